"""The speech-to-video model, its rings and its condition: laws against a memory without rings."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ispa_deploy.avatar.cache import AvatarCache
from ispa_deploy.avatar.condition import drawn_distance, reference_position
from ispa_deploy.avatar.model import CausalS2V
from ispa_deploy.avatar.sizes import condition_length
from ispa_deploy.avatar.stream import Scene
from ispa_deploy.errors import InputError
from ispa_deploy.memory import held_bytes, predicted
from ispa_deploy.networks import network_of
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.sampler import Sampler
from ispa_deploy.specs import SPECS
from tests.reference import attention, kept_frames, ridge, rotate
from tests.tiny import tiny_model
from tests.tiny_avatar import AVATAR, avatar_model, scene

TOKENS, STEPS, CHUNK = AVATAR.frame_tokens, len(AVATAR.steps), AVATAR.chunk_frames


def test_the_published_model_has_its_tensors() -> None:
    with torch.device("meta"):
        model = network_of(SPECS["liveavatar-14b"])
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(shapes) == 1260
    assert sum(p.numel() for p in model.parameters()) == 16_295_755_609
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 467
    expected = {
        "cond_encoder.weight": (5120, 16, 1, 2, 2),
        "trainable_cond_mask.weight": (3, 5120),
        "frame_packer.proj_2x.weight": (5120, 16, 2, 4, 4),
        "frame_packer.proj_4x.weight": (5120, 16, 4, 8, 8),
        "casual_audio_encoder.weights": (1, 25, 1, 1),
        "casual_audio_encoder.encoder.padding_tokens": (1, 1, 1, 5120),
        "casual_audio_encoder.encoder.conv1_local.conv.weight": (5120, 1024, 3),
        "casual_audio_encoder.encoder.conv1_global.conv.weight": (1280, 1024, 3),
        "casual_audio_encoder.encoder.conv2.conv.weight": (2560, 1280, 3),
        "casual_audio_encoder.encoder.conv3.conv.weight": (5120, 2560, 3),
        "casual_audio_encoder.encoder.final_linear.weight": (5120, 5120),
        "audio_injector.injector.11.q.weight": (5120, 5120),
        "audio_injector.injector.11.norm_k.weight": (5120,),
        "audio_injector.injector_adain_layers.11.linear.weight": (10240, 5120),
    }
    assert {name: shapes[name] for name in expected} == expected


@pytest.mark.parametrize(("grid", "tokens"), [((24, 44), 2640), ((25, 45), 2778), ((4, 6), 58)])
def test_length_of_the_condition(grid: tuple[int, int], tokens: int) -> None:
    assert condition_length(SPECS["liveavatar-14b"], grid) == tokens


def test_steps_are_those_of_the_twice_shifted_scheduler() -> None:
    schedule = Sampler.of(SPECS["liveavatar-14b"]).schedule
    published = torch.tensor([1000.0, 857.6923, 602.1506, 8.9286])
    torch.testing.assert_close(torch.tensor(schedule.timesteps), published, atol=1e-4, rtol=0)
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=3)
    theirs.set_timesteps(4)
    assert schedule.timesteps == tuple(theirs.timesteps.tolist())
    assert (*schedule.sigmas, 0.0) == tuple(theirs.sigmas.tolist())


def test_distances_are_uniform_keyed_and_the_reference_keeps_ahead() -> None:
    draw = drawn_distance(7)
    drawn = [draw(start, step) for start in range(0, 6000, 3) for step in range(4)]
    assert set(drawn) == set(range(4, 31))
    assert max(Counter(drawn).values()) < 1.3 * len(drawn) / 27
    assert [drawn_distance(7)(start, 2) for start in (0, 3)] == [draw(0, 2), draw(3, 2)]
    assert [reference_position(start, 12) for start in (0, 18, 21, 100)] == [30, 30, 33, 112]


# -- memory against a reference without rings


def _condition_places() -> list[tuple[int, int, int]]:
    """(time, row, column) of the condition's tokens of a 4 x 6 grid, the reference at 30."""
    full = [(row, column) for row in range(4) for column in range(6)]
    half = [(row, column) for row in (0, 3) for column in (0, 2, 5)]
    return [
        *((30, *place) for place in full),
        *((-1, *place) for place in full),
        *((-3, *place) for place in half),
        *((time, 0, 0) for time in (-19, -14, -9, -4)),
    ]


