"""A prompt switch that also replaces the sink (LongLive's `global_sink: false`), against a stream that begins there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ispa_deploy.adapt import adapted
from ispa_deploy.errors import InputError
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.specs import SPECS
from tests.tiny import SPEC, latents_of, text_rows, tiny_model, tiny_stream

LONG = replace(SPEC, sink_frames=3, recaches=True)
AT, FRAMES = 18, 36
NEW = text_rows(seed=7)


def switched(spec: Any = LONG, *, renew: bool = True, **options: Any) -> Any:
    options = {"frames": FRAMES, "policy": "full", **options}
    return tiny_stream(tiny_model(spec), switches=[(AT, NEW)], renew_sink=renew, **options)


@pytest.mark.parametrize("infinity", [False, True])
@pytest.mark.parametrize("recent", [0, 3])
@pytest.mark.parametrize("policy", ["full", "absorb"])
def test_it_goes_on_like_a_stream_that_begins_with_the_windows_frames(policy: str, recent: int, infinity: bool) -> None:
    """Those frames given as one chunk of twelve. Only positions differ, and they matter by their distance alone.

    Absorbed, the warm-up begins at the switch; begun anew, its first chunk is the one that is given.
    """
    stream = switched(policy=policy, recent_frames=recent, infinity=infinity, warmup=9)
    ours = latents_of(stream)
    begun = replace(LONG, first_chunk_frames=12)
    fresh = open_stream(
        tiny_model(begun), NEW, StreamOptions(frames=FRAMES - AT + 12, policy=policy, recent_frames=recent,
        infinity=infinity, warmup=21), initial=ours[:, AT - 12 : AT],
    )  # fmt: skip
    noise = stream.noise

    def shifted(chunk: int, count: int, step: int) -> Tensor:
        return noise(chunk - 1 + AT // 3, count, step)

    fresh.noise = shifted
    again = latents_of(fresh)
    layer = next(n for n in range(4) if not stream.cache.is_local(n))
    assert stream.cache.temporal(layer)[0][:4] == [6, 7, 8, 27]
    close = 1e-4 if policy == "full" else 2e-3  # the closed form enlarges what rounding does
    torch.testing.assert_close(again[:, 12:], ours[:, AT:], atol=close, rtol=close)
    assert stream.absorber.local_layers() == fresh.absorber.local_layers()


def test_without_it_the_first_frames_stay() -> None:
    kept, renewed = switched(renew=False), switched()
    a, b = latents_of(kept), latents_of(renewed)
    assert [stream.cache.temporal(0)[0][0] for stream in (kept, renewed)] == [0, 6]
    torch.testing.assert_close(a[:, :AT], b[:, :AT])
    assert not torch.allclose(a[:, AT:], b[:, AT:], atol=1e-2)


def test_local_layers_keep_the_new_first_frame() -> None:
    stream = switched(policy="absorb", ratio=1.0)
    latents_of(stream)
    assert [stream.cache.temporal(layer)[0] for layer in range(4)] == [[6]] * 4
    twice = tiny_stream(
        tiny_model(LONG), switches=[(AT, NEW), (33, text_rows())], renew_sink=True, frames=48, ratio=1.0
    )  # fmt: skip
    latents_of(twice)
    assert [twice.cache.temporal(layer)[0] for layer in range(4)] == [[21]] * 4


def test_a_switch_while_the_first_frames_are_in_the_window_is_the_same_either_way() -> None:
    """As upstream: what is computed anew then begins with frame 0."""
    early = [tiny_stream(tiny_model(LONG), switches=[(9, NEW)], renew_sink=renew, policy="full") for renew in (0, 1)]
    assert torch.equal(*(latents_of(stream) for stream in early))


def test_other_models_keep_their_sink() -> None:
    with pytest.raises(InputError, match=r"--renew-sink with model 'krea-14b': .*\(longlive-1\.3b\); leave it out"):
        adapted(SPECS["krea-14b"], StreamOptions(renew_sink=True))
    assert adapted(SPECS["longlive-1.3b"], StreamOptions(renew_sink=True)).renews_sink
