"""Corrections of low rank and those fitted on codes: optimum, certificate and what is served, against stacked rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ispa_deploy.absorb.lowrank import Rank, truncate
from ispa_deploy.absorb.solve import Ridge, Solution, solve
from ispa_deploy.absorb.stats import Statistics
from ispa_deploy.delta import Delta
from ispa_deploy.errors import InputError
from ispa_deploy.flags import rank_of
from ispa_deploy.linear import Linear
from quant.convert import quantise_
from quant.linear import Int8Linear
from quant.schemes import SCHEMES
from tests.reference import ridge as dense_ridge
from tests.tiny import latents_of, tiny_model, tiny_stream

ROWS, WIDTH, OUT = 300, 14, 9
EXACT = Ridge(absolute=1e-9)


class _Layer:
    """Rows a with loud and quiet directions, gaps e, and a layer's weight, float64."""

    def __init__(self, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        mix = torch.randn(WIDTH, WIDTH, generator=draw).double() * torch.logspace(0, -2, WIDTH)[:, None]
        self.a = torch.randn(ROWS, WIDTH, generator=draw).double() @ mix + 0.3
        self.e = self.a @ torch.randn(WIDTH, WIDTH, generator=draw).double() + 0.1
        self.e += 0.2 * torch.randn(ROWS, WIDTH, generator=draw).double()
        self.weight = torch.randn(OUT, WIDTH, generator=draw).double()

    def stats(self) -> Statistics:
        stats = Statistics(self.weight, dtype=torch.float64)
        stats.update(self.a, self.e)
        return stats

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Row by row."""
        target = self.e @ self.weight.T
        return float((self.a @ weight.T + (0 if bias is None else bias) - target).square().sum())


def fitted(layer: _Layer, intercept: bool, ridge: Ridge = EXACT) -> Solution:
    return solve(layer.stats(), ridge, intercept=intercept)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("ridge", [EXACT, Ridge(relative=1e-1)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, OUT])
def test_the_certificate_is_the_increase_row_by_row(rank: int, ridge: Ridge, intercept: bool) -> None:
    layer = _Layer()
    whole = fitted(layer, intercept, ridge)
    part = truncate(layer.stats(), whole, Rank(count=rank))
    assert whole.weight is not None
    assert part.weight is not None
    assert part.down is not None
    assert (part.rank, part.weight.shape, part.down.shape) == (rank, (OUT, rank), (rank, WIDTH))
    increase = layer.error(part.weight @ part.down, part.bias) - layer.error(whole.weight, whole.bias)
    assert part.increase == pytest.approx(increase, rel=1e-6, abs=1e-7 * whole.gap)
    assert part.residual == pytest.approx(layer.error(part.weight @ part.down, part.bias), rel=1e-6)
    # The paper's form of it: the eigenvalues left out, and twice the ridge on what they take with them.
    a = layer.a - (layer.a.mean(0) if intercept else 0)
    left = torch.linalg.svdvals(a @ whole.weight.T)[rank:].square().sum()
    ridged = 2 * whole.ridge * (whole.weight - part.weight @ part.down).square().sum()
    assert increase == pytest.approx(float(left + ridged), rel=1e-6, abs=1e-7 * whole.gap)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_no_matrix_of_that_rank_is_better(rank: int) -> None:
    """Against the SVD of ΔW, and against alternating least squares from several starts."""
    layer = _Layer()
    whole = fitted(layer, False)
    assert whole.weight is not None
    part = truncate(layer.stats(), whole, Rank(count=rank))
    assert part.weight is not None
    assert part.down is not None
    ours = layer.error(part.weight @ part.down, None)
    u, s, v = torch.linalg.svd(whole.weight, full_matrices=False)
    assert ours < layer.error(u[:, :rank] * s[:rank] @ v[:rank], None)
    target = layer.e @ layer.weight.T
    for seed in range(3):
        up = torch.randn(OUT, rank, generator=torch.Generator().manual_seed(seed)).double()
        for _ in range(200):
            down = torch.linalg.lstsq(layer.a, target @ torch.linalg.pinv(up.T)).solution.T
            up = torch.linalg.lstsq(layer.a @ down.T, target).solution.T
        assert ours <= layer.error(up @ down, None) * (1 + 1e-6)


def test_a_share_takes_as_few_directions_as_hold_it() -> None:
    layer = _Layer()
    whole, stats = fitted(layer, True), layer.stats()
    kept = [truncate(stats, whole, Rank(count=count)).kept for count in range(1, OUT + 1)]
    assert kept == sorted(kept)
    assert kept[-1] == pytest.approx(1.0)
    for share in (0.5, 0.9, 0.99, 1.0):
        found = truncate(stats, whole, Rank(share=share))
        assert found.kept >= share * (1 - 1e-12)
        assert found.rank == 1 or kept[found.rank - 2] < share


def test_a_correction_of_nothing_has_a_rank_too() -> None:
    layer = _Layer()
    layer.e.zero_()
    found = truncate(layer.stats(), fitted(layer, True), Rank(share=0.99))
    assert (found.rank, found.kept, found.increase) == (1, 1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("many", "'many': expected a number of directions, or auto:0.99"),
        ("auto:x", "'auto:x': expected a number"),
        ("0", "delta rank 0: expected 1 or more"),
        ("auto:1.5", "delta rank auto:1.5: expected a share"),
        ("auto:nan", "delta rank auto:nan: expected a share"),
    ],
)
def test_the_flag(text: str, message: str) -> None:
    assert rank_of(None) is None
    assert rank_of("16") == Rank(count=16)
    assert rank_of("auto:0.99") == Rank(share=0.99)
    with pytest.raises(InputError, match=message):
        rank_of(text)


def test_more_directions_than_the_model_has_are_refused() -> None:
    with pytest.raises(InputError, match="delta rank 49: expected 1 to 48"):
        tiny_stream(tiny_model(), delta_rank=Rank(count=49))


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("mode", ["side", "fold", "requant"])
def test_factors_serve_as_their_product(kind: str, mode: str) -> None:
    torch.manual_seed(0)
    linear = Linear(64, 40)
    layer = linear if kind == "float" else Int8Linear.from_float(linear)
    if (kind, mode) == ("float", "requant"):
        pytest.skip("a floating-point layer has no codes")
    up, down, x = torch.randn(40, 3) * 0.1, torch.randn(3, 64), torch.randn(30, 64)
    low, whole = Delta(up, torch.randn(40), down), Delta(up @ down)
    assert (low.shape, low.nbytes) == ((40, 64), 4 * (3 * 104 + 40))
    torch.testing.assert_close(low.dense(), up @ down)
    layer.set_delta(low, mode)
    got = layer(x)
    layer.set_delta(Delta(whole.weight, low.bias), mode)
    torch.testing.assert_close(got, layer(x), rtol=1e-5, atol=1e-2 if mode == "requant" else 1e-5)
    assert type(low.of(low.tensors())) is Delta


def test_a_stream_of_low_rank_reports_its_price() -> None:
    whole, low = (tiny_stream(tiny_model(), layers=(0, 2), delta_rank=rank) for rank in (None, Rank(count=4)))
    exact, near = latents_of(whole), latents_of(low)
    assert torch.equal(exact[:, :12], near[:, :12])
    assert not torch.equal(exact[:, 12:], near[:, 12:])
    plain, cut = (stream.absorber.report()["layers"] for stream in (whole, low))
    assert "delta_rank" not in plain[0]
    assert (cut[0]["delta_rank"], cut[1]["delta_rank"]) == (4, 4)
    assert 0 < cut[0]["delta_kept"] < 1
    assert 0 < cut[0]["delta_increase"] < cut[0]["gap"] - cut[0]["residual"]
    delta = low.absorber.deltas[0]
    assert delta.down is not None
    assert (delta.weight.shape, delta.down.shape) == ((48, 4), (4, 48))


# -- fitted on codes


def rounded(rows: Tensor, wide: bool = False) -> Tensor:
    """Q(a): 8 bits or, if `wide`, 16, one scale per row."""
    scale = rows.abs().amax(1, keepdim=True).float() / (32639 if wide else 127)
    return (rows.float() / scale).round().double() * scale.double()


@pytest.mark.parametrize("aware", [False, True])
def test_the_fit_is_least_squares_on_what_the_layer_multiplies(aware: bool) -> None:
    """ΔW' = (ÂᵀÂ + λI)⁻¹ Âᵀ (A_full − Â) W_q on stacked rows, Â = Q(A_loc) or A_loc itself."""
    model = tiny_model()
    quantise_(model, SCHEMES["w8a8-int8"])
    stream = tiny_stream(
        model, preset="paper", frames=12, stats_double=True, ridge_absolute=1.0, ratio=1.0, quantisation_aware=aware
    )
    seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    listen = stream.absorber._observe

    def observe(layer: int, local: Tensor, full: Tensor) -> None:
        rows, codes = local[0].flatten(1).double(), rounded(local[0].flatten(1), model.blocks[layer].self_attn.o.wide)
        seen.setdefault(layer, []).append((rows, full[0].flatten(1).double(), codes))
        listen(layer, local, full)

    stream.absorber._observe = observe  # type: ignore[method-assign]
    latents_of(stream)
    for layer, rows in seen.items():
        local, full, codes = (torch.cat(parts) for parts in zip(*rows, strict=True))
        weight = model.blocks[layer].self_attn.o.reference_weight().double()
        taken = codes if aware else local
        want, _ = dense_ridge(taken, (full - taken) @ weight.T, 1.0)
        found = stream.absorber.deltas[layer].weight.double()
        torch.testing.assert_close(found.T, want, rtol=2e-3, atol=2e-4)
        if aware:  # no other matrix serves these codes better, the plain fit included
            plain, _ = dense_ridge(local, (full - local) @ weight.T, 1.0)
            served = [float((codes @ (weight.T + d) - full @ weight.T).square().sum() + d.square().sum())
                      for d in (found.T, plain)]  # fmt: skip
            assert served[0] < served[1]
    assert {delta.on_codes for delta in stream.absorber.deltas.values()} == {aware}


def test_a_side_correction_fitted_on_codes_is_applied_to_codes() -> None:
    """Q(a) W_q + Q(a) ΔW'."""
    torch.manual_seed(0)
    layer, x = Int8Linear.from_float(torch.nn.Linear(64, 40)), torch.randn(30, 64)
    plain, codes = layer(x), rounded(x)
    delta = Delta(torch.randn(40, 64), on_codes=True)
    layer.set_delta(delta, "side")
    torch.testing.assert_close(layer(x), plain + (codes @ delta.weight.double().T).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.multiplied(x).double(), codes, rtol=1e-6, atol=1e-6)
    assert torch.equal(Linear(64, 40).multiplied(x), x)
