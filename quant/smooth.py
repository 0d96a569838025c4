"""SmoothQuant (Xiao et al., 2022, equation 4): activation channels are made alike, the weight takes up the difference.

A channel j of a linear's input is divided by s_j = max|x_j|^α / max|w_j|^(1-α) and column j of the weight multiplied by
it. The factors are rounded to powers of two, which costs the balance a factor of √2 at most and makes the whole
transformation exact in every floating dtype: nothing is rounded, the float model computes the same bits.

Where the producer of x is linear in each channel the division costs nothing, because it goes into the producer: `FOLDS`
lists those of a Wan block. Everywhere else the layer multiplies its input itself (`pre_quant_scale`),
within the pass that quantises it.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ispa_deploy.errors import InputError

ALPHA = 0.5
MODES = ("none", "fold", "all")
# Beyond 2^8 either way a float16 model could leave its range.
_MOST = 8

# Consumer within a block: whose rows (weight and bias) are divided. Attention mixes rows of v, never its channels.
FOLDS = {"self_attn.o": "self_attn.v", "cross_attn.o": "cross_attn.v", "cross_attn.q": "norm3"}
# Linears that read the same tensor and so need one factor.
_SHARED = (("self_attn.q", "self_attn.k", "self_attn.v"), ("cross_attn.k", "cross_attn.v"))
_BLOCK = re.compile(r"(?P<block>(?:.*\.)?blocks\.\d+)\.(?P<part>.+)$")


@dataclass(frozen=True, slots=True)
class Smoothing:
    """Factors of a model.

    `inputs`: by linear, what its input comes multiplied by, (K,) float32 powers of two. `producers`: the linears whose
    factor was folded, and into whom; the others multiply their input themselves. `tensors`: by parameter, what it is
    multiplied by, broadcastable.
    """

    inputs: Mapping[str, Tensor]
    producers: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    @staticmethod
    def of(inputs: Mapping[str, Tensor], producers: Mapping[str, str]) -> Smoothing:
        """Of `inputs` and `producers`."""
        return Smoothing(inputs, producers, _tensors(inputs, producers))

    def folded(self) -> Smoothing:
        """The part that leaves a floating-point model's outputs as they are, bit for bit."""
        return Smoothing.of({name: self.inputs[name] for name in self.producers}, self.producers)

    def of_layers(self, eight: Container[str]) -> Smoothing:
        """Without the factors that a linear would have to multiply by and is not in `eight`: a plain one cannot."""
        inputs = {name: factor for name, factor in self.inputs.items() if name in self.producers or name in eight}
        return self if len(inputs) == len(self.inputs) else Smoothing.of(inputs, self.producers)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The parameter called `name` as the smoothed model holds it; the tensor itself where nothing changes."""
        factor = self.tensors.get(name)
        return tensor if factor is None else (tensor.float() * factor.to(tensor.device)).to(tensor.dtype)

    def pre_scale(self, name: str) -> Tensor | None:
        """(K,) that the linear called `name` multiplies its input by."""
        return None if name in self.producers else self.inputs.get(name)


NOTHING = Smoothing({}, {}, {})


@torch.no_grad()
def smooth_(model: nn.Module, smoothing: Smoothing) -> None:
    """Multiply a floating-point model's parameters, in place of the old ones, which are not written to."""
    for name in smoothing.tensors:
        owner, _, leaf = name.rpartition(".")
        old = model.get_parameter(name)
        new = nn.Parameter(smoothing.apply(name, old.detach()), requires_grad=old.requires_grad)
        setattr(model.get_submodule(owner), leaf, new)


def columns(weight: Tensor) -> Tensor:
    """(N, K) -> (K,) float32: the largest magnitude of each column."""
    return weight.detach().abs().amax(0).float()


def factors(channels: Tensor, columns: Tensor, alpha: float = ALPHA) -> Tensor:
    """Largest magnitudes of activations (K,) and of weight columns (K,) -> 1 / s, (K,) float32 powers of two.

    A channel that is zero on either side keeps the factor 1. The factors' geometric mean is about 1, for a common
    factor would change nothing but the range.
    """
    known = (channels > 0) & (columns > 0)
    logs = (1 - alpha) * columns.float().log2() - alpha * channels.float().log2()
    if not bool(known.any()):
        return torch.ones_like(logs)
    exponents = (logs - logs[known].mean()).round().clamp(-_MOST, _MOST)
    return torch.where(known, torch.exp2(exponents), 1.0)


def check_smoothing(mode: str, alpha: float) -> None:
    """InputError for an unknown mode and for an alpha outside [0, 1]."""
    if mode not in MODES:
        raise InputError(f"smoothing '{mode}': expected one of {', '.join(MODES)}")
    if not 0 <= alpha <= 1:
        raise InputError(f"smoothing strength {alpha}: expected alpha from 0 (weights) to 1 (activations)")


def smoothing(
    mode: str, channels: Mapping[str, Tensor], columns: Mapping[str, Tensor], alpha: float = ALPHA
) -> Smoothing:
    """Factors for the linears in `channels`: largest magnitudes (K,) of their inputs and of their weight's columns.

    `mode`: `none`; `fold`, where a producer takes the factor up exactly; `all`, also where the layer has to multiply.
    Raises `InputError` for another mode and for an alpha outside [0, 1].
    """
    check_smoothing(mode, alpha)
    inputs: dict[str, Tensor] = {}
    folds: dict[str, str] = {}
    for group in _groups(channels if mode != "none" else ()):
        folded = _producer(group[0])
        if folded is None and mode == "fold":
            continue
        loudest = torch.stack([channels[name] for name in group]).amax(0)
        factor = factors(loudest, torch.stack([columns[name] for name in group]).amax(0), alpha)
        inputs.update(dict.fromkeys(group, factor))
        if folded is not None:
            folds[group[0]] = folded
    return Smoothing.of(inputs, folds)


def _tensors(inputs: Mapping[str, Tensor], folds: Mapping[str, str]) -> dict[str, Tensor]:
    """Parameters and their factors: columns of every smoothed linear, rows of every producer (a norm has no other)."""
    tensors = {f"{name}.weight": 1 / factor for name, factor in inputs.items()}
    for name, producer in folds.items():
        factor = inputs[name]
        own = tensors.get(f"{producer}.weight")  # a producer may be a smoothed linear itself
        rows = factor if producer.endswith("norm3") else factor[:, None]
        tensors[f"{producer}.weight"] = rows if own is None else rows * own
        tensors[f"{producer}.bias"] = factor
    return tensors


def _groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The linears of blocks, those that read one tensor together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        match = _BLOCK.match(name)
        if match is None:
            continue
        shared = next((group for group in _SHARED if match["part"] in group), (match["part"],))
        groups.setdefault((match["block"], *shared), []).append(name)
    return [tuple(group) for group in groups.values()]


def _producer(name: str) -> str | None:
    match = _BLOCK.match(name)
    assert match is not None
    part = FOLDS.get(match["part"])
    return None if part is None else f"{match['block']}.{part}"
