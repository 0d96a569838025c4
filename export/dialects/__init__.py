"""Bundles in the dialects of other readers, and back.

    export_bundle("bundle", "comfyui", "model-comfyui.safetensors")
    import_dialect("model-comfyui.safetensors", "auto", "bundle-again")

`auto` tells a file's dialect by what is in it.
"""

from export.dialects.convert import export_bundle, import_dialect
from export.dialects.table import DIALECTS, Dialect, recognise

__all__ = ["DIALECTS", "Dialect", "export_bundle", "import_dialect", "recognise"]
