"""The streaming loop: seeds, prefixes, prompts, warm-up, measuring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from ispa_deploy.errors import InputError
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.regions import ROWS, recording
from ispa_deploy.stream import plan_chunks
from tests.tiny import SPEC, latents_of, text_rows, tiny_model, tiny_stream

POLICIES = ["full", "window", "sink-local", "no-sink", "absorb"]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_bits_and_a_longer_run_keeps_its_frames(policy: str) -> None:
    model = tiny_model()
    short, again, longer = (latents_of(tiny_stream(model, policy=policy, frames=n)) for n in (18, 18, 24))
    assert torch.equal(short, again)
    assert torch.equal(longer[:, :18], short)
    assert not torch.allclose(latents_of(tiny_stream(model, policy=policy, seed=1, frames=18)), short, atol=1e-2)


def test_latents_carry_no_gradient() -> None:
    model = tiny_model()
    for chunk in tiny_stream(model, frames=15):
        assert not chunk.latents.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_stream_that_ends_in_its_warm_up_is_the_full_one() -> None:
    model = tiny_model()
    stream = tiny_stream(model, frames=9)
    torch.testing.assert_close(
        latents_of(stream), latents_of(tiny_stream(model, policy="full", frames=9)), rtol=1e-4, atol=1e-4
    )
    assert stream.absorber.state == "warm-up"
    assert stream.absorber.local_layers() == []


def _states(stream) -> list[str]:  # type: ignore[no-untyped-def]
    return [stream.absorber.state for _ in stream]


@pytest.mark.parametrize("frame", [5, 6, 15])
def test_a_prompt_switch_starts_a_new_warm_up_at_the_next_chunk(frame: int) -> None:
    stream = tiny_stream(tiny_model(), frames=36, switches=[(frame, text_rows(seed=7))])
    states = _states(stream)
    first = next(n for n in range(12) if 3 * n >= frame)
    expected = ["warm-up"] * 12
    if first > 4:
        expected[4:first] = ["absorbed"] * (first - 4)
    expected[first + 4 :] = ["absorbed"] * (8 - first)
    assert states == expected
    assert len(stream.absorber.local_layers()) == 2


def test_a_prompt_switch_changes_only_what_follows() -> None:
    model = tiny_model()
    plain = latents_of(tiny_stream(model, policy="full"))
    switched = latents_of(tiny_stream(model, policy="full", switches=[(9, text_rows(seed=7))]))
    assert torch.equal(plain[:, :9], switched[:, :9])
    assert not torch.allclose(plain[:, 9:12], switched[:, 9:12], atol=1e-3)


@pytest.mark.parametrize("recent", [0, 3])
@pytest.mark.parametrize("policy", ["absorb", "no-sink", "sink-local"])
def test_a_recalibrated_stream_goes_on(policy: str, recent: int) -> None:
    model = tiny_model(replace(SPEC, rope="window"))
    stream = tiny_stream(model, policy=policy, recent_frames=recent, frames=45)
    for chunk in stream:
        if chunk.start == 15:
            stream.request_recalibration()
    assert stream.absorber.state == "absorbed"
    assert len(stream.absorber.local_layers()) == 2
    assert chunk.latents.isfinite().all()


@pytest.mark.parametrize(("frames", "nearest"), [(20, 21), (22, 21), (1, 3), (0, 3)])
def test_frames_come_in_whole_chunks(frames: int, nearest: int) -> None:
    with pytest.raises(InputError, match=f"nearest is {nearest}"):
        tiny_stream(tiny_model(), frames=frames)


def test_chunks_are_planned_without_gaps() -> None:
    assert plan_chunks(SPEC, 9) == [(0, 3), (3, 3), (6, 3)]
    assert plan_chunks(replace(SPEC, first_chunk_frames=1), 7) == [(0, 1), (1, 3), (4, 3)]


class _Counter:
    """A recorder that only counts."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        self.seen[name] += 1
        yield


@pytest.mark.parametrize("policy", ["full", "absorb"])
def test_measuring_changes_no_bit_and_marks_only_known_rows(policy: str) -> None:
    model, recorder = tiny_model(), _Counter()
    plain = latents_of(tiny_stream(model, policy=policy))
    with recording(recorder):
        assert torch.equal(latents_of(tiny_stream(model, policy=policy)), plain)
    assert set(recorder.seen) <= set(ROWS)
    assert {"attention.kernel", "linear.gemm", "overhead.norm", "overhead.sampler"} <= set(recorder.seen)
    assert ("attention.merge" in recorder.seen) == (policy == "absorb")


def test_given_latents_are_handed_out_and_remembered() -> None:
    model, given = tiny_model(), torch.randn(1, 6, *SPEC.latent_shape)
    options = StreamOptions(frames=12, policy="full")
    found = latents_of(open_stream(model, text_rows(), options, initial=given))
    assert torch.equal(found[:, :6], given)
    other = latents_of(open_stream(model, text_rows(), options, initial=given + 1))
    assert not torch.allclose(found[:, 6:], other[:, 6:], atol=1e-3)


def test_given_latents_must_be_whole_chunks() -> None:
    given = torch.randn(1, 4, *SPEC.latent_shape)
    with pytest.raises(InputError, match="4"):
        latents_of(open_stream(tiny_model(), text_rows(), StreamOptions(frames=12, policy="full"), initial=given))


