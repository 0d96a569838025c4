"""Laws of the 8-bit arithmetic: half a step, exact integers, non-finite rows, zero rows, the compiler's absence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ispa_deploy.errors import InputError
from ispa_deploy.native import elementwise
from quant import kernels, kernels_cpu
from quant.kernels import Kernel, kernel_for, refusal
from quant.kernels_cpu import AVX2, INT_MM, ONEDNN
from quant.primitives import (
    HIGH,
    WIDE_MAX,
    ZERO_POINT,
    dequantise,
    dequantise_wide,
    int_matmul,
    join_wide,
    quantise_rows,
    quantise_weight,
    quantise_wide_rows,
    sqnr_db,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_round_trip_is_within_half_a_step(dtype: torch.dtype) -> None:
    weight = (torch.randn(48, 130) * torch.logspace(-3, 1, 48)[:, None]).to(dtype)
    codes, scale = quantise_weight(weight)
    assert codes.dtype == torch.int8
    assert scale.shape == (48, 1)
    assert int(codes.to(torch.int16).abs().amax()) == 127
    error = (weight.double() - codes.double() * scale.double()).abs()
    assert bool((error <= 0.5 * scale.double() * (1 + 1e-5)).all())
    torch.testing.assert_close(scale, weight.float().abs().amax(1, keepdim=True) / 127, rtol=0, atol=0)


def test_weight_rounds_half_to_even() -> None:
    codes, _ = quantise_weight(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("unsigned", [False, True])
def test_row_round_trip_is_within_half_a_step(unsigned: bool) -> None:
    x = torch.randn(40, 64) * torch.logspace(-20, 10, 40)[:, None]
    codes, scale = quantise_rows(x, unsigned=unsigned)
    assert codes.dtype == (torch.uint8 if unsigned else torch.int8)
    error = (x.double() - dequantise(codes, scale).double()).abs()
    assert bool((error <= 0.5 * scale.double() * (1 + 1e-4)).all())


@pytest.mark.parametrize("unsigned", [False, True])
def test_a_wide_code_is_two_of_one_byte_and_within_half_a_step(unsigned: bool) -> None:
    x = torch.randn(10, 300) * torch.logspace(-30, 30, 10)[:, None]
    x[4], x[5, 1], x[6, 0] = 0.0, math.nan, -math.inf
    x[7] = torch.linspace(-1, 1, 300)  # both ends of the range
    codes, scale = quantise_wide_rows(x, unsigned=unsigned)
    assert codes.dtype == (torch.uint8 if unsigned else torch.int8)
    assert codes.shape == (10, 600)
    assert scale.isnan().flatten().tolist() == [row in (5, 6) for row in range(10)]
    finite = ~scale.isnan().flatten()
    high, low = (codes.int() - (ZERO_POINT if unsigned else 0))[finite].chunk(2, 1)
    assert (int(high.min()), int(high.max())) == (-127, 127)
    assert (high * HIGH + low).abs().max() == WIDE_MAX
    assert not high[4].any()
    assert not low[4].any()
    assert ((dequantise_wide(codes, scale) - x)[finite].abs() <= 0.502 * scale[finite]).all()


def test_products_of_wide_codes_are_joined_exactly() -> None:
    codes, scale = quantise_wide_rows(torch.randn(6, 40))
    weight, bias = torch.randint(-127, 128, (5, 40), dtype=torch.int8), torch.randn(5)
    got = join_wide(int_matmul(codes.view(12, 40), weight), scale, bias)
    want = (dequantise_wide(codes, scale).double() @ weight.double().t() + bias).float()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


def test_zero_rows_stay_zero() -> None:
    for codes, scale in (quantise_weight(torch.zeros(3, 5)), quantise_rows(torch.zeros(3, 5), unsigned=True)):
        assert bool(torch.isfinite(scale).all())
        assert bool((dequantise(codes, scale) == 0).all())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_weight_is_named(poison: float) -> None:
    weight = torch.randn(4, 8)
    weight[2, 3] = poison
    with pytest.raises(InputError, match=r"blocks\.0\.o\.weight: 1 of 4 rows"):
        quantise_weight(weight, "blocks.0.o.weight")


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_row_has_no_scale(poison: float) -> None:
    x = torch.randn(4, 8)
    x[1, 0] = poison
    assert torch.isnan(quantise_rows(x)[1]).flatten().tolist() == [False, True, False, False]


def test_sqnr_of_a_gaussian_weight_matches_its_arithmetic() -> None:
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    codes, scale = quantise_weight(weight)
    expected = 10 * math.log10(1 / float((scale.double().square() / 12).mean()))  # uniform noise of one step
    assert sqnr_db(weight, dequantise(codes, scale)) == pytest.approx(expected, abs=0.2)
    assert expected > 38
    assert sqnr_db(weight, weight) == math.inf
    assert sqnr_db(weight, torch.zeros_like(weight)) == pytest.approx(0)


@pytest.mark.parametrize("kernel", [ONEDNN, AVX2, INT_MM], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (1, 512, 33), (17, 31, 5), (40, 257, 96), (130, 64, 1)])
def test_kernel_equals_int64(kernel: Kernel, m: int, k: int, n: int) -> None:
    if (why := refusal(kernel, "cpu")) is not None:
        pytest.skip(why)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    weight[0] = -128
    codes = torch.randint(-128, 128, (m, k), dtype=torch.int16)
    codes[0] = -128
    stored = (codes + 128).to(torch.uint8) if kernel.unsigned else codes.to(torch.int8)
    packed, ones = kernel.pack(weight), torch.ones(n)
    got = kernel.multiply(stored, torch.ones(m, 1), packed, ones, None, torch.float32)
    assert torch.equal(got.to(torch.int64), int_matmul(stored, weight))
    assert torch.equal(int_matmul(stored, weight), (codes.double() @ weight.double().t()).to(torch.int64))
    assert torch.equal(kernel.unpack(packed), weight)


def test_an_inexact_kernel_is_refused_and_the_stand_in_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Saturating(type(INT_MM)):  # type: ignore[misc]
        """int16 saturation, as a processor without VNNI multiplies."""

        def multiply(self, *operands: object) -> torch.Tensor:
            return super().multiply(*operands).clamp(-(2**15), 2**15 - 1)

    broken = Saturating("saturating")
    assert refusal(broken, "cpu") == "not exact on this processor"
    monkeypatch.setattr(kernels, "candidates", lambda family, device_type: (broken,))
    with pytest.raises(InputError, match=r"saturating refused, not exact on this processor.*allow the fallback"):
        kernel_for(CPU, 8, 8)
    chosen = kernel_for(CPU, 8, 8, allow_fallback=True)
    assert (chosen.name, chosen.exact) == ("simulated", False)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("m", [1, 127, 300])
@pytest.mark.parametrize("factor", [None, torch.exp2(torch.arange(50) % 9 - 4.0)])
def test_eager_passes_equal_the_plain_ones(factor: Tensor | None, unsigned: bool, m: int) -> None:
    x = (torch.randn(m, 50) * 3).bfloat16()
    x[0, 0] = math.nan
    codes, scale = kernels_cpu._codes_eager(x, factor, unsigned)
    want_codes, want_scale = quantise_rows(x, factor, unsigned=unsigned)
    assert torch.equal(codes[1:], want_codes[1:])
    torch.testing.assert_close(scale, want_scale, rtol=0, atol=0, equal_nan=True)
    product, bias = torch.randn(m, 50), torch.randn(50)
    for dtype in (torch.float32, torch.bfloat16):
        want = (product * scale + bias).to(dtype)
        got = kernels_cpu._rescale_eager(product.clone(), scale, bias, dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_without_a_compiler_large_passes_run_eagerly_and_say_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(function: object) -> object:
        raise RuntimeError("no C++ compiler found\nlong trace")

    monkeypatch.setattr(kernels_cpu, "_compile", no_compiler)
    monkeypatch.setattr(kernels_cpu.elementwise, "applies", lambda *_, **__: False)  # as where no C kernel runs
    fresh = kernels_cpu._Accelerated(kernels_cpu._codes, kernels_cpu._codes_eager)
    monkeypatch.setattr(kernels_cpu, "_QUANTISE", fresh)
    monkeypatch.setattr(elementwise, "library", lambda: None)  # whose passes need no compiling by torch
    assert kernels_cpu.compile_note() is None
    x = torch.randn(kernels_cpu.COMPILE_FROM // 512, 512)
    codes, scale = ONEDNN.quantise(x)
    want_codes, want_scale = quantise_rows(x, unsigned=True)
    assert torch.equal(codes, want_codes)
    assert torch.equal(scale, want_scale)
    note = kernels_cpu.compile_note()
    assert note is not None
    assert "no C++ compiler found" in note
    assert "\n" not in note


def test_small_passes_never_ask_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = kernels_cpu._Accelerated(kernels_cpu._codes, kernels_cpu._codes_eager)
    monkeypatch.setattr(kernels_cpu, "_QUANTISE", fresh)
    monkeypatch.setattr(elementwise, "library", lambda: None)  # whose passes need no compiling by torch
    ONEDNN.quantise(torch.randn(75, 256))
    assert fresh.compiled is None
    assert fresh.failure is None


@pytest.mark.slow
def test_compiled_passes_give_the_same_bits() -> None:
    """Skips where nothing can be compiled; slow because a cold compiler takes half a minute."""
    passes = kernels_cpu._Accelerated(kernels_cpu._codes, kernels_cpu._codes_eager, threshold=0)
    rescales = kernels_cpu._Accelerated(kernels_cpu.rescale, kernels_cpu._rescale_eager, threshold=0)
    x, product, bias = torch.randn(150, 256).bfloat16(), torch.randn(150, 64).bfloat16(), torch.randn(64)
    for unsigned, factor in ((True, None), (False, torch.exp2(torch.arange(256) % 9 - 4.0)), (False, None)):
        codes, scale = passes(x, factor, unsigned)
        want_codes, want_scale = passes.eager(x, factor, unsigned)
        assert torch.equal(codes, want_codes)
        assert torch.equal(scale, want_scale)
        got = rescales(product, scale, bias, torch.bfloat16)
        assert torch.equal(got, rescales.eager(product.clone(), scale, bias, torch.bfloat16))
    if passes.failure or rescales.failure:
        pytest.skip(str(passes.failure or rescales.failure))
