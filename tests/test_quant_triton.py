"""The Triton kernels against the plain arithmetic: interpreted on the CPU, compiled where there is a CUDA device."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ispa_deploy.passes
import quant.kernels_cuda
from ispa_deploy.attention import Attended
from ispa_deploy.attention_int8 import Coded, plain
from ispa_deploy.kvstore import PEAKS, Coder
from quant.linear import Int8Linear
from quant.primitives import HIGH, int_matmul, quantise_rows, quantise_wide_rows
from tests.fused import FusedLayer, check_bad_rows, check_layer, check_marks, check_watched

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CAST = 2.0**-8  # a bfloat16 result


def _with_bad_rows(test: Callable[..., None]) -> Callable[..., None]:
    """The interpreter's NumPy warns of them."""
    for warning in ("invalid value encountered", "All-NaN slice encountered"):
        test = pytest.mark.filterwarnings(f"ignore:{warning}:RuntimeWarning")(test)
    return test


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run in this process")
def test_this_file_interpreted() -> None:
    """Triton chooses its interpreter when it is first imported, so the CPU case needs a process of its own."""
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-3000:]
    assert "57 passed" in child.stdout


@pytest.fixture(autouse=True)
def _rounding_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts float32 off to bfloat16 where a GPU rounds to nearest: let it round."""
    if not INTERPRETED:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    cut_off, bfloat16 = interpreter._convert_float, interpreter.tl.bfloat16

    def convert(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if target != bfloat16 or x.dtype != np.float32:
            return cut_off(x, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def _interpreted(name: str) -> ModuleType:
    pytest.importorskip("triton")
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("runs in the child process of test_this_file_interpreted")
    return importlib.import_module(name)


@pytest.fixture
def kernels() -> ModuleType:
    return _interpreted("quant.triton_kernels")


@pytest.fixture
def passes() -> ModuleType:
    return _interpreted("ispa_deploy.triton_passes")


@pytest.fixture
def attending() -> ModuleType:
    return _interpreted("ispa_deploy.triton_attention")


@_with_bad_rows
def test_quantiser_equals_the_plain_one(kernels: ModuleType) -> None:
    x = torch.randn(9, 300, device=DEVICE) * torch.logspace(-6, 6, 9, device=DEVICE)[:, None]
    x[0] = 0
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    for dtype in (torch.float32, torch.bfloat16):
        codes, scale = kernels.quantise_rows(x.to(dtype))
        want_codes, want_scale = quantise_rows(x.to(dtype))
        torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0, equal_nan=True)
        fine = [0, *range(3, 9)]
        assert int((codes[fine].int() - want_codes[fine].int()).abs().max()) <= (1 if DEVICE == "cuda" else 0)
        by = torch.exp2(torch.randint(-6, 7, (300,), device=DEVICE).float())
        codes, scale = kernels.quantise_rows(x[3:].to(dtype), by)
        want_codes, want_scale = quantise_rows(x[3:].to(dtype), by)
        torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0)
        assert int((codes.int() - want_codes.int()).abs().max()) <= (1 if DEVICE == "cuda" else 0)


def test_quantiser_after_gelu_against_float64(kernels: ModuleType) -> None:
    x = torch.randn(9, 300, device=DEVICE).bfloat16() * 4
    codes, scale = kernels.quantise_rows(x, gelu=True)
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(scale.double(), exact.abs().amax(-1, keepdim=True) / 127, rtol=1e-5, atol=0)
    assert float(((codes.double() * scale.double() - exact).abs() / scale.double()).max()) <= 0.501


@pytest.mark.parametrize("table", [(1, 1, 1, 72), (2, 3, 1, 72), (72,)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, CAST)])
def test_residual_norm_against_float64(
    passes: ModuleType, table: tuple[int, ...], dtype: torch.dtype, bound: float
) -> None:
    x, y = (torch.randn(2, 3, 5, 72, device=DEVICE).to(dtype) * 3 for _ in range(2))
    gate, scale, shift = (torch.randn(table, device=DEVICE).to(dtype) for _ in range(3))
    one = len(table) > 1
    for given, by in ((None, None), (y, None), (y, gate)):
        total, normed = passes.residual_norm(x, given, by, scale, shift, 1e-6, one)
        want = x.double() + (0 if given is None else given.double() * (1 if by is None else by.double()))
        torch.testing.assert_close(total.double(), want, rtol=bound, atol=bound)
        wide = torch.nn.functional.layer_norm(total.double(), (72,), eps=1e-6)
        torch.testing.assert_close(
            normed.double(), wide * (scale.double() + one) + shift.double(), rtol=bound, atol=bound
        )
    assert passes.residual_norm(x, y, gate, None, None, 0.0, False)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_against_float64(passes: ModuleType, dtype: torch.dtype) -> None:
    """Of views as the kernels return them, with empty sets on either side and on both."""
    a, b = (torch.randn(2, 3, 7, 40, device=DEVICE).to(dtype).transpose(1, 2) for _ in range(2))
    first, second = (3 * torch.randn(2, 3, 7, device=DEVICE).transpose(1, 2) for _ in range(2))
    first[0, 0], second[0, 1] = -torch.inf, -torch.inf
    first[1, 2], second[1, 2] = -torch.inf, -torch.inf
    a[1, 2], b[1, 2] = 0, 0
    out, lse = passes.merge(a, first, b, second)
    share = torch.sigmoid((first.double() - second.double()).nan_to_num(nan=0.0)).unsqueeze(-1)
    want = torch.lerp(b.double(), a.double(), share)
    torch.testing.assert_close(out.double(), want, rtol=CAST if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    torch.testing.assert_close(lse, torch.logaddexp(first, second), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 70, 33), (64, 64, 128), (130, 200, 300)])
def test_product_is_exact_and_scaled(kernels: ModuleType, m: int, n: int, k: int) -> None:
    codes = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    codes[0], weight[0] = -128, -128
    rows, columns, bias = torch.rand(m, 1), torch.rand(n), torch.randn(n)
    whole = int_matmul(codes, weight)
    ones = (torch.ones(m, 1, device=DEVICE), torch.ones(n, device=DEVICE))
    got = kernels.int8_linear(codes.to(DEVICE), ones[0], weight.to(DEVICE), ones[1], None, torch.float32)
    assert torch.equal(got.cpu().to(torch.int64), whole)
    operands = [t.to(DEVICE) for t in (codes, rows, weight, columns, bias)]
    want = whole.double() * rows.double() * columns.double() + bias.double()
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        y = kernels.int8_linear(*operands, dtype).cpu().double()
        assert float((y - want).norm() / want.norm()) <= bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@_with_bad_rows
def test_wide_quantiser_has_the_bits_of_the_plain_one_on_a_cpu(kernels: ModuleType, dtype: torch.dtype) -> None:
    x = (torch.randn(64, 301) * torch.logspace(-4, 4, 64)[:, None]).to(dtype)
    x[0], x[1, 5], x[2, 7] = 0, float("nan"), float("inf")
    x[3] = torch.arange(301) * 0.5  # ties
    x[3, 0] = 32639
    for by in (None, torch.exp2(torch.randint(-6, 7, (301,)).float()), torch.rand(301)):
        want_codes, want_scale = quantise_wide_rows(x, by)
        codes, scale = kernels.quantise_rows(x.to(DEVICE), None if by is None else by.to(DEVICE), wide=True)
        torch.testing.assert_close(scale.cpu(), want_scale, rtol=0, atol=0, equal_nan=True)
        assert scale[1:3].isnan().all()
        finite = want_scale[:, 0].isfinite()
        assert int(finite.sum()) > 50
        assert torch.equal(codes.cpu()[finite], want_codes[finite])


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 70, 33), (64, 64, 128), (67, 130, 301)])
def test_wide_product_is_two_exact_ones_joined_and_scaled(kernels: ModuleType, m: int, n: int, k: int) -> None:
    codes = torch.randint(-128, 128, (m, 2 * k), dtype=torch.int8)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    codes[0], weight[0] = -128, -128
    rows, columns, bias = torch.rand(m, 1), torch.rand(n), torch.randn(n)
    high, low = int_matmul(codes.view(2 * m, k), weight).double().unflatten(0, (m, 2)).unbind(1)
    ones = (torch.ones(m, 1, device=DEVICE), torch.ones(n, device=DEVICE))
    got = kernels.int8_linear(codes.to(DEVICE), ones[0], weight.to(DEVICE), ones[1], None, torch.float32)
    off = (got.cpu().double() - (high * HIGH + low)).abs()
    assert bool((off <= 2.0**-23 * (high.abs() * HIGH + low.abs())).all()), "nothing but the join is rounded"
    x, gate = torch.randn(1, 1, m, n), torch.randn(n)
    y = (high * HIGH + low) * rows.double() * columns.double() + bias.double()
    operands = [t.to(DEVICE) for t in (codes, rows, weight, columns, bias)]
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, CAST), (torch.float16, 2.0**-10)):
        operands[1] = (rows * 2.0**-16).to(DEVICE)  # float16 holds no more
        scaled = bias + (y - bias) * 2.0**-16
        got = kernels.int8_linear(*operands, dtype)
        assert got.dtype == dtype
        assert float((got.cpu().double() - scaled).norm() / scaled.norm()) <= bound
        added = kernels.int8_linear(*operands, dtype, x.to(DEVICE, dtype), gate.to(DEVICE, dtype)).cpu().double()
        want = x[0, 0].to(dtype).double() + gate.to(dtype).double() * scaled
        assert float((added - want).norm() / want.norm()) <= bound
    operands[1][-1] = float("nan")
    got = kernels.int8_linear(*operands, torch.float32)
    assert got[-1].isnan().all()
    assert got[:-1].isfinite().all()


def test_wide_tiles_are_those_whose_two_accumulators_fit(kernels: ModuleType) -> None:
    every = kernels._CONFIGS
    assert kernels._fitting(every, {}, WIDE=False) == every
    kept = kernels._fitting(every, {}, WIDE=True)
    assert kept[0] is every[0], "which the interpreter runs"
    assert len(kept) > 2
    for one in kept:
        assert 2 * one.kwargs["BLOCK_M"] * one.kwargs["BLOCK_N"] <= 128 * 32 * one.num_warps


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-3)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("right", [True, False])
@_with_bad_rows
def test_a_layer_widens_on_triton(
    kernels: ModuleType, dtype: torch.dtype, bound: float, biased: bool, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a kernel of its own; smoothed; a row of NaN stays alone, and 8 bits come back."""
    assert quant.kernels_cuda._widens_right(torch.device(DEVICE)), "what a device is asked before it gets this kernel"
    monkeypatch.setattr(quant.kernels_cuda, "_widens_right", lambda _: right)
    layer = Int8Linear.from_float(torch.nn.Linear(301, 70, bias=biased)).to(DEVICE)
    layer.pre_quant_scale = torch.exp2(torch.randint(-3, 4, (301,)).float()).to(DEVICE)
    layer.prepare(quant.kernels_cuda.TRITON)
    x = (torch.randn(3, 7, 301) * torch.logspace(-3, 3, 7)[:, None]).to(DEVICE, dtype)
    x[1, 2, 4] = float("nan")
    narrow = layer(x)
    assert layer.set_wide(True)
    y = layer(x)
    assert (layer.calls, layer.wide_calls) == (2, 1)
    assert (y.dtype, y.shape) == (dtype, (3, 7, 70))
    assert y[1, 2].isnan().all()
    want = x.double() @ layer.reference_weight().double().t()
    if layer.bias is not None:
        want = want + layer.bias.double()
    fine = torch.ones(3, 7, dtype=torch.bool, device=DEVICE)
    fine[1, 2] = False
    off = [((got.double() - want)[fine].norm(dim=-1) / want[fine].norm(dim=-1)).max() for got in (y, narrow)]
    assert off[0] < bound < off[1]
    layer.set_wide(False)
    torch.testing.assert_close(layer(x), narrow, rtol=0, atol=0, equal_nan=True)


