"""Marks in the code that say whose time this is; free when nobody is measuring.

`with region("attention.kernel"):` costs one global read and an empty context manager while no recorder is installed.
With one installed, marks nest and the innermost owns the time. A mark never touches a tensor, so latents are bit-equal
with and without a recorder.

The names below are the rows of the latency breakdown; the part before the dot is the row's family. A fused pass has one
row: residual and norm with what they dequantise and quantise are `overhead.norm`, a GELU with its codes is
`linear.quantise`, a product with its epilogue is `linear.gemm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import get_ident
from typing import Protocol

ROWS: dict[str, str] = {
    "attention.kernel": "self-attention kernel",
    "attention.merge": "log-sum-exp merge",
    "attention.cache": "cache management: append, evict, copies",
    "attention.cross": "cross-attention",
    "linear.gemm": "matrix products of the linear layers",
    "linear.quantise": "activation quantisation",
    "linear.dequantise": "dequantisation and bias",
    "linear.delta": "absorbed delta",
    "overhead.norm": "norms, modulation, activations, residuals",
    "overhead.rope": "rotary embedding",
    "overhead.sampler": "sampler",
    "overhead.statistics": "absorption statistics",
    "overhead.solve": "solve and transition",
    "overhead.text": "text encoding",
    "overhead.audio": "audio encoding",
    "overhead.decode": "decoding to pixels",
    "overhead.python": "Python and launch gaps inside a pass",
}
FAMILIES = ("attention", "linear", "overhead")


class Recorder(Protocol):
    """What a profiler offers: a context manager for each marked stretch."""

    def region(self, name: str) -> AbstractContextManager[None]: ...


class _Off:
    """A mark while no recorder is installed. A new one each time: a shared one would break a traced graph."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


_recorder: Recorder | None = None
_thread = 0
"""The thread that installed the recorder: its time is accounted for, and what others do beside it owns none of it."""


def region(name: str) -> AbstractContextManager[None]:
    """Mark a stretch of code as one row of `ROWS`. The innermost mark owns the time; marks of other threads are off."""
    return _Off() if _recorder is None or get_ident() != _thread else _recorder.region(name)


def recorded() -> bool:
    """Whether a recorder is installed."""
    return _recorder is not None


def install(recorder: Recorder | None) -> None:
    """Marks go to `recorder` from now on; None: to nobody. Recorders do not stack: two would both claim the time."""
    global _recorder, _thread
    assert recorder is None or _recorder is None, "a recorder is already installed"
    _recorder, _thread = recorder, get_ident()


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Install `recorder` for the body."""
    install(recorder)
    try:
        yield recorder
    finally:
        install(None)
