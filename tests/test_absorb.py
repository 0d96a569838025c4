"""Absorption against stacked rows: sums, closed form, certificate, ranking, and the way in and out of a stream."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ispa_deploy.absorb.presets import PRESETS, settings_for
from ispa_deploy.absorb.records import Choice, LayerRecord
from ispa_deploy.absorb.solve import RETRIES, Ridge, Solution, solve
from ispa_deploy.absorb.stats import Statistics
from ispa_deploy.errors import InputError
from tests.reference import ridge as dense_ridge
from tests.tiny import SPEC, latents_of, same_weights, tiny_model, tiny_stream, weights_of

ROWS, WIDTH, OUT = 200, 12, 7


class _Data:
    """Rows a and e of one layer, its weight, and their sums in float64."""

    def __init__(self, seed: int = 0, *, rows: int = ROWS):
        draw = torch.Generator().manual_seed(seed)
        self.a = torch.randn(rows, WIDTH, generator=draw, dtype=torch.float64) + 0.5
        self.e = torch.randn(rows, WIDTH, generator=draw, dtype=torch.float64) * 0.3 + 0.2
        self.weight = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(99), dtype=torch.float64)

    def stats(self, rows: slice = slice(None), weight: float = 1.0) -> Statistics:
        stats = Statistics(self.weight, dtype=torch.float64)
        stats.update(self.a[rows], self.e[rows], weight=weight)
        return stats

    @property
    def target(self) -> Tensor:
        return self.e @ self.weight.T

    def error(self, delta: Tensor, bias: Tensor | None) -> float:
        """‖a ΔW + b − e W‖² row by row."""
        return float((self.a @ delta.T + (0 if bias is None else bias) - self.target).square().sum())


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    data = _Data()
    whole, parts = data.stats(), data.stats(slice(0, 70)) + data.stats(slice(70, None))
    for name in ("gram", "cross", "local_sum", "gap_sum"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    assert (parts.rows, parts.gap_energy) == pytest.approx((whole.rows, whole.gap_energy))
    torch.testing.assert_close(whole.gram, data.a.T @ data.a)
    torch.testing.assert_close(whole.cross, data.a.T @ data.e)
    assert whole.gap_energy == pytest.approx(float(data.target.square().sum()))


@pytest.mark.parametrize("intercept", [False, True])
def test_a_planted_correction_is_recovered(intercept: bool) -> None:
    data = _Data()
    planted = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    data.e = data.a @ planted + (0.7 if intercept else 0.0)
    found = solve(data.stats(), Ridge(absolute=1e-10), intercept=intercept)
    assert found.status == "ok"
    assert found.weight is not None
    torch.testing.assert_close(found.weight, data.weight @ planted.T, rtol=1e-7, atol=1e-7)
    assert found.residual == pytest.approx(0.0, abs=1e-6 * found.gap)
    if intercept:
        assert found.bias is not None
        torch.testing.assert_close(found.bias, 0.7 * data.weight.sum(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("ridge", [Ridge(absolute=1e-3), Ridge(absolute=50.0), Ridge(relative=1e-2)], ids=str)
def test_the_closed_form_is_least_squares_on_the_stacked_rows(ridge: Ridge, intercept: bool) -> None:
    data = _Data()
    found = solve(data.stats(), ridge, intercept=intercept)
    centred = data.a - (data.a.mean(0) if intercept else 0.0)
    assert found.ridge == pytest.approx(ridge.absolute + ridge.relative * float(centred.square().sum()) / WIDTH)
    weight, bias = dense_ridge(data.a, data.target, found.ridge, intercept=intercept)
    assert found.weight is not None
    torch.testing.assert_close(found.weight.T, weight, rtol=1e-9, atol=1e-9)
    if intercept:
        assert found.bias is not None
        torch.testing.assert_close(found.bias, bias, rtol=1e-9, atol=1e-9)
    else:
        assert found.bias is None


@pytest.mark.parametrize("intercept", [False, True])
def test_the_error_from_the_sums_is_the_error_of_the_rows(intercept: bool) -> None:
    data, other = _Data(), _Data(seed=5)
    found = solve(data.stats(), Ridge(absolute=2.0), intercept=intercept)
    assert found.weight is not None
    assert found.residual == pytest.approx(data.error(found.weight, found.bias), rel=1e-6)
    assert other.stats().residual(found.weight, found.bias) == pytest.approx(
        other.error(found.weight, found.bias), rel=1e-6
    )
    assert found.gap == pytest.approx(float(data.target.square().sum()))
    assert found.residual < found.gap


def test_the_error_is_the_paper_s_certificate() -> None:
    data = _Data()
    found, stats = solve(data.stats(), Ridge(absolute=2.0)), data.stats()
    assert found.weight is not None
    delta = found.weight.T
    certificate = stats.gap_energy - (stats.projected_cross() * delta).sum() - 2.0 * delta.square().sum()
    assert found.residual == pytest.approx(float(certificate), rel=1e-9)


def test_diagnostics_are_those_of_the_matrix() -> None:
    data = _Data()
    found = solve(data.stats(), Ridge(absolute=1.0))
    values = torch.linalg.eigvalsh(data.a.T @ data.a)
    assert found.condition == pytest.approx(float((values[-1] + 1) / (values[0] + 1)), rel=0.05)
    assert found.effective_rank == pytest.approx(float(values.sum() ** 2 / values.square().sum()), rel=1e-9)


@pytest.mark.parametrize("intercept", [False, True])
def test_no_gap_needs_no_correction(intercept: bool) -> None:
    data = _Data()
    data.e.zero_()
    found = solve(data.stats(), Ridge(relative=1e-2), intercept=intercept)
    assert found.weight is not None
    assert not found.weight.any()
    assert found.residual == 0.0


def test_a_huge_ridge_corrects_nothing() -> None:
    found = solve(_Data().stats(), Ridge(absolute=1e15))
    assert found.weight is not None
    assert float(found.weight.abs().max()) < 1e-12


def test_a_singular_matrix_is_retried_and_reported() -> None:
    data = _Data()
    data.a[:, 3] = 0.0
    found = solve(data.stats(), Ridge())
    assert found.status.startswith("ridge raised x10^")
    assert found.ridge > 0
    assert found.weight is not None
    assert found.weight.isfinite().all()


def test_a_matrix_beyond_repair_is_a_failure_with_its_reason() -> None:
    stats = _Data().stats()
    stats.gram = -torch.eye(WIDTH, dtype=torch.float64) * 1e9
    found = solve(stats, Ridge(absolute=1e-3))
    assert found.failed
    assert "not positive definite" in found.status
    assert RETRIES > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_and_no_rows_are_failures_not_exceptions(bad: float) -> None:
    data = _Data()
    data.e[3, 3] = bad
    assert "NaN or Inf" in solve(data.stats(), Ridge(relative=1e-2), intercept=True).status
    assert "no rows" in solve(Statistics(data.weight), Ridge(relative=1e-2), intercept=True).status


def test_forgetting_is_explicit_weighting() -> None:
    data, stats = _Data(), Statistics(_Data().weight, dtype=torch.float64)
    for chunk in range(4):
        stats.scale(0.5)
        stats.update(data.a[50 * chunk : 50 * chunk + 50], data.e[50 * chunk : 50 * chunk + 50])
    root = (0.5 ** torch.arange(3, -1, -1).double()).repeat_interleave(50).sqrt()[:, None]
    found = solve(stats, Ridge(absolute=1.0))
    assert found.weight is not None
    torch.testing.assert_close(found.weight.T, dense_ridge(root * data.a, root * data.target, 1.0)[0])
    twice, weighted = data.stats() + data.stats(), data.stats(weight=2.0)
    torch.testing.assert_close(twice.gram, weighted.gram)
    assert (twice.rows, twice.gap_energy) == pytest.approx((weighted.rows, weighted.gap_energy))


@pytest.mark.parametrize(
    ("layers", "ratio", "count"),
    [
        (30, 0.3, 9),
        (30, 0.4, 12),
        (30, 0.5, 15),
        (40, 0.3, 12),
        (40, 0.5, 20),
        (30, 0.0, 0),
        (30, 1.0, 30),
        (10, 0.25, 3),
    ],
)
def test_number_of_local_layers(layers: int, ratio: float, count: int) -> None:
    assert Choice(ratio=ratio).count(layers) == count


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_is_a_share(ratio: float) -> None:
    with pytest.raises(InputError, match="ratio"):
        Choice(ratio=ratio)


def test_presets_are_the_documented_ones() -> None:
    paper, tuned = PRESETS["paper"], PRESETS["tuned"]
    assert (paper.warmup, paper.ridge, paper.intercept, paper.half_life) == (12, Ridge(absolute=0.001), False, None)
    assert (paper.ranking, paper.all_rows, paper.rows_per_width) == ("epsilon", True, None)
    assert (tuned.warmup, tuned.ridge, tuned.intercept, tuned.half_life) == (12, Ridge(relative=0.01), True, 3.0)
    assert (tuned.ranking, tuned.all_rows) == ("heldout", False)
    assert (paper.ahead, tuned.ahead) == (0, 1)


@pytest.mark.parametrize(("preset", "least"), [("paper", 6), ("tuned", 9)])
def test_a_warm_up_too_short_for_its_preset_is_refused(preset: str, least: int) -> None:
    settings_for(preset, warmup=least).check(3, 3)
    for frames in (least - 3, least + 1):
        with pytest.raises(InputError, match="warm-up"):
            settings_for(preset, warmup=frames).check(3, 3)
    with pytest.raises(InputError, match="paper, tuned"):
        settings_for("best")


# -- in a stream


def _watched(**options: object) -> tuple[object, list[tuple[int, int, Tensor, Tensor]]]:
    """A stream, and all rows its absorber was shown: (chunk start, layer, a, e)."""
    stream, seen = tiny_stream(tiny_model(), **options), []
    listen = stream.absorber._observe
    stream.solved = _solutions(stream)

    def observe(layer: int, local: Tensor, full: Tensor) -> None:
        a = local[0].flatten(1).double()
        seen.append((stream.cache.start, layer, a, full[0].flatten(1).double() - a))
        listen(layer, local, full)

    stream.absorber._observe = observe  # type: ignore[method-assign]
    return stream, seen


def _solutions(stream) -> dict[int, Solution]:  # type: ignore[no-untyped-def]
    """Every layer's solution with its ΔW, which the absorber does not keep."""
    found, solve_layer = {}, stream.absorber._solve

    def solve_and_keep(layer: int) -> LayerRecord:
        record = solve_layer(layer)
        found[layer] = record.solution
        return record

    stream.absorber._solve = solve_and_keep
    return found


