"""Runs every variant on the same prompts and noise and measures each against the full-cache run of its pair.

AR trajectories part chaotically, so errors against Full are read in the chunks right after the transition; what holds
later is judged without a reference, by the demo's known world: steady background, and a sprite that still moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ispa_deploy.demo.metrics import scene_report
from ispa_deploy.demo.prompts import embed, parse_prompt
from ispa_deploy.errors import InputError
from ispa_deploy.evaluate.aggregate import aggregate
from ispa_deploy.evaluate.metrics import latent_relative_error, psnr, ssim
from ispa_deploy.evaluate.variants import FULL, RIVALS, VARIANTS, Pair, Variant
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import open_stream

Decode = Callable[[Tensor], Tensor]
"""Latents (F, C, H, W) -> pixels (F, 3, h, w) in [0, 1]."""

DIVERGED = 0.1
"""A frame whose latent error against Full exceeds this has parted from it."""


@dataclass(frozen=True)
class _Run:
    """One finished stream: latents (F, C, H, W), its local layers, and persistent KV bytes over those of Full."""

    latents: Tensor
    layers: tuple[int, ...]
    kv_share: float


@dataclass(frozen=True)
class _Parts:
    """Where the frames after the transition lie: `first` chunk, the two `next` ones and `later`; none is empty."""

    warmup: int
    spans: dict[str, slice]


def evaluate(
    model: CausalWanDiT,
    decode: Decode,
    pairs: Sequence[Pair],
    variants: Sequence[Variant] = VARIANTS,
    *,
    frames: int = 24,
    finished: Callable[[Pair, Variant], None] | None = None,
) -> dict[str, Any]:
    """Every variant on every pair -> `rows` (variant, prompt, seed, layers, metrics) and `aggregate` of them.

    Metrics of a row: `kv_share`; `error_*`, `psnr_*` and `ssim_*` against Full in the parts `first`, `next` and `later`
    after the transition; `agreeing_frames` after it before one parts from Full; and of all frames after it the
    `scene_report` against the run's own warm-up. `finished` is called after each run. InputError if no chunk follows
    the transition.
    """
    parts = _parts(model, variants, frames)
    rows = []
    for pair in pairs:
        runs: dict[str, _Run] = {}
        for variant in variants:
            runs[variant.name] = _run(model, pair, variant, runs, frames)
            rows.append(_row(pair, variant, runs, parts, decode))
            if finished is not None:
                finished(pair, variant)
    return {"frames": frames, "warmup": parts.warmup, "rows": rows, **aggregate(rows, RIVALS, FULL)}


def _parts(model: CausalWanDiT, variants: Sequence[Variant], frames: int) -> _Parts:
    assert variants[0].name == FULL, "the reference runs first"
    warmups = {variant.options.settings().warmup for variant in variants}
    assert len(warmups) == 1, f"variants with different transitions cannot be compared: {warmups}"
    warmup, chunk = warmups.pop(), model.spec.chunk_frames
    if frames < warmup + chunk:
        raise InputError(f"{frames} frames: expected {warmup + chunk} or more, a chunk after the warm-up of {warmup}")
    borders = (warmup, warmup + chunk, warmup + 3 * chunk, max(frames, warmup + 3 * chunk))
    spans = {name: slice(*borders[i : i + 2]) for i, name in enumerate(("first", "next", "later"))}
    return _Parts(warmup, {name: span for name, span in spans.items() if span.start < min(span.stop, frames)})


def _run(model: CausalWanDiT, pair: Pair, variant: Variant, runs: dict[str, _Run], frames: int) -> _Run:
    options = replace(variant.options, frames=frames, seed=pair.seed)
    if variant.layers_of is not None:
        options = replace(options, layers=runs[variant.layers_of].layers)
    stream = open_stream(model, embed(parse_prompt(pair.prompt)[None]).to(model.device), options)
    latents = torch.cat([chunk.latents[0].cpu() for chunk in stream])
    cache, layers = stream.cache, tuple(stream.absorber.local_layers())
    return _Run(latents, layers, cache.persistent_bytes() / cache.full_bytes())


def _row(pair: Pair, variant: Variant, runs: dict[str, _Run], parts: _Parts, decode: Decode) -> dict[str, Any]:
    run, full = runs[variant.name], runs[FULL]
    pixels, full_pixels = decode(run.latents), decode(full.latents)
    metrics = {"kv_share": run.kv_share}
    for name, span in parts.spans.items():
        metrics[f"error_{name}"] = latent_relative_error(run.latents[span], full.latents[span])
        metrics[f"psnr_{name}"] = psnr(pixels[span], full_pixels[span])
        metrics[f"ssim_{name}"] = ssim(pixels[span], full_pixels[span])
    metrics["agreeing_frames"] = _agreeing_frames(run.latents[parts.warmup :], full.latents[parts.warmup :])
    attributes = parse_prompt(pair.prompt)
    metrics |= scene_report(pixels[parts.warmup :], attributes, pixels[: parts.warmup])
    return {
        "variant": variant.name,
        "prompt": pair.prompt,
        "seed": pair.seed,
        "layers": list(run.layers),
        "metrics": metrics,
    }


def _agreeing_frames(latents: Tensor, full: Tensor) -> float:
    """Frames before the first whose error exceeds `DIVERGED`; all of them if none does."""
    parted = [latent_relative_error(*both) > DIVERGED for both in zip(latents, full, strict=True)]
    return float(parted.index(True) if True in parted else len(parted))
