"""What a layer does between matrix products: residual, norm and modulation, RMS norm.

Plain PyTorch, or one C pass where `ispa_deploy.native` applies (bfloat16 on a CPU with AVX512-BF16): that rounds once
instead of after every operation, and is a quarter of the time. Float32 takes the plain way everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ispa_deploy.native import elementwise
from ispa_deploy.regions import region


class Norm(NamedTuple):
    """LayerNorm times `scale` (1 + scale, if `modulates`) plus `shift`: (C,), or (B, F, 1, C) for modulation."""

    scale: Tensor
    shift: Tensor
    eps: float
    modulates: bool = True


def norm(x: Tensor, how: Norm) -> Tensor:
    """(B, F, T, C) -> the same shape."""
    if elementwise.applies(x, x.shape[-1]):
        _, normed = elementwise.residual_norm(x, None, None, how.scale, how.shift, how.eps, how.modulates)
        assert normed is not None
        return normed
    if how.modulates:
        return torch.addcmul(how.shift, F.layer_norm(x, x.shape[-1:], eps=how.eps), 1 + how.scale)
    return F.layer_norm(x, x.shape[-1:], how.scale, how.shift, how.eps)


def add(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + gate * y, (B, F, T, C) each; gate (B, F, 1, C)."""
    if elementwise.applies(x, x.shape[-1]):
        return elementwise.residual_norm(x, y, gate, None, None, 0.0, False)[0]
    return x + y if gate is None else torch.addcmul(x, gate, y)


def add_norm(x: Tensor, y: Tensor, how: Norm, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum of `add` and its norm, in one pass where that exists."""
    if elementwise.applies(x, x.shape[-1]):
        total, normed = elementwise.residual_norm(x, y, gate, how.scale, how.shift, how.eps, how.modulates)
        assert normed is not None
        return total, normed
    total = add(x, y, gate)
    return total, norm(total, how)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of (B, S, C) over C times weight (C,), evaluated in float32."""
    if elementwise.applies(x, x.shape[-1]) and x.stride(-1) == 1:
        return elementwise.rms_norm(x, weight, eps)
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def feed_forward(up: nn.Module, gelu: nn.Module, down: nn.Module, x: Tensor) -> Tensor:
    """down(gelu(up(x))); an 8-bit `up` may hand its successor quantised rows, made in one pass with the GELU.

    A layer that is being watched by hooks is called as any module.
    """
    watched = any(layer._forward_hooks or layer._forward_pre_hooks for layer in (up, down))
    fused = None if watched else getattr(up, "gelu_into", None)
    rows = None if fused is None else fused(x, down)
    if rows is not None:
        return down(rows)
    y = up(x)
    with region("overhead.norm"):
        overwritten = not watched and elementwise.applies(y, y.shape[-1])
        y = elementwise.gelu_(y) if overwritten else gelu(y)
    return down(y)
