"""What absorption costs: rows, products and bytes of the statistics, a transition without a stall."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ispa_deploy.absorb.rows import stride_of, thinned
from ispa_deploy.absorb.solve import Ridge, solve
from ispa_deploy.absorb.stats import Statistics
from ispa_deploy.budget import Setup, predict
from ispa_deploy.cache import KVCache
from ispa_deploy.errors import InputError
from ispa_deploy.native import library, sums
from ispa_deploy.specs import SPECS
from tests.living import living_bytes
from tests.tiny import SPEC, latents_of, text_rows, tiny_model, tiny_stream

WIDE = 520


def _rows(count: int = 600, width: int = WIDE) -> tuple[Tensor, Tensor, Tensor]:
    """A_loc and A_full (R, I) as bf16 attention gives them, and a weight."""
    draw = torch.Generator().manual_seed(3)
    local = torch.randn(count, width, generator=draw) + 0.3
    full = local + 0.2 * torch.randn(count, width, generator=draw)
    weight = torch.randn(width // 2, width, generator=draw) / width**0.5
    return local.bfloat16(), full.bfloat16(), weight.bfloat16()


def _exact(local: Tensor, full: Tensor, weight: Tensor) -> Statistics:
    stats = Statistics(weight.double(), dtype=torch.float64)
    stats.update(local.double(), full.double() - local.double(), weight=1.5)
    return stats


def _close(got: Statistics, want: Statistics, energy: float) -> None:
    for name in ("gram", "cross", "local_sum", "gap_sum"):
        a, b = getattr(got, name).double(), getattr(want, name)
        assert (a - b).norm() <= 1e-5 * b.norm(), name
    assert got.rows == want.rows
    assert got.gap_energy == pytest.approx(want.gap_energy, rel=energy)


@pytest.mark.parametrize("add", ["update", "update_pair", "update_halves"])
def test_every_way_of_summing_bf16_rows_gives_the_sums(add: str) -> None:
    """A width at which G is summed in blocks, no block divides it and no kernel takes it; the last is a GPU's way."""
    local, full, weight = _rows()
    stats = Statistics(weight)
    for part in (slice(0, 251), slice(251, None)):
        second = full[part].float() - local[part].float() if add == "update" else full[part]
        getattr(stats, add)(local[part], second, weight=1.5)
    _close(stats, _exact(local, full, weight), 1e-5 if add == "update" else 1e-4)
    assert torch.equal(stats.gram, stats.gram.T)


