"""Laws of every scheme: its error floor against float64, special rows, its state; and the packages' own layers."""

from __future__ import annotations

import copy
import importlib.util
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ispa_deploy.delta import Delta
from ispa_deploy.errors import InputError
from quant import kernels, kernels_cpu, kernels_cuda, kernels_float8
from quant.interchange import from_bitsandbytes, from_torchao, to_bitsandbytes, to_torchao
from quant.kernels import candidates, kernel_for, refusal, resident_count, runs
from quant.kernels_packages import TORCHAO
from quant.kernels_stored import StoredKernel
from quant.layers import LAYERS, Fp8Linear, StaticInt8Linear
from quant.linear import Int8Linear, QuantisedLinear
from quant.primitives import FLOAT8, FLOAT8_MAX, dequantise, quantise_fixed, quantise_rows_fp8, quantise_weight_fp8
from quant.schemes import SCHEMES, LayerKind

# Both packages warn about themselves when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore")

K, N = 320, 208
# Relative L2 error on Gaussian rows, twice what the number of bits gives: 8 evenly spaced bits, e4m3's 3 of mantissa.
ERROR = {"int8": 1.6e-2, "int8-wide": 1.2e-2, "int8-static": 2.5e-2, "fp8": 5e-2, "bnb": 1.6e-2}
CPU = torch.device("cpu")


def needs_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.double()).norm() / want.double().norm())


def exact(linear: nn.Linear, x: Tensor) -> Tensor:
    y = x.double() @ linear.weight.detach().double().t()
    return y if linear.bias is None else y + linear.bias.detach().double()


def make(kind: LayerKind, linear: nn.Linear, amax: float = 5.0) -> QuantisedLinear:
    """The kind's layer, on a stand-in where its kernels do not run."""
    if kind == "int8-static":
        return StaticInt8Linear.calibrated(linear, amax)
    layer = LAYERS[kind].from_float(linear)
    layer.allow_fallback = True
    return layer


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_error_floor_against_float64(kind: LayerKind, dtype: torch.dtype, bias: bool) -> None:
    linear = nn.Linear(K, N, bias=bias)
    x = torch.randn(2, 40, K).to(dtype)
    layer = make(kind, linear, float(x.abs().max()))
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (2, 40, N)
    assert 1e-4 < relative(y, exact(linear, x)) < ERROR[kind]
    assert layer.calls == 1


@pytest.mark.parametrize("kind", LAYERS)
def test_zero_rows_give_the_bias_exactly(kind: LayerKind, linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight[5] = 0
        linear.bias.copy_(linear.bias.half())  # bitsandbytes adds it in float16
    x = torch.randn(9, K)
    x[2] = 0
    y = make(kind, linear)(x)
    assert torch.equal(y[2], linear.bias.detach())
    assert torch.equal(y[:, 5], linear.bias.detach()[5].expand(9))


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "int8-static"])
def test_outliers_hurt_their_own_row_alone(kind: LayerKind, linear: nn.Linear) -> None:
    x = torch.randn(6, K)
    layer = make(kind, linear)
    clean = layer(x)
    x[3, 7] = 1e4
    y, want = layer(x), exact(linear, x)
    others = [0, 1, 2, 4, 5]
    assert torch.equal(y[others], clean[others])
    # Of the row with the outlier: its step is 1e4 / 127, so what is left is the outlier's own column.
    assert bool(y[3].isfinite().all())
    assert relative(y[3], want[3]) < 0.1


@pytest.mark.parametrize("kind", LAYERS)
def test_outlying_weights_hurt_their_own_output_alone(kind: LayerKind, linear: nn.Linear) -> None:
    x = torch.randn(6, K)
    clean = make(kind, linear)(x)
    with torch.no_grad():
        linear.weight[3, 7] = 1e4
    y, want = make(kind, linear)(x), exact(linear, x)
    others = [column for column in range(N) if column != 3]
    assert torch.equal(y[:, others], clean[:, others])
    assert relative(y[:, 3], want[:, 3]) < 0.05


