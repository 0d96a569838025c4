"""`python -m ispa_deploy.evaluate.costs`: what a layer's error costs the next chunk, measured over videos of the demo.

An error in one layer's output may vanish on its way through the network, or decide what the next chunk shows. So, video
by video, each layer alone becomes local with its correction, and the chunk after the transition is compared with that
of the full cache. A layer's cost is the geometric mean of that error over its held-out error to the power of
`EFFECT_POWER`. What it prints is `ModelSpec.layer_costs`, by which ranking `effect` weighs the errors of a stream.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ispa_deploy.absorb.presets import EFFECT_POWER
from ispa_deploy.cache import KVCache
from ispa_deploy.demo.prompts import embed, parse_prompt
from ispa_deploy.evaluate.metrics import latent_relative_error
from ispa_deploy.evaluate.variants import demo_pairs
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.stream import Chunk, Stream

Video = tuple[Tensor, int]
"""Text rows (1, L, text_dim) and the seed of the noise."""
TINY = 1e-12


def layer_costs(
    model: CausalWanDiT, videos: Sequence[Video], finished: Callable[[int], None] | None = None
) -> tuple[float, ...]:
    """One cost per layer, their mean being 1. `finished` is called with the number of videos done."""
    logs = torch.zeros(model.spec.layers, dtype=torch.float64)
    for number, video in enumerate(videos, 1):
        logs += torch.tensor(_of_video(model, video), dtype=torch.float64)
        if finished is not None:
            finished(number)
    costs = (logs / len(videos)).exp()
    return tuple(float(cost) for cost in costs / costs.mean())


def _of_video(model: CausalWanDiT, video: Video) -> list[float]:
    """Logarithms of one video's costs, layer by layer."""
    rows, seed = video
    # Spread over a chunk, the transition comes after one more chunk on the full cache: that chunk is the reference.
    options = StreamOptions(seed=seed, ranking="heldout", ratio=1.0, spread_solve=1)
    warmup = options.settings().warmup
    stream = open_stream(model, rows, replace(options, frames=warmup + model.spec.chunk_frames))
    caches = []
    for chunk in stream:
        if chunk.start + chunk.frames == warmup:
            caches.append(copy.deepcopy(stream.cache))
    costs = []
    for layer, record in enumerate(stream.absorber.records):
        assert record.score is not None, "a layer that cannot be solved has no cost"
        error = latent_relative_error(_alone(stream, copy.deepcopy(caches[0]), chunk, layer), chunk.latents)
        costs.append(math.log(max(error, TINY)) - EFFECT_POWER * math.log(max(record.score, TINY)))
    return costs


@torch.inference_mode()
def _alone(stream: Stream, cache: KVCache, chunk: Chunk, layer: int) -> Tensor:
    """Latents of the chunk when one layer alone is local from there on, with its correction; `cache` is used up."""
    model, target = stream.model, stream.absorber.targets[layer]
    cache.localise(layer, stream.absorber.policy.sink, cache.recent)
    cache.begin(chunk.start, chunk.frames)

    def velocity(x: Tensor, timestep: float) -> Tensor:
        condition = model.condition(torch.full((1, 1), timestep, device=model.device))
        return model(x, condition, stream.text, cache)

    target.set_delta(stream.absorber.deltas[layer])
    try:
        return stream.sampler.denoise(chunk.index, velocity, lambda step: stream.noise(chunk.index, chunk.frames, step))
    finally:
        target.set_delta(None)


def main() -> int:
    """Print the costs of the demo's layers as one JSON line."""
    from ispa_deploy.evaluate.__main__ import SHIPPED, load_demo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="safetensors of the demo model")
    parser.add_argument("--pairs", type=int, default=24, help="videos for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="the quality table has seed 0")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pairs = [pair for seed in arguments.seeds for pair in demo_pairs(arguments.pairs, seed)]
    videos = [(embed(parse_prompt(pair.prompt)[None]), pair.seed) for pair in pairs]
    found = layer_costs(
        load_demo(arguments.weights), videos, lambda done: print(f"\r{done}/{len(videos)}", end="", flush=True)
    )
    print("\r" + json.dumps({"layer_costs": [float(f"{cost:.2g}") for cost in found]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
