"""Attention that reads keys and values in 8 bits as a cache holds them, without decoding them first.

Legend: B batch, Q queries, K keys, H heads, D head width. A query gets int8 codes of its own, on the fly, with one
scale per token and head, so a score is an integer product times two scales; softmax and sums are float32. A weight
times its value's scale meets the value's codes. `plain` defines this arithmetic; the kernels differ from it in how they
round weights: to 8-bit integers per 128 keys on AVX512-VNNI, to 16-bit ones on AVX2, to bfloat16 in Triton.

Keys are not smoothed (SageAttention takes their mean off): what a channel far from 0 costs, it costs in the cache's
codes already, and the queries' codes add little to it (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ispa_deploy.attention import Attended, merge
from ispa_deploy.errors import RunError
from ispa_deploy.native import attention_int8 as native
from ispa_deploy.regions import region

PEAK = 127
FLOOR = 1e-30
"""The least largest number of a query that has a step; below it, all codes are 0."""
_SCORES = 1 << 24
_TOLERANCE = 2e-2  # of a probe: bfloat16 weights are rounded by 2^-9


class Coded(NamedTuple):
    """`codes` (B, K, H, D) int8 and `scale` (B, K, H, 1) float16: the numbers are their products."""

    codes: Tensor
    scale: Tensor


Kernel = Callable[[Tensor, Coded, Coded, Attended | None], Attended]


def quantise_queries(q: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) -> whole numbers of at most 127 and their step (..., 1), float32 or wider; NaN where q is not finite."""
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    top = wide.abs().amax(-1, keepdim=True)
    step = torch.where(top.isfinite(), top, torch.nan) / PEAK
    codes = (wide / step).round()
    return torch.where(top < FLOOR, 0.0, codes), step


def plain(q: Tensor, keys: Coded, values: Coded, before: Attended | None) -> Attended:
    """The same out of PyTorch's operations, on any device: simulated, as products are taken in floating point."""
    codes, step = quantise_queries(q)
    k, v = (part.codes.to(step.dtype) for part in (keys, values))
    k_scale, v_scale = (part.scale.to(step.dtype).squeeze(-1) for part in (keys, values))
    rows = max(1, _SCORES // (q.shape[0] * q.shape[2] * k.shape[1]))
    parts = []
    for first in range(0, q.shape[1], rows):
        part = slice(first, first + rows)
        scores = torch.einsum("bqhd,bkhd->bhqk", codes[:, part], k)
        scores *= (step[:, part] * q.shape[-1] ** -0.5).transpose(1, 2) * k_scale.transpose(1, 2).unsqueeze(2)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse).exp() * v_scale.transpose(1, 2).unsqueeze(2)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        parts.append(Attended(out.to(q.dtype), lse.squeeze(-1).transpose(1, 2)))
    made = Attended(*(torch.cat(each, 1) for each in zip(*parts, strict=True)))
    return made if before is None else merge(before, made)


def _native(name: str, q: Tensor, keys: Coded, values: Coded, before: Attended | None) -> Attended:
    return Attended(*native.attention(name, q, keys, values, *(before or (None, None))))


def _triton(q: Tensor, keys: Coded, values: Coded, before: Attended | None) -> Attended:
    from ispa_deploy.triton_attention import attention

    return Attended(*attention(q, keys, values, *(before or (None, None))))


SIMULATED = "simulated"
_KERNELS: dict[str, Kernel] = {
    "cpu-avx512-vnni": partial(_native, "avx512-vnni"),
    "cpu-avx2": partial(_native, "avx2"),
    "triton": _triton,
    SIMULATED: plain,
}
_ORDER = {"cpu": ("cpu-avx512-vnni", "cpu-avx2"), "cuda": ("triton",)}


def kernels() -> tuple[str, ...]:
    """Names of all kernels, wherever they run."""
    return tuple(_KERNELS)


@cache
def probe(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None when a kernel runs here and agrees with `plain` on a small input, else the first line of why not."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, head_dim, generator=generator) for n in (70, 90, 90))
    codes = ((part * 40).round().clamp(-PEAK, PEAK).to(torch.int8) for part in (k, v))
    scale = torch.rand(1, 90, 2, 1, generator=generator).half() / 40
    keys, values = (Coded(part.to(device), scale.to(device)) for part in codes)
    q = q.to(device, dtype)
    before = Attended(torch.ones_like(q), torch.full(q.shape[:3], 1.0, device=device))
    try:
        got, want = (run(q, keys, values, before) for run in (_KERNELS[name], plain))
    except Exception as error:  # no triton, or one that does not know this card: each raises its own
        return (str(error).splitlines() or [type(error).__name__])[0]
    size = float(want.out.float().abs().max())
    close = torch.allclose(got.out.float(), want.out.float(), atol=_TOLERANCE * size)
    close &= torch.allclose(got.lse, want.lse, atol=_TOLERANCE)
    return None if close else "its result differs from the plain one"


class CodedAttention:
    """8-bit attention of one stream: the best kernel for it, and how often that ran.

    `calls` counts what Python called: replayed CUDA graphs are not in it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, head_dim: int):
        why = {name: probe(name, device, dtype, head_dim) for name in _ORDER.get(device.type, ())}
        self.kernel = next((name for name, reason in why.items() if reason is None), SIMULATED)
        self.calls = 0
        reasons = "; ".join(f"{name}: {reason}" for name, reason in why.items())
        self._why = (
            f"no kernel runs on {device} with {str(dtype).removeprefix('torch.')} and heads of {head_dim} "
            f"({reasons or 'there is none for this kind of device'})"
        )

    def __call__(self, q: Tensor, keys: Coded, values: Coded, before: Attended | None) -> Attended:
        """Attention of q (B, Q, H, D) over coded keys and values, joined with that over other keys, if any."""
        self.calls += 1
        with region("attention.kernel"):
            return _KERNELS[self.kernel](q, keys, values, before)

    def assert_will_run(self) -> None:
        """Before a stream: raise `RunError` where floating point would stand in for a kernel."""
        if self.kernel == SIMULATED:
            raise RunError(
                f"8-bit attention: {self._why}; --allow-fallback simulates it, or leave --attention-dtype out"
            )

    def complaints(self) -> list[str]:
        """After a stream: what was not as it was asked for, in one line; empty where a kernel ran."""
        if self.calls == 0:
            return ["8-bit attention never ran: no layer read a coded past (one chunk has none, nor have local layers)"]
        return [f"8-bit attention was simulated: {self._why}"] if self.kernel == SIMULATED else []

    def assert_ran(self, *, allow_fallback: bool = False) -> list[str]:
        """Raise `RunError` with the complaints; `allow_fallback` returns them instead, as warnings."""
        found = self.complaints()
        if found and not allow_fallback:
            raise RunError(f"{found[0]}; allow the fallback, or leave --attention-dtype out")
        return found

    def report(self) -> dict[str, str | int]:
        """What ran, as plain JSON types."""
        return {"dtype": "int8", "kernel": self.kernel, "calls": self.calls}