def test_a_range_calibrated_on_an_outlier_leaves_ordinary_rows_to_the_bias(linear: nn.Linear) -> None:
    """One step is 1e4 / 127 = 79, and what is smaller than half of it is 0: right for the outlier, useless otherwise,
    finite for both."""
    x = torch.randn(6, K)
    x[3, 7] = 1e4
    y, want = make("int8-static", linear, 1e4)(x), exact(linear, x)
    assert torch.equal(y[[0, 1, 2, 4, 5]], linear.bias.detach().expand(5, N))
    assert relative(y[3], want[3]) < 0.1


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("mode", ["side", "requant", "fold"])
def test_special_rows_with_a_delta(kind: LayerKind, mode: str, linear: nn.Linear) -> None:
    """Zeros give the moved bias; what is not finite never comes out as a number, in any mode; others are alone."""
    with torch.no_grad():
        linear.bias.copy_(linear.bias.half())
    layer, x = make(kind, linear), torch.randn(6, K)
    delta = Delta(0.02 * torch.randn(N, K), torch.randn(N).half().float())
    layer.set_delta(delta, mode)
    x[1] = 0
    clean = layer(x)
    assert delta.bias is not None
    torch.testing.assert_close(clean[1], linear.bias.detach() + delta.bias, rtol=2e-3, atol=2e-3)
    for poison in (math.nan, math.inf, -math.inf):
        x[4, 7] = poison
        y = layer(x)
        assert not bool(y[4].isfinite().any())
        assert torch.equal(y[[0, 1, 2, 3, 5]], clean[[0, 1, 2, 3, 5]])


