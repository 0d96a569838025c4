"""The spec that a stream runs under: the model's, with what the stream's options change of it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ispa_deploy.errors import InputError, known_names
from ispa_deploy.sampler import even_steps
from ispa_deploy.specs import SPECS, ModelSpec

if TYPE_CHECKING:
    from ispa_deploy.options import StreamOptions

SINK_DTYPES = ("float32", "model")
POSITIONS = 1024
"""Frames that a published table of absolute positions holds."""
FIRST_FRAMES = ("auto", "reencode", "keep")
# Options of a model that encodes its past anew before every chunk.
REENCODING = ("kv_frames", "kv_bias", "steps", "strength", "first_frame")


def adapted(spec: ModelSpec, options: StreamOptions) -> ModelSpec:
    """`spec` with the rules, window, resolution, steps and interpolation of `options`; InputError for what does not fit
    it."""
    if not spec.reencodes:
        _refuse_reencoding(spec, options)
    changes: dict[str, Any] = {**_rules(spec, options), **_window(spec, options), **_size(spec, options)}
    if options.interpolate is not None:
        changes["interpolate"] = _interpolate(options.interpolate)
    if options.steps is not None or options.strength is not None:
        changes["steps"] = _steps(spec, options)
    if options.first_chunk is not None:
        if spec.reencodes:
            raise InputError(f"a still image with model '{spec.name}': expected --initial VIDEO, or another model")
        changes["first_chunk_frames"] = options.first_chunk
    if options.first_frame not in FIRST_FRAMES:
        raise known_names("first frame", options.first_frame, FIRST_FRAMES)
    return replace(spec, **changes)


def check_length(spec: ModelSpec, frames: int) -> None:
    """InputError where the stream would fail at its end: now, not after minutes of work."""
    if not spec.rolls and frames > spec.window_frames:
        raise InputError(
            f"{frames} frames: '{spec.name}' keeps all of them, {spec.window_frames} at most; ask for fewer --frames, "
            "or let its window roll with --roll --sink 1"
        )
    if spec.rope == "absolute" and frames > spec.max_frames:
        endless = "" if spec.audio_blocks else ", or rotate keys by their slot in the window with --infinity"
        raise InputError(
            f"{frames} frames: '{spec.name}' has {spec.max_frames} absolute positions; ask for fewer --frames{endless}"
        )


def _rules(spec: ModelSpec, options: StreamOptions) -> dict[str, Any]:
    """How the window rolls and where its keys are."""
    if options.sink_dtype not in SINK_DTYPES:
        raise known_names("sink dtype", options.sink_dtype, SINK_DTYPES)
    if options.sink is not None and options.sink < 0:
        raise InputError(f"--sink {options.sink}: expected 0 or more frames")
    if options.sink not in (None, 1) and spec.reencodes:
        raise InputError(f"--sink {options.sink} with model '{spec.name}': its context has one; leave it out")
    if options.roll and spec.audio_blocks:
        raise InputError(f"--roll with model '{spec.name}': its rings roll by themselves; leave it out")
    if options.infinity and spec.reencodes:
        raise InputError(f"--infinity with model '{spec.name}': its context has positions of its own; leave it out")
    if options.renew_sink and not spec.recaches:
        able = ", ".join(other.name for other in SPECS.values() if other.recaches)
        raise InputError(
            f"--renew-sink with model '{spec.name}': expected a model that computes its past anew at a prompt switch "
            f"({able}); leave it out"
        )
    return {
        "renews_sink": spec.renews_sink or options.renew_sink,
        "sink_frames": spec.sink_frames if options.sink is None else options.sink,
        "ema_wide": spec.ema_wide and options.sink_dtype == "float32",
        "rolls": spec.rolls or options.roll,
        "max_frames": max(spec.max_frames, POSITIONS) if options.roll else spec.max_frames,
        "rope": "window" if options.infinity else spec.rope,
    }


def _refuse_reencoding(spec: ModelSpec, options: StreamOptions) -> None:
    default = {field.name: field.default for field in fields(options)}
    given = [name for name in REENCODING if getattr(options, name) != default[name]]
    if given:
        able = ", ".join(other.name for other in SPECS.values() if other.reencodes)
        raise InputError(
            f"--{given[0].replace('_', '-')} with model '{spec.name}': expected a model that encodes its past anew "
            f"before every chunk ({able}); leave it out"
        )


def _window(spec: ModelSpec, options: StreamOptions) -> dict[str, int]:
    if options.window is not None and options.kv_frames is not None:
        raise InputError("--window and --kv-frames both set the window's length: leave one out")
    if options.kv_frames is not None:
        return {"window_frames": options.kv_frames + spec.chunk_frames}
    return {} if options.window is None else {"window_frames": options.window}


def _size(spec: ModelSpec, options: StreamOptions) -> dict[str, int]:
    changes = {}
    for axis, side in enumerate(("height", "width")):
        pixels, step = getattr(options, side), spec.spatial_stride * spec.patch[1 + axis]
        if pixels is None:
            continue
        if pixels < step or pixels % step:
            nearest = max(1, round(pixels / step)) * step
            raise InputError(f"--{side} {pixels}: expected a multiple of {step} pixels; nearest is {nearest}")
        changes[f"latent_{side}"] = pixels // spec.spatial_stride
    return changes


def _interpolate(chunks: int) -> int:
    if chunks == 1 or chunks < 0:
        raise InputError(f"--interpolate {chunks}: expected 0 (at once), or 2 or more chunks from prompt to prompt")
    return chunks


def _steps(spec: ModelSpec, options: StreamOptions) -> tuple[int, ...]:
    strength = 1.0 if options.strength is None else options.strength
    if not 0 < strength <= 1:
        raise InputError(f"--strength {strength}: expected a number above 0 and at most 1, which forgets --initial")
    count = len(spec.steps) if options.steps is None else options.steps
    if count < 1:
        raise InputError(f"--steps {count}: expected 1 or more")
    return even_steps(count, strength)
