"""What the speech-to-video model has beyond the other: tokens of its condition, its layers and numbers. No torch."""

from __future__ import annotations

from math import prod

from ispa_deploy.errors import InputError
from ispa_deploy.specs import ModelSpec

PACKINGS = (("proj", (1, 2, 2), 1), ("proj_2x", (2, 4, 4), 2), ("proj_4x", (4, 8, 8), 16))
"""Packings of the motion frames, newest first: name, kernel, and how many frames each takes."""


def packed(spec: ModelSpec, grid: tuple[int, int]) -> list[tuple[list[int], int, int]]:
    """Of each packing: time positions, rows and columns of its tokens."""
    parts, end = [], 0
    for _, kernel, frames in PACKINGS:
        down, across = (kernel[axis] // spec.patch[axis] for axis in (1, 2))
        count = frames // kernel[0]
        first, last = end - frames, end - 1
        positions = [first] if count == 1 else [first + index * (last - first) // (count - 1) for index in range(count)]
        parts.append((positions, grid[0] // down, grid[1] // across))
        end = first
    return parts


def condition_length(spec: ModelSpec, grid: tuple[int, int]) -> int:
    """Tokens of reference and motion together: about 2.5 of a frame's."""
    return grid[0] * grid[1] + sum(len(places) * rows * columns for places, rows, columns in packed(spec, grid))


def check_rings(spec: ModelSpec, recent: int) -> None:
    """InputError unless window and recent frames are whole chunks, with room for the current one."""
    chunk, window = spec.chunk_frames, spec.window_frames
    if window % chunk or recent % chunk or not 0 <= recent <= window - chunk:
        raise InputError(
            f"window of {window} and {recent} recent frames: '{spec.name}' keeps rings of whole chunks, expected "
            f"multiples of {chunk} with room for the current one"
        )


def audio_linears(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Linear layers that only this model has: name -> (outputs, inputs). Each has a bias."""
    if not spec.audio_blocks:
        return {}
    dim, injectors = spec.dim, range(len(spec.audio_blocks))
    return {
        "casual_audio_encoder.encoder.final_linear": (dim, dim),
        **{f"audio_injector.injector.{i}.{name}": (dim, dim) for i in injectors for name in "qkvo"},
        **{f"audio_injector.injector_adain_layers.{i}.linear": (2 * dim, dim) for i in injectors},
    }


def audio_parameters(spec: ModelSpec) -> int:
    """Numbers in the state dict that only this model has, its linear layers left out."""
    if not spec.audio_blocks:
        return 0
    dim, channels, narrow = spec.dim, spec.latent_channels, spec.dim // 4
    encoders = dim * (channels * prod(spec.patch) + 1) + sum(
        dim * (channels * prod(kernel) + 1) for _, kernel, _ in PACKINGS
    )
    first = narrow * (spec.audio_tokens + 1) * (3 * spec.audio_dim + 1)
    later = 2 * narrow * (3 * narrow + 1) + dim * (6 * narrow + 1)
    norms, mask = 2 * dim * len(spec.audio_blocks), 3 * dim
    return encoders + first + later + norms + mask + dim + spec.audio_states
