"""Kernels in C for CPUs with AVX512-BF16, compiled on first use where a C compiler is found; never needed.

`library()` is the loaded library or None, `refusal()` says why it is None. The compiled file is kept in the user's
cache folder (`XDG_CACHE_HOME`, else `~/.cache`), named after its source and compiler: two seconds once per machine. It
contains no `-march=native`, so that a cache shared between machines cannot hold instructions one of them lacks; what
it does need is asked of the CPU first. It runs on PyTorch's own OpenMP
threads (a PyTorch on another runtime leaves its symbols open, and loading fails). `ISPA_NATIVE=0` switches it off.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

_SOURCES = ("attention.c", "elementwise.c", "sums.c")
_HEADERS = ("vector.h",)
# No -ffast-math: infinities and NaN are data here. No -lgomp: a second OpenMP runtime would fight PyTorch's threads.
_FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    # Products and sums round apart, as PyTorch's do: codes are equal bit for bit.
    *("-mavx512bf16", "-mfma", "-ffp-contract=off"),
)  # fmt: skip


class _Refused(Exception):
    """Why there is no library, in a few words."""


def library() -> ctypes.CDLL | None:
    """The library, compiled and loaded on the first call."""
    return _load()[0]


def refusal() -> str | None:
    """A few words on why there is no library; None when there is one."""
    return _load()[1]


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        _check_machine()
        return ctypes.CDLL(str(_compiled())), None
    except (_Refused, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return None, str(error)


def _check_machine() -> None:
    if os.environ.get("ISPA_NATIVE", "1") == "0":
        raise _Refused("switched off by ISPA_NATIVE=0")
    if not torch.cpu._is_avx512_bf16_supported():
        raise _Refused("this CPU has no AVX512-BF16")


def _compiled() -> Path:
    """The compiled library, from the cache or built now."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "cc")), None)
    if compiler is None or shutil.which(compiler) is None:
        raise _Refused("no C compiler found")
    folder = Path(__file__).parent
    digest = hashlib.sha256(" ".join((shutil.which(compiler) or "", *_FLAGS)).encode())
    for name in (*_HEADERS, *_SOURCES):
        digest.update((folder / name).read_bytes())
    target = _cache_folder() / f"kernels-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        _build(compiler, folder, target)
    return target


def _cache_folder() -> Path:
    """A folder of the user's own; a temporary one where that cannot be written."""
    root = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(root) if root else Path.home() / ".cache") / "ispa-deploy"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ours = folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK)
    except OSError:
        ours = False
    if not ours:
        folder = Path(tempfile.mkdtemp(prefix="ispa-deploy-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _build(compiler: str, folder: Path, target: Path) -> None:
    """Compile into a folder of its own beside the target, then rename: two processes may build at once."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
        objects = [str(Path(scratch) / name.replace(".c", ".o")) for name in _SOURCES]
        commands = [
            [compiler, *_FLAGS, "-c", str(folder / name), "-o", object_]
            for name, object_ in zip(_SOURCES, objects, strict=True)
        ]
        built = str(Path(scratch) / "kernels.so")
        commands.append([compiler, "-shared", *objects, "-o", built, "-lm"])
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
            if done.returncode:
                raise _Refused(f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
        os.replace(built, target)
