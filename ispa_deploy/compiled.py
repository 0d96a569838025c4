"""`torch.compile` of what lies between the attentions of a layer: three small graphs for all layers of a model, and
three more where some take activations of 16 bits in a chunk's last pass.

Nothing that changes during a stream is inside them. Windows fill in the caches, corrections are carried by the
self-attention's `o`, a prompt switch brings other text of the same shape, and passes over another number of frames or
under a recorder run eagerly. So the graphs of the first chunk serve every later one, without a recompilation.

A compiler that is missing or fails costs nothing but a line: the model goes on eagerly. Compiled code is kept on disk
by PyTorch, in `TORCHINDUCTOR_CACHE_DIR`, which is the user's cache folder unless set.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ispa_deploy.model import Block, CausalWanDiT, Modulation
from ispa_deploy.regions import recorded

CACHE = "TORCHINDUCTOR_CACHE_DIR"


class CompiledStages:
    """The stages of `Block`, compiled on their first call. `cold_start`: seconds that those first calls took.

    `failure`: None, or the first line of why the compiler is not used.
    """

    def __init__(self, frames: int, backend: str) -> None:
        self.frames, self.backend = frames, backend
        self.cold_start, self.failure = 0.0, ""
        self._stages: dict[str, Callable[..., Any]] = {
            name: torch.compile(getattr(Block, name), fullgraph=True, dynamic=False, backend=backend)
            for name in ("before", "between", "after")
        }
        self._warm: set[tuple[str, bool]] = set()

    def takes(self, x: Tensor) -> bool:
        """Whether a pass over x (B, F, T, C) runs compiled: the frames of a chunk, and nobody looks inside."""
        return not self.failure and x.shape[1] == self.frames and not recorded()

    def before(self, block: Block, x: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor, Tensor]:
        """As `Block.before`."""
        return self._run("before", block, x, modulation)

    def between(self, block: Block, x: Tensor, y: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor]:
        """As `Block.between`."""
        return self._run("between", block, x, y, modulation)

    def after(self, block: Block, x: Tensor, y: Tensor, modulation: Modulation) -> Tensor:
        """As `Block.after`."""
        return self._run("after", block, x, y, modulation)

    def _run(self, name: str, *arguments: Any) -> Any:
        if self.failure:
            return getattr(Block, name)(*arguments)
        # Linears with activations of 16 bits are another graph of the same stage.
        form = (name, getattr(arguments[0].ffn[0], "wide", False))
        if form in self._warm:
            return self._stages[name](*arguments)
        return self._first(form, self._stages[name], *arguments)

    def _first(self, form: tuple[str, bool], stage: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            out = stage(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, no headers, a graph it cannot take: each raises its own
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self.failure = " ".join([f"{type(error).__name__}:", *lines[:2]])
            return getattr(Block, form[0])(*arguments)
        self._warm.add(form)
        self.cold_start += time.perf_counter() - started
        return out

    def describe(self) -> str:
        """One line: what runs, and how long its first calls took."""
        if self.failure:
            return f"not compiled, the layers run eagerly ({self.failure})"
        return f"layers compiled with {self.backend}, first calls {self.cold_start:.1f} s"


def compile_(model: CausalWanDiT, *, backend: str = "inductor") -> CompiledStages:
    """Let a model's layers run compiled from their next pass on; `backend` is one of `torch.compile`'s."""
    os.environ.setdefault(CACHE, str(_cache_folder()))
    stages = CompiledStages(model.spec.chunk_frames, backend)
    for block in model.layers():
        block.compiled = stages
    return stages


def eager_(model: CausalWanDiT) -> None:
    """Let a model's layers run eagerly again."""
    for block in model.layers():
        block.compiled = None


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "ispa-deploy" / "inductor"