def _stack(
    seen: list[tuple[int, int, Tensor, Tensor]], layer: int, chunks: list[int], halving: bool
) -> tuple[Tensor, ...]:
    rows = [(start, a, e) for start, index, a, e in seen if index == layer and start in chunks]
    share = torch.cat([torch.full((len(a), 1), 0.5 ** ((12 - start) / 3 if halving else 0)) for start, a, _ in rows])
    return torch.cat([a for _, a, _ in rows]), torch.cat([e for *_, e in rows]), share.double()


def _fit(a: Tensor, target: Tensor, share: Tensor, relative: float) -> tuple[Tensor, Tensor]:
    """Weighted ridge with an unpenalised intercept, on centred rows."""
    mean_a, mean_t = (a * share).sum(0) / share.sum(), (target * share).sum(0) / share.sum()
    root = share.sqrt()
    strength = relative * float((root * (a - mean_a)).square().sum()) / a.shape[1]
    weight, _ = dense_ridge(root * (a - mean_a), root * (target - mean_t), strength)
    return weight, mean_t - mean_a @ weight


@pytest.fixture(scope="module")
def tuned_run():  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    stream, seen = _watched(preset="tuned", frames=15, stats_double=True)
    latents_of(stream)
    return stream, seen


def test_tuned_counts_rows_with_history_and_lets_them_fade(tuned_run) -> None:  # type: ignore[no-untyped-def]
    stream, seen = tuned_run
    assert {start for start, *_ in seen} == {3, 6, 9, 12}
    assert [sum(start == chunk for start, *_ in seen) for chunk in (9, 12)] == [SPEC.passes * SPEC.layers, SPEC.layers]
    for layer, record in enumerate(stream.absorber.records):
        a, e, share = _stack(seen, layer, [3, 6, 9, 12], halving=True)
        target = e @ stream.model.blocks[layer].self_attn.o.weight.detach().double().T
        weight, bias = _fit(a, target, share, 1e-2)
        torch.testing.assert_close(stream.solved[layer].weight.T, weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stream.solved[layer].bias, bias, rtol=1e-5, atol=1e-6)
        assert record.solution.weight is None
        assert not record.solution.failed


