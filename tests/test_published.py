"""The yardstick of the benchmarks computes what our own full-cache stream computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ispa_deploy.stream import default_noise, plan_chunks
from tests.bench.published import Published, SteadyPublished
from tests.tiny import SPEC, latents_of, text_rows, tiny_model, tiny_stream


@pytest.mark.parametrize("changes", [{}, {"sink_frames": 3}, {"window_frames": 6, "sink_frames": 0}])
def test_the_published_loop_generates_the_same_latents(changes: dict[str, int]) -> None:
    """Over a growing window, a full one and three that roll."""
    spec = replace(SPEC, **changes)
    model, frames = tiny_model(spec), 24
    want = latents_of(tiny_stream(model, policy="full", frames=frames))
    loop, noise = Published(model, text_rows(spec)), default_noise(spec, 0)
    chunks = [loop.chunk(index, start, count, noise) for index, (start, count) in enumerate(plan_chunks(spec, frames))]
    torch.testing.assert_close(torch.cat(chunks, 1), want, rtol=1e-4, atol=1e-4)
    assert want.std() > 0.1


def test_a_steady_loop_keeps_its_window_full() -> None:
    steady = SteadyPublished(tiny_model())
    steady.step()
    full = (SPEC.window_frames - SPEC.chunk_frames) * SPEC.frame_tokens
    assert all(k.shape[1] == v.shape[1] == full for k, v in steady.loop.past)
    steady.step()
    assert all(k.shape[1] == full for k, _ in steady.loop.past)