def _turned(x: Tensor, reference: int) -> Tensor:
    """Condition tokens (1, M, H, D), each rotated alone at its place, in float64."""
    places = [(reference if time == 30 else time, row, column) for time, row, column in _condition_places()]
    tokens = []
    for index, (time, row, column) in enumerate(places):
        plane = x[:, index : index + 1].expand(-1, 24, -1, -1)
        tokens.append(rotate(plane, time, (4, 6), AVATAR.rope_theta)[:, row * 6 + column])
    return torch.stack(tokens, 1)


class _Pair:
    """A cache and, beside it, every frame's keys in a dict; `seen` collects what an observer is told."""

    def __init__(self, **options: Any):
        torch.manual_seed(3)
        self.cache = AvatarCache(AVATAR, **options)
        self.held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # step, frame
        self.chunks: list[tuple[int, int]] = []
        self.condition = self._random(self.cache.condition_tokens)[1:]
        with self.cache.condition():
            for layer in range(AVATAR.layers):
                q, k, v = self._random(0)[0], *self.condition
                self.cache.layer(layer)(q.new_zeros(1, *k.shape[1:]), k, v)

    @staticmethod
    def _random(tokens: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(1, tokens, AVATAR.heads, AVATAR.head_dim) for _ in range(3))

    def chunk(self, local: bool = False, recent: int = 0, sink: bool = True) -> None:
        """One chunk, every step, layer 0: compare with dense attention over what should be seen."""
        start = sum(self.chunks[-1]) if self.chunks else 0
        self.cache.begin(start, CHUNK)
        self.chunks.append((start, CHUNK))
        window = kept_frames(AVATAR.window_frames, 0, self.chunks)
        near = [frame for frame in window if frame >= start - recent]
        for step in range(STEPS):
            distance = 4 + (7 * start + step) % 27
            self.cache.begin_pass(step, distance)
            q, k, v = self._random(CHUNK * TOKENS)
            for index in range(CHUNK):
                rows = slice(index * TOKENS, (index + 1) * TOKENS)
                self.held[step, start + index] = rotate(k[:, rows], start + index, (4, 6), 1e4), v[:, rows].double()
            turned = torch.cat([rotate(part, start + index, (4, 6), 1e4)
                                for index, part in enumerate(q.split(TOKENS, 1))], 1)  # fmt: skip
            told: list[tuple[Tensor, Tensor]] = []
            if self.cache.observer is not None:
                self.cache.observer = lambda _, *pair, told=told: told.append(pair)
            ours = self.cache.layer(0)(q, k, v)
            seen = near if local else window
            reference = self._dense(turned, seen, step, start, distance, sink or not local)
            torch.testing.assert_close(ours.double(), reference, atol=2e-5, rtol=2e-5)
            for got_local, got_full in told:
                torch.testing.assert_close(got_full.double(), reference, atol=2e-5, rtol=2e-5)
                want = self._dense(turned, near, step, start, distance, sink)
                torch.testing.assert_close(got_local.double(), want, atol=2e-5, rtol=2e-5)

    def _dense(self, q: Tensor, frames: list[int], step: int, start: int, distance: int, sink: bool) -> Tensor:
        keys = [self.held[step, frame] for frame in frames]
        if sink:
            place = 30 + max(0, start - (30 - distance))
            keys.append((_turned(self.condition[0], place), self.condition[1].double()))
        return attention(q, torch.cat([k for k, _ in keys], 1), torch.cat([v for _, v in keys], 1))[0]


