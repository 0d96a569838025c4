"""Low-rank adapters (PEFT's LoRA), merged into the weights: W + alpha / rank * B A.

The sum is formed in float32 and rounded once, to the dtype of the weight. Upstream runs its adapters unmerged; the two
agree up to rounding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.checkpoints import read_container, tensors_only
from export.keymaps import plain_name
from export.tensors import check_finite, few
from ispa_deploy.errors import InputError

Shape = tuple[int, ...]

# LongLive's file also holds the critic's adapter, which generates nothing.
_CONTAINER = "generator_lora"
_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
# Models whose project publishes a base and an adapter that belongs on it.
PUBLISHED = {"longlive-1.3b": "models/lora.pt", "liveavatar-14b": "liveavatar.safetensors"}
# LiveAvatar, told by its audio modules, was trained with alpha 64; everyone else here with alpha = rank.
_AUDIO, _AUDIO_ALPHA = "audio_injector.", 64.0


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter. `pairs`: module -> A (rank, in) and B (out, rank), as stored; `assumed`: nobody gave `alpha`."""

    where: str
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    alpha: float
    assumed: bool

    @staticmethod
    def of(held: Any, where: str, alpha: float | None = None) -> Lora:
        """The adapter in a mapping of PEFT's names, bare or under `generator_lora`.

        InputError: no adapter, half a pair, ranks that differ within a pair, names that are no adapter's, NaN or Inf.
        """
        inner = held.get(_CONTAINER, held) if isinstance(held, Mapping) else held
        tensors = tensors_only(inner, where, f"LoRA tensors, alone or under '{_CONTAINER}'")
        pairs = _pairs(tensors, where)
        rank = max(len(a) for a, _ in pairs.values())
        if alpha is not None and not 0 < alpha < float("inf"):
            raise InputError(f"--lora-alpha {alpha:g}: expected a number above 0 (LongLive 256, LiveAvatar 64)")
        audio = any(module.startswith(_AUDIO) for module in pairs)
        published = _AUDIO_ALPHA if audio else float(rank)
        return Lora(where, pairs, alpha if alpha is not None else published, alpha is None)

    @property
    def summary(self) -> str:
        """One line: modules, rank, alpha, scale."""
        ranks = sorted({len(a) for a, _ in self.pairs.values()})
        scales = ", ".join(f"{self.alpha / rank:g}" for rank in ranks)
        alpha = f"alpha {self.alpha:g}" + (" assumed (--lora-alpha says otherwise)" if self.assumed else "")
        rank = ", ".join(map(str, ranks))
        return f"LoRA {self.where}: {len(self.pairs)} modules, rank {rank}, {alpha}, scale {scales}"

    def check(self, weights: Mapping[str, Shape], model: str) -> None:
        """InputError unless every pair belongs to a weight (N, K) of `weights` and has its shape."""
        strays = sorted(module for module in self.pairs if f"{module}.weight" not in weights)
        if strays:
            raise InputError(
                f"{self.where}: {len(strays)} of {len(self.pairs)} LoRA modules match no weight of model '{model}'"
                f"{few(strays)}: expected an adapter of this model; choose the model it was trained on"
            )
        wrong = [
            f"{module} {(len(b), a.shape[1])} for {weights[f'{module}.weight']}"
            for module, (a, b) in sorted(self.pairs.items())
            if (len(b), a.shape[1]) != tuple(weights[f"{module}.weight"])
        ]
        if wrong:
            raise InputError(
                f"{self.where}: {len(wrong)} LoRA modules differ in shape from model '{model}'{few(wrong)}; choose the "
                "model it was trained on"
            )

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The tensor called `name`: float32 with the adapter added where it has one, else as it is."""
        pair = self.pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if pair is None:
            return weight
        a, b = (check_finite(side, f"{name} (LoRA)", self.where).float() for side in pair)
        # A copy even of float32: the weight may be mapped from its file.
        return weight.detach().to(torch.float32, copy=True).addmm_(b, a, alpha=self.alpha / len(a))


def read_lora(file: str | Path, *, alpha: float | None = None) -> Lora:
    """The adapter in a `.pt` or `.safetensors` file; `alpha` None: as published (LiveAvatar 64, others the rank)."""
    path = Path(file)
    if not path.is_file():
        raise InputError(f"LoRA '{path}' does not exist or is no file: expected a .pt or .safetensors file")
    return Lora.of(read_container(path), f"'{path}'", alpha)


@torch.no_grad()
def merge_lora_(model: nn.Module, lora: str | Path | Lora, *, alpha: float | None = None) -> Lora:
    """Add an adapter to the model's own weights, in place, in float32 before the cast to each weight's dtype.

    The rank is the file's. InputError, with the model untouched, when the file is no adapter, or any of its modules
    matches no linear weight of this model.
    """
    adapter = lora if isinstance(lora, Lora) else read_lora(lora, alpha=alpha)
    weights = dict(model.named_parameters())
    name = getattr(getattr(model, "spec", None), "name", type(model).__name__)
    adapter.check({key: tuple(weight.shape) for key, weight in weights.items()}, name)
    merged = {key: adapter.merged(key, weights[key]).to(weights[key].dtype) for key in map(_weight, adapter.pairs)}
    for key, tensor in merged.items():
        weights[key].copy_(tensor)
    return adapter


def _weight(module: str) -> str:
    return f"{module}.weight"


def _pairs(tensors: Mapping[str, Tensor], where: str) -> dict[str, tuple[Tensor, Tensor]]:
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    others = []
    for name, tensor in tensors.items():
        match = _KEY.match(name)
        if match is None or tensor.ndim != 2:
            others.append(name)
            continue
        side, module = sides[match["side"]], plain_name(match["module"])
        if module in side:
            raise InputError(f"{where} holds lora_{match['side']} of {module} twice: expected one adapter")
        side[module] = tensor
    if not sides["A"] and not sides["B"]:
        raise InputError(
            f"{where} holds no LoRA tensors{few(sorted(others))}: expected names like "
            "base_model.model.blocks.0.self_attn.q.lora_A.weight"
        )
    if others:
        raise InputError(f"{where}: {len(others)} tensors are no part of a LoRA{few(sorted(others))}: expected A and B")
    halves = sorted(sides["A"].keys() ^ sides["B"].keys())
    if halves:
        raise InputError(f"{where}: {len(halves)} LoRA modules lack A or B{few(halves)}: the file is damaged")
    pairs = {module: (a, sides["B"][module]) for module, a in sides["A"].items()}
    uneven = sorted(module for module, (a, b) in pairs.items() if len(a) != b.shape[1] or not len(a))
    if uneven:
        raise InputError(f"{where}: A and B of {len(uneven)} LoRA modules differ in rank{few(uneven)}: damaged file")
    return pairs
