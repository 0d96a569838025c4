"""Krea's loop: a past encoded anew before every chunk, against the same mathematics dense and masked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ispa_deploy.cache import KVCache
from ispa_deploy.context import Context
from ispa_deploy.errors import InputError
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.profile.steady import SteadyStream
from ispa_deploy.sampler import Schedule, even_steps
from ispa_deploy.specs import SPECS, ModelSpec
from ispa_deploy.stream import Stream
from tests.reference import rotate
from tests.tiny import SPEC, latents_of, text_rows, tiny_model

KREA = replace(
    SPEC, name="tiny-krea", window_frames=6, sink_frames=1, rope="window", reencodes=True, steps=(1000, 500, 0)
)
WIDE = replace(KREA, window_frames=9)


def krea_stream(spec: ModelSpec = KREA, *, frames: int = 18, **options: Any) -> Stream:
    return open_stream(tiny_model(spec), text_rows(spec), StreamOptions(frames=frames, **options))


class Masked:
    """A model's memory for one pass over [context | current] at once: dense float64 attention under a mask."""

    def __init__(self, spec: ModelSpec, past: int, current: int, *, beta: float = 1.0, local: int | None = None):
        tokens, total = spec.frame_tokens, past + current
        frame = torch.arange(total).repeat_interleave(tokens)
        chunk = torch.where(frame < past, frame // spec.chunk_frames, past)
        self.spec, self.past = spec, past * tokens
        self.bias = torch.where(chunk[:, None] >= chunk[None], 0.0, -torch.inf).double()
        rows, between = frame[:, None] >= past, (frame > 0) & (frame < past)
        self.bias += torch.where(rows & between[None], torch.log(torch.tensor(beta, dtype=torch.float64)), 0.0)
        if local is not None:  # an L-layer that keeps `local` recent frames
            lost = between & (frame < past - local)
            self.lost = torch.where(rows & lost[None], -torch.inf, 0.0)
        self.is_local = local is not None

    def layer(self, index: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = [x.unflatten(1, (-1, self.spec.frame_tokens)).unbind(1) for x in (q, k)]
            q, k = (
                torch.cat([rotate(x, n, self.spec.grid, self.spec.rope_theta) for n, x in enumerate(part)], 1)
                for part in parts
            )
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5 + self.bias
            if self.is_local:
                scores = scores + self.lost
            return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double()).to(v.dtype)

        return attend

    def cross(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * q.shape[-1] ** -0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double()).to(q.dtype)

    def store(self, index: int, k: Tensor, v: Tensor) -> None:
        raise AssertionError("a pass over everything stores nothing")


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("spec", [KREA, WIDE], ids=["K3", "K6"])
@torch.inference_mode()
def test_context_and_chunk_are_one_masked_pass(spec: ModelSpec, beta: float) -> None:
    """Both passes together are one pass of a causal model in which chunks see themselves and what came before."""
    model, cache = tiny_model(spec), KVCache(spec, past_bias=beta)
    text = model.encode_text(text_rows(spec))
    clean, noisy = model.condition(torch.tensor([[0.0]])), model.condition(torch.tensor([[700.0]]))
    heard: list[int] = []
    for start in range(0, 24, 3):
        cache.begin(start, 3)
        frames = Context(spec).frames(start)
        past, x = torch.randn(1, len(frames), *spec.latent_shape), torch.randn(1, 3, *spec.latent_shape)
        if frames:
            with cache.encoding(frames):
                model(past, clean, text, cache)
        cache.observer = (lambda layer, local, full: heard.append(layer)) if start == 12 else None
        got = model(x, noisy, text, cache)
        t = torch.cat([torch.zeros(1, len(frames)), torch.full((1, 3), 700.0)], 1)
        want = model(torch.cat([past, x], 1), model.condition(t), text, Masked(spec, len(frames), 3, beta=beta))
        torch.testing.assert_close(got, want[:, -3:], rtol=2e-5, atol=2e-5)
        assert cache.position(start) == min(start, spec.context_frames)
    assert heard == list(range(spec.layers))


@pytest.mark.parametrize(("spec", "recent"), [(KREA, 0), (WIDE, 0), (WIDE, 3)])
@pytest.mark.parametrize("beta", [1.0, 0.3])
@torch.inference_mode()
def test_an_l_layer_sees_the_whole_context_pass_and_keeps_the_first_frame(
    spec: ModelSpec, recent: int, beta: float
) -> None:
    model, cache = tiny_model(spec), KVCache(spec, recent=recent, past_bias=beta)
    text, timestep = model.encode_text(text_rows(spec)), model.condition(torch.tensor([[700.0]]))
    said: dict[int, Tensor] = {}
    for start in range(0, 21, 3):
        cache.begin(start, 3)
        frames = Context(spec).frames(start)
        past, x = torch.randn(1, len(frames), *spec.latent_shape), torch.randn(1, 3, *spec.latent_shape)
        if start == 12:
            for layer in range(spec.layers):
                cache.localise(layer, 1, recent)
        if frames:
            with cache.encoding(frames):
                model(past, model.condition(torch.tensor([[0.0]])), text, cache)
        if start == 9:
            cache.observer = lambda layer, local, full: said.__setitem__(layer, local)
        got = model(x, timestep, text, cache)
        cache.observer = None
        if start < 12:
            continue
        t = torch.cat([torch.zeros(1, len(frames)), torch.full((1, 3), 700.0)], 1)
        memory = Masked(spec, len(frames), 3, beta=beta, local=recent)
        want = model(torch.cat([past, x], 1), model.condition(t), text, memory)
        torch.testing.assert_close(got, want[:, -3:], rtol=2e-5, atol=2e-5)
        held, _, _ = cache.temporal(0)
        assert held == [0, *range(start - recent, start)]
    assert set(said) == set(range(spec.layers))


def test_bytes_are_those_of_the_window_and_one_frame() -> None:
    """Table of the facts: K + 3 frames in every layer (7.67 GB for 40 layers at 832x480), one in an L-layer."""
    spec = SPECS["krea-14b"]
    frame = 2 * spec.frame_tokens * spec.dim * 2
    assert round(frame * spec.window_frames * spec.layers / 1e9, 2) == 7.67
    stream = krea_stream(frames=18, policy="full")
    latents_of(stream)
    assert stream.cache.persistent_bytes() == stream.cache.full_bytes() == 4 * 2 * 6 * 6 * 48 * 4
    stream = krea_stream(frames=18)
    latents_of(stream)
    assert stream.absorber.state == "absorbed"
    assert stream.cache.persistent_bytes() / stream.cache.full_bytes() == pytest.approx(1 - 0.5 * 5 / 6)


def _rows(stream: Stream) -> list[float]:
    sums = [all_of for all_of in (stream.absorber._early, stream.absorber._late) if all_of]
    return [sum(s.rows for s in layer) for layer in zip(*sums, strict=True)]


@pytest.mark.parametrize(("preset", "chunks"), [("paper", 3), ("tuned", 2)])
def test_only_denoising_passes_are_watched(preset: str, chunks: int) -> None:
    """Three chunks into the warm-up: `paper` counts them all, `tuned` those with a history, the context pass never."""
    stream = krea_stream(preset=preset, half_life=1e9)
    for chunk in stream:
        if chunk.index == 2:
            assert _rows(stream) == pytest.approx([chunks * 3 * 3 * KREA.frame_tokens] * KREA.layers)
            break


def test_corrections_rest_in_the_context_pass() -> None:
    """Every layer sees its whole context there, so there is nothing to correct: outputs of `o` are those of W alone."""
    stream = krea_stream(frames=18, delta="fold")
    model, wrong, passes = stream.model, [], 0
    own = {id(block.self_attn.o): block.self_attn.o.weight.clone() for block in model.layers()}

    def watch(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal passes
        plain = torch.nn.functional.linear(inputs[0], own[id(layer)], layer.bias)
        if stream.cache._context:
            passes += 1
            wrong.append(not torch.equal(plain, output))

    handles = [block.self_attn.o.register_forward_hook(watch) for block in model.layers()]
    for chunk in stream:
        if chunk.start == 12:
            local = stream.absorber.local_layers()
            assert local
            assert all(model.blocks[layer].self_attn.o.delta is not None for layer in local)
    for handle in handles:
        handle.remove()
    assert passes == 5 * (KREA.layers - 1), "the last layer of a context pass only stores"
    assert not any(wrong)


def test_a_prompt_turns_into_the_next_over_chunks() -> None:
    spec = replace(KREA, interpolate=3)
    old, new = text_rows(spec), text_rows(spec, seed=7)
    model = tiny_model(spec)
    stream = open_stream(model, old, StreamOptions(frames=36), switches=[(13, new)])
    seen: list[tuple[Tensor, bool]] = []
    encode = model.encode_text

    def remember(rows: Tensor) -> Any:
        seen.append((rows, True))
        return encode(rows)

    model.encode_text = remember  # type: ignore[method-assign]
    states = [stream.absorber.state for _ in stream]
    assert [rows.equal(want) for (rows, _), want in zip(seen, [torch.lerp(old, new, 0.5), new], strict=True)] == [
        True, True,
    ]  # fmt: skip
    # Chunk 5 is the first of three and still under the old prompt; 6 is half way, 7 arrives and warms up into 11.
    assert states == ["warm-up"] * 4 + ["absorbed"] * 2 + ["warm-up"] * 5 + ["absorbed"]


def test_a_switched_chunk_is_encoded_under_the_prompt_before() -> None:
    old, new = text_rows(KREA), text_rows(KREA, seed=7)
    model = tiny_model(KREA)
    stream = open_stream(model, old, StreamOptions(frames=12, policy="full"), switches=[(6, new)])
    texts: list[tuple[int, bool, bool]] = []
    forward = model.forward

    def watch(x: Tensor, condition: Any, text: Any, memory: Any, stores: Any = None) -> Tensor:
        before = torch.equal(text.layers[0][0], first.layers[0][0])
        texts.append((stream.cache.start, bool(stream.cache._context), before))
        return forward(x, condition, text, memory, stores)

    first = model.encode_text(old)
    model.forward = watch  # type: ignore[method-assign]
    latents_of(stream)
    assert all(before for start, _, before in texts if start < 6)
    assert all(before == context for start, context, before in texts if start == 6)
    assert not any(before for start, _, before in texts if start == 9)


def test_the_windows_first_frame_slides_through_pixels() -> None:
    """Once there are more than K frames, slot 0 is the oldest pixel frame of the context's time, encoded alone."""
    spec, seen = WIDE, []
    model = tiny_model(spec)
    counted = 0

    def decode(latents: Tensor) -> Tensor:
        nonlocal counted
        frames = 4 * latents.shape[1] - (3 if counted == 0 else 0)
        pixels = torch.arange(counted, counted + frames, dtype=torch.float32)
        counted += frames
        return pixels[None, :, None, None, None].expand(1, -1, 3, 1, 1)

    def encode(pixels: Tensor) -> Tensor:
        assert pixels.shape == (1, 1, 3, 1, 1)
        seen.append(int(pixels.flatten()[0]))
        return torch.full((1, 1, *spec.latent_shape), 0.5)

    stream = open_stream(
        model, text_rows(spec), StreamOptions(frames=18, policy="full"), decoder=decode, encoder=encode
    )
    contexts = {}
    for chunk in stream:
        contexts[chunk.start] = stream.context.latents(chunk.start + 3) if chunk.start < 15 else None
    # Before frame 9, 9 + 4 * 6 = 33 pixel frames exist, of which 21 are the context's; each chunk adds twelve.
    assert sorted(set(seen)) == [33 - 21, 45 - 21, 57 - 21]
    assert bool((contexts[9][:, :1] == 0.5).all())
    kept = open_stream(model, text_rows(spec), StreamOptions(frames=18, policy="full"))
    chunks = [(chunk.latents, kept.context.latents(chunk.start + 3)) for chunk in kept]
    for index in (2, 3, 4):
        assert torch.equal(chunks[index][1][:, :1], chunks[0][0][:, :1])
        assert torch.equal(chunks[index][1][:, -3:], chunks[index][0])


@pytest.mark.parametrize(
    ("count", "strength", "want"),
    [
        (4, 1.0, (1000.0, 908.8427, 713.9794, 0.0)),
        (5, 1.0, (1000.0, 937.5, 833.3333, 625.0, 0.0)),
        (3, 0.7, (921.0526, 729.1667, 0.0)),
    ],
)
def test_steps_are_spaced_as_the_server_does(count: int, strength: float, want: tuple[float, ...]) -> None:
    schedule = Schedule.few_step(even_steps(count, strength), 5.0)
    assert schedule.timesteps == pytest.approx(want)
    assert schedule.sigmas[:-1] == pytest.approx([t / 1000 for t in want[:-1]])
    assert schedule.sigmas[-1] == pytest.approx(0.004980, abs=1e-6)


@pytest.mark.parametrize("window", [3, 5, 7, 27])
def test_a_context_is_whole_chunks(window: int) -> None:
    with pytest.raises(InputError, match=r"3 to 21 frames|shorter than sink"):
        replace(KREA, window_frames=window)


def test_a_recalibrated_layer_has_its_history_back_at_once() -> None:
    stream = krea_stream(frames=30)
    for chunk in stream:
        if chunk.start == 15:
            assert stream.absorber.local_layers()
            stream.request_recalibration()
        if chunk.start == 18:
            held = {tuple(stream.cache.temporal(layer)[0]) for layer in range(KREA.layers)}
            assert held == {(0, 16, 17, 18, 19, 20)}
            assert min(_rows(stream)) > 0
    assert stream.absorber.state == "absorbed"


def test_a_stream_made_steady_encodes_its_context_too() -> None:
    """What `profile` times: from the first chunk on, every chunk begins with a whole context pass."""
    model, passes = tiny_model(WIDE), []
    steady = SteadyStream.open(model, StreamOptions(), 2)
    model.blocks[0].register_forward_hook(lambda _, __, out: passes.append(out.shape[1]))
    with steady.turn():
        for _ in range(2):
            steady.step()
    assert passes == [6, 3, 6, 3, 3, 3]


def test_a_batch_of_two_is_two_batches_of_one() -> None:
    model, rows = tiny_model(WIDE), text_rows(WIDE, batch=2)
    streams = [open_stream(model, part, StreamOptions(frames=15, policy="full")) for part in (rows, rows[:1], rows[1:])]
    noise = torch.randn(5, 3, 2, 3, *WIDE.latent_shape)
    for stream, samples in zip(streams, (slice(0, 2), slice(0, 1), slice(1, 2)), strict=True):
        stream.noise = lambda chunk, _, step, samples=samples: noise[chunk, step, samples]
    together, *apart = (latents_of(stream) for stream in streams)
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


@pytest.mark.parametrize("spread", [0, 2])
@pytest.mark.parametrize("kv_dtype", ["int8", "auto"])
def test_the_other_options_hold_on_krea_too(spread: int, kv_dtype: str) -> None:
    """8-bit caches stay close to the full run, and a spread solve absorbs so many chunks after the warm-up."""
    full = latents_of(krea_stream(frames=24, policy="full"))
    stream = krea_stream(frames=24, spread_solve=spread, kv_dtype=kv_dtype)
    states = [stream.absorber.state for _ in stream]
    assert states.index("absorbed") == 3 + max(1, spread)
    coded = latents_of(krea_stream(frames=24, policy="full", kv_dtype=kv_dtype))
    assert torch.equal(coded, full) == (kv_dtype == "auto")
    assert float((coded - full).square().mean() / full.square().mean()) < 1e-2