@pytest.mark.parametrize("recent", [0, 3])
@pytest.mark.parametrize("observed", [False, True])
def test_an_f_layer_sees_its_step_s_window_and_the_condition(observed: bool, recent: int) -> None:
    pair = _Pair(recent=recent)
    if observed:
        pair.cache.observer = lambda *_: None
    for _ in range(7):  # the ring of 12 is full after four
        pair.chunk(recent=recent)


def test_without_a_sink_the_local_part_is_the_chunk_alone() -> None:
    pair = _Pair(local_sink=0)
    pair.cache.observer = lambda *_: None
    for _ in range(5):
        pair.chunk(sink=False)


@pytest.mark.parametrize(("recent", "sink"), [(0, True), (3, True), (6, True), (0, False), (3, False)])
def test_an_l_layer_sees_condition_recent_and_current(recent: int, sink: bool) -> None:
    pair = _Pair(recent=recent, local_sink=int(sink))
    for _ in range(5):
        pair.chunk(recent=recent, sink=sink)
    pair.cache.localise(0, int(sink), recent)
    for _ in range(4):
        pair.chunk(local=True, recent=recent, sink=sink)


def test_an_l_layer_made_global_again_fills_a_new_ring() -> None:
    pair = _Pair()
    pair.chunk()
    pair.cache.localise(0, 1, 0)
    pair.chunk(local=True)
    pair.cache.globalise(0)
    pair.held.clear()
    pair.chunks = [(6, 0)]
    for _ in range(5):
        pair.chunk()


def test_bytes_are_those_of_rings_and_condition() -> None:
    spec = SPECS["liveavatar-14b"]
    cache = AvatarCache(spec, dtype=torch.bfloat16, device="meta")
    ring = 4 * 12 * 1056 * 40 * 128 * 2 * 2 * 40
    condition = 2640 * 40 * 128 * 2 * 2 * 40
    assert cache.persistent_bytes() == cache.full_bytes() == ring + condition
    assert round(ring / 1e9, 1) == 41.5
    for layer in range(20):
        cache.localise(layer, 1, 0)
    assert cache.persistent_bytes() == ring // 2 + condition
    for layer in range(20, 40):
        cache.localise(layer, 0, 0)
    assert cache.persistent_bytes() == condition // 2


def test_rings_hold_whole_chunks() -> None:
    with pytest.raises(InputError, match="whole chunks"):
        AvatarCache(AVATAR, recent=2)


# -- the model


def _velocity(model: CausalS2V, states: Tensor, mask: Tensor | None = None) -> Tensor:
    torch.manual_seed(5)
    cache = AvatarCache(AVATAR)
    text = model.encode_text(torch.randn(1, AVATAR.text_len, AVATAR.text_dim))
    given = scene()
    with cache.condition():
        tokens = model.condition_tokens(given.reference, given.reference.expand(-1, 19, -1, -1, -1))
        model.prefill(tokens, model.condition(torch.zeros(1, 1)), text, cache)
    cache.begin(0, CHUNK)
    cache.begin_pass(0, 10)
    guidance = model.guide(states, None if mask is None else mask.flatten(1)[:, None, :, None])
    x = torch.randn(1, CHUNK, *AVATAR.latent_shape)
    return model(x, model.condition(torch.full((1, 1), 900.0)), text, cache, guidance=guidance)


