"""What lies on disk: bundles of quantised models, the checkpoints they come from, and the deltas of a stream.

    write_bundle(folder, model, scheme=scheme, report=report, source=source)
    bundle = open_bundle(folder)
    for chunk in bundle.stream("a fast red ring over teal waves", StreamOptions(frames=24)):
        ...

Names are imported on first use, so that reading a manifest does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.bundle import Bundle, open_bundle
    from export.convert import convert_checkpoint, quantise_source
    from export.deltas import StoredDeltas, load_deltas, save_deltas, save_deltas_of
    from export.lora import merge_lora_
    from export.manifest import Manifest, Source, read_manifest
    from export.sources import load_source
    from export.write import write_bundle

__all__ = [
    "Bundle",
    "Manifest",
    "Source",
    "StoredDeltas",
    "convert_checkpoint",
    "load_deltas",
    "load_source",
    "merge_lora_",
    "open_bundle",
    "quantise_source",
    "read_manifest",
    "save_deltas",
    "save_deltas_of",
    "write_bundle",
]

_HOME = {
    **dict.fromkeys(("Bundle", "open_bundle"), "bundle"),
    **dict.fromkeys(("convert_checkpoint", "quantise_source"), "convert"),
    **dict.fromkeys(("StoredDeltas", "load_deltas", "save_deltas", "save_deltas_of"), "deltas"),
    **dict.fromkeys(("Manifest", "Source", "read_manifest"), "manifest"),
    "load_source": "sources",
    "merge_lora_": "lora",
    "write_bundle": "write",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'export' has no attribute '{name}'")
    return getattr(import_module(f"export.{_HOME[name]}"), name)
