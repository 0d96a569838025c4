"""What the inputs of linear layers were seen to be: magnitudes by channel and moment, gathered by hooks.

A moment is whatever the caller calls it (`Observer.at`); nothing here knows what a frame is. Sums over moments are left
to the caller, because a static scale needs the largest of all while a report shows how far they differ.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

# Rows kept of every layer's inputs, a few from each moment, for the errors of a plan.
SAMPLE_ROWS = 64
_ROWS_EACH = 4


@dataclass(frozen=True, slots=True)
class Seen:
    """One layer's inputs. `peaks` (P, K) float32: the largest magnitude of every channel at each of the P `moments`.

    `sample` (R, K): some of the rows themselves, in their own dtype.
    """

    moments: tuple[Hashable, ...]
    peaks: Tensor
    sample: Tensor

    @property
    def amax(self) -> float:
        """The largest magnitude of all."""
        return float(self.peaks.max())

    @property
    def channels(self) -> Tensor:
        """(K,) float32: the largest magnitude of each channel."""
        return self.peaks.amax(0)

    def scaled(self, factor: Tensor) -> Seen:
        """The same inputs with every channel times `factor` (K,), which is positive."""
        return Seen(self.moments, self.peaks * factor, (self.sample * factor).to(self.sample.dtype))


class Observer:
    """Watches the inputs of the named linears while it is entered; the model computes the same bits.

    with Observer(model, names) as observer:
        observer.at("first")
        model(x)
    observer.seen()["blocks.0.q"].amax
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._modules = {name: model.get_submodule(name) for name in names}
        self._peaks: dict[str, dict[Hashable, Tensor]] = {name: {} for name in self._modules}
        self._samples: dict[str, list[Tensor]] = {name: [] for name in self._modules}
        self._moment: Hashable = None
        self._hooks: list[Any] = []

    def at(self, moment: Hashable) -> None:
        """What runs from now on belongs to `moment`."""
        self._moment = moment

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            self._hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: self._take(name, args[0])))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _take(self, name: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        if not len(rows):
            return
        peak, held = rows.abs().amax(0).float().cpu(), self._peaks[name]
        held[self._moment] = torch.maximum(held[self._moment], peak) if self._moment in held else peak
        kept = self._samples[name]
        if len(kept) * _ROWS_EACH < SAMPLE_ROWS:
            kept.append(rows[:: max(1, len(rows) // _ROWS_EACH)][:_ROWS_EACH].cpu())

    def seen(self) -> dict[str, Seen]:
        """What was gathered so far, of the layers that ran."""
        return {
            name: Seen(tuple(held), torch.stack(list(held.values())), torch.cat(self._samples[name])[:SAMPLE_ROWS])
            for name, held in self._peaks.items()
            if held
        }