@pytest.mark.skipif(library() is None, reason="no AVX512-BF16 or no C compiler here")
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 48), (513, 64), (1100, WIDE + 8), (64, 784)])
def test_the_kernel_sums_in_float32(rows: int, width: int) -> None:
    """Widths that its panels divide and do not, odd rows, more than one block of them, rows of a wider tensor."""
    draw = torch.Generator().manual_seed(rows)
    a, f = torch.randn(2, rows, width + 16, generator=draw).bfloat16()[..., :width]
    gram, cross = torch.zeros(2, width, width)
    assert sums.applies(a, f, gram)
    for _ in range(2):
        near, far = sums.add_sums(a, f, gram, cross, 0.5)
    for got, right in ((gram.triu(), (a.double().T @ a.double()).triu()), (cross, a.double().T @ f.double())):
        assert (got.double() - right).norm() <= 2e-6 * right.norm()
    for got, row in ((near, a), (far, f)):
        torch.testing.assert_close(got.double(), row.double().sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(library() is None, reason="no AVX512-BF16 or no C compiler here")
def test_the_kernel_may_follow_a_reading_and_other_rows() -> None:
    """What was read, or summed in float32, stays counted: the kernel keeps H and G together until H is asked for."""
    local, full, weight = (tensor[..., :512] for tensor in _rows())
    stats, reference = Statistics(weight), Statistics(weight.double(), dtype=torch.float64)
    for first in (0, 150, 300, 450):
        part = slice(first, first + 150)
        gap = full[part].float() - local[part].float()
        reference.update(local[part].double(), gap.double(), weight=1.5)
        if first == 300:
            stats.update(local[part], gap, weight=1.5)
        else:
            stats.update_pair(local[part], full[part], weight=1.5)
        if first == 150:
            assert (stats.cross.double() - reference.cross).norm() <= 1e-5 * reference.cross.norm()
    _close(stats, reference, 1e-4)
    _close((stats + stats).to(torch.device("cpu")), reference + reference, 1e-4)


def test_blocks_survive_fading_adding_and_moving() -> None:
    local, full, weight = _rows()
    first, second = Statistics(weight), Statistics(weight)
    first.update_pair(local, full, weight=3.0)
    first.scale(0.25)
    second.update_pair(local, full, weight=0.75)
    _close((first + second).to(torch.device("cpu")), _exact(local, full, weight), 1e-4)


def test_fading_for_ever_in_every_way_of_summing() -> None:
    """Squares are scaled seldom: what they say must not depend on when, nor on the path that the last rows took."""
    local, full, weight = (tensor[..., :512] for tensor in _rows())
    stats, exact = Statistics(weight), Statistics(weight.double(), dtype=torch.float64)
    paths = (
        lambda: stats.update_pair(local, full),
        lambda: stats.update(local.float(), full.float() - local.float()),
        lambda: stats.update_halves(local, full),
    )
    for step in range(70):
        for each in (stats, exact):
            each.scale(0.5)
        paths[step % 3]()
        exact.update(local.double(), full.double() - local.double())
        if step % 10 == 9:
            _close(stats, exact, 1e-4)


def test_statistics_hold_no_copy_of_the_weight() -> None:
    model = tiny_model().bfloat16()
    stream = tiny_stream(model)
    next(iter(stream))
    for block, stats in zip(model.blocks, stream.absorber._early, strict=True):
        assert stats.weight.data_ptr() == block.self_attn.o.weight.data_ptr()
    made = []

    def weight() -> Tensor:
        made.append(1)
        return torch.eye(4)

    stats = Statistics(weight)
    stats.update(torch.ones(2, 4), torch.ones(2, 4))
    assert stats.gap_energy == 8
    assert len(made) == 2, "once for its shape, once for the rows"


def _accumulators(name: str, count: int) -> int:
    """Bytes of `count` sums for every layer of a model of the table."""
    spec = SPECS[name]
    return count * spec.layers * Statistics(torch.empty(spec.dim, spec.dim, device="meta")).nbytes()


def test_statistics_fit_beside_the_cache() -> None:
    """1.3B: the warm-up's peak is at most 1.35 of the full cache's. 14B: 17 GB, hence --stats-device cpu."""
    cache = KVCache(replace(SPECS["longlive-1.3b"]), dtype=torch.bfloat16, device="meta").full_bytes()
    assert cache + _accumulators("longlive-1.3b", 2) <= 1.35 * cache
    assert 16.7e9 < _accumulators("krea-14b", 2) < 17.1e9


class _Ledger(TorchDispatchMode):
    """The most bytes that tensors made under it held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        alive = [tensor for ref in self._made if (tensor := ref()) is not None]
        ours = {_storage(tensor)[0] for tensor in alive}
        given = {_storage(leaf)[0] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)} - ours
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and _storage(leaf)[0] not in given]
        self._made = [weakref.ref(tensor) for tensor in (*alive, *made)]
        self.peak = max(self.peak, sum(dict(map(_storage, (*alive, *made))).values()))
        return out


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes."""
    return tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()


SOLVING = 4.06
"""Squares of a layer's width, of 8 bytes, that a solve with its sums on the host holds on the device at most: the sums,
H W, the factor and the solution; the rest are the rows that a pass over a square takes at a time."""


def test_what_sums_on_the_host_leave_on_the_device() -> None:
    """Warming up one product of 4 bytes at a time, and rows; a layer's solve its sums, its fit, and what made it."""
    width, rows = 640, 64
    square, weight = width * width, torch.randn(width, width).bfloat16()
    host, every = Statistics(weight), Statistics(weight)
    draw = torch.Generator().manual_seed(4)
    local, full = torch.randn(2, rows, width, generator=draw).bfloat16()
    with torch.inference_mode():
        with _Ledger() as warming:
            host.update_halves(local, full)
        every.update(torch.randn(2 * width, width), torch.randn(2 * width, width))
        assert torch.equal(every.gram, every.gram.T)
        with _Ledger() as solving:
            solution = solve(every, Ridge(relative=1e-2), intercept=True)
    assert solution.status == "ok"
    assert 4 * square <= warming.peak <= 4 * square + 24 * rows * width
    sums, taken = 1, 256 * width * 8  # of a wide layer 0.05 squares
    assert 3 * 8 * square <= solving.peak <= (int(SOLVING) - sums) * 8 * square + 2 * taken
    with _Ledger() as scoring:
        every.to(torch.device("cpu")).residual(solution.weight, solution.bias)
    assert scoring.peak <= 2 * 8 * square + 3 * taken, "beside the sums and the fit: at its widest before it takes rows"


@pytest.mark.parametrize("name", ["krea-14b", "liveavatar-14b"])
def test_14b_with_its_sums_on_the_host(name: str) -> None:
    """Over the full cache's steady peak: 1.05 in every pass of the warm-up; and at the transition, when activations
    have been freed and a layer is solved at a time."""
    spec, budget = SPECS[name], predict(SPECS[name], Setup(policy="full"))
    caches = budget.kv_full + budget.kv_scratch
    assert predict(spec, Setup(stats_device="cpu")).statistics == 0
    kept = 9 * spec.frame_tokens * spec.passes / stride_of(9 * spec.frame_tokens * spec.passes, 8, spec.dim)
    rows = kept / 9 * 3 / spec.passes
    watched = 6 * spec.dim**2 + 12 * rows * spec.dim  # an 8-bit layer's weight made anew, before it a product; rows
    assert caches + budget.activations + watched <= 1.05 * (caches + budget.activations)
    assert caches + SOLVING * 8 * spec.dim**2 <= 1.05 * (caches + budget.activations)


def _grown(chunks: int, **options: object) -> tuple[int, object]:
    """Bytes that a stream holds after so many chunks, and the stream."""
    model = tiny_model()
    stream = tiny_stream(model, frames=18, **options)  # type: ignore[arg-type]
    before, made = living_bytes(), iter(stream)
    for _ in range(chunks):
        next(made)
    grown = living_bytes() - before
    made.close()  # type: ignore[attr-defined]
    return grown, stream


@pytest.mark.parametrize(("preset", "accumulators"), [("tuned", 2), ("paper", 1)])
def test_a_warm_up_holds_its_sums_and_nothing_else(preset: str, accumulators: int) -> None:
    """Counted over all tensors of the process: against a stream that takes no statistics."""
    full, _ = _grown(2, policy="full")
    grown, stream = _grown(2, preset=preset)
    sums = accumulators * SPEC.layers * 4 * (2 * SPEC.dim * SPEC.dim + 2 * SPEC.dim)
    assert stream.absorber.statistics_bytes() == sums  # type: ignore[attr-defined]
    assert sums <= grown - full <= 1.02 * sums


@pytest.mark.parametrize("preset", ["paper", "tuned"])
def test_an_absorbed_stream_holds_its_deltas_and_nothing_else(preset: str) -> None:
    """Against the same layers made local without a correction."""
    plain, _ = _grown(5, policy="sink-local", layers=(1, 3))
    grown, stream = _grown(5, layers=(1, 3), preset=preset)
    bias = preset == "tuned"
    held = 2 * 4 * (2 * SPEC.dim * SPEC.dim + 2 * bias * SPEC.dim)  # delta and folded weight of two layers
    assert stream.absorber.statistics_bytes() == 0  # type: ignore[attr-defined]
    assert held <= grown - plain <= 1.02 * held


def test_rows_are_thinned_evenly_and_keep_their_weight() -> None:
    """At least 8 times the width is kept, each pass at another offset, and what is kept stands for all."""
    spec = replace(SPEC, latent_height=40, latent_width=40)
    stream, tokens = tiny_stream(tiny_model(spec), frames=15, half_life=1e9), 3 * spec.frame_tokens
    absorber = stream.absorber
    for chunk in stream:
        if chunk.start == 6:
            assert absorber._stride == (3 * 3 + 1) * tokens / (8 * spec.dim) > 20, "three chunks, and a pass ahead"
            assert absorber._early[0].rows == pytest.approx(2 * 3 * tokens)
            break
    seen = []
    for _ in range(50):
        absorber.after_pass()
        seen.append(thinned(tokens, absorber._stride, absorber._phase))
        assert len(seen[-1]) * 10 >= 8 * spec.dim
        assert seen[-1].diff().min() >= math.floor(absorber._stride) - 1
        assert int(seen[-1].max()) < tokens
    assert torch.bincount(torch.cat(seen)).max() <= 8, "no row is met again and again"


def test_few_rows_are_all_taken() -> None:
    stream = tiny_stream(tiny_model(), frames=12)
    next(iter(stream))
    assert stream.absorber._stride == 1


# -- the transition, spread over chunks


@pytest.mark.parametrize("preset", ["paper", "tuned"])
@pytest.mark.parametrize("spread", [1, 2, 3])
def test_a_spread_solve_gives_the_same_corrections_later(spread: int, preset: str) -> None:
    model = tiny_model()
    at_once, later = (
        tiny_stream(model, frames=24, preset=preset, spread_solve=chunks) for chunks in (0, spread)
    )  # fmt: skip
    first, second = latents_of(at_once), [(chunk.latents, _state(later)) for chunk in later]
    latents = torch.cat([found for found, _ in second], 1)
    switch, ahead = 12 + 3 * spread, later.absorber.settings.ahead
    assert torch.equal(latents[:, :12], first[:, :12])
    assert not torch.equal(latents[:, 12:15], first[:, 12:15])
    states = ["warm-up"] * (3 + ahead) + ["solving"] * (spread - ahead) + ["absorbed"] * (8 - 3 - spread)
    assert [state for _, (state, _) in second] == states
    assert [local for _, (_, local) in second] == [0 if state != "absorbed" else 2 for state in states]
    assert switch == 3 * states.index("absorbed") + 3
    assert at_once.absorber.local_layers() == later.absorber.local_layers()
    for layer, delta in at_once.absorber.deltas.items():
        assert torch.equal(later.absorber.deltas[layer].weight, delta.weight)


def _state(stream) -> tuple[str, int]:  # type: ignore[no-untyped-def]
    return stream.absorber.state, len(stream.absorber.local_layers())


def test_a_spread_solve_is_even_and_frees_sums_as_it_goes() -> None:
    """Three passes a chunk, the first one watched, two chunks, four layers: no pass solves two, and a solved layer
    holds its delta alone."""
    stream, solved, held = tiny_stream(tiny_model(), frames=24, spread_solve=2), [], []
    absorber = stream.absorber
    solve_layer, after_pass = absorber._solve, absorber.after_pass
    absorber._solve = lambda layer: solved.append(layer) or solve_layer(layer)  # type: ignore[func-returns-value,method-assign]

    def count_after() -> None:
        before = len(solved)
        after_pass()
        if absorber.state == "solving":
            held.append((len(solved) - before, absorber.statistics_bytes()))

    absorber.after_pass = count_after  # type: ignore[method-assign]
    latents_of(stream)
    assert solved == [0, 1, 2, 3]
    assert [count for count, _ in held] == [0, 1, 1, 1, 1, 0]
    sizes = [size for count, size in held if count]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 3 * sizes[-1]
    assert absorber.statistics_bytes() == 0


def test_a_prompt_switch_while_solving_starts_over() -> None:
    stream = tiny_stream(tiny_model(), frames=36, spread_solve=2, switches=[(15, text_rows(seed=7))])
    states = [stream.absorber.state for _ in stream]
    assert states == ["warm-up"] * 4 + ["solving"] + ["warm-up"] * 4 + ["solving"] + ["absorbed"] * 2
    assert len(stream.absorber.local_layers()) == 2


def test_a_stream_that_ends_while_solving_says_so() -> None:
    stream = tiny_stream(tiny_model(), frames=15, spread_solve=2)
    latents_of(stream)
    assert stream.absorber.local_layers() == []
    assert "before its transition" in stream.absorber.notes()[0]


@pytest.mark.parametrize("policy", ["sink-local", "absorb"])
def test_nothing_to_solve_is_not_waited_for(policy: str) -> None:
    options = {"layers": (1, 3)} if policy == "sink-local" else {"ratio": 0.0}
    stream = tiny_stream(tiny_model(), frames=15, policy=policy, spread_solve=3, **options)
    latents_of(stream)
    assert stream.absorber.state == "absorbed"


def test_chunks_to_spread_over_are_not_negative() -> None:
    with pytest.raises(InputError, match="spread"):
        tiny_stream(tiny_model(), spread_solve=-1)