def test_held_out_ranking_fits_early_rows_and_scores_late_ones(tuned_run) -> None:  # type: ignore[no-untyped-def]
    stream, seen = tuned_run
    scores = []
    for layer, record in enumerate(stream.absorber.records):
        matrix = stream.model.blocks[layer].self_attn.o.weight.detach().double().T
        a, e, share = _stack(seen, layer, [3, 6], halving=True)
        weight, bias = _fit(a, e @ matrix, share, 1e-2)
        late_a, late_e, late_share = _stack(seen, layer, [9, 12], halving=True)
        scores.append(float((late_share * (late_a @ weight + bias - late_e @ matrix).square()).sum()))
        assert record.score == pytest.approx(scores[-1], rel=1e-4)
    best = sorted(range(SPEC.layers), key=scores.__getitem__)[:2]
    assert stream.absorber.local_layers() == sorted(best)


def test_paper_counts_all_rows_alike_and_ranks_in_sample() -> None:
    stream, seen = _watched(preset="paper", frames=12, stats_double=True)
    latents_of(stream)
    assert {start for start, *_ in seen} == {0, 3, 6, 9}
    errors = []
    for layer, record in enumerate(stream.absorber.records):
        a, e, _ = _stack(seen, layer, [0, 3, 6, 9], halving=False)
        target = e @ stream.model.blocks[layer].self_attn.o.weight.detach().double().T
        weight, _ = dense_ridge(a, target, 1e-3)
        torch.testing.assert_close(stream.solved[layer].weight.T, weight, rtol=1e-4, atol=1e-5)
        errors.append(float((a @ weight - target).square().sum()))
        assert record.score == pytest.approx(errors[-1], rel=1e-4)
    assert stream.absorber.local_layers() == sorted(sorted(range(SPEC.layers), key=errors.__getitem__)[:2])


