"""A CUDA graph without CUDA: records the operations of a pass and does them again on the very same tensors.

As in a CUDA graph no Python of the pass runs at a replay and every operand is where it was when recorded, so a buffer
that was replaced instead of written to, or a decision that Python should have taken anew, gives other numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Step = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not _is_view(func, tree_leaves((args, kwargs)), out):
            self.steps.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Every operation again; what it returns goes where it went when it was recorded."""
        for func, args, kwargs, out in self.steps:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _is_view(func: Any, operands: list[Any], out: Any) -> bool:
    """Whether what came out is a part of an operand and nothing was written; the same operation may copy at times."""
    if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
        return False
    held, made = (
        [t.untyped_storage().data_ptr() for t in tensors if isinstance(t, Tensor) and not t.is_mkldnn]  # packed: opaque
        for tensors in (operands, tree_leaves(out))
    )
    return all(address in held for address in made)


class Recorder:
    """A `Record` that counts its tapes. Like a CUDA graph's, a recording leaves no numbers behind."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        tape = Tape()
        with tape:
            out = run()
        out.fill_(torch.nan)
        self.tapes.append(tape)

        def replay() -> Tensor:
            tape.replay()
            return out

        return replay
