"""The same rows from a trace of kernels, where marks cannot be: inside of a compiled graph or a CUDA graph.

A kernel belongs to a row by its name; patterns are tried in order. Self- and cross-attention run the same kernels, so
they are told apart by their turn: a block calls the one, then the other. Attention over coded keys is known by its
name; it goes on from attention over the chunk's own keys and takes no turn. What no kernel covers is launch gaps, which
is `overhead.python`; a kernel that no pattern knows is unattributed, and the closing rules show it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.profiler_util import FunctionEvent

from ispa_deploy.profile.breakdown import Breakdown
from ispa_deploy.profile.recorder import Clock, synchronise
from ispa_deploy.regions import ROWS

UNKNOWN = "unattributed"
_SELF, _CROSS, _GAP = "attention.kernel", "attention.cross", "overhead.python"
_US_PER_MS, _NS_PER_MS = 1e3, 1e6

PATTERNS: tuple[tuple[str, str], ...] = (
    (_SELF, r"^ispa_attention$|flash|fmha|sdpa|mem_?eff|efficient_attention|attn_?fwd|attention_forward|"
            r"fused_attention"),
    ("attention.merge", r"logaddexp|merge_states?|lse_merge|^_merge_kernel"),
    ("overhead.statistics", r"^ispa_sums"),
    # A fused norm keeps its row with the codes it ends in, a fused GELU does not: as `ispa_deploy.regions` has it.
    ("overhead.norm", r"fused_\w*(layer_norm|rsqrt)\w*amax|fused_\w*amax\w*(layer_norm|rsqrt)"),
    ("linear.quantise", r"quanti[sz]e(?!.*(mm|gemm|linear))|_amax_.*int8|dynamic_quant|fused_\w*amax"),
    ("linear.dequantise", r"dequant|scale_epilogue|ispa_rescale|join_wide"),
    ("overhead.solve", r"potrf|potrs|trsm|getrf|syevd|cusolver|cholesky|linalg|triangular_solve"),
    ("overhead.decode", r"conv\d?d|convolution|implicit_?gemm|wgrad|dgrad|winograd|upsample"),
    ("linear.gemm", r"gemm|gemv|nvjet|cutlass|cublas|xmma|addmm|_mm\b|::mm|::bmm|mm_kernel|triton_mm|tem_fused|"
                    r"matmul|splitk|_linear_kernel|^ispa_linear_int8$|::linear|qlinear|int8_mm|scaled_mm|packed_linear"),
    ("overhead.norm", r"::_to_copy\b|convert_element_type"),
    ("overhead.rope", r"rope|rotary|rotate|view_as_complex|complex|polar"),
    ("overhead.sampler", r"randn|normal_|distribution|philox"),
    ("attention.cache", r"memcpy|direct_copy|copy_kernel|::copy_|catarray|::cat\b|index_put|index_copy|::fill_|memset"),
    ("overhead.norm", r"norm|gelu|silu|addcmul|modulat|elementwise|triton_(poi|red|per)|cpp_fused|reduce|vectorized|"
                      r"ispa_(passage|rms)|"
                      r"::(add|sub|mul|div|mean|rsqrt|pow|sigmoid|lerp|neg|reciprocal|square|sum)\w*"),
)  # fmt: skip
_CODED = re.compile(r"^ispa_attention_int8$|^_attention_kernel")
"""Self-attention over coded keys, in C and in Triton."""
_COMPILED = tuple((row, re.compile(pattern, re.IGNORECASE)) for row, pattern in PATTERNS)


@dataclass(frozen=True)
class Kernel:
    """One kernel of a trace, in microseconds."""

    name: str
    start: float
    length: float


def row_of(name: str) -> str:
    """The row that a kernel's name stands for, attention as self-attention; `unattributed` where none does."""
    if _CODED.search(name):
        return _SELF
    return next((row for row, pattern in _COMPILED if pattern.search(name)), UNKNOWN)


def rows_of(kernels: Iterable[Kernel]) -> list[str]:
    """The row of each kernel in the order of their starts; every second attention but those over coded keys is
    cross-attention."""
    rows, turn = [], 0
    for kernel in kernels:
        row = row_of(kernel.name)
        if row == _SELF and not _CODED.search(kernel.name):
            row = (_SELF, _CROSS)[turn % 2]
            turn += 1
        rows.append(row)
    return rows


def breakdown_of(kernels: Sequence[Kernel], wall: float) -> Breakdown:
    """The chunk of `wall` ms that these kernels ran in; where two overlap, the earlier one owns the time."""
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    spent = dict.fromkeys((*ROWS, UNKNOWN), 0.0)
    until = ordered[0].start if ordered else 0.0
    for kernel, row in zip(ordered, rows_of(ordered), strict=True):
        end = kernel.start + kernel.length
        spent[row] += max(0.0, end - max(kernel.start, until)) / _US_PER_MS
        until = max(until, end)
    unattributed = spent.pop(UNKNOWN)
    spent[_GAP] += max(0.0, wall - sum(spent.values()) - unattributed)
    return Breakdown(spent, unattributed, wall)


def measure_kernels(work: Callable[[], object], device: torch.device, clock: Clock) -> Breakdown:
    """Run `work`, one chunk, under the profiler: kernels of the GPU, or on a CPU its operators."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        synchronise(device)
        start = clock()
        work()
        synchronise(device)
        wall = (clock() - start) / _NS_PER_MS
    events = trace.events() or ()
    return breakdown_of(_gpu_kernels(events) if cuda else _cpu_kernels(events), wall)


def _gpu_kernels(events: Iterable[FunctionEvent]) -> list[Kernel]:
    return [_kernel(event) for event in events if event.device_type.name == "CUDA"]


def _cpu_kernels(events: Iterable[FunctionEvent]) -> list[Kernel]:
    """The outermost operators that a pattern knows; what the others do by themselves is a gap: Python's."""
    found: list[Kernel] = []
    pending = [event for event in events if event.device_type.name == "CPU" and event.cpu_parent is None]
    while pending:
        event = pending.pop()
        if row_of(event.name) == UNKNOWN:
            pending.extend(event.cpu_children)
        else:
            found.append(_kernel(event))
    return found


def _kernel(event: FunctionEvent) -> Kernel:
    return Kernel(event.name, event.time_range.start, event.time_range.elapsed_us())
