"""Configurations side by side: steady-state chunks on pre-filled caches, in rotating order, into one report.

Headline times are taken with nothing installed; the breakdown comes from the chunks between them, so the price of
recording is the ratio of neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ispa_deploy.errors import InputError, known_names
from ispa_deploy.profile.lane import Configuration, keep_log, open_lane, take_turn
from ispa_deploy.profile.recorder import CLOCKS
from ispa_deploy.profile.report import report_of
from ispa_deploy.profile.trace import encode

__all__ = ["Configuration", "compare"]


def compare(
    configurations: Sequence[Configuration],
    *,
    chunks: int = 1,
    rounds: int = 5,
    baseline: str = "full",
    pixel_frames: int = 4,
    decoder: Callable[[Tensor], Tensor] | None = None,
    clock: str = "wall",
    timeline: bool = True,
    command: str = "",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The report of `configurations` as plain JSON types.

    In each of `rounds` rounds every configuration generates `chunks` chunks plain and `chunks` recorded.
    `pixel_frames`: pixel frames per latent frame, for FPS; `decoder`: latents (B, F, C, H, W) -> pixels, timed apart.
    `clock`: `wall`, or `cpu` for one thread on a shared machine. `timeline`: put the last recorded chunk of each
    configuration into the report moment by moment, some 10 KB each.
    """
    _check_clock(clock, configurations)
    names = [configuration.name for configuration in configurations]
    if baseline not in names or len(set(names)) != len(names):
        raise InputError(f"configurations {names}: expected different names and the baseline '{baseline}' among them")
    say = progress or (lambda _: None)
    lanes = []
    for configuration in configurations:
        say(f"preparing {configuration.name}")
        lanes.append(open_lane(configuration, 2 * chunks * rounds + 1, CLOCKS[clock]))
    for number in range(rounds):
        for offset in range(len(lanes)):
            lane = lanes[(number + offset) % len(lanes)]
            say(f"round {number + 1}/{rounds}: {lane.configuration.name}")
            if timeline and number == rounds - 1:
                keep_log(lane, CLOCKS[clock])
            take_turn(lane, chunks, recorded_first=number % 2 == 1, decoder=decoder, clock=CLOCKS[clock])
    report = report_of(lanes, baseline, pixel_frames=pixel_frames, command=command, clock=clock)
    if timeline:
        for run, lane in zip(report["runs"], lanes, strict=True):
            run["timeline"] = encode(lane.recorder.stretches())
    return report


def _check_clock(clock: str, configurations: Sequence[Configuration]) -> None:
    if clock not in CLOCKS:
        raise known_names("clock", clock, CLOCKS)
    if clock == "cpu" and (
        torch.get_num_threads() != 1 or any(each.model.device.type != "cpu" for each in configurations)
    ):
        raise InputError("clock 'cpu' counts the time of one thread: expected one thread on a CPU; use --threads 1")