def test_weights_are_bit_equal_after_the_session_an_exception_and_recalibration() -> None:
    model = tiny_model()
    before = weights_of(model)
    latents_of(tiny_stream(model, delta="fold"))
    assert same_weights(model, before)

    stream = tiny_stream(model)
    plain = stream.noise

    def failing(chunk: int, count: int, step: int) -> Tensor:
        if chunk == 6:
            assert stream.absorber.state == "absorbed"
            assert not same_weights(model, before)
            raise ZeroDivisionError
        return plain(chunk, count, step)

    stream.noise = failing
    with pytest.raises(ZeroDivisionError):
        latents_of(stream)
    assert same_weights(model, before)

    stream = tiny_stream(model, frames=24)
    for chunk in stream:
        if chunk.start == 12:
            stream.request_recalibration()
        if chunk.start == 15:
            assert stream.absorber.state == "warm-up"
            assert same_weights(model, before)
            assert stream.cache.persistent_bytes() == stream.cache.full_bytes()


def test_a_failing_layer_stays_and_the_next_takes_its_place() -> None:
    whole = tiny_stream(tiny_model(), frames=12)
    latents_of(whole)
    best = whole.absorber._ranked()
    stream = tiny_stream(tiny_model(), frames=18)
    for chunk in stream:
        if chunk.start == 6:
            stream.absorber._early[best[0]].cross[0, 0] = torch.nan
    assert stream.absorber.local_layers() == sorted(best[1:3])
    report = stream.absorber.report()["layers"][best[0]]
    assert report["kind"] == "F"
    assert "NaN" in report["status"]


def test_a_huge_ridge_without_intercept_is_no_absorb() -> None:
    layers = (0, 2)
    absorbed = tiny_stream(tiny_model(), preset="paper", ridge_absolute=1e30, layers=layers, frames=24)
    dropped = tiny_stream(tiny_model(), policy="sink-local", preset="paper", layers=layers, frames=24)
    full = latents_of(tiny_stream(tiny_model(), policy="full", frames=24))
    a, b = latents_of(absorbed), latents_of(dropped)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(a[:, 15:], full[:, 15:], atol=1e-2)


@pytest.mark.parametrize("recent", [0, 3])
@pytest.mark.parametrize("mode", ["fold", "side"])
def test_adopted_corrections_are_the_ones_of_the_transition(mode: str, recent: int) -> None:
    source = tiny_stream(tiny_model(), frames=24, recent_frames=recent, delta=mode, ahead=0)
    want = latents_of(source)
    again = tiny_stream(tiny_model(), frames=24, recent_frames=recent, delta=mode, ahead=0)
    again.absorber.needs_statistics = lambda: False  # type: ignore[method-assign]
    again.absorber.settings = replace(again.absorber.settings, warmup=10_000)
    found = []
    for chunk in again:
        found.append(chunk.latents)
        if chunk.start == 9:
            again.absorber.adopt(source.absorber.deltas)
    torch.testing.assert_close(torch.cat(found, 1), want, rtol=1e-4, atol=1e-4)