def test_a_static_scale_saturates_outliers(linear: nn.Linear) -> None:
    x = torch.randn(6, K)
    x[3, 7] = 1e4
    clipped = x.clamp(-5, 5)
    layer = make("int8-static", linear, 5.0)
    assert torch.equal(layer(x), layer(clipped))
    assert relative(layer(x), exact(linear, clipped)) < ERROR["int8-static"]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_non_finite_row_is_nan_and_alone(
    kind: LayerKind, poison: float, dtype: torch.dtype, linear: nn.Linear
) -> None:
    layer, x = make(kind, linear), torch.randn(6, K).to(dtype)
    clean = layer(x)
    x[2, 7] = poison
    y = layer(x)
    assert bool(y[2].isnan().all())
    assert torch.equal(y[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])
    assert bool(layer(x[2:3]).isnan().all())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_non_finite_weight_is_refused(kind: LayerKind, linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight[3, 3] = math.inf
    with pytest.raises(InputError, match="1 of 208 rows hold NaN or Inf"):
        make(kind, linear)


@pytest.mark.parametrize("kind", LAYERS)
def test_few_and_no_rows(kind: LayerKind, linear: nn.Linear) -> None:
    layer = make(kind, linear)
    assert layer(torch.randn(0, K)).shape == (0, N)
    x = torch.randn(K)
    assert relative(layer(x), exact(linear, x)) < 1.5 * ERROR[kind]


@pytest.mark.parametrize("kind", LAYERS)
def test_state_survives_moves_copies_and_loading(kind: LayerKind, linear: nn.Linear) -> None:
    layer, x = make(kind, linear), torch.randn(7, K)
    want, state = layer(x), layer.state_dict()
    assert state["weight"].dtype == LAYERS[kind].code_dtype
    assert torch.equal(copy.deepcopy(layer)(x), want)
    other = LAYERS[kind](K, N, device="meta")
    other.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    other.allow_fallback = True
    assert torch.equal(other(x), want)
    other.to(torch.float16).to(torch.float32)
    for name, tensor in other.state_dict().items():
        if name != "bias":
            assert tensor.dtype == state[name].dtype
            assert torch.equal(tensor.view(torch.int8), state[name].view(torch.int8))


@pytest.mark.parametrize("kind", ["int8-static", "int8-wide", "fp8"])
def test_whole_graph_agrees(kind: LayerKind, linear: nn.Linear) -> None:
    torch._dynamo.reset()
    layer, x = make(kind, linear), torch.randn(12, K)
    layer.prepare()
    want = layer(x)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert layer.calls == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_activations_leave_the_weights_error_alone(dtype: torch.dtype, linear: nn.Linear) -> None:
    """Against the layer's own weight in float64, where 8-bit activations leave a hundredth."""
    x = (torch.randn(150, K) * torch.logspace(-3, 3, 150)[:, None]).to(dtype)
    x[7, 3] = 1e4
    errors = {}
    for kind in ("int8", "int8-wide"):
        layer = LAYERS[kind].from_float(linear)
        want = x.double() @ layer.reference_weight().double().t() + linear.bias.detach().double()
        errors[kind] = relative(layer(x), want)
    assert errors["int8-wide"] < (1e-4 if dtype == torch.float32 else 3e-3) < errors["int8"]


def test_a_wide_layer_names_both_products_and_shares_no_codes_with_a_narrow_one(linear: nn.Linear) -> None:
    wide, narrow = (LAYERS[kind].from_float(linear) for kind in ("int8-wide", "int8"))
    x = torch.randn(5, K)
    assert wide.shared(x, [narrow]) is x
    rows = wide.shared(x, [LAYERS["int8-wide"].from_float(linear)])
    assert torch.equal(wide(rows), wide(x))
    assert wide.kernel_name.endswith("16-bit activations in two products")
    assert wide.calls == 2
    assert torch.equal(wide.codes(), narrow.codes())
    torch.testing.assert_close(wide.multiplied(x), x, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int8-static"])
def test_a_layer_widens_its_activations_and_narrows_them_again(
    kind: LayerKind, dtype: torch.dtype, linear: nn.Linear
) -> None:
    """On the same packed weight: results are a wide layer's bit for bit, and its own again afterwards."""
    layer, wide, x = make(kind, linear), LAYERS["int8-wide"].from_float(linear), torch.randn(300, K).to(dtype)
    before, held = layer(x), resident_count()
    assert layer.set_wide(True)
    assert torch.equal(layer(x), wide(x))
    assert layer.shared(x, [make("int8", linear)]) is x
    torch.testing.assert_close(layer.multiplied(x), x.float(), rtol=1e-3, atol=2e-3)
    assert not layer.set_wide(False)
    assert torch.equal(layer(x), before)
    assert (layer.calls, layer.wide_calls) == (3, 1)
    assert resident_count() == held + 1, "that of `wide` alone"
    assert layer.nbytes == make(kind, linear).nbytes
    delta = Delta(torch.randn_like(linear.weight.detach()) * 0.01)
    layer.set_delta(delta, "requant")
    layer.set_wide(True)
    corrected = x.double() @ layer.reference_weight().add(delta.dense()).double().t() + linear.bias.detach().double()
    assert relative(layer(x), corrected) < ERROR["int8-wide"]
    layer.set_wide(False)
    layer.set_delta(None)
    assert (layer.calls, layer.wide_calls) == (4, 2)
    assert torch.equal(copy.deepcopy(layer)(x), before)


@pytest.mark.parametrize("kind", ["int8-wide", "fp8", "bnb"])
def test_layers_that_cannot_widen_say_so_and_stay(kind: LayerKind, linear: nn.Linear) -> None:
    if kind == "bnb":
        needs_bitsandbytes()
    layer, x = make(kind, linear), torch.randn(5, K)
    before = layer(x)
    assert not layer.set_wide(True)
    assert torch.equal(layer(x), before)


def test_static_steps_are_the_calibrated_ones() -> None:
    x, step = torch.tensor([[0.0, 1.0, -1.0, 200.0, -200.0]]), torch.tensor([0.5])
    codes, scale = quantise_fixed(x, step, unsigned=True)
    assert codes.tolist() == [[128, 130, 126, 255, 1]]
    assert scale.tolist() == [[0.5]]
    codes, _ = quantise_fixed(x, step)
    assert codes.tolist() == [[0, 2, -2, 127, -127]]


@pytest.mark.parametrize("amax", [math.nan, math.inf, -1.0])
def test_bad_ranges_are_refused(amax: float, linear: nn.Linear) -> None:
    with pytest.raises(InputError, match="calibrated range"):
        StaticInt8Linear.calibrated(linear, amax)
    assert torch.equal(StaticInt8Linear.calibrated(linear, 0.0)(torch.zeros(1, K))[0], linear.bias.detach()), (
        "a layer that only ever saw zeros"
    )


def test_e4m3_codes_are_the_nearest_numbers() -> None:
    grid = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()  # every finite magnitude
    assert grid.max() == FLOAT8_MAX
    weight = torch.randn(20, 50)
    codes, scale = quantise_weight_fp8(weight)
    nearest = (weight / scale).abs()[..., None].sub(grid).abs().amin(-1)
    assert torch.equal(((weight / scale) - codes.float()).abs(), nearest)
    assert torch.allclose(scale[:, 0] * FLOAT8_MAX, weight.abs().amax(1))
    rows, steps = quantise_rows_fp8(weight)
    assert relative(dequantise(rows, steps), weight) < 0.04


# Where a scheme does not run


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what lacks without a GPU")
def test_fp8_on_a_cpu_names_device_and_remedy(linear: nn.Linear) -> None:
    layer = Fp8Linear.from_float(linear)
    message = r"fp8 linear of 208 x 320 on device 'cpu': .*compute capability 8\.9.*w8a8-int8.*allow the fallback"
    with pytest.raises(InputError, match=message) as caught:
        layer(torch.randn(2, K))
    assert "\n" not in str(caught.value)
    assert not runs("fp8", "cpu")
    layer.allow_fallback = True
    layer(torch.randn(2, K))
    assert (layer.kernel_name, layer.exact) == ("simulated fp8", False)


def test_without_bitsandbytes_the_message_says_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr("quant.kernels_packages.import_module", missing)
    refusal.cache_clear()
    with pytest.raises(InputError, match=r"bnb linear of 16 x 32 on device 'cpu'.*pip install 'bitsandbytes"):
        kernel_for(CPU, 16, 32, "bnb")
    assert kernel_for(CPU, 16, 32, "bnb", allow_fallback=True).name == "simulated"
    refusal.cache_clear()


def test_the_float8_stand_in_is_never_a_candidate() -> None:
    for family in kernels._NEEDS:
        for device in ("cpu", "cuda"):
            assert all(kernel.exact for kernel in candidates(family, device))
            assert not kernels.stand_in(family, device).exact
    assert kernels_float8.SIMULATED.name.startswith("simulated")


# Which kernel a CUDA device gets, asked without one


@pytest.mark.parametrize(
    ("family", "shape", "refused", "chosen"),
    [
        ("int8", (1536, 1536), (), kernels_cuda.TRITON),
        ("int8", (1536, 1536), (kernels_cuda.TRITON,), kernels_cuda.INT_MM),
        ("int8", (70, 33), (), kernels_cuda.TRITON),
        ("int8", (70, 33), (kernels_cuda.TRITON,), TORCHAO),  # `_int_mm` takes eights alone
        ("int8-static", (1536, 1536), (kernels_cuda.TRITON,), kernels_cuda.INT_MM),
        ("fp8", (1536, 8960), (), kernels_float8.SCALED_MM),
    ],
)
def test_cuda_gets_the_fastest_kernel_that_is_right(
    family: kernels.Family, shape: tuple[int, int], refused: tuple[object, ...], chosen: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(kernels, "refusal", lambda kernel, _: "not here" if kernel in refused else None)
    assert kernel_for(torch.device("cuda"), *shape, family) is chosen


@pytest.mark.parametrize("shape", [(1536, 1544), (1544, 1536)])
def test_fp8_takes_sixteens_and_says_so_otherwise(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "refusal", lambda *_: None)
    with pytest.raises(InputError, match=f"fp8 linear of {shape[0]} x {shape[1]} on device 'cuda'"):
        kernel_for(torch.device("cuda"), *shape, "fp8")
    assert kernel_for(torch.device("cuda"), *shape, "fp8", allow_fallback=True) is kernels_float8.SIMULATED


@dataclass(frozen=True)
class _OffByOne(StoredKernel):
    """Right but for one sum."""

    def multiply(
        self, codes: Tensor, scale: Tensor, packed: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        y = codes.double() @ packed.double().t()
        y[-1, -1] += 1
        return (y * scale * column).to(dtype)


def test_a_kernel_that_is_wrong_once_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = _OffByOne("wrong")
    assert refusal(wrong, "cpu") == "not exact on this processor"
    assert refusal(kernels_cpu.INT_MM, "cpu") is None
    monkeypatch.setattr(kernels_cpu, "KERNELS", (wrong, kernels_cpu.INT_MM))
    assert kernel_for(CPU, 16, 32) is kernels_cpu.INT_MM
    assert "wrong refused, not exact" in kernels.describe("cpu")


# Other packages


def test_torchao_runs_our_codes(linear: nn.Linear) -> None:
    if (why := refusal(TORCHAO, "cpu")) is not None:
        pytest.skip(why)
    layer, x = Int8Linear.from_float(linear), torch.randn(30, K)
    layer.prepare(TORCHAO)
    assert relative(layer(x), exact(linear, x)) < ERROR["int8"]
    assert layer.kernel_name == "int8 torchao"
    assert layer.calls == 1
    x[3, 3] = math.nan
    assert layer(x).isnan().all(dim=1).nonzero().flatten().tolist() == [3]


def test_torchao_layers_come_and_go_exactly(linear: nn.Linear) -> None:
    """torchao's own codes reach -128: it divides by 127.5."""
    torchao = pytest.importorskip("torchao.quantization")
    theirs = copy.deepcopy(linear)
    config = torchao.Int8DynamicActivationInt8WeightConfig(version=2, set_inductor_config=False)
    torchao.quantize_(theirs, config)
    ours = from_torchao(theirs)
    assert int(ours.codes().min()) == -128
    x = torch.randn(50, K)
    assert relative(ours(x), theirs(x).detach()) < 1.2e-2
    back = to_torchao(ours, torch.float32)
    assert torch.equal(back.weight.qdata, theirs.weight.qdata)
    assert torch.equal(back.weight.scale, theirs.weight.scale)
    assert torch.equal(back(x), theirs(x))
    with pytest.raises(InputError, match="expected torchao's Int8Tensor"):
        from_torchao(linear)


def test_bitsandbytes_runs_our_codes(linear: nn.Linear) -> None:
    needs_bitsandbytes()
    if (why := refusal(candidates("bnb", "cpu")[0], "cpu")) is not None:
        pytest.skip(why)
    layer, x = LAYERS["bnb"].from_float(linear), torch.randn(30, K)
    y = layer(x)
    assert layer.kernel_name == "int8 bitsandbytes"
    assert layer.exact
    theirs = to_bitsandbytes(Int8Linear.from_float(linear), torch.float16)
    assert torch.equal(y, theirs(x.half()).float())
    x[4, 4] = 1e5  # beyond float16
    assert layer(x).isnan().all(dim=1).nonzero().flatten().tolist() == [4]


def test_bitsandbytes_layers_come_and_go(linear: nn.Linear) -> None:
    needs_bitsandbytes()
    ours = Int8Linear.from_float(linear)
    back = from_bitsandbytes(to_bitsandbytes(ours, torch.float32))
    assert torch.equal(back.codes(), ours.codes())
    ulps = (back.weight_scale.view(torch.int32) - ours.weight_scale.view(torch.int32)).abs().max()
    assert int(ulps) <= 1
    with pytest.raises(InputError, match="without int8 codes"):
        from_bitsandbytes(linear)


def test_every_scheme_names_a_layer() -> None:
    assert {scheme.layer for scheme in SCHEMES.values()} == {"float", *LAYERS}
