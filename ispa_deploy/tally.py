"""What is measured while a stream runs, and the reports made of it: one for every chunk, one at the end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ispa_deploy.budget import Budget
from ispa_deploy.errors import InputError
from ispa_deploy.media.output import output_path
from ispa_deploy.media.sheet import Shown
from ispa_deploy.memory import held_bytes
from ispa_deploy.stream import Chunk, Stream


@dataclass(frozen=True)
class Outputs:
    """Files to write; None: not wanted. `scale` enlarges tiny videos by whole pixels. `audio` files are read: their
    sound, mixed, goes into the video."""

    video: Path | None = None
    sheet: Path | None = None
    latents: Path | None = None
    scale: int = 1
    label: str = ""
    audio: Sequence[Path] = ()

    def check(self, decodes: bool) -> None:
        """InputError for a file that could not be written, before any work is done."""
        if not decodes and (self.video or self.sheet):
            raise InputError("this bundle has no decoder to pixels: name one with --vae or --decoder, or use --latents")
        for path, suffix, what in (
            (self.video, ".mp4", "video"),
            (self.sheet, ".png", "contact sheet"),
            (self.latents, ".safetensors", "latents"),
        ):
            if path is not None:
                output_path(path, suffix, what)


@dataclass(frozen=True)
class Progress:
    """One finished chunk, for a progress bar. `kv_bytes` are persistent; `state` is the absorber's, in words."""

    chunk: int
    chunks: int
    seconds: float
    fps: float
    eta: float
    kv_bytes: int
    state: str


@dataclass
class Tally:
    """What is measured while the stream runs, and what the outputs need of it; `shown`: on a contact sheet."""

    seconds: list[float] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    shown: Shown | None = None
    delta_modes: list[str] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)
    frames: int = 0


def keep(tally: Tally, chunk: Chunk, stream: Stream, outputs: Outputs) -> None:
    """Measure a finished chunk, and hold of it what the outputs need."""
    tally.frames += chunk.frames
    tally.kv_bytes.append(stream.cache.persistent_bytes())
    tally.delta_modes = sorted({target.delta_mode for target in stream.absorber.targets if target.delta_mode})
    tally.held = {name: max(count, tally.held.get(name, 0)) for name, count in held_bytes(stream).items()}
    if outputs.latents:
        tally.latents.append(chunk.latents.cpu())


def progress_of(stream: Stream, tally: Tally, wall: float) -> Progress:
    done, total = len(tally.seconds), len(stream.chunks)
    return Progress(
        chunk=done,
        chunks=total,
        seconds=wall,
        fps=stream.model.spec.pixel_frames(tally.frames) / wall,
        eta=(total - done) * statistics.median(tally.seconds),
        kv_bytes=tally.kv_bytes[-1],
        state=stream.absorber.describe(),
    )


def report_of(
    stream: Stream, tally: Tally, wall: float, decoding: float, outputs: Outputs, budget: Budget
) -> dict[str, Any]:
    """The run's report as plain JSON types; `wall` and `decoding` in seconds; `budget`: what was predicted for it."""
    spec, cache, absorber = stream.model.spec, stream.cache, stream.absorber
    generating, pixel_frames = sum(tally.seconds) - decoding, spec.pixel_frames(tally.frames)
    warm = len(tally.seconds) // 2  # the second half: past warm-up and transition in any stream worth timing
    return {
        "model": spec.name,
        "options": _options(stream),
        "frames": tally.frames,
        "pixel_frames": pixel_frames,
        "chunks": len(tally.seconds),
        "complete": len(tally.seconds) == len(stream.chunks),
        "wall_s": wall,
        "chunk_ms": [1e3 * seconds for seconds in tally.seconds],
        "steady_chunk_ms": 1e3 * statistics.median(tally.seconds[warm:]) if tally.seconds else math.nan,
        "fps": {
            "dit": pixel_frames / generating,
            "with_vae": pixel_frames / (generating + decoding),
            "wall": pixel_frames / wall,
        },
        "kv": {
            "persistent_bytes": cache.persistent_bytes(),
            "full_bytes": cache.full_bytes(),
            "percent": 100 * cache.persistent_bytes() / cache.full_bytes(),
            "scratch_bytes": cache.scratch_bytes(),
            "wide_sink_bytes": cache.wide_sink_bytes(),
            "dtype": cache.kv_dtype,
            "error": cache.errors(),
            "attention": cache.coded_attention.report() if cache.coded_attention else None,
            "per_chunk_bytes": tally.kv_bytes,
        },
        "delta_modes": tally.delta_modes,
        "delta_bytes": sum(delta.nbytes for delta in absorber.corrections()),
        "statistics_bytes": tally.held.get("statistics", 0),
        "memory": {"allocated": tally.held, "predicted": budget.to_dict()},
        "absorption": {**absorber.report(), "notes": _notes(stream)},
        "outputs": {
            name: str(path) for name in ("video", "sheet", "latents") if (path := getattr(outputs, name)) is not None
        },
    }


def _notes(stream: Stream) -> list[str]:
    """What a user should know and did not ask: one line each. A kept first frame was asked for where it could slide."""
    slides = stream.context is not None and stream.decoder is None
    return stream.absorber.notes() + (stream.context.notes(stream.frames) if stream.context and slides else [])


def _context(stream: Stream) -> dict[str, Any]:
    """How a model that encodes its past anew was made to."""
    if stream.context is None:
        return {}
    return {
        "kv_frames": stream.spec.context_frames,
        "kv_bias": math.exp(stream.cache.past_bias),
        "first_frame": "keep" if stream.context.encode is None else "reencode",
    }


def _options(stream: Stream) -> dict[str, Any]:
    """What the stream ran under, read from the stream itself; `wide_in_last_pass`: linears with activations of 16 bits
    there."""
    absorber, cache = stream.absorber, stream.cache
    return {
        **asdict(absorber.settings),
        "ratio": absorber.choice.ratio,
        "layers": absorber.choice.layers,
        "delta": absorber.mode,
        "spread_solve": absorber.spread,
        "delta_rank": asdict(absorber.rank) if absorber.rank is not None else None,
        "recent_frames": cache.recent,
        "window": cache.spec.window_frames,
        "sink_frames": cache.spec.sink_frames,
        "rope": cache.spec.rope,
        "attention": cache.backend,
        "wide_in_last_pass": len(stream.fine),
        "steps": stream.spec.steps,
        "interpolate": stream.spec.interpolate,
        "height": stream.spec.latent_height * stream.spec.spatial_stride,
        "width": stream.spec.latent_width * stream.spec.spatial_stride,
        **_context(stream),
        "device": str(stream.model.device),
        "dtype": str(stream.model.dtype).removeprefix("torch."),
    }