def test_given_latents_are_committed_at_timestep_zero() -> None:
    """Whatever timestep generated chunks are committed at: upstream prefills clean latents as clean ones."""
    stream = open_stream(
        tiny_model(replace(SPEC, context_timestep=50.0)), text_rows(), StreamOptions(frames=9, policy="full"),
        initial=torch.randn(1, 3, *SPEC.latent_shape),
    )  # fmt: skip
    chunks = iter(stream)
    next(chunks)
    assert set(stream._conditions) == {0.0}


def test_a_stream_is_iterated_once() -> None:
    stream = tiny_stream(tiny_model(), policy="full", frames=6)
    latents_of(stream)
    with pytest.raises((InputError, RuntimeError, AssertionError)):
        latents_of(stream)


def test_switches_may_come_in_any_order() -> None:
    model = tiny_model()
    switches = [(8, text_rows(seed=7)), (7, text_rows(seed=8))]
    mixed, ordered = (
        latents_of(tiny_stream(model, policy="full", switches=order)) for order in (switches, switches[::-1])
    )
    assert torch.equal(mixed, ordered)


def test_a_window_belongs_to_its_policy() -> None:
    with pytest.raises(InputError, match="--policy window"):
        tiny_stream(tiny_model(), policy="full", window=6)


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(InputError):
        tiny_stream(tiny_model(), policy="window", window=0)


def test_opening_a_stream_leaves_the_model_alone() -> None:
    """Stored corrections are the stream's, from its first chunk on: a stream that is never run must not leave them."""
    model = tiny_model()
    source = tiny_stream(model, frames=12)
    latents_of(source)
    open_stream(model, text_rows(), StreamOptions(frames=12), deltas=source.absorber.deltas)
    assert all(block.self_attn.o.delta is None for block in model.blocks)


# -- clean passes: nothing is computed that nothing reads


def _kept(stream) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """Frames, keys and values of every layer."""
    layers = [stream.cache.temporal(layer) for layer in range(SPEC.layers)]
    return [tensor for frames, k, v in layers for tensor in (torch.tensor(frames), k, v)]


@pytest.mark.parametrize("changes", [{}, {"rope": "window", "ema_sink": 0.75, "sink_frames": 3}, {"recaches": True}])
@pytest.mark.parametrize(
    "options",
    [
        {"policy": "full"},
        {},
        {"ratio": 1.0},
        {"ratio": 1.0, "recent_frames": 3},
        {"policy": "no-sink", "ratio": 1.0},
        {"layers": (1, 3)},
    ],
    ids=str,
)
def test_a_clean_pass_that_stops_early_leaves_the_same_bits(changes: dict, options: dict) -> None:  # type: ignore[type-arg]
    model = tiny_model(replace(SPEC, **changes))
    runs = []
    for whole in (True, False):
        switches = [(18, text_rows(seed=7))]
        stream = tiny_stream(model, frames=36, switches=switches, full_commit=whole, **options)
        stream.commit_last = True
        runs.append((latents_of(stream), _kept(stream)))
    (want, held), (got, kept) = runs
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(kept, held, strict=True))


def _layers_run(model, commits: list[int]):  # type: ignore[no-untyped-def]
    """Hook handles; `commits` gains the number of layers that ran whole in every pass that hands out no velocity."""
    ran = [0]
    blocks = [block.register_forward_hook(lambda *_: ran.__setitem__(0, ran[0] + 1)) for block in model.blocks]

    def done(_: object, __: object, out: torch.Tensor) -> None:
        if not out.numel():
            commits.append(ran[0])
        ran[0] = 0

    return [*blocks, model.register_forward_hook(done)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"policy": "full"}, [SPEC.layers - 1] * 6),
        # The first chunk has no history to observe; those with statistics run whole; then layer 1 is the last to store.
        ({"layers": (2, 3), "preset": "tuned"}, [SPEC.layers - 1, 1, 1]),
        ({"layers": (0, 1)}, [SPEC.layers - 1] * 3),
        # Of nothing there is no pass at all.
        ({"ratio": 1.0}, [SPEC.layers - 1]),
        ({"ratio": 1.0, "recent_frames": 3}, [SPEC.layers - 1] * 3),
    ],
    ids=str,
)
def test_a_clean_pass_ends_at_the_last_layer_that_keeps_something(options: dict, expected: list[int]) -> None:  # type: ignore[type-arg]
    model, commits = tiny_model(), list[int]()
    handles = _layers_run(model, commits)
    try:
        latents_of(tiny_stream(model, frames=21, **options))
    finally:
        for handle in handles:
            handle.remove()
    assert commits == expected


@pytest.mark.parametrize(("preset", "ahead", "frames"), [("paper", None, 12), ("tuned", 0, 12), ("tuned", None, 15)])
def test_corrections_do_not_depend_on_what_follows_their_last_rows(preset: str, ahead: int | None, frames: int) -> None:
    """The last chunk of a stream needs no clean pass, unless statistics are taken from it."""
    lengths = frames, frames + 3
    ends, goes_on = (tiny_stream(tiny_model(), preset=preset, ahead=ahead, frames=length) for length in lengths)
    latents_of(ends)
    latents_of(goes_on)
    assert set(ends.absorber.deltas) == set(goes_on.absorber.deltas) != set()
    for layer, delta in goes_on.absorber.deltas.items():
        assert torch.equal(ends.absorber.deltas[layer].weight, delta.weight)
