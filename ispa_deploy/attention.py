"""Attention that returns its log-sum-exp, and the merge that joins disjoint key sets (paper section 3.4, eq. 9-12).

Legend: B batch, Q queries, K keys, H heads, D head width. Unmasked, scaled by 1/sqrt(D), natural logarithm.
`attend(q, near)` merged with `attend(q, far)` is `attend(q, near + far)`: one pass over both key sets yields the local
output and the full one. Keys are partitioned, never masked: on CPU a fully masked row reports lse 0, which a merge
would believe. Only this file knows the kernels; each is imported and probed on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from ispa_deploy.errors import InputError, known_names
from ispa_deploy.passes import on_triton
from ispa_deploy.regions import region


class Attended(NamedTuple):
    """Attention output and its log-sum-exp: `out` (B, Q, H, D) in the dtype of q, `lse` (B, Q, H) float32 (float64 for
    float64 inputs), -inf where no key was seen."""

    out: Tensor
    lse: Tensor


Kernel = Callable[[Tensor, Tensor, Tensor], Attended]
_BACKENDS: dict[str, Kernel] = {}


def _backend(name: str) -> Callable[[Kernel], Kernel]:
    def register(kernel: Kernel) -> Kernel:
        _BACKENDS[name] = kernel
        return kernel

    return register


@_backend("reference")
def _reference(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    """Dense softmax in float64: slow, exact, any device."""
    scores = torch.einsum("bqhd,bkhd->bqhk", q.double(), k.double()) * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    out = torch.einsum("bqhk,bkhd->bqhd", (scores - lse.unsqueeze(-1)).exp(), v.double())
    return Attended(out.to(q.dtype), lse.to(_lse_dtype(q)))


@_backend("cpu-flash")
def _cpu_flash(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = op(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, False)
    return Attended(out.transpose(1, 2), lse.transpose(1, 2))


@_backend("cpu-native")
def _cpu_native(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    from ispa_deploy.native.attention import attention

    return Attended(*attention(q, k, v))


@_backend("cpu-blocked")
def _cpu_blocked(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    from ispa_deploy.attention_cpu import blocked

    return Attended(*blocked(q, k, v))


@_backend("cudnn")
def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    op = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = op(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True)
    return Attended(out.transpose(1, 2), lse.reshape(lse.shape[:3]).transpose(1, 2))


@_backend("cuda-flash")
def _cuda_flash(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    op = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse, *_ = op(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return Attended(out.transpose(1, 2), lse.transpose(1, 2))


@_backend("cuda-efficient")
def _cuda_efficient(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    op = torch.ops.aten._scaled_dot_product_efficient_attention
    out, lse, *_ = op(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True)
    return Attended(out.transpose(1, 2), lse[..., : q.shape[1]].transpose(1, 2))


@_backend("flash-attn-3")
def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    try:
        from fa3_fwd_interface import _flash_attn_forward
    except ImportError:
        from flash_attn_interface import _flash_attn_forward
    out, lse, *_ = _flash_attn_forward(q, k, v, softmax_scale=q.shape[-1] ** -0.5)
    return Attended(out, lse.transpose(1, 2))


@_backend("flash-attn-2")
def _flash_attn_2(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    from flash_attn import flash_attn_func

    out, lse, *_ = flash_attn_func(q, k, v, return_attn_probs=True)
    return Attended(out, lse.transpose(1, 2))


# On a CPU, bfloat16: in this order of expectation, measured. Float32 has one kernel.
_CPU_ORDER = ("cpu-native", "cpu-flash", "cpu-blocked")
_REPEATS, _CLEARLY = 4, 0.9
_HALF = (torch.bfloat16, torch.float16)
# Preference on CUDA by compute capability: cuDNN leads on Hopper, flash on Ampere and Blackwell; fp32 has one kernel.
_CUDA_ORDER = {
    True: ("cudnn", "flash-attn-3", "flash-attn-2", "cuda-flash", "cuda-efficient"),
    False: ("flash-attn-2", "cuda-flash", "cudnn", "cuda-efficient"),
}


def backends() -> tuple[str, ...]:
    """Names that `attend` accepts beside `auto`."""
    return tuple(_BACKENDS)


def works(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a backend runs here: tried once on a small input and compared with the float64 reference."""
    return _probe(name, device, dtype, head_dim) is None


