"""The C product of int8 codes: equal to PyTorch's, and to the scales and the bias applied apart, bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ispa_deploy import native
from ispa_deploy.native import LINEAR, library, linear_int8
from quant import kernels, kernels_cpu
from quant.audit import slow_kernels
from quant.kernels_cpu import AVX2, INT_MM
from quant.linear import Int8Linear
from quant.primitives import rescale

needs_library = pytest.mark.skipif(library(LINEAR) is None, reason="no AVX2 or no C compiler here")
# One panel, block of rows, of features or of columns and what is left over; all edges at once.
SHAPES = (
    (1, 1, 1), (1, 512, 33), (5, 3, 15), (6, 8, 16), (7, 31, 17), (95, 64, 32), (97, 256, 272), (193, 767, 5),
    (13, 769, 48), (200, 1543, 50), (3, 2305, 16),
)  # fmt: skip


def codes(*shape: int) -> torch.Tensor:
    """Int8, extremes and a row of zeros among them."""
    drawn = torch.randint(-128, 128, shape, dtype=torch.int8)
    drawn[0, : shape[1] // 2], drawn[-1] = 127, -128
    if len(drawn) > 4:
        drawn[2], drawn[3] = 0, -127
    return drawn


@needs_library
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_sums_are_those_of_int_mm(m: int, k: int, n: int) -> None:
    x, weight = codes(m, k), codes(n, k)
    packed = linear_int8.pack(weight)
    assert torch.equal(linear_int8.unpack(packed), weight)
    assert torch.equal(linear_int8.product(x, packed, None, None, None, torch.int32), torch._int_mm(x, weight.t()))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [16, 50])
@pytest.mark.parametrize("biased", [True, False])
def test_scales_and_bias_round_as_the_plain_passes(dtype: torch.dtype, columns: int, biased: bool) -> None:
    x, weight, row, column = codes(100, 300), codes(columns, 300), torch.rand(100, 1), torch.rand(columns)
    row[4], row[5], row[6] = math.nan, 1e-38, 1e30
    bias = torch.randn(columns) if biased else None
    got = linear_int8.product(x, linear_int8.pack(weight), row, column, bias, dtype)
    want = rescale(torch._int_mm(x, weight.t()) * column, row, bias, dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert got[4].isnan().all()


@needs_library
def test_any_number_of_threads_gives_the_same_bits() -> None:
    x, packed, before = codes(200, 64), linear_int8.pack(codes(530, 64)), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(linear_int8.product(x, packed, None, None, None, torch.int32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_kernel_that_float32_outruns_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this CPU does fast, it is read off the clock."""
    pace = iter([1e-3] * 8 + [5e-3] * 8)
    clock = [0.0]

    def perf_counter() -> float:
        clock[0] += next(pace)
        return clock[0]

    model = nn.Sequential(Int8Linear.from_float(nn.Linear(32, 16)))
    model[0].prepare(INT_MM)
    monkeypatch.setattr(kernels_cpu, "KERNELS", (INT_MM,))
    monkeypatch.setattr(kernels, "time", SimpleNamespace(perf_counter=perf_counter))
    kernels.slowness.cache_clear()
    try:
        assert kernels.describe("cpu") == "kernel int8 _int_mm s8s8, which takes 5 times as long as float32 here"
        (line,) = slow_kernels(model)
    finally:
        kernels.slowness.cache_clear()
    assert line.startswith("int8 linears: kernel int8 _int_mm s8s8, which takes 5 times as long")


@needs_library
def test_this_kernel_is_taken_where_onednn_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_cpu, "KERNELS", (AVX2, INT_MM))
    assert kernels.kernel_for(torch.device("cpu"), 48, 33) is AVX2


def test_kernels_that_a_compiler_would_bring_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a bfloat16 model on a CPU that could run them, and of no other."""
    cpu, why = torch.device("cpu"), "no C compiler found"
    monkeypatch.setattr(native, "MAIN", replace(native.MAIN, runs=lambda: True))
    monkeypatch.setattr(native, "refusal", lambda: why)
    line = native.missed(cpu, torch.bfloat16)
    assert line is not None
    assert line.endswith(why)
    assert native.missed(cpu, torch.float32) is None
    assert native.missed(torch.device("cuda"), torch.bfloat16) is None
    monkeypatch.setattr(native, "refusal", lambda: None)
    assert native.missed(cpu, torch.bfloat16) is None
    monkeypatch.setattr(native, "MAIN", replace(native.MAIN, runs=lambda: False))
    assert native.missed(cpu, torch.bfloat16) is None
