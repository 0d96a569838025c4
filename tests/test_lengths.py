"""Streams as long as asked for: where positions or frames run out, what goes on for ever, and what that costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ispa_deploy.adapt import adapted
from ispa_deploy.errors import InputError
from ispa_deploy.options import StreamOptions
from ispa_deploy.specs import SPECS
from tests.test_budget import living_bytes
from tests.tiny import SPEC, latents_of, tiny_model, tiny_stream

QUICK = replace(SPEC, layers=2, latent_height=2, latent_width=2, steps=(1000,), sink_frames=3)
STAYS = replace(SPEC, layers=2, window_frames=21, sink_frames=0, rolls=False, steps=(1000,))
EMA = replace(SPEC, rope="window", window_frames=9, sink_frames=3, ema_sink=0.9)


@pytest.mark.filterwarnings("ignore")  # of objects that the collector shows and nobody asked for
def test_infinity_goes_past_1024_frames_in_the_same_memory() -> None:
    model, frames = tiny_model(QUICK), 1104
    with pytest.raises(InputError, match=r"1104 frames: 'tiny' has 1024 absolute positions; .*--infinity"):
        tiny_stream(model, frames=frames)
    stream, held = tiny_stream(model, frames=frames, infinity=True, policy="full"), {}
    for chunk in stream:
        assert bool(chunk.latents.isfinite().all())
        if chunk.start in (60, 1101):
            held[chunk.start] = (living_bytes(), stream.cache.persistent_bytes(), stream.cache.scratch_bytes())
    assert chunk.start == 1101
    assert max(stream.cache.position(frame) for frame in range(1092, 1104)) == QUICK.window_frames - 1
    assert held[60] == held[1101]


def test_infinity_is_the_same_until_the_window_rolls_and_not_after() -> None:
    """Until then a frame's slot is its number. (LongLive's own code, both ways: tests/test_parity.py.)"""
    model = tiny_model()
    plain, endless = (latents_of(tiny_stream(model, frames=18, policy="full", infinity=yes)) for yes in (False, True))
    torch.testing.assert_close(plain[:, :12], endless[:, :12], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain[:, 12:], endless[:, 12:], atol=1e-2)


def test_the_22nd_frame_is_one_line_and_rolling_goes_on() -> None:
    model = tiny_model(STAYS)
    assert latents_of(tiny_stream(model, frames=21)).shape[1] == 21
    with pytest.raises(InputError, match=r"24 frames: 'tiny' keeps all of them, 21 at most; .*--roll --sink 1"):
        tiny_stream(model, frames=24)
    stream = tiny_stream(model, frames=33, roll=True, sink=1, policy="full")
    rolled = latents_of(stream)
    assert stream.cache.temporal(0)[0] == [0, *range(13, 33)], "the sink and the newest twenty"
    torch.testing.assert_close(rolled[:, :21], latents_of(tiny_stream(model, frames=21, policy="full")))
    with pytest.raises(InputError, match="1026 frames"):
        tiny_stream(model, frames=1026, roll=True)


def test_a_sink_of_the_cache_s_dtype_is_upstream_s() -> None:
    """Where the cache is float32 both are the same; in 16 bits the wide one exists, or does not."""
    model = tiny_model(EMA)
    wide, narrow = (
        latents_of(tiny_stream(model, frames=21, policy="full", sink_dtype=kind)) for kind in ("float32", "model")
    )
    assert torch.equal(wide, narrow)
    streams = [tiny_stream(model.bfloat16(), frames=21, policy="full", sink_dtype=k) for k in ("float32", "model")]
    assert not torch.equal(*(latents_of(stream) for stream in streams))
    assert [stream.cache.wide_sink_bytes() > 0 for stream in streams] == [True, False]


def test_options_change_only_what_they_name() -> None:
    for spec in SPECS.values():
        assert adapted(spec, StreamOptions()) == spec
    longlive = SPECS["longlive-1.3b"]
    assert adapted(longlive, StreamOptions(infinity=True, sink=1)) == replace(longlive, rope="window", sink_frames=1)
    assert SPECS["self-forcing-1.3b"].max_frames == 1024