@torch.inference_mode()
def test_each_speaker_is_heard_where_the_mask_says() -> None:
    model = avatar_model()
    two = torch.randn(2, AVATAR.audio_states, AVATAR.audio_dim, 4 * CHUNK)
    alone = [_velocity(model, two[index : index + 1]) for index in range(2)]
    assert not torch.allclose(*alone, atol=1e-3)
    for index in range(2):
        mask = torch.zeros(2, *AVATAR.grid)
        mask[index] = 1
        torch.testing.assert_close(_velocity(model, two, mask), alone[index], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_frame_hears_no_later_sound() -> None:
    model = avatar_model()
    states = torch.randn(1, AVATAR.audio_states, AVATAR.audio_dim, 12)
    later = states.clone()
    later[..., 9:] += 1
    (local, heard), (local_2, heard_2) = (model.casual_audio_encoder(s) for s in (states, later))
    assert torch.equal(local[:, :2], local_2[:, :2])
    assert torch.equal(heard[:, :2], heard_2[:, :2])
    assert not torch.allclose(local[:, 2], local_2[:, 2])


# -- absorption


def _stream(model: CausalS2V, **options: Any) -> Any:
    rows = torch.randn(1, AVATAR.text_len, AVATAR.text_dim, generator=torch.Generator().manual_seed(4))
    return open_stream(model, rows, StreamOptions(**{"frames": 18, **options}), scene=scene())


def _rows_seen(stream: Any) -> dict[tuple[int, int], list[tuple[Tensor, Tensor]]]:
    """Local and full rows of every layer and step, as the absorber is told them."""
    seen: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    tell = stream.absorber._observe

    def listen(layer: int, local: Tensor, full: Tensor) -> None:
        rows = local[0].flatten(1).double(), full[0].flatten(1).double()
        seen.setdefault((layer, stream.cache.step), []).append(rows)
        tell(layer, local, full)

    stream.absorber._observe = listen
    return seen


@pytest.mark.parametrize("per_step", [False, True])
def test_corrections_are_the_ridge_regression_on_the_rows_of_all_steps_or_of_one(per_step: bool) -> None:
    model = avatar_model()
    stream = _stream(
        model, preset="paper", ratio=1.0, ridge_absolute=1.0, stats_double=True, per_step=per_step, delta="side"
    )
    seen = _rows_seen(stream)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    latents = torch.cat([chunk.latents for chunk in stream], 1)
    assert latents.isfinite().all()
    assert stream.absorber.state == "absorbed"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(block.self_attn.o.delta is None for block in model.layers())
    for layer in (0, 3):
        weight = model.layers()[layer].self_attn.o.weight.detach().double()
        for step in range(STEPS):
            steps = [step] if per_step else range(STEPS)
            local, full = (torch.cat([rows[side] for at in steps for rows in seen[layer, at]]) for side in (0, 1))
            want, _ = ridge(local, (full - local) @ weight.T, 1.0)
            delta = stream.absorber.steps[layer][step] if per_step else stream.absorber.deltas[layer]
            torch.testing.assert_close(delta.weight.double(), want.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_step": True, "delta": "side"},
        {"policy": "full"},
        {"policy": "no-sink", "ratio": 1.0, "recent_frames": 3},
        {"offload": True},
        {"offload": True, "policy": "full"},
    ],
)
def test_predicted_bytes_are_those_held(options: dict[str, Any]) -> None:
    stream = _stream(avatar_model(), **options)
    foreseen, chunks = predicted(stream), iter(stream)
    next(chunks)
    before = held_bytes(stream)
    for chunk in chunks:
        if chunk.index == 4:
            break
    after = held_bytes(stream)
    expected = {"weights": foreseen.weights, "text_kv": foreseen.text_kv, "wide_sink": 0}
    one_ring = 2 * 12 * TOKENS * AVATAR.dim * 4  # keys and values, float32
    warm = {
        **expected,
        "kv": foreseen.kv_full,
        "host_kv": foreseen.host_kv_full,
        "kv_scratch": one_ring if stream.cache.rests else 0,
        "statistics": foreseen.statistics or foreseen.host_statistics,
        "deltas": 0,
    }
    assert foreseen.host_kv_full == (4 * one_ring * AVATAR.layers if stream.cache.rests else 0)
    local = {
        **expected,
        "kv": foreseen.kv,
        "host_kv": foreseen.host_kv,
        "kv_scratch": foreseen.kv_scratch,
        "statistics": 0,
        "deltas": foreseen.deltas,
    }
    for seen, wanted in ((before, warm), (after, local)):
        assert seen == {name: pytest.approx(count, rel=0.05) for name, count in wanted.items()}


