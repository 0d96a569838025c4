"""A cached stream against recomputation without a cache, and the bytes that stay allocated."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ispa_deploy.cache import KVCache
from ispa_deploy.errors import InputError
from ispa_deploy.kvstore import Layout, Store
from ispa_deploy.layercache import WindowCache
from ispa_deploy.slots import WindowSlots
from ispa_deploy.specs import ModelSpec
from tests.living import living_bytes
from tests.reference import NaiveMemory
from tests.tiny import SPEC, text_rows, tiny_model

SPECS = {
    "absolute": SPEC,
    "absolute-sink3": replace(SPEC, sink_frames=3),
    "no-sink": replace(SPEC, sink_frames=0, window_frames=6),
    "uneven": replace(SPEC, window_frames=10, sink_frames=2),
    "window": replace(SPEC, rope="window"),
    "window-theta": replace(SPEC, rope="window", rope_theta=100.0, window_frames=9),
    "ema": replace(SPEC, rope="window", window_frames=9, sink_frames=3, ema_sink=0.75),
    "ema-uneven": replace(SPEC, rope="window", window_frames=10, sink_frames=3, ema_sink=0.75),
    "first-frame": replace(SPEC, first_chunk_frames=1),
    "first-frame-window": replace(SPEC, rope="window", first_chunk_frames=1, window_frames=10),
}
LOCAL = (1, 2)


class _Pair:
    """The same model on the cache and on the naive memory, fed the same chunks."""

    def __init__(self, spec: ModelSpec, *, recent: int = 0):
        self.model, self.spec = tiny_model(spec), spec
        self.cache, self.naive = KVCache(spec, recent=recent), NaiveMemory(spec)
        self.text = self.model.encode_text(text_rows(spec))
        self.start = 0

    def step(self) -> None:
        """One chunk, a noisy and a clean pass; both memories must give the same velocity."""
        count = (self.spec.first_chunk_frames or self.spec.chunk_frames) if self.start == 0 else self.spec.chunk_frames
        for memory in (self.cache, self.naive):
            memory.begin(self.start, count)
        for t, committing in ((700.0, False), (0.0, True)):
            x, condition = torch.randn(1, count, *self.spec.latent_shape), self.model.condition(torch.tensor([[t]]))
            self.cache.committing = committing
            got, want = (self.model(x, condition, self.text, memory) for memory in (self.cache, self.naive))
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, msg=lambda m: f"frame {self.start}: {m}")
        self.start += count

    def localise(self, recent: int) -> None:
        for layer in LOCAL:
            self.cache.localise(layer, 1, recent)
            self.naive.localise(layer, recent)


@pytest.mark.parametrize("name", SPECS)
@torch.inference_mode()
def test_cached_attention_is_attention_over_the_window(name: str) -> None:
    pair = _Pair(SPECS[name])
    for _ in range(8):
        pair.step()


def _listen(seen: list[tuple[int, Tensor, Tensor]]) -> Callable[[int, Tensor, Tensor], None]:
    return lambda layer, local, full: seen.append((layer, local, full))


@pytest.mark.parametrize("name", ["absolute", "absolute-sink3", "window", "ema"])
@pytest.mark.parametrize("recent", [0, 3])
@torch.inference_mode()
def test_an_observer_changes_nothing_and_hears_what_an_l_layer_would_say(name: str, recent: int) -> None:
    pair = _Pair(SPECS[name], recent=recent)
    pair.step()
    for _ in range(6):
        seen: list[tuple[int, Tensor, Tensor]] = []
        pair.cache.observer = _listen(seen)
        pair.step()
        assert [layer for layer, *_ in seen] == 2 * list(range(SPEC.layers))
        for layer, local, _ in seen[SPEC.layers :]:
            want = pair.naive.local_output(layer, pair.naive.queries[layer], recent)
            torch.testing.assert_close(local, want, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(*seen[0][1:], atol=1e-3)


@pytest.mark.parametrize("name", ["absolute", "window", "ema"])
@pytest.mark.parametrize("recent", [3, 6])
@torch.inference_mode()
def test_an_observer_of_the_first_chunks_takes_no_empty_slot_for_a_recent_frame(name: str, recent: int) -> None:
    pair = _Pair(replace(SPECS[name], window_frames=12), recent=recent)
    pair.cache.observer = _listen([])
    for _ in range(3):
        pair.step()


@pytest.mark.parametrize("name", ["absolute", "absolute-sink3", "window", "ema", "first-frame"])
@pytest.mark.parametrize("recent", [0, 3])
@torch.inference_mode()
def test_an_l_layer_attends_to_the_sink_recent_frames_and_the_chunk(name: str, recent: int) -> None:
    pair = _Pair(SPECS[name], recent=recent)
    for _ in range(4):
        pair.step()
    pair.localise(recent)
    for _ in range(5):
        pair.step()
        for layer in LOCAL:
            frames = pair.cache.temporal(layer)[0]
            assert frames == [0, *range(pair.start - recent, pair.start)]


@pytest.mark.parametrize("name", ["absolute", "window", "window-theta"])
@pytest.mark.parametrize("recent", [0, 3])
@torch.inference_mode()
def test_a_layer_made_global_again_fills_up_from_what_it_held(name: str, recent: int) -> None:
    pair = _Pair(SPECS[name], recent=recent)
    for _ in range(4):
        pair.step()
    pair.localise(recent)
    pair.step()
    for layer in LOCAL:
        pair.cache.globalise(layer)
        pair.naive.globalise(layer)
    assert not pair.cache.is_local(1)
    for _ in range(6):
        pair.step()


@torch.inference_mode()
def test_a_three_frame_sink_survives_being_local() -> None:
    _local_and_back("absolute-sink3")


@torch.inference_mode()
def test_an_ema_sink_survives_being_local() -> None:
    _local_and_back("ema")


def _local_and_back(name: str) -> None:
    """Only frame 0 of the sink is left then: the stream goes on, with a window that rolls behind it."""
    pair = _Pair(SPECS[name])
    cache, model = pair.cache, pair.model
    for start in range(0, 45, 3):
        cache.begin(start, 3)
        cache.committing = True
        out = model(torch.randn(1, 3, *SPEC.latent_shape), model.condition(torch.zeros(1, 1)), pair.text, cache)
        assert out.isfinite().all()
        if start == 9:
            cache.localise(1, 1, 0)
        if start == 15:
            cache.globalise(1)
    frames = cache.temporal(1)[0]
    assert frames[0] == 0
    assert frames[1:] == list(range(45 - len(frames) + 1, 45))


@torch.inference_mode()
def test_no_sink_layers_hold_the_chunk_alone() -> None:
    pair = _Pair(SPEC)
    for _ in range(4):
        pair.step()
    for layer in range(SPEC.layers):
        pair.cache.localise(layer, 0, 0)
    assert pair.cache.persistent_bytes() == 0


def _wide(window: int) -> ModelSpec:
    return replace(SPEC, layers=10, window_frames=window)


@pytest.mark.parametrize(
    ("window", "percent"),
    [(12, (72.5, 63.3, 54.2)), (9, (73.3, 64.4, 55.6)), (6, (75.0, 66.7, 58.3))],
)
def test_persistent_bytes_are_the_paper_s(window: int, percent: tuple[float, ...]) -> None:
    cache = KVCache(_wide(window))
    before = living_bytes()
    assert cache.persistent_bytes() == cache.full_bytes()
    for layer in range(5):
        cache.localise(layer, 1, 0)
        if layer >= 2:
            assert round(100 * cache.persistent_bytes() / cache.full_bytes(), 1) == percent[layer - 2]
    assert before - living_bytes() == cache.full_bytes() - cache.persistent_bytes()


def test_recent_frames_are_counted() -> None:
    cache = KVCache(_wide(12), recent=3)
    for layer in range(10):
        cache.localise(layer, 1, 3)
    assert cache.persistent_bytes() * 12 == cache.full_bytes() * 4


def test_evicted_history_is_freed_at_once() -> None:
    cache = KVCache(SPEC)
    buffers = [weakref.ref(buffer) for store in (cache._layers[2].k, cache._layers[2].v) for buffer in store.parts]
    cache.localise(2, 1, 0)
    assert [buffer() for buffer in buffers] == [None, None]


@pytest.mark.parametrize("name", ["absolute", "window"])
@torch.inference_mode()
def test_scratch_is_shared_bounded_and_flat(name: str) -> None:
    pair = _Pair(SPECS[name])
    for _ in range(4):
        pair.step()
    for layer in range(SPEC.layers):
        pair.cache.localise(layer, 1, 0)
        pair.naive.localise(layer, 0)
    pair.step()
    scratch, kept = pair.cache.scratch_bytes(), pair.cache.persistent_bytes()
    assert 0 < scratch <= pair.cache.full_bytes() / SPEC.layers
    for _ in range(4):
        pair.step()
    assert (pair.cache.scratch_bytes(), pair.cache.persistent_bytes()) == (scratch, kept)


def test_a_stream_past_the_model_s_positions_ends_in_one_line() -> None:
    cache = KVCache(replace(SPEC, max_frames=6))
    cache.begin(3, 3)
    with pytest.raises(InputError, match="at most 6 frames"):
        cache.begin(6, 3)


def test_a_buffer_that_does_not_roll_ends_in_one_line() -> None:
    cache = KVCache(replace(SPEC, rolls=False, window_frames=6))
    cache.begin(0, 3)
    cache.begin(3, 3)
    with pytest.raises(InputError, match="at most 6 frames"):
        cache.begin(6, 3)


@pytest.mark.parametrize(("wide", "moves"), [(True, True), (False, False)])
def test_a_sixteen_bit_averaging_sink_keeps_small_updates_in_float32(wide: bool, moves: bool) -> None:
    layout = Layout(1, 2, 1, 4, torch.bfloat16, torch.device("cpu"))
    cache = WindowCache(WindowSlots(capacity=9, sink=3, chunk=3), Store(layout, 9), Store(layout, 9), 0.999, wide)
    for start in range(0, 900, 3):
        cache.begin(start, 3)
        first, last = cache.slots.current
        for slot in range(first, last):
            for store in (cache.k, cache.v):
                store.put(slot, torch.full((1, 2, 1, 4), 1.0 if start == 0 else 1.25))
    sink = cache.slots.frames.index(0)
    expected = 1.25 - 0.25 * 0.999 ** (900 / 3 - 3)  # every update counts
    drift = float(cache.k.frame(sink).float().mean()) - 1
    assert (abs(drift - (expected - 1)) < 5e-3) == moves
    assert bool(cache.wide_bytes()) == wide