def test_corrections_are_rounded_to_what_would_be_stored() -> None:
    stream = tiny_stream(tiny_model(), frames=12, delta_dtype=torch.bfloat16)
    solved = _solutions(stream)
    latents_of(stream)
    for layer, delta in stream.absorber.deltas.items():
        solution = solved[layer]
        assert torch.equal(delta.weight, (stream.absorber.settings.share * solution.weight).bfloat16())
        assert delta.bias is not None
        assert delta.bias.dtype == torch.float32


@pytest.mark.parametrize("policy", ["absorb", "sink-local", "no-sink"])
def test_chosen_layers_become_local(policy: str) -> None:
    stream = tiny_stream(tiny_model(), policy=policy, layers=(3, 1), frames=18)
    latents_of(stream)
    assert stream.absorber.local_layers() == [1, 3]
    assert bool(stream.absorber.deltas) == (policy != "sink-local")
    kept = 0 if policy == "no-sink" else 1
    assert stream.cache.persistent_bytes() * 24 == stream.cache.full_bytes() * (12 + kept)


@pytest.mark.parametrize("recent", [0, 3])
@pytest.mark.parametrize("policy", ["absorb", "sink-local"])
def test_layers_become_local_amid_the_chunk_that_was_looked_into(policy: str, recent: int) -> None:
    """Its first pass is the full cache's, and of its own frames none is kept before it is clean."""
    stream = tiny_stream(tiny_model(), policy=policy, recent_frames=recent, layers=(1, 3), frames=18)
    full = tiny_stream(tiny_model(), policy="full", frames=18)
    flows, local = _flows(stream)
    wanted, _ = _flows(full)
    latents_of(stream)
    latents_of(full)
    before = sum(stream.sampler.passes(chunk) for chunk in range(4))
    first = next(index for index, (layers, _) in enumerate(local) if layers)
    assert (first, local[first]) == (before + 1, ([1, 3], [0, 9, 10, 11][: 1 + recent]))
    torch.testing.assert_close(flows[before], wanted[before], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(flows[first], wanted[first], atol=1e-3)
    assert stream.cache.temporal(1)[0] == [0, 12, 13, 14][: 1 + recent]


def _flows(stream) -> tuple[list[Tensor], list[tuple[list[int], list[int]]]]:  # type: ignore[no-untyped-def]
    """Every denoising pass's velocity of a stream yet to run; the layers that were local in it, what layer 1 held."""
    flows, local, velocity = list[Tensor](), list[tuple[list[int], list[int]]](), stream._velocity

    def listen(x: Tensor, timestep: float) -> Tensor:
        local.append((stream.absorber.local_layers(), stream.cache.temporal(1)[0]))
        flows.append(velocity(x, timestep).clone())
        return flows[-1]

    stream._velocity = listen
    return flows, local


def test_a_stream_that_ends_with_its_warm_up_is_solved_from_what_it_saw() -> None:
    ended, plain = (tiny_stream(tiny_model(), frames=12, ahead=ahead) for ahead in (1, 0))
    latents_of(ended)
    latents_of(plain)
    assert ended.absorber.state == plain.absorber.state == "absorbed"
    for layer, delta in plain.absorber.deltas.items():
        assert torch.equal(ended.absorber.deltas[layer].weight, delta.weight)


@pytest.mark.parametrize("ahead", [-1, 5])
def test_more_passes_ahead_than_a_chunk_has_are_refused(ahead: int) -> None:
    with pytest.raises(InputError, match="passes ahead"):
        tiny_stream(tiny_model(), ahead=ahead)


def test_statistics_are_freed_at_the_transition() -> None:
    stream = tiny_stream(tiny_model())
    for chunk in stream:
        assert (stream.absorber.statistics_bytes() > 0) == (chunk.start < 12)


@pytest.mark.parametrize("layers", [(0, 4), (-1,)])
def test_impossible_layers_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="layers"):
        tiny_stream(tiny_model(), layers=layers)


def test_rows_without_history_do_not_dilute_a_recalibration() -> None:
    stream = tiny_stream(tiny_model(), frames=24)
    for chunk in stream:
        if chunk.start == 15:
            local = stream.absorber.local_layers()
            stream.request_recalibration()
        if chunk.start == 18:
            rows = [stats.rows for stats in stream.absorber._early]
    assert [layer for layer in range(SPEC.layers) if rows[layer] == 0] == local


def test_a_layer_is_chosen_once() -> None:
    with pytest.raises(InputError, match="layers"):
        tiny_stream(tiny_model(), layers=(1, 1))