@pytest.mark.parametrize("recent", [0, 3])
def test_rings_that_rest_in_host_memory_change_no_bit(recent: int) -> None:
    streams = [_stream(avatar_model(), recent_frames=recent, offload=rests) for rests in (False, True)]
    here, there = (torch.cat([chunk.latents for chunk in stream], 1) for stream in streams)
    assert torch.equal(here, there)
    kept, rested = (stream.cache for stream in streams)
    assert kept.persistent_bytes() == rested.persistent_bytes()
    condition = 2 * 58 * 48 * 4 * AVATAR.layers
    assert (
        rested.persistent_bytes() - rested.host_bytes()
        == condition
        == kept.persistent_bytes()
        - 4 * sum(2 * (recent if kept.is_local(layer) else 12) * TOKENS * 48 * 4 for layer in range(AVATAR.layers))
    )


def test_each_step_runs_under_its_own_correction() -> None:
    model = avatar_model()
    stream = _stream(model, preset="paper", ratio=0.5, per_step=True)
    carried: dict[int, list[Tensor]] = {}

    def watch(module: nn.Module, *_: Any) -> None:
        if module.delta is not None:  # type: ignore[union-attr]
            carried.setdefault(stream.cache.step, []).append(module.delta.weight)  # type: ignore[union-attr, arg-type]

    layers = []
    for chunk in stream:
        if chunk.index == 3:
            layers = stream.absorber.local_layers()
            handle = model.layers()[layers[0]].self_attn.o.register_forward_pre_hook(watch)
    handle.remove()
    assert len(layers) == 2
    for step, deltas in carried.items():
        assert all(torch.equal(delta, stream.absorber.steps[layers[0]][step].weight) for delta in deltas)
    assert sorted(carried) == list(range(STEPS))
    one, other = (stream.absorber.steps[layers[0]][step].weight for step in (0, 3))
    assert not torch.allclose(one, other)
    assert len(list(stream.absorber.corrections())) == 2 * STEPS


def test_the_prefill_after_a_prompt_switch_runs_without_corrections() -> None:
    """Two streams of one model, absorbed or not, hold the same condition once the prompt has changed."""
    conditions = []
    rows = torch.randn(1, AVATAR.text_len, AVATAR.text_dim)
    for policy in ("full", "absorb"):
        model = avatar_model()
        stream = open_stream(
            model, rows, StreamOptions(frames=18, policy=policy, ratio=1.0), scene=scene(), switches=[(15, rows + 1)]
        )
        first = None
        for chunk in stream:
            if chunk.index == 0:
                first = stream.cache.conditioned(2)[0].clone()
        conditions.append(stream.cache.conditioned(2)[0].clone())
        assert first is not None
        assert not torch.allclose(first, conditions[-1])
    torch.testing.assert_close(*conditions)


def test_a_longer_stream_keeps_its_early_frames_and_another_seed_does_not() -> None:
    model = avatar_model()
    short, long, other = (
        torch.cat([chunk.latents for chunk in _stream(model, policy="full", frames=frames, seed=seed)], 1)
        for frames, seed in ((9, 0), (15, 0), (9, 1))
    )
    assert torch.equal(short, long[:, :9])
    assert not torch.allclose(short, other)


def test_a_stream_needs_its_scene_and_no_other_model_takes_one() -> None:
    rows = torch.zeros(1, AVATAR.text_len, AVATAR.text_dim)
    with pytest.raises(InputError, match="sound and an image"):
        open_stream(avatar_model(), rows, StreamOptions(frames=18))
    with pytest.raises(InputError, match="no scene"):
        open_stream(tiny_model(), rows, StreamOptions(frames=18), scene=scene())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"states": torch.zeros(1, 25, 8, 12)}, "speech features"),
        ({"reference": torch.zeros(1, 1, 4, 2, 2)}, "reference latents"),
        ({"states": torch.zeros(2, AVATAR.audio_states, AVATAR.audio_dim, 12)}, "mask"),
    ],
)
def test_a_scene_that_does_not_fit_is_refused(changes: dict[str, Tensor], said: str) -> None:
    given = scene()
    with pytest.raises(InputError, match=said):
        Scene(**{"states": given.states, "reference": given.reference, **changes}).check(AVATAR)
