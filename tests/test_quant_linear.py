"""Laws of the int8 linear layer: its error, its delta modes, its state, special rows, the compiled form."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from torch import Tensor, nn

from ispa_deploy.delta import Delta, DeltaTarget
from ispa_deploy.errors import InputError
from ispa_deploy.linear import shared_input
from ispa_deploy.regions import recording
from quant.kernels import QuantisedRows, refusal, resident_count
from quant.kernels_cpu import INT_MM, KERNELS, ONEDNN, SIMULATED
from quant.layers import StaticInt8Linear
from quant.linear import Int8Linear

K, N = 320, 200


def relative(got: Tensor, want: Tensor) -> float:
    want = want.detach().double()
    return float((got.detach().double() - want).norm() / want.norm())


def exact(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N)


@pytest.fixture
def layer(linear: nn.Linear) -> Int8Linear:
    return Int8Linear.from_float(linear)


def a_delta(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> Delta:
    return Delta((torch.randn(N, K) * 0.03).to(dtype), torch.randn(N) if bias else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kernel", [*KERNELS, SIMULATED], ids=lambda kernel: kernel.name)
def test_error_against_float64(linear: nn.Linear, kernel: object, dtype: torch.dtype) -> None:
    if (why := refusal(kernel, "cpu")) is not None:  # type: ignore[arg-type]
        pytest.skip(why)
    layer = Int8Linear.from_float(linear)
    layer.prepare(kernel)  # type: ignore[arg-type]
    x = (torch.randn(2, 37, K) * (1 + 5 * torch.rand(K))).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (2, 37, N)
    assert relative(y, exact(linear.weight, linear.bias, x)) <= 2e-2
    assert layer.calls == 1
    assert layer.kernel_name == kernel.name  # type: ignore[attr-defined]


def test_without_bias_and_from_bfloat16() -> None:
    linear = nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    x = torch.randn(50, K).bfloat16()
    assert relative(Int8Linear.from_float(linear)(x), exact(linear.weight, None, x)) <= 2e-2


@pytest.mark.parametrize("shape", [(1, K), (K,), (0, K), (2, 0, K)])
def test_few_rows(layer: Int8Linear, linear: nn.Linear, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], N)
    if x.numel():
        assert relative(y, exact(linear.weight, linear.bias, x)) <= 2e-2


def test_non_contiguous_inputs_equal_contiguous_ones(layer: Int8Linear) -> None:
    for x in (torch.randn(K, 30).t(), torch.randn(30, 2 * K)[:, ::2], torch.randn(3, 10, 4, K).transpose(1, 2)):
        assert torch.equal(layer(x), layer(x.contiguous()))


def test_weights_given_as_transposed_views(linear: nn.Linear) -> None:
    transposed = nn.Linear(K, N)
    transposed.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    transposed.bias = linear.bias
    x = torch.randn(20, K)
    assert torch.equal(Int8Linear.from_float(transposed)(x), Int8Linear.from_float(linear)(x))


def test_zero_rows_give_the_bias(layer: Int8Linear, linear: nn.Linear) -> None:
    assert torch.equal(layer(torch.zeros(3, K)), linear.bias.detach().expand(3, N))
    with torch.no_grad():
        linear.weight[5] = 0
    y = Int8Linear.from_float(linear)(torch.randn(9, K))
    assert torch.equal(y[:, 5], linear.bias.detach()[5].expand(9))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_non_finite_row_is_nan_and_alone(layer: Int8Linear, poison: float, dtype: torch.dtype) -> None:
    x = torch.randn(6, K).to(dtype)
    clean = layer(x)
    x[2, 7] = poison
    y = layer(x)
    assert bool(y[2].isnan().all())
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[others], clean[others])


def test_shared_quantisation_changes_nothing(linear: nn.Linear) -> None:
    q, k = Int8Linear.from_float(linear), Int8Linear.from_float(nn.Linear(K, 77))
    x = torch.randn(2, 11, K).bfloat16()
    rows = q.quantise(x)
    assert torch.equal(q(rows), q(x))
    assert torch.equal(k(rows), k(x))
    q.set_delta(a_delta(), "side")
    assert torch.equal(q(rows), q(x))


# The delta seam


def test_it_is_a_delta_target(layer: Int8Linear, linear: nn.Linear) -> None:
    assert isinstance(layer, DeltaTarget)
    assert layer.delta_nbytes() == 0
    assert relative(layer.reference_weight(), linear.weight) < 1e-2


@pytest.mark.parametrize("mode", ["auto", "side", "requant", "fold"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_modes_against_float64(layer: Int8Linear, linear: nn.Linear, mode: str, dtype: torch.dtype) -> None:
    x = torch.randn(40, K).to(dtype)
    before, state = layer(x), layer.state_dict()
    delta = a_delta(dtype)
    layer.set_delta(delta, mode)
    assert delta.bias is not None
    want = exact(linear.weight.double() + delta.weight.double(), linear.bias + delta.bias, x)
    assert relative(layer(x), want) <= 2e-2
    assert relative(before, want) > 0.1
    assert layer.delta_mode == ("requant" if mode == "auto" else mode)
    assert layer.delta_nbytes() >= delta.nbytes
    assert ("float" in layer.kernel_name) == (mode == "fold")

    carried = layer.state_dict()
    assert all(torch.equal(carried[name], state[name]) for name in state), "a delta leaked into the state"
    layer.set_delta(None)
    assert torch.equal(layer(x), before)
    assert layer.delta_nbytes() == 0
    assert layer.delta is None
    assert layer.delta_mode is None


def test_a_second_delta_replaces_the_first(layer: Int8Linear) -> None:
    x, first, second = torch.randn(12, K), a_delta(), a_delta(bias=False)
    layer.set_delta(second)
    want = layer(x)
    layer.set_delta(first)
    layer.set_delta(second)
    assert torch.equal(layer(x), want)


def test_delta_on_a_layer_without_bias() -> None:
    linear = nn.Linear(K, N, bias=False)
    layer, delta, x = Int8Linear.from_float(linear), a_delta(), torch.randn(30, K)
    assert delta.bias is not None
    for mode in ("side", "requant", "fold"):
        layer.set_delta(delta, mode)
        want = exact(linear.weight.double() + delta.weight.double(), delta.bias, x)
        assert relative(layer(x), want) <= 2e-2


def test_bad_deltas_are_refused_and_change_nothing(layer: Int8Linear) -> None:
    x = torch.randn(3, K)
    before = layer(x)
    with pytest.raises(InputError, match="delta mode 'sideways': expected one of auto"):
        layer.set_delta(a_delta(), "sideways")
    with pytest.raises(InputError, match="delta of shape"):
        layer.set_delta(Delta(torch.zeros(K, N)))
    poisoned = a_delta()
    poisoned.weight[3, 3] = math.nan
    for mode in ("side", "requant", "fold"):
        with pytest.raises(InputError, match="delta: 1 of 200 rows hold NaN"):
            layer.set_delta(poisoned, mode)
    assert layer.delta is None
    assert torch.equal(layer(x), before)


def test_calls_are_counted_over_deltas(layer: Int8Linear) -> None:
    x = torch.randn(2, K)
    layer(x)
    layer.set_delta(a_delta(), "requant")
    layer(x)
    layer.set_delta(a_delta(), "fold")
    layer(x)
    layer.set_delta(None)
    layer(x)
    assert layer.calls == 3  # the folded product is no 8-bit call


# State and residence


@pytest.mark.parametrize("assign", [False, True])
def test_state_round_trip_is_bit_equal(layer: Int8Linear, assign: bool) -> None:
    x = torch.randn(21, K).bfloat16()
    y = layer(x)
    assert layer.weight is None, "plain codes stayed beside the packed ones"
    state = layer.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "weight": torch.int8, "weight_scale": torch.float32, "bias": torch.float32,
    }  # fmt: skip
    other = Int8Linear(K, N, device="meta" if assign else None)
    other.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=assign)
    assert torch.equal(other(x), y)
    other.load_state_dict(state, assign=assign)  # over a prepared layer
    assert torch.equal(other(x), y)


def test_codes_of_minus_128_survive(layer: Int8Linear) -> None:
    state = layer.state_dict()
    state["weight"] = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    state["weight"][0] = -128
    layer.load_state_dict(state)
    x = torch.randn(8, K)
    want = exact(state["weight"].double() * state["weight_scale"].double(), state["bias"], x)
    assert relative(layer(x), want) <= 2e-2
    assert torch.equal(layer.codes(), state["weight"])


def test_moving_keeps_float32_scales_and_codes(layer: Int8Linear) -> None:
    x = torch.randn(8, K)
    y, scale = layer(x), layer.weight_scale.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.weight_scale, scale)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert relative(layer(x), y) < 1e-2


def test_copies_are_independent_and_packs_are_freed(linear: nn.Linear) -> None:
    gc.collect()
    x, alive = torch.randn(8, K), resident_count()
    layer = Int8Linear.from_float(linear)
    y = layer(x)
    layer.set_delta(a_delta(), "requant")
    assert resident_count() == alive + 2
    twin, want = copy.deepcopy(layer), layer(x)
    assert resident_count() == alive + 4
    del layer
    gc.collect()
    assert resident_count() == alive + 2
    assert torch.equal(twin(x), want)
    twin.set_delta(None)
    assert resident_count() == alive + 1
    assert torch.equal(twin(x), y)
    del twin
    gc.collect()
    assert resident_count() == alive


def test_regions_are_marked(layer: Int8Linear) -> None:
    seen: list[str] = []

    class Names:
        def region(self, name: str) -> object:
            from contextlib import nullcontext

            seen.append(name)
            return nullcontext()

    layer.prepare(INT_MM)
    layer.set_delta(a_delta(), "side")
    x = torch.randn(4, K)
    silent = layer(x)
    with recording(Names()):  # type: ignore[arg-type]
        assert torch.equal(layer(x), silent)
    # A kernel whose product ends in int32 marks the pass that scales it.
    assert list(dict.fromkeys(seen)) == ["linear.quantise", "linear.gemm", "linear.dequantise", "linear.delta"]


def test_too_many_features_are_refused() -> None:
    with pytest.raises(InputError, match="expected 1 to 65793"):
        Int8Linear(65794, 1, device="meta")


def test_compiled_whole_graph_agrees_and_counts(linear: nn.Linear) -> None:
    """`aot_eager` traces and runs the graph like the default back-end, and needs no C++ compiler."""
    if refusal(ONEDNN, "cpu") is not None:
        pytest.skip("no oneDNN int8 here")
    torch._dynamo.reset()
    layers = [Int8Linear.from_float(linear) for _ in range(10)]  # more than the recompile limit of 8
    x = torch.randn(16, K)
    for layer in layers:
        layer.prepare()
        want = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want, rtol=1e-6, atol=1e-6)
        assert layer.calls == 2


def test_a_graph_prepares_a_layer_that_nobody_prepared(linear: nn.Linear) -> None:
    torch._dynamo.reset()
    layer, x = Int8Linear.from_float(linear), torch.randn(16, K)
    got = torch.compile(layer, backend="eager")(x)
    assert layer.calls == 1
    torch.testing.assert_close(got, layer(x), rtol=1e-6, atol=1e-6)


# One quantisation for layers on one input


def test_layers_that_quantise_alike_share_their_rows(linear: nn.Linear) -> None:
    layers = [Int8Linear.from_float(linear) for _ in range(3)]
    x = torch.randn(2, 9, K).bfloat16()
    want, rows = [layer(x) for layer in layers], shared_input(x, layers)
    assert isinstance(rows, QuantisedRows)
    assert all(torch.equal(layer(rows), y) for layer, y in zip(layers, want, strict=True))
    layers[1].set_delta(a_delta(), "side")
    want[1] = layers[1](x)
    assert torch.equal(layers[1](shared_input(x, layers)), want[1])


def test_layers_that_do_not_quantise_alike_get_the_input_itself(linear: nn.Linear) -> None:
    x, first = torch.randn(9, K), Int8Linear.from_float(linear)
    smooth, folded, simulated = (Int8Linear.from_float(linear) for _ in range(3))
    smooth.pre_quant_scale = torch.full((K,), 2.0)
    folded.set_delta(a_delta(), "fold")
    simulated.prepare(SIMULATED)
    static = [StaticInt8Linear.calibrated(linear, amax) for amax in (4.0, 5.0, 5.0)]
    for other in (linear, smooth, folded, simulated, static[0]):
        assert shared_input(x, (first, other)) is x
        assert shared_input(x, (other, first)) is x
    assert shared_input(x, static[:2]) is x
    assert isinstance(shared_input(x, static[1:]), QuantisedRows)
    before = shared_input(x, (first, Int8Linear.from_float(linear)))
    assert isinstance(before, QuantisedRows)
    first.pre_quant_scale = torch.full((K,), 2.0)  # and what was found before no longer holds
    first.load_state_dict(first.state_dict())
    assert shared_input(x, (first, Int8Linear.from_float(linear))) is x
