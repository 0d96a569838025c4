"""Out of memory in one line: what the stream needs by prediction, and which changes would fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ispa_deploy.budget import Setup, predict
from ispa_deploy.errors import RunError
from ispa_deploy.policies import POLICIES
from ispa_deploy.specs import ModelSpec

PIXELS = 8
"""Of a latent, in both directions."""

Choice = tuple[str, ModelSpec, Setup]


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out; on the CPU, torch says so in words only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def memory_errors(
    spec: ModelSpec, setup: Callable[[], Setup], device: torch.device, when: Callable[[], str]
) -> Iterator[None]:
    """RunError in place of a memory error: `when` it happened, and what would fit on `device`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise RunError(f"out of memory {when()}: {advise(spec, setup(), capacity(device))}") from error


def capacity(device: torch.device) -> int:
    """All the memory of a device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def advise(spec: ModelSpec, setup: Setup, room: int) -> str:
    """What is needed at the peak, and by how much each change would bring it down; those that fit in `room` first.

    Other programs may hold some of that room, so changes that seem to fit are told with their bytes, largest first.
    """
    needed = predict(spec, setup)
    parts = {
        "weights": needed.weights, "KV cache": needed.kv_full, "statistics": needed.statistics, "VAE": needed.decoder
    }  # fmt: skip
    told = ", ".join(f"{name} {_size(count)}" for name, count in parts.items() if count)
    choices = [(flags, predict(smaller_spec, changed).peak) for flags, smaller_spec, changed in smaller(spec, setup)]
    better = sorted((peak, flags) for flags, peak in choices if peak < needed.peak)
    fits = [f"{flags} ({_size(peak)})" for peak, flags in better if peak <= room]
    line = f"this stream needs about {_size(needed.peak)} ({told}) of {_size(room)}"
    if POLICIES[setup.policy].localises:
        local = predict(spec, replace(setup, ratio=1.0, local_layers=None))
        line += f", after its warm-up {_size(needed.steady)}, then with --ratio 1 {_size(local.steady)}"
    if fits:
        return f"{line}; would fit: {', '.join(fits)}"
    together = all_smaller(spec, setup)
    return f"{line}; together {', '.join(flags for _, flags in better)} need {_size(predict(*together).peak)}"


def smaller(spec: ModelSpec, setup: Setup) -> list[Choice]:
    """Changes that take memory away, each alone, as the flags that make them."""
    window, policy, hears = shortest_window(spec), POLICIES[setup.policy], bool(spec.audio_blocks)
    on_host = replace(setup, stats_device="cpu")
    choices: list[tuple[bool, Choice]] = [
        (setup.scheme == "none", ("quantize --scheme w8a8", spec, replace(setup, scheme="w8a8", quantised=None))),
        (True, (f"--policy window --window {window}", spec, replace(setup, policy="window", window=window))),
        (policy.localises and setup.stats_device != "cpu", ("--stats-device cpu", spec, on_host)),
        (setup.kv_dtype == "auto" and not hears, ("--kv-dtype int8", spec, replace(setup, kv_dtype="int8"))),
        (True, _smaller_pictures(spec, setup)),
        ((setup.vae or hears) and not setup.offload, ("--offload", spec, replace(on_host, offload=True))),
    ]
    return [choice for possible, choice in choices if possible]


def all_smaller(spec: ModelSpec, setup: Setup) -> tuple[ModelSpec, Setup]:
    """All of them at once; of window and ratio, the window, which is small from the start."""
    window, kv_dtype = shortest_window(spec), "auto" if spec.audio_blocks else "int8"  # rings are not coded
    quantised = setup.quantised if setup.scheme != "none" else None
    _, pictures, _ = _smaller_pictures(spec, setup)
    return pictures, replace(
        setup, scheme="w8a8", quantised=quantised, policy="window", window=window, kv_dtype=kv_dtype, offload=True
    )


def shortest_window(spec: ModelSpec) -> int:
    """Frames; a context that is encoded anew is made of whole chunks."""
    return 2 * spec.chunk_frames if spec.reencodes else spec.sink_frames + spec.chunk_frames


def _smaller_pictures(spec: ModelSpec, setup: Setup) -> Choice:
    """Half of the height and width, in whole patches."""
    height, width = (
        max(patch, length // 2 // patch * patch)
        for length, patch in ((spec.latent_height, spec.patch[1]), (spec.latent_width, spec.patch[2]))
    )
    flags = f"--height {PIXELS * height} --width {PIXELS * width}"
    return flags, replace(spec, latent_height=height, latent_width=width), setup


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