def test_a_device_whose_kernel_is_wrong_gets_two_products(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right, own = quant.kernels_cuda._widens_right.__wrapped__, kernels.int8_linear
    monkeypatch.setattr(kernels, "int8_linear", lambda *operands: own(*operands) * 1.001)
    assert not right(torch.device(DEVICE))
    monkeypatch.delattr(kernels, "quantise_rows")
    assert not right(torch.device(DEVICE))


@pytest.mark.parametrize("table", [(1, 1, 1, 72), (2, 3, 1, 72), (72,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@_with_bad_rows
def test_residual_norm_straight_to_codes(passes: ModuleType, table: tuple[int, ...], dtype: torch.dtype) -> None:
    """Codes of the norm of the sum as stored, with and without smoothing; a row of nothing, NaN and Inf."""
    x, y = (torch.randn(2, 3, 5, 72, device=DEVICE).to(dtype) * 3 for _ in range(2))
    gate, scale, shift = (torch.randn(table, device=DEVICE).to(dtype) for _ in range(3))
    by = torch.exp2(torch.randint(-6, 7, (72,), device=DEVICE).float())
    for given, factor in ((None, None), (y, None), (y, by)):
        total, codes, step = passes.residual_norm_quantise(x, given, gate, scale, shift, 1e-6, True, factor)
        assert torch.equal(total, passes.residual_norm(x, given, gate, None, None, 0.0, False)[0])
        wide = torch.nn.functional.layer_norm(total.double(), (72,), eps=1e-6) * (scale.double() + 1) + shift.double()
        want = wide.view(30, 72) * (1 if factor is None else factor.double())
        torch.testing.assert_close(step.double(), want.abs().amax(-1, keepdim=True) / 127, rtol=1e-5, atol=0)
        assert float(((codes.double() * step - want).abs() / step).max()) <= 0.501
    x.view(30, 72)[0], x.view(30, 72)[1, 3], x.view(30, 72)[2, 4] = 2.0, float("nan"), float("inf")
    _, codes, step = passes.residual_norm_quantise(x, None, None, scale, torch.zeros_like(shift), 1e-6, True)
    assert not codes[0].any()
    assert step.flatten().isnan().nonzero().flatten().tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("frames", "tokens", "n", "k"), [(1, 1, 1, 1), (3, 5, 70, 33), (2, 65, 130, 300)])
def test_product_with_the_residual_in_its_epilogue(
    kernels: ModuleType, dtype: torch.dtype, frames: int, tokens: int, n: int, k: int
) -> None:
    m = frames * tokens
    codes, weight = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=DEVICE) for rows in (m, n))
    rows, columns, bias = (torch.rand(m, 1) / 127, torch.rand(n) / 127, torch.randn(n))
    rows[-1] = float("nan")  # a row whose input was not finite
    rows, columns, bias = (t.to(DEVICE) for t in (rows, columns, bias))
    x, gate = (torch.randn(1, frames, t, n, device=DEVICE).to(dtype) for t in (tokens, 1))
    y = int_matmul(codes.cpu(), weight.cpu()).double().to(DEVICE) * rows.double() * columns.double() + bias.double()
    bound = {torch.float32: 1e-6, torch.bfloat16: CAST, torch.float16: 2.0**-10}[dtype]
    for by in (None, gate, gate[0, 0, 0]):
        want = x.double() + (1 if by is None else by.double()) * y.view(x.shape)
        got = kernels.int8_linear(codes, rows, weight, columns, bias, dtype, x, by).view(x.shape)
        assert got.dtype == dtype
        assert got.view(m, n)[-1].isnan().all()
        got, want = got.view(m, n)[:-1], want.view(m, n)[:-1]
        torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound * float(want.abs().max() if m > 1 else 1))


