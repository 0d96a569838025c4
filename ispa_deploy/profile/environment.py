"""What a measurement ran on: device, versions, threads; and a name for it that serves as a folder."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torchao", "triton", "flash-attn", "safetensors", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, as plain JSON types; `gpu` is None on a CPU."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": device.type,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "gpu": gpu.name if gpu else None,
        "gpu_memory": gpu.total_memory if gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def slug(env: dict[str, Any]) -> str:
    """A folder's name for this hardware, such as `cpu-amd-epyc-2c` or `nvidia-h200`.

    Processors of one name differ in their vector units, and by that severalfold in speed: narrow ones are told apart.
    """
    capability = env.get("cpu_capability")
    narrow = "" if capability is None or wide_vectors(capability) else f" {capability}"
    name = env["gpu"] or f"cpu {env['cpu']} {env['cores']}c{narrow}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def wide_vectors(capability: str | None = None) -> bool:
    """Whether the vector units torch uses, this processor's unless told, are at least AVX-512."""
    return (capability or torch.backends.cpu.get_cpu_capability()).startswith("AVX512")


def cpu_name() -> str:
    """The processor's model as the system names it."""
    table = Path("/proc/cpuinfo")
    if table.exists() and (match := re.search(r"^model name\s*:\s*(.+)$", table.read_text(), re.MULTILINE)):
        return match.group(1).strip()
    return platform.processor() or platform.machine()


def peak_rss() -> int:
    """Most bytes of memory this process ever held."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def restart_peak() -> bool:
    """Forget the highest resident set so far, where the system allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident() -> int:
    """Bytes of physical memory this process holds now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
