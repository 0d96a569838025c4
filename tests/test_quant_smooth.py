"""Laws of smoothing: exact in every dtype where it is folded, exact in the layer where it is not, and worth having."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ispa_deploy.delta import Delta
from ispa_deploy.errors import InputError
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.native import elementwise
from quant.convert import convert_linear, quantise_
from quant.kernels import candidates, quantise, refusal, stand_in
from quant.layers import LAYERS
from quant.linear import QuantisedLinear
from quant.plan import Plan, PlannedLayer
from quant.schemes import SCHEMES, LayerKind
from quant.smooth import FOLDS, NOTHING, Smoothing, columns, factors, smooth_, smoothing
from tests.tiny import SPEC, latents_of, tiny_model, tiny_stream

LINEARS = [f"blocks.{block}.{part}" for block in range(SPEC.layers) for part in (
    *(f"{kind}.{leaf}" for kind in ("self_attn", "cross_attn") for leaf in "qkvo"), "ffn.0", "ffn.2")]  # fmt: skip
SCHEME_OF = {scheme.layer: scheme for scheme in SCHEMES.values()}


def loud(width: int, seed: int = 0) -> Tensor:
    """(K,) magnitudes of channels, a few of them 50 times the others."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.rand(width, generator=draw) + 0.5
    values[torch.randperm(width, generator=draw)[: width // 12]] *= 50
    return values


def model_and_smoothing(mode: str, dtype: torch.dtype = torch.float32) -> tuple[CausalWanDiT, Smoothing]:
    model = tiny_model().requires_grad_(False)
    for name, tensor in model.named_parameters():
        if name.endswith("bias") or "norm3" in name:
            tensor.normal_(0.5, 0.2)
    model.to(dtype)
    weights = {name: model.get_parameter(f"{name}.weight") for name in LINEARS}
    channels = {name: loud(weight.shape[1], index) for index, (name, weight) in enumerate(weights.items())}
    return model, smoothing(mode, channels, {name: columns(weight) for name, weight in weights.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_folding_leaves_every_bit_of_a_stream(dtype: torch.dtype) -> None:
    """Powers of two: nothing is rounded, in no floating dtype, through attention, caches, norms and residuals."""
    model, smooth = model_and_smoothing("fold", dtype)
    want = latents_of(tiny_stream(model, frames=15, policy="full"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = model.blocks[0].self_attn.o.weight
    smooth_(model, smooth)
    assert torch.equal(latents_of(tiny_stream(model, frames=15, policy="full")), want)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    parts = [*FOLDS, *(producer for producer in FOLDS.values())]
    assert {name.split(".", 2)[2].rsplit(".", 1)[0] for name in changed} == set(parts)
    assert torch.equal(old, before["blocks.0.self_attn.o.weight"]), "the old parameter was written to"


def test_factors_are_powers_of_two_that_balance() -> None:
    activations, weights = loud(240), loud(240, 1)
    found = factors(activations, weights, 0.5)
    assert torch.equal(found.log2(), found.log2().round())
    ideal = (weights / activations).sqrt()
    ratio = (found / ideal).log2()
    assert float((ratio - ratio.mean()).abs().max()) <= 0.51 + float((ratio.mean() - ratio.mean().round()).abs())
    # At 1/2 both sides are alike: the ratio of the smoothed maxima does not depend on the channel but for rounding.
    balance = ((activations * found) / (weights / found)).log2()
    assert float(balance.max() - balance.min()) <= 2.01
    assert torch.equal(factors(activations, weights, 0.0), factors(torch.ones(240), weights, 0.0))


def test_dead_channels_keep_their_factor() -> None:
    activations, weights = loud(24), loud(24, 1)
    activations[3], weights[5] = 0, 0
    found = factors(activations, weights)
    assert found[3] == found[5] == 1
    assert torch.equal(factors(torch.zeros(8), torch.ones(8)), torch.ones(8))


def test_linears_on_one_input_share_a_factor_and_folds_are_the_exact_ones() -> None:
    _, smooth = model_and_smoothing("all")
    for block in range(SPEC.layers):
        q, k, v = (smooth.inputs[f"blocks.{block}.self_attn.{leaf}"] for leaf in "qkv")
        assert torch.equal(q, k)
        assert torch.equal(q, v)
        assert not torch.equal(q, smooth.inputs[f"blocks.{block}.ffn.0"])
    folded = {name.split(".", 2)[2] for name in smooth.producers}
    assert folded == set(FOLDS) == {"self_attn.o", "cross_attn.o", "cross_attn.q"}
    _, exact = model_and_smoothing("fold")
    assert set(exact.inputs) == set(exact.producers)
    assert all(smooth.pre_scale(name) is None for name in smooth.producers)
    assert smooth.pre_scale("blocks.0.ffn.2") is not None
    assert set(smooth.folded().inputs) == set(smooth.producers)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_smooths_computes_the_linear_better(kind: LayerKind, bias: bool) -> None:
    """Outlying input channels at small weights: what smoothing is for. e4m3's steps are relative: it gains nothing."""
    torch.manual_seed(0)
    linear, loudness = nn.Linear(240, 96, bias=bias).requires_grad_(False), loud(240)
    with torch.no_grad():
        linear.weight /= loudness.sqrt()
    x = torch.randn(64, 240) * loudness
    want = x.double() @ linear.weight.detach().double().t() + (linear.bias.detach().double() if bias else 0)
    plain, smooth = (layer_of(kind, linear, x, on) for on in (False, True))
    errors = [float((layer(x).double() - want).norm() / want.norm()) for layer in (plain, smooth)]
    assert errors[1] < (1.05 if kind == "fp8" else 0.75) * errors[0]
    assert smooth.pre_quant_scale is not None
    assert smooth.nbytes == plain.nbytes + 4 * 240
    reference = smooth.reference_weight()
    assert float((reference - linear.weight).norm() / linear.weight.norm()) < 0.05


def layer_of(kind: LayerKind, linear: nn.Linear, x: Tensor, on: bool) -> QuantisedLinear:
    smooth = NOTHING
    if on:
        factor = factors(x.abs().amax(0), columns(linear.weight))
        smooth = Smoothing.of({"it": factor}, {})
    holder = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    holder.weight = nn.Parameter(smooth.apply("it.weight", linear.weight.detach()))
    holder.bias = linear.bias
    scale = smooth.pre_scale("it")
    amax = float((x if scale is None else x * scale).abs().max())
    layer, row = convert_linear("it", holder, SCHEME_OF[kind], None, amax, scale)
    assert layer is not None
    assert row.sqnr_db is not None
    layer.allow_fallback = True
    return layer


@pytest.mark.parametrize("mode", ["side", "requant", "fold"])
def test_deltas_of_a_layer_that_smooths(mode: str) -> None:
    torch.manual_seed(1)
    linear, loudness = nn.Linear(240, 96), loud(240)
    x = torch.randn(64, 240) * loudness
    layer = layer_of("int8", linear, x, True)
    before = layer(x)
    delta = Delta(torch.randn(96, 240) * 0.03, torch.randn(96))
    layer.set_delta(delta, mode)
    weight = linear.weight.detach().double() + delta.weight.double()
    want = x.double() @ weight.t() + (linear.bias + delta.bias).detach().double()
    assert float((layer(x).double() - want).norm() / want.norm()) < 2e-2
    layer.set_delta(None)
    assert torch.equal(layer(x), before)


def test_a_fit_to_the_codes_sees_the_input_in_its_own_units() -> None:
    linear, x = nn.Linear(240, 96), torch.randn(64, 240) * loud(240)
    layer = layer_of("int8", linear, x, True)
    assert float((layer.multiplied(x) - x).norm() / x.norm()) < 2e-2


class _Made(TorchDispatchMode):
    """Notes every floating-point tensor of a given size that an operation makes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.operations = size, list[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            views = function.is_view or function in (torch.ops.aten._to_copy.default, torch.ops.aten.detach.default)
            if isinstance(one, Tensor) and one.is_floating_point() and one.numel() == self.size and not views:
                self.operations.append(str(function))
        return made


@pytest.mark.parametrize("kind", ["int8", "int8-static"])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smoothing_takes_place_inside_the_quantiser(
    kind: LayerKind, native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of multiplying first, and no tensor of the activations' size in between: in C and in steps of rows."""
    if not native:
        monkeypatch.setattr(elementwise, "library", lambda: None)
    linear, x = nn.Linear(240, 96), (torch.randn(700, 240) * loud(240)).to(dtype)
    layer = layer_of(kind, linear, x.float(), True)
    assert layer.pre_quant_scale is not None
    layer.prepare()
    rows, plain = layer.quantise(x), layer_of(kind, linear, x.float(), True)
    by, plain.pre_quant_scale = layer.pre_quant_scale, None
    want = plain.quantise(x * by.to(dtype))
    assert torch.equal(rows.codes, want.codes)
    assert torch.equal(rows.scale, want.scale)
    with _Made(x.numel()) as made:
        layer.quantise(x)
    assert made.operations == []


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kernel_multiplies_by_the_factor(kind: LayerKind) -> None:
    """Each that runs here, and its stand-in, against the product taken first."""
    x, by = torch.randn(40, 48) * loud(48), torch.exp2(torch.randint(-6, 7, (48,)).float())
    step = torch.tensor([0.05]) if kind == "int8-static" else None
    for kernel in [*candidates(kind, "cpu"), stand_in(kind, "cpu")]:
        if refusal(kernel, "cpu") is None:
            got, want = kernel.quantise(x, step, by), kernel.quantise(x * by, step)
            for one, other in zip((*got, *quantise(x[:0], kernel, step, by)), (*want, *quantise(x[:0], kernel, step)),
                                  strict=True):  # fmt: skip
                assert torch.equal(one.float(), other.float())


def test_special_rows_of_a_layer_that_smooths() -> None:
    linear = nn.Linear(48, 16)
    x = torch.randn(6, 48) * loud(48)
    x[1] = 0
    for kind in LAYERS:
        layer = layer_of(kind, linear, x.clone(), True)
        y = x.clone()
        y[3, 5] = math.nan
        y[4, 5] = math.inf
        got = layer(y)
        assert bool(got[3:5].isnan().all())
        assert bool(got[[0, 1, 2, 5]].isfinite().all())
        torch.testing.assert_close(got[1], linear.bias.detach(), rtol=1e-3, atol=1e-3)


def test_a_smoothed_model_in_eight_bits_is_still_the_model() -> None:
    model, smooth = model_and_smoothing("all")
    want = latents_of(tiny_stream(model, frames=3, policy="full"))
    report = quantise_(model, SCHEMES["w8a8-int8"], smoothing=smooth)
    got = latents_of(tiny_stream(model, frames=3, policy="full"))
    assert float((got - want).norm() / want.norm()) < 0.05
    assert all(row.sqnr_db is not None and row.sqnr_db > 25 for row in report.rows if row.quantised)


def test_a_layer_that_a_plan_keeps_is_smoothed_only_where_that_is_folded() -> None:
    """A floating-point linear cannot multiply its input: a plan without eight bits leaves every bit of the stream."""
    model, smooth = model_and_smoothing("all")
    want = latents_of(tiny_stream(model, frames=6, policy="full"))
    shape = {name: tuple(model.get_parameter(f"{name}.weight").shape) for name in LINEARS}
    for eight in ((), LINEARS[::3]):
        schemes = {name: "w8a8-int8" if name in eight else "none" for name in LINEARS}
        layers = tuple(PlannedLayer(name, shape[name], 1, schemes[name], {}, "told") for name in LINEARS)
        plan, own = Plan("cpu", 1, "float32", 0.05, (), layers), copy.deepcopy(model)
        quantise_(own, SCHEMES["w8a8-int8"], plan=plan, smoothing=smooth)
        got = latents_of(tiny_stream(own, frames=6, policy="full"))
        assert torch.equal(got, want) if not eight else float((got - want).norm() / want.norm()) < 0.05


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(InputError, match="expected one of none, fold, all"):
        smoothing("some", {}, {})
    with pytest.raises(InputError, match="alpha from 0"):
        smoothing("fold", {}, {}, -1.0)
    assert smoothing("none", {"blocks.0.self_attn.o": torch.ones(3)}, {}) == NOTHING