@_with_bad_rows
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_with_everything_fused(
    kernels: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a CUDA device, also where the interpreter has to stand in for one."""
    for module in (ispa_deploy.passes, quant.kernels_cuda):
        monkeypatch.setattr(module, "on_triton", lambda _: True)
    quant.kernels_cuda._adds_right.cache_clear()
    assert quant.kernels_cuda._adds_right(torch.device(DEVICE)), "what a device is asked before it gets these passes"
    layer = FusedLayer(quant.kernels_cuda.TRITON, dtype, DEVICE)
    check_layer(layer, monkeypatch)
    check_bad_rows(layer, monkeypatch)
    check_watched(layer, monkeypatch)
    check_marks(layer, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 17, 1000])
def test_layer_on_cuda(m: int) -> None:
    from quant.linear import Int8Linear

    linear = torch.nn.Linear(1536, 1544)
    layer = Int8Linear.from_float(linear).to("cuda")
    x = torch.randn(m, 1536)
    y = layer(x.to("cuda", torch.bfloat16)).cpu().double()
    want = x.bfloat16().double() @ linear.weight.double().t() + linear.bias.double()
    assert float((y - want).norm() / want.norm()) <= 2e-2
    assert layer.exact
    assert layer.calls == 1


@pytest.mark.parametrize("width", [40, 64])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_attention_over_codes_against_float64(
    attending: ModuleType, width: int, dtype: torch.dtype, bound: float
) -> None:
    """Of views, alone and going on from other keys, some of which saw none. A tie of a code may fall either way."""
    q = torch.randn(2, 70, 6, width, device=DEVICE).to(dtype)[:, :, 2:4]
    keys, values = (Coded(*_coded(torch.randn(2, 150, 3, width, device=DEVICE) * 2)) for _ in range(2))
    keys, values = (Coded(*(part[:, 7:, 1:] for part in each)) for each in (keys, values))
    before = Attended(torch.randn_like(q), torch.randn(2, 70, 2, device=DEVICE) + 3)
    before.lse[:, :5] = -torch.inf
    for known in (None, before):
        out, lse = attending.attention(q, keys, values, *(known or (None, None)))
        wide = None if known is None else Attended(known.out.double(), known.lse.double())
        want = plain(q.float().double(), keys, values, wide)
        assert float((out.double() - want.out).norm() / want.out.norm()) < bound
        torch.testing.assert_close(lse.double(), want.lse, rtol=0, atol=3 * bound)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy, on NaN
def test_attention_over_codes_of_special_values(attending: ModuleType) -> None:
    q = torch.randn(1, 8, 3, 32, device=DEVICE)
    q[0, 1], q[0, 2, 0, 5], q[0, 3, 1, 2] = 0, torch.nan, torch.inf
    keys, values = (Coded(*_coded(torch.randn(1, 40, 3, 32, device=DEVICE))) for _ in range(2))
    keys.scale[0, 9, 2] = torch.nan
    out, lse = attending.attention(q, keys, values, None, None)
    want = plain(q, keys, values, None)
    assert torch.equal(out.isnan(), want.out.isnan())
    assert torch.equal(lse.isnan(), want.lse.isnan())
    torch.testing.assert_close(out[:, :, :2], want.out[:, :, :2], rtol=1e-3, atol=1e-5, equal_nan=True)


def _coded(x: Tensor) -> tuple[Tensor, Tensor]:
    return Coder(*PEAKS["int8"], x.device).encode(x)