@cache
def _probe(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None when the backend works, else the first line of why not."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, head_dim, generator=generator).to(device, dtype) for n in (64, 96, 96))
    try:
        got, want = _BACKENDS[name](q, k, v), _reference(q, k, v)
    except (ImportError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    if got.lse.shape != want.lse.shape or not torch.allclose(got.lse.float(), want.lse.float(), atol=2e-2):
        return "its log-sum-exp differs from the reference"
    return (
        None
        if torch.allclose(got.out.float(), want.out.float(), atol=3e-2)
        else "its output differs from the reference"
    )


def choose(device: torch.device, dtype: torch.dtype, head_dim: int, queries: int = 256, keys: int = 4096) -> str:
    """The backend that `auto` means for this device, dtype, head width and number of queries and keys."""
    if device.type == "cpu":
        # Whole powers of two: a growing window asks for few measurements.
        sizes = (1 << (min(most, n) - 1).bit_length() for most, n in ((256, queries), (4096, keys)))
        return _fastest_on_cpu(head_dim, *sizes) if dtype == torch.bfloat16 else "cpu-flash"
    return _choose_on_gpu(device, dtype, head_dim)


@cache
def _choose_on_gpu(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if device.type == "cuda":
        hopper = torch.cuda.get_device_capability(device)[0] == 9
        order = _CUDA_ORDER[hopper] if dtype in _HALF else ("cuda-efficient",)
        for name in order:
            if works(name, device, dtype, head_dim):
                return name
    return "reference"


@cache
def _fastest_on_cpu(head_dim: int, queries: int, keys: int) -> str:
    """Measured on two heads, some milliseconds: later kernels of `_CPU_ORDER` must win clearly, so that noise does not
    decide between two runs."""
    device, best, least = torch.device("cpu"), "cpu-flash", float("inf")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, head_dim, generator=generator).bfloat16() for n in (queries, keys, keys))
    for name in _CPU_ORDER:
        if works(name, device, torch.bfloat16, head_dim):
            seconds = min(_seconds(name, q, k, v) for _ in range(_REPEATS))
            if seconds < _CLEARLY * least:
                best, least = name, seconds
    return best


def _seconds(name: str, q: Tensor, k: Tensor, v: Tensor) -> float:
    start = perf_counter()
    _BACKENDS[name](q, k, v)
    return perf_counter() - start


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def attend(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", mark: str = "attention.kernel") -> Attended:
    """Attention of q (B, Q, H, D) over k, v (B, K, H, D); K = 0 gives zeros with lse -inf.

    `mark` is the row of the latency breakdown that owns the time.
    """
    if k.shape[1] == 0:  # the CPU kernel dies on an empty key set
        return Attended(torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=_lse_dtype(q)))
    name = choose(q.device, q.dtype, q.shape[-1], q.shape[1], k.shape[1]) if backend == "auto" else backend
    if name not in _BACKENDS:
        raise known_names("attention backend", name, ["auto", *_BACKENDS])
    if backend != "auto" and (why := _probe(name, q.device, q.dtype, q.shape[-1])):
        raise InputError(f"attention backend '{name}' does not run on {q.device} with {q.dtype}: {why}; use 'auto'")
    with region(mark):
        return _BACKENDS[name](q, k, v)


def merge(a: Attended, b: Attended) -> Attended:
    """Join attention over two disjoint key sets (paper eq. 11-12); weights and sum in float32, float64 for float64."""
    with region("attention.merge"):
        if on_triton(a.out):
            from ispa_deploy.triton_passes import merge as fused

            return Attended(*fused(a.out, a.lse, b.out, b.lse))
        wide = _lse_dtype(a.out)
        # Two empty sets give -inf - -inf = nan: any weight serves there, both outputs are zero.
        share = torch.sigmoid((a.lse - b.lse).nan_to_num(nan=0.0)).to(wide).unsqueeze(-1)
        out = torch.lerp(b.out.to(wide), a.out.to(wide), share).to(a.out.dtype)
        return Attended(out, torch.logaddexp(a.lse, b.lse))
