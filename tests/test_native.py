"""The C passes against float64, and where they must, bit for bit against the plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ispa_deploy import passes
from ispa_deploy.delta import Delta
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.native import elementwise, library
from ispa_deploy.passes import Norm
from ispa_deploy.rope import Rope, rotate
from quant.kernels_cpu import ONEDNN
from quant.linear import Int8Linear
from quant.primitives import join_wide, quantise_rows, quantise_wide_rows, rescale
from tests.fused import FusedLayer, check_bad_rows, check_layer, check_marks, check_watched
from tests.tiny import SPEC, latents_of, tiny_model, tiny_stream

pytestmark = pytest.mark.skipif(library() is None, reason="no AVX512-BF16 or no C compiler here")
BF16 = torch.bfloat16
ROUNDED = 2.0**-8  # of a bfloat16 result, relative to its size


@pytest.fixture(autouse=True)
def _no_grad() -> object:
    with torch.no_grad():
        yield


def _close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == BF16
    torch.testing.assert_close(got.double(), want, rtol=ROUNDED, atol=ROUNDED * 0.05)


def _norm(x: Tensor, how: Norm) -> Tensor:
    """In float64."""
    wide = F.layer_norm(x.double(), x.shape[-1:], eps=how.eps)
    return wide * (how.scale.double() + how.modulates) + how.shift.double()


@pytest.mark.parametrize("table", [(1, 1, 1, 64), (2, 3, 1, 64), (64,)])
@pytest.mark.parametrize("modulates", [True, False])
def test_residual_norm_and_modulation(table: tuple[int, ...], modulates: bool) -> None:
    x, y = (torch.randn(2, 3, 5, 64).to(BF16) * 3 for _ in range(2))
    gate, scale, shift = (torch.randn(table).to(BF16) for _ in range(3))
    how = Norm(scale, shift, 1e-6, modulates)
    assert elementwise.applies(x, 64)
    _close(passes.norm(x, how), _norm(x, how))
    _close(passes.add(x, y), x.double() + y.double())
    _close(passes.add(x, y, gate), x.double() + gate.double() * y.double())
    total, normed = passes.add_norm(x, y, how, gate)
    _close(total, x.double() + gate.double() * y.double())
    _close(normed, _norm(total, how))  # what is stored is what is normed


def test_a_shared_table_beside_one_for_every_frame() -> None:
    x, y = (torch.randn(1, 3, 4, 32).to(BF16) for _ in range(2))
    gate, scale, shift = torch.randn(1, 3, 1, 32).to(BF16), *torch.randn(2, 32).to(BF16).unbind()
    total, normed = passes.add_norm(x, y, Norm(scale, shift, 1e-6, modulates=False), gate)
    _close(total, x.double() + gate.double() * y.double())
    _close(normed, _norm(total, Norm(scale, shift, 1e-6, modulates=False)))


def test_rms_norm_and_rotation_of_views() -> None:
    wide, weight = torch.randn(2, 6, 192).to(BF16) * 5, torch.rand(64).to(BF16)
    x = wide[..., 64:128]
    want = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    _close(passes.rms_norm(x, weight, 1e-6), want)
    turn = Rope(32, (2, 3)).frames([7])
    heads = x.unflatten(-1, (2, 32))
    pairs = torch.view_as_complex(heads.double().unflatten(-1, (-1, 2)).contiguous())
    _close(rotate(heads, turn), torch.view_as_real(pairs * turn.to(torch.complex128)).flatten(-2))


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_quantisation_and_rescaling_are_the_plain_ones_bit_for_bit(dtype: torch.dtype) -> None:
    x = (torch.randn(70, 96) * torch.logspace(-6, 6, 70)[:, None]).to(dtype)
    x[0], x[1, :48] = 0, x[1, 48:]
    codes, scale = elementwise.quantise(x[:, :48])
    want_codes, want_scale = quantise_rows(x[:, :48], unsigned=True)
    assert torch.equal(codes, want_codes)
    assert torch.equal(scale, want_scale)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[3, 5] = bad
        scale = elementwise.quantise(x)[1]
        assert scale[3].isnan()
        assert scale[[0, 1, 2, 4]].isfinite().all()
    x[3, 5], by = 0, torch.exp2(torch.randint(-6, 7, (96,)).float())
    for got, want in zip(elementwise.quantise(x, by), quantise_rows(x, by, unsigned=True), strict=True):
        assert torch.equal(got, want)
    product, factor, bias = torch.randn(9, 32).to(dtype), torch.rand(9, 1), torch.randn(32)
    for wanted in (None, bias):
        for out in (BF16, torch.float32):
            want = rescale(product, factor, wanted, out)
            assert torch.equal(elementwise.rescale(product.clone(), factor, wanted, out), want)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_codes_of_sixteen_bits_have_the_reference_s_bits_and_are_joined(dtype: torch.dtype) -> None:
    x = (torch.randn(7, 96) * torch.logspace(-20, 20, 7)[:, None]).to(dtype)
    x[1], x[2, 3], x[5, 7] = 0, float("nan"), -float("inf")
    by = torch.exp2(torch.randint(-6, 7, (96,)).float())
    for factor, rows in ((None, x), (by, x), (None, torch.cat([x, x], 1)[:, 48:144])):
        codes, scale = elementwise.quantise_wide(rows, factor)
        want_codes, want_scale = quantise_wide_rows(rows, factor, unsigned=True)
        finite = ~want_scale.isnan().flatten()
        assert torch.equal(scale.isnan(), want_scale.isnan())
        assert torch.equal(scale[finite], want_scale[finite])
        assert torch.equal(codes[finite], want_codes[finite])
    product, scale, bias = torch.randn(14, 32) * 1e6, torch.rand(7, 1), torch.randn(32)
    for wanted in (None, bias):
        y = torch.empty(7, 32, dtype=dtype)
        elementwise.join_wide(product, scale, wanted, y)
        torch.testing.assert_close(y, join_wide(product, scale, wanted).to(dtype), rtol=1e-6, atol=1e-3)


def test_gelu_and_its_quantisation() -> None:
    product, factor, bias = (torch.randn(12, 64) * 20).to(BF16), torch.rand(12, 1), torch.randn(64)
    product[0, 0], product[0, 1] = 3e4, -3e4
    exact = F.gelu(product.double() * factor.double() + bias.double(), approximate="tanh")
    wide = elementwise.rescale(product.clone(), factor, bias, torch.float32, gelu=True)
    torch.testing.assert_close(wide.double(), exact, rtol=2e-6, atol=2e-6)
    codes, scale = elementwise.gelu_quantise(product, factor, bias)
    torch.testing.assert_close(scale.double(), exact.abs().amax(-1, keepdim=True) / 127, rtol=1e-5, atol=0)
    error = (codes.double() - 128) * scale.double() - exact
    assert float((error.abs() / scale.double()).max()) <= 0.501
    by = torch.exp2(torch.randint(-6, 7, (64,)).float())
    codes, scale = elementwise.gelu_quantise(product, factor, bias, by)
    torch.testing.assert_close(scale.double(), (exact * by).abs().amax(-1, keepdim=True) / 127, rtol=1e-5, atol=0)
    assert float((((codes.double() - 128) * scale.double() - exact * by).abs() / scale.double()).max()) <= 0.501
    product[2, 3] = float("nan")
    assert elementwise.gelu_quantise(product, factor, bias)[1].isnan().flatten().nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("table", [(1, 1, 1, 64), (2, 3, 1, 64), (64,)])
@pytest.mark.parametrize("smooth", [False, True])
def test_residual_norm_straight_to_codes(table: tuple[int, ...], smooth: bool) -> None:
    """Of a tensor, of nothing, and of a product that lacks scales and bias: codes of the norm of what was stored."""
    x, product = (torch.randn(2, 3, 5, 64).to(BF16) * 3 for _ in range(2))
    gate, scale, shift = (torch.randn(table).to(BF16) for _ in range(3))
    rows, bias, by = torch.rand(30, 1), torch.randn(64), torch.exp2(torch.randint(-6, 7, (64,)).float())
    exact = product.double() * rows.double().view(2, 3, 5, 1) + bias.double()
    added = {
        None: 0 * exact, product: product.double(), elementwise.Unscaled(product.view(30, 64), rows, bias): exact,
        elementwise.Unscaled(product.view(30, 64), rows, None): exact - bias.double(),
    }  # fmt: skip
    for y, value in added.items():
        given = None if y is None else gate
        how = (given, scale, shift, 1e-6, True)
        total, codes, step = elementwise.residual_norm_quantise(x, y, *how, by if smooth else None)
        _close(total, x.double() + (0 if y is None else gate.double() * value))
        assert torch.equal(total, elementwise.residual_norm(x, y, *how)[0])
        want = _norm(total, Norm(scale, shift, 1e-6)).view(30, 64) * (by.double() if smooth else 1)
        torch.testing.assert_close(step.double(), want.abs().amax(-1, keepdim=True) / 127, rtol=1e-5, atol=0)
        assert float((((codes.double() - 128) * step - want).abs() / step).max()) <= 0.501


def test_rows_of_nothing_and_rows_that_are_not_finite_as_codes() -> None:
    x, shift = torch.randn(1, 1, 6, 64).to(BF16), torch.zeros(64).to(BF16)
    x[0, 0, 0], x[0, 0, 1, 3], x[0, 0, 2, 4] = 2.0, float("nan"), float("inf")
    rows = torch.ones(6, 1)
    rows[3] = float("nan")  # a row whose input was not finite
    y = elementwise.Unscaled(torch.zeros(6, 64).to(BF16), rows, None)
    total, codes, scale = elementwise.residual_norm_quantise(x, y, None, shift, shift, 1e-6, True)
    assert (codes[0] == 128).all()
    assert scale[0] == torch.finfo(torch.float32).tiny
    assert scale.flatten().isnan().tolist() == [False, True, True, True, False, False]
    assert total[0, 0, 3].isnan().all()


def test_a_layer_with_everything_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced on the kernel, whose sums may saturate on an old CPU: fused and apart multiply alike."""
    layer = FusedLayer(ONEDNN, BF16)
    check_layer(layer, monkeypatch)
    check_bad_rows(layer, monkeypatch)
    check_watched(layer, monkeypatch)
    check_marks(layer, monkeypatch)


