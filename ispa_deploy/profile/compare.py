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
from ispa_deploy.profile.lane import (
    Configuration,
    Lane,
    open_lane,
    record_blocks,
    take_plain_turn,
    take_turn,
)
from ispa_deploy.profile.paper import FIGURE_RUNS
from ispa_deploy.profile.recorder import CLOCKS
from ispa_deploy.profile.report import Bench, report_of
from ispa_deploy.profile.roofline import measure_peaks
from ispa_deploy.profile.trace import encode
from ispa_deploy.profile.windows import LONG, measure_windows

__all__ = ["Configuration", "compare"]

PRICE_PAIRS = 20
"""Most pairs of chunks that a run spends on what recording costs; one is enough where chunks are long."""


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
    windows: Sequence[int] = (LONG,),
    plain_only: int = 0,
    price_pairs: int = PRICE_PAIRS,
    load_ms: float | None = None,
    command: str = "",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The report of `configurations` as plain JSON types.

    In each of `rounds` rounds every configuration generates `chunks` chunks plain and `chunks` recorded.
    `pixel_frames`: pixel frames per latent frame, for FPS; `decoder`: latents (B, F, C, H, W) -> pixels, timed apart.
    `clock`: `wall`, or `cpu` for one thread on a shared machine. `timeline`: put the last recorded chunk of each
    configuration into the report moment by moment, some 10 KB each. `windows`: frames at which self-attention alone is
    measured beside the model's own window. `plain_only`: rounds more in which chunks are timed and not recorded.
    `price_pairs`: most pairs of chunks for what recording costs. `load_ms`: what loading the weights took.
    """
    _check_clock(clock, configurations)
    names = [configuration.name for configuration in configurations]
    if baseline not in names or len(set(names)) != len(names):
        raise InputError(f"configurations {names}: expected different names and the baseline '{baseline}' among them")
    say = progress or (lambda _: None)
    lanes = []
    for configuration in configurations:
        say(f"preparing {configuration.name}")
        asked = chunks * (2 * rounds + plain_only) + 2 + 2 * price_pairs
        lanes.append(open_lane(configuration, asked, CLOCKS[clock], decoder))
    for number in range(rounds + plain_only):
        for offset in range(len(lanes)):
            lane = lanes[(number + offset) % len(lanes)]
            say(f"round {number + 1}/{rounds + plain_only}: {lane.configuration.name}")
            if number < rounds:
                take_turn(lane, chunks, recorded_first=number % 2 == 1, decoder=decoder, clock=CLOCKS[clock])
            else:
                take_plain_turn(lane, chunks, clock=CLOCKS[clock])
    for lane in lanes:
        say(f"blocks and recording: {lane.configuration.name}")
        record_blocks(lane, CLOCKS[clock], most=price_pairs)
    say("peaks of the device, and attention at long windows")
    bench = _bench(lanes, baseline, clock, windows)
    report = report_of(lanes, baseline, bench, pixel_frames=pixel_frames, command=command, clock=clock, load_ms=load_ms)
    if timeline:
        for run, lane in zip(report["runs"], lanes, strict=True):
            run["timeline"] = encode(lane.recorder.stretches())
    return report


def _bench(lanes: Sequence[Lane], baseline: str, clock: str, windows: Sequence[int]) -> Bench:
    """What the device can do, and self-attention by itself, at the sizes of the baseline's model."""
    lane = next(lane for lane in lanes if lane.configuration.name == baseline)
    model = lane.configuration.model
    ispa = next((lane.facts for lane in lanes if lane.configuration.name == FIGURE_RUNS["attention"]), None)
    ratio, near = (len(ispa["local"]) / model.spec.layers, ispa["near"]) if ispa else (0.0, model.spec.chunk_frames)
    own = lane.facts["window"]
    rows = measure_windows(
        model.spec, model.dtype, model.device, CLOCKS[clock], ratio=ratio, local=near,
        windows=tuple(dict.fromkeys((own, *windows))) if ratio else (),
    )  # fmt: skip
    return Bench(measure_peaks(model.device, model.dtype, CLOCKS[clock]), rows)


def _check_clock(clock: str, configurations: Sequence[Configuration]) -> None:
    if clock not in CLOCKS:
        raise known_names("clock", clock, CLOCKS)
    if clock == "cpu" and (
        torch.get_num_threads() != 1 or any(each.model.device.type != "cpu" for each in configurations)
    ):
        raise InputError("clock 'cpu' counts the time of one thread: expected one thread on a CPU; use --threads 1")
