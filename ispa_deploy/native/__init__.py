"""Kernels in C, compiled on first use where a C compiler is found; never needed.

Passes and attention in bfloat16 want AVX512-BF16 (`MAIN`); 8-bit attention wants AVX512-VNNI or, slower, AVX2 (`INT8`);
8-bit linears on CPUs without VNNI want AVX2 (`LINEAR`).
`library()` is a loaded library or None, `refusal()` says why it is None. The compiled file is kept in the user's cache
folder (`XDG_CACHE_HOME`, else `~/.cache`), named after its source and compiler: two seconds once per machine. It
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
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

# No -ffast-math: infinities and NaN are data here. No -lgomp: a second OpenMP runtime would fight PyTorch's threads.
# Products and sums round apart, as PyTorch's do: codes are equal bit for bit.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-mfma", "-ffp-contract=off")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")


@dataclass(frozen=True)
class Build:
    """A library: `lacks` says what a CPU needs for it that `runs` does not find."""

    name: str
    sources: tuple[str, ...]
    headers: tuple[str, ...]
    flags: tuple[str, ...]
    runs: Callable[[], bool]
    lacks: str


MAIN = Build(
    "kernels", ("attention.c", "elementwise.c", "sums.c"), ("vector.h",), (*_AVX512, "-mavx512bf16"),
    torch.cpu._is_avx512_bf16_supported, "AVX512-BF16",
)  # fmt: skip
_INT8 = ("attention_int8.c",), ("lanes.h",)
INT8 = {
    "avx512-vnni": Build(
        "int8-avx512-vnni", *_INT8, (*_AVX512, "-mavx512vnni", "-mf16c"), torch.cpu._is_vnni_supported, "AVX512-VNNI"
    ),
    "avx2": Build("int8-avx2", *_INT8, ("-mavx2", "-mf16c"), torch.cpu._is_avx2_supported, "AVX2"),
}
"""The same source for two instruction sets, the faster first."""
LINEAR = Build(
    "linear-int8-avx2", ("linear_int8.c",), ("lanes.h",), ("-mavx2", "-mf16c"), torch.cpu._is_avx2_supported, "AVX2"
)


class _Refused(Exception):
    """Why there is no library, in a few words."""


class Library(ctypes.CDLL):
    """A shared library whose calls PyTorch's profiler sees under their names, as it sees operators."""

    def __init__(self, path: str) -> None:
        super().__init__(path)

        class Seen(self._FuncPtr):  # type: ignore[name-defined, misc]
            _flags_, _restype_ = self._FuncPtr._flags_, self._FuncPtr._restype_

            def __call__(self, *arguments: object) -> object:
                if not torch._C._autograd._profiler_enabled():
                    return super().__call__(*arguments)
                with torch.profiler.record_function(self.__name__):
                    return super().__call__(*arguments)

        self._FuncPtr = Seen


def library(build: Build = MAIN) -> ctypes.CDLL | None:
    """The library, compiled and loaded on the first call."""
    return _load(build)[0]


def refusal(build: Build = MAIN) -> str | None:
    """A few words on why there is no library; None when there is one."""
    return _load(build)[1]


def missed(device: torch.device, dtype: torch.dtype) -> str | None:
    """One line where a model on this CPU would run kernels of `MAIN` and has to do without; None elsewhere."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not MAIN.runs():
        return None
    why = refusal()
    return why and f"bfloat16 attention, and what lies between products, run without their C kernels, slower: {why}"


@cache
def _load(build: Build) -> tuple[ctypes.CDLL | None, str | None]:
    try:
        _check_machine(build)
        return Library(str(_compiled(build))), None
    except (_Refused, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return None, str(error)


def _check_machine(build: Build) -> None:
    if os.environ.get("ISPA_NATIVE", "1") == "0":
        raise _Refused("switched off by ISPA_NATIVE=0")
    if not build.runs():
        raise _Refused(f"this CPU has no {build.lacks}")


def _compiled(build: Build) -> Path:
    """The compiled library, from the cache or built now."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "cc")), None)
    if compiler is None or shutil.which(compiler) is None:
        raise _Refused("no C compiler found")
    folder = Path(__file__).parent
    digest = hashlib.sha256(" ".join((shutil.which(compiler) or "", *_FLAGS, *build.flags)).encode())
    for name in (*build.headers, *build.sources):
        digest.update((folder / name).read_bytes())
    target = _cache_folder() / f"{build.name}-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        _make(build, compiler, folder, target)
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


def _make(build: Build, compiler: str, folder: Path, target: Path) -> None:
    """Compile into a folder of its own beside the target, then rename: two processes may build at once."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
        objects = [str(Path(scratch) / name.replace(".c", ".o")) for name in build.sources]
        commands = [
            [compiler, *_FLAGS, *build.flags, "-c", str(folder / name), "-o", object_]
            for name, object_ in zip(build.sources, objects, strict=True)
        ]
        built = str(Path(scratch) / "kernels.so")
        commands.append([compiler, "-shared", *objects, "-o", built, "-lm"])
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
            if done.returncode:
                raise _Refused(f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
        os.replace(built, target)