def _with_weight(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    made = nn.Linear(linear.in_features, linear.out_features)
    made.weight, made.bias = nn.Parameter(weight.detach()), linear.bias
    return made


@pytest.mark.parametrize("smooth", [False, True])
def test_an_8_bit_feed_forward_hands_on_quantised_rows(smooth: bool) -> None:
    """Against float64 no worse than the layers called one by one, counted as run, and not taken while watched."""
    up, down = nn.Linear(64, 96, dtype=BF16), nn.Linear(96, 64, dtype=BF16)
    x = torch.randn(2, 20, 64).to(BF16) * 2
    exact = down.double()(F.gelu(up.double()(x.double()), approximate="tanh"))
    eight = [Int8Linear.from_float(layer) for layer in (up, down)]
    if smooth:
        by = torch.exp2(torch.randint(-3, 4, (96,)).float())
        eight[1] = Int8Linear.from_float(_with_weight(down, down.weight.float() / by))
        eight[1].pre_quant_scale = by
    for layer in eight:
        layer.prepare()
    gelu = nn.GELU(approximate="tanh")
    if eight[0].gelu_into(x, eight[1]) is None:
        pytest.skip("this CPU multiplies eight bits by another kernel")
    before = [layer.calls for layer in eight]
    pending = passes.feed_forward(eight[0], gelu, eight[1], x)
    fused = passes.add(torch.zeros(2, 1, 20, 64, dtype=BF16), pending).view(2, 20, 64)
    assert [layer.calls - count for layer, count in zip(eight, before, strict=True)] == [1, 1]
    apart = eight[1](gelu(eight[0](x)))
    assert fused.dtype == BF16
    assert float((fused - exact).norm()) <= 1.05 * float((apart - exact).norm())
    seen: list[Tensor] = []
    handle = eight[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    watched = passes.feed_forward(eight[0], gelu, eight[1], x)
    handle.remove()
    assert torch.equal(watched, apart)
    torch.testing.assert_close(seen[0], gelu(eight[0](x)), rtol=0, atol=0)
    eight[1].set_delta(Delta(torch.zeros(64, 96)), "side")
    assert eight[0].gelu_into(x, eight[1]) is None


def test_a_bfloat16_feed_forward() -> None:
    up, down, gelu = nn.Linear(64, 96).to(BF16), nn.Linear(96, 64).to(BF16), nn.GELU(approximate="tanh")
    x = torch.randn(2, 20, 64).to(BF16) * 2
    exact = down.double()(F.gelu(up.double()(x.double()), approximate="tanh"))
    up, down = up.to(BF16), down.to(BF16)
    got, plain = passes.feed_forward(up, gelu, down, x), down(gelu(up(x)))
    assert float((got - exact).norm()) <= 1.05 * float((plain - exact).norm())


def test_what_the_passes_leave_alone() -> None:
    x = torch.randn(4, 64)
    assert not elementwise.applies(x, 64)
    assert not elementwise.applies(x.to(BF16), 60)
    assert not elementwise.applies(x.to(BF16)[:0], 64)
    with torch.enable_grad():
        assert not elementwise.applies(x.to(BF16).requires_grad_(), 64)


def test_a_bfloat16_stream_comes_no_further_from_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """C passes and attention against plain PyTorch, both against the same weights in float32."""

    def stream(model: CausalWanDiT, backend: str) -> Tensor:
        return latents_of(tiny_stream(model, policy="full", frames=15, backend=backend))

    narrow = tiny_model(SPEC).to(BF16)
    wide = tiny_model(SPEC)
    wide.load_state_dict({name: value.float() for name, value in narrow.state_dict().items()})
    want, native = stream(wide, "cpu-flash"), stream(narrow, "auto")
    monkeypatch.setattr(elementwise, "library", lambda: None)
    plain = stream(narrow, "cpu-flash")
    assert not torch.equal(native, plain)
    assert float((native - want).norm()) <= 1.1 * float((plain - want).norm())
