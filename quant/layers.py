"""The other kinds of quantised linear: calibrated or 16-bit activations, e4m3, LLM.int8; and the table of all kinds."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from ispa_deploy.errors import InputError
from quant.linear import Int8Linear, QuantisedLinear
from quant.primitives import CODE_MAX, FLOAT8, SCALE_FLOOR, quantise_weight_fp8
from quant.schemes import LayerKind


def step_of(amax: float, name: str) -> Tensor:
    """(1,) float32: the activation scale of a layer whose inputs reach `amax`. `InputError` unless finite, >= 0."""
    if not 0 <= amax < float("inf"):
        raise InputError(f"{name}: calibrated range {amax}: expected a finite number of at least 0; calibrate anew")
    return torch.tensor([amax / CODE_MAX], dtype=torch.float32).clamp_min(SCALE_FLOOR)


class StaticInt8Linear(Int8Linear):
    """int8 with one calibrated activation scale for the whole layer; what lies outside its range saturates.

    State: as `Int8Linear` and `input_scale` float32 (1,).
    """

    family = "int8-static"
    input_scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: torch.device | str | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias, device)
        self.register_buffer("input_scale", torch.ones(1, dtype=torch.float32, device=device))

    @classmethod
    def calibrated(cls, linear: nn.Linear, amax: float, name: str = "weight") -> StaticInt8Linear:
        """Quantise a linear whose inputs were seen to reach `amax`. Raises `InputError` unless that is finite, >= 0."""
        step = step_of(amax, name)
        layer = cls.from_float(linear, name)
        layer.input_scale = step.to(linear.weight.device)
        return layer

    def _step(self) -> Tensor | None:
        return None if self.wide else self.input_scale


class WideInt8Linear(Int8Linear):
    """The same codes; activations in 16 bits, one scale per token, multiplied by two int8 products."""

    family = "int8-wide"


class BnbInt8Linear(Int8Linear):
    """The same codes multiplied by bitsandbytes: activations in float16, quantised per token."""

    family = "bnb"


class Fp8Linear(QuantisedLinear):
    """e4m3 codes, symmetric per output channel; e4m3 activations, one scale per token taken as it comes."""

    family = "fp8"
    code_dtype = FLOAT8
    max_features = sys.maxsize

    @staticmethod
    def encode(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
        return quantise_weight_fp8(weight, name)


LAYERS: dict[LayerKind, type[QuantisedLinear]] = {
    "int8": Int8Linear,
    "int8-static": StaticInt8Linear,
    "int8-wide": WideInt8Linear,
    "bnb": BnbInt8Linear,
    "fp8": Fp8Linear,
}
