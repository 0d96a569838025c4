"""What a layer does between matrix products: residual, norm and modulation, RMS norm.

Plain PyTorch, or one pass: in C where `ispa_deploy.native` applies (bfloat16 on a CPU with AVX512-BF16), in Triton on
CUDA for 16 bits. One pass rounds once instead of after every operation; on the CPU it is a quarter of the time, on CUDA
it awaits measuring. Float32 takes the plain way everywhere.

Where 8-bit linears lie on either side, the same pass may begin with their products, not yet scaled (`to_be_added`), and
end in codes for the next ones (`norm_into`, `add_norm_into`). Layers say for themselves whether they can: by methods
`pending`, `norm_codes` and `gelu_into`. Whatever they do together belongs to the row `overhead.norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ispa_deploy.linear import shared_input
from ispa_deploy.native import elementwise
from ispa_deploy.regions import region


class Norm(NamedTuple):
    """LayerNorm times `scale` (1 + scale, if `modulates`) plus `shift`: (C,), or (B, F, 1, C) for modulation."""

    scale: Tensor
    shift: Tensor
    eps: float
    modulates: bool = True


class Pending(Protocol):
    """What an 8-bit layer adds to the residual, still without scales and bias: the pass that adds it finishes it.

    To be used once.
    """

    def added(self, x: Tensor, gate: Tensor | None, how: Norm | None) -> tuple[Tensor, Tensor | None]:
        """The sum of `add` and, with `how`, its norm."""
        ...


ResidualNorm = Callable[..., tuple[Tensor, Tensor | None]]


def _fused(x: Tensor) -> ResidualNorm | None:
    """The one-pass kernel that takes `x`; None: plain PyTorch."""
    if elementwise.applies(x, x.shape[-1]):
        return elementwise.residual_norm
    if on_triton(x):
        from ispa_deploy.triton_passes import residual_norm

        return residual_norm
    return None


def on_triton(x: Tensor) -> bool:
    """Whether the Triton passes take `x`: 16 bits on a CUDA device where they were found right, no gradients."""
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and x.requires_grad)
        and _triton_is_right(x.device)
    )


@cache
def _triton_is_right(device: torch.device) -> bool:
    """Both kernels tried once against plain PyTorch."""
    try:
        from ispa_deploy.triton_passes import merge, residual_norm

        x, y, scale, shift = (torch.randn(8, 64, device=device).bfloat16() for _ in range(4))
        total, normed = residual_norm(x, y, None, scale[:1], shift[:1], 1e-6, True)
        sums = (x.float() + y.float()).bfloat16()
        want = F.layer_norm(sums.float(), (64,), eps=1e-6) * (1 + scale[:1].float()) + shift[:1].float()
        a, b, lse = x.view(1, 4, 2, 64), y.view(1, 4, 2, 64), torch.zeros(1, 4, 2, device=device)
        merged, _ = merge(a, lse, b, lse)
        pairs = (total, sums), (normed, want), (merged, (a.float() + b.float()) / 2)
        return all(got is not None and torch.allclose(got.float(), w.float(), 2e-2, 2e-2) for got, w in pairs)
    except Exception:  # no triton, or one that does not know this card: each raises its own
        return False


def norm(x: Tensor, how: Norm) -> Tensor:
    """(B, F, T, C) -> the same shape."""
    fused = _fused(x)
    if fused is not None:
        _, normed = fused(x, None, None, how.scale, how.shift, how.eps, how.modulates)
        assert normed is not None
        return normed
    if how.modulates:
        return torch.addcmul(how.shift, F.layer_norm(x, x.shape[-1:], eps=how.eps), 1 + how.scale)
    return F.layer_norm(x, x.shape[-1:], how.scale, how.shift, how.eps)


def add(x: Tensor, y: Tensor | Pending, gate: Tensor | None = None) -> Tensor:
    """x + gate * y; x (B, F, T, C), y (B, F * T, C), gate (B, F, 1, C)."""
    if not isinstance(y, Tensor):
        return y.added(x, gate, None)[0]
    y = y.reshape(x.shape)
    fused = _fused(x)
    if fused is not None:
        return fused(x, y, gate, None, None, 0.0, False)[0]
    return x + y if gate is None else torch.addcmul(x, gate, y)


def add_norm(x: Tensor, y: Tensor | Pending, how: Norm, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum of `add` and its norm, in one pass where that exists."""
    made = None
    if not isinstance(y, Tensor):
        made = y.added(x, gate, how)
    elif (fused := _fused(x)) is not None:
        made = fused(x, y.reshape(x.shape), gate, how.scale, how.shift, how.eps, how.modulates)
    if made is not None:
        assert made[1] is not None
        return made[0], made[1]
    total = add(x, y, gate)
    return total, norm(total, how)


def norm_into(layers: Sequence[nn.Module], x: Tensor, how: Norm) -> Any:
    """`norm` of x (B, F, T, C) as all `layers` and nobody else take it: (B, F * T, C), or their 8-bit codes of it."""
    coded = _norm_codes(layers, x, None, how, None)
    return shared_input(norm(x, how).flatten(1, 2), layers) if coded is None else coded[1]


def add_norm_into(
    layers: Sequence[nn.Module], x: Tensor, y: Tensor | Pending, how: Norm, gate: Tensor | None = None
) -> tuple[Tensor, Any]:
    """The sum of `add`, and its norm as `norm_into` gives it."""
    coded = _norm_codes(layers, x, y, how, gate)
    if coded is not None:
        return coded
    total, normed = add_norm(x, y, how, gate)
    return total, shared_input(normed.flatten(1, 2), layers)


def _norm_codes(
    layers: Sequence[nn.Module], x: Tensor, y: Tensor | Pending | None, how: Norm, gate: Tensor | None
) -> tuple[Tensor, Any] | None:
    """The sum, and codes of its norm from the same pass; None where `layers` do not all take them."""
    quantises: Any = None if _watched(layers) else getattr(layers[0], "norm_codes", None)
    return None if quantises is None else quantises(layers[1:], x, y, how, gate)


def _watched(layers: Sequence[nn.Module]) -> bool:
    """Whether hooks look at what goes in and comes out, which then has to be there."""
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def to_be_added(layer: nn.Module, x: Any) -> Tensor | Pending:
    """layer(x), which nobody but `add` and its kin will read: they finish it where they can."""
    unfinished: Any = None if _watched([layer]) else getattr(layer, "pending", None)
    made = None if unfinished is None else unfinished(x)
    return layer(x) if made is None else made


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of (B, S, C) over C times weight (C,), evaluated in float32."""
    if elementwise.applies(x, x.shape[-1]) and x.stride(-1) == 1:
        return elementwise.rms_norm(x, weight, eps)
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def feed_forward(up: nn.Module, gelu: nn.Module, down: nn.Module, x: Any) -> Tensor | Pending:
    """down(gelu(up(x))), to be added; an 8-bit `up` may hand its successor codes, made in one pass with the GELU.

    A layer that is being watched by hooks is called as any module.
    """
    watched = _watched([up, down])
    fused = None if watched else getattr(up, "gelu_into", None)
    rows = None if fused is None else fused(x, down)
    if rows is not None:
        return to_be_added(down, rows)
    y = up(x)
    with region("overhead.norm"):
        overwritten = not watched and elementwise.applies(y, y.shape[-1])
        y = elementwise.gelu_(y) if overwritten else gelu(y)
    return to_be_added(down, y)
