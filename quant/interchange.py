"""int8 layers to and from the layers of torchao and bitsandbytes: codes verbatim, scales to one unit in the last place.

torchao stores our scale as it is. bitsandbytes stores 127 times the scale, so that its scale may differ by 1 ulp.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ispa_deploy.errors import InputError
from quant.kernels_packages import SCB_PER_SCALE, torchao_tensor
from quant.linear import Int8Linear


def from_codes(codes: Tensor, scale: Tensor, bias: Tensor | None) -> Int8Linear:
    """A layer of int8 codes (N, K), -128 included, float32 scales (N, 1) and a bias (N,) or None; codes are shared."""
    outputs, features = codes.shape
    if codes.dtype != torch.int8 or scale.shape != (outputs, 1):
        raise InputError(
            f"int8 layer of {codes.dtype} codes {tuple(codes.shape)} and scales {tuple(scale.shape)}: expected "
            "torch.int8 (N, K) and (N, 1); quantise per output channel"
        )
    layer = Int8Linear(features, outputs, bias is not None, device="meta")
    layer.weight, layer.weight_scale = codes.contiguous(), scale.detach().to(torch.float32)
    layer.bias = None if bias is None else bias.detach().to(torch.float32)
    return layer.eval()


def to_torchao(layer: Int8Linear, dtype: torch.dtype) -> nn.Linear:
    """An `nn.Linear` of `dtype` with torchao's int8 dynamic weight."""
    linear = _empty(layer, dtype)
    weight = torchao_tensor(layer.codes(), layer.weight_scale, dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def from_torchao(linear: nn.Linear) -> Int8Linear:
    """The inverse. Raises `InputError` for a weight of another kind."""
    weight: Any = linear.weight
    if type(weight).__name__ != "Int8Tensor":
        raise InputError(f"weight of type {type(weight).__name__}: expected torchao's Int8Tensor; quantise it first")
    points = weight.zero_point
    if points is not None and bool(points.any()):
        raise InputError("torchao weight with zero points: expected symmetric codes; quantise it symmetrically")
    return from_codes(weight.qdata, weight.scale, linear.bias)


def to_bitsandbytes(layer: Int8Linear, dtype: torch.dtype) -> nn.Module:
    """A `bitsandbytes.nn.Linear8bitLt` in eval mode with a bias of `dtype`, ready to run without quantising again."""
    bnb = import_module("bitsandbytes.nn")
    codes, amax = layer.codes(), layer.weight_scale.flatten() * SCB_PER_SCALE
    linear: nn.Module = bnb.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=0.0,
        device="meta",
    )  # fmt: skip
    linear.weight = bnb.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=amax)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return linear.eval()


def from_bitsandbytes(linear: nn.Module) -> Int8Linear:
    """The inverse, of a layer quantised by bitsandbytes or read from its state. Raises `InputError` for a float one."""
    weight, state = linear.weight, getattr(linear, "state", None)
    codes = getattr(weight, "CB", None) if getattr(weight, "CB", None) is not None else getattr(state, "CB", None)
    amax = getattr(weight, "SCB", None) if getattr(weight, "SCB", None) is not None else getattr(state, "SCB", None)
    if codes is None or amax is None:
        raise InputError(f"{type(linear).__name__} without int8 codes: expected a quantised Linear8bitLt; run it once")
    bias = linear.bias
    assert isinstance(codes, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    return from_codes(codes, amax[:, None] / SCB_PER_SCALE, bias)


def _empty(layer: Int8Linear, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return linear.eval()
