"""`python -m tests.bench.chunk GEOMETRY --json FILE`: published | full | ispa | … + W8A8 on random weights.

The GEOMETRY `demo` has a trained checkpoint, which is not used here: latency does not depend on the weights.
"""

from __future__ import annotations

import argparse
import copy
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import quant
from export.profiling import by_pass, configurations, whole
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions
from ispa_deploy.profile.compare import PRICE_PAIRS, Configuration, compare
from ispa_deploy.profile.files import write_json, write_text
from ispa_deploy.profile.geometries import GEOMETRIES, random_model
from ispa_deploy.profile.table import markdown
from ispa_deploy.profile.terminal import terminal
from ispa_deploy.regions import region
from quant.audit import audit
from tests.bench.published import SteadyPublished


@dataclass(frozen=True)
class Plan:
    """How a geometry is measured: rounds of `chunks` plain and `chunks` recorded chunks per configuration.

    `plain`: rounds more without a recorder; `layers`: only so many, whose clean passes run to their end, so that a few
    stand for all; `brief`: the runs of the paper and the published loop, without their start and chunks for what
    recording costs. `price_pairs`: most pairs of chunks for what recording costs. `shared_clock`: what `--shared`
    reads; a reading of the CPU clock is a system call, too dear for the demo's marks.
    """

    dtype: torch.dtype
    rounds: int
    chunks: int
    plain: int = 0
    layers: int | None = None
    brief: bool = False
    price_pairs: int = PRICE_PAIRS
    shared_clock: str = "cpu"


PLANS = {
    "cpu": {
        "demo": Plan(torch.float32, rounds=12, chunks=3, shared_clock="wall"),
        "mid": Plan(torch.bfloat16, rounds=4, chunks=1, plain=2, price_pairs=3),
        # The paper's geometry and window in two layers, one of them local: every layer costs the same.
        "longlive-1.3b": Plan(torch.bfloat16, rounds=3, chunks=1, plain=3, layers=2, brief=True),
        "krea-14b": Plan(torch.bfloat16, rounds=1, chunks=1, plain=2, layers=2, brief=True),
    },
    "cuda": {
        "demo": Plan(torch.float32, rounds=10, chunks=2),
        "mid": Plan(torch.bfloat16, rounds=6, chunks=2),
        "longlive-1.3b": Plan(torch.bfloat16, rounds=6, chunks=2, price_pairs=6),
        # A chunk takes seconds and has hundreds of blocks: two pairs tell what recording costs.
        "krea-14b": Plan(torch.bfloat16, rounds=3, chunks=1, plain=3, price_pairs=2),
    },
}
BRIEF_RUNS = ("published", "full", "ispa", "full+w8a8", "ispa+w8a8")
STEPS = {"cpu": {"longlive-1.3b": (1000,), "krea-14b": (1000,)}}
"""Fewer denoising passes where a CPU has no time for all of them: one and the clean one."""


def measure(geometry: str, plan: Plan, device: str, rounds: int | None, shared: bool) -> dict[str, Any]:
    """The report of one geometry."""
    fewer = f" --layers {plan.layers}" if plan.layers else ""
    scheme, line = quant.resolve("w8a8", device)
    print(line)
    spec = GEOMETRIES[geometry]
    spec = replace(spec, layers=plan.layers or spec.layers, steps=STEPS.get(device, {}).get(geometry, spec.steps))
    model = random_model(spec, plan.dtype, device)
    eight = copy.deepcopy(model)
    print(quant.quantise_(eight, scheme).summary())
    start = time.monotonic()
    runs = [*published(model), *by_pass(configurations(model, eight, scheme.name))]
    if plan.brief:
        runs = [replace(run, starts=False) for run in runs if run.name in BRIEF_RUNS]
    if spec.layers < GEOMETRIES[geometry].layers:
        runs = whole(runs)
    report = compare(
        runs,
        chunks=plan.chunks,
        rounds=rounds or plan.rounds,
        plain_only=plan.plain,
        price_pairs=0 if plan.brief else plan.price_pairs,
        pixel_frames=model.spec.temporal_stride,
        clock=plan.shared_clock if shared else "wall",
        timeline=False,
        command=f"python -m tests.bench.chunk {geometry} --device {device}{fewer}{' --shared' if shared else ''}",
        progress=lambda step: print(f"{time.monotonic() - start:6.0f} s  {step}", flush=True),
    )
    for row in report["runs"]:
        row["audit"] = _counted(row["audit"])
    return report


class PublishedSteady:
    """The published loop as one of the runs: what lies between its marks is Python's."""

    def __init__(self, model: CausalWanDiT):
        self._loop = SteadyPublished(model)

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self) -> object:
        with region("overhead.python"):
            return self._loop.step()

    def facts(self) -> dict[str, Any]:
        """As `SteadyStream.facts`: keys and values of the past stay, the concatenated ones are made in every pass."""
        spec, past = self._loop.loop.spec, sum(row["kv_persistent"] for row in self.layers())
        full = past * spec.window_frames // (spec.window_frames - spec.chunk_frames)
        memory = {"kv_persistent": past, "kv_scratch": full, "deltas": 0, "statistics": 0}
        return {
            "localises": False, "local": [], "near": spec.window_frames, "window": spec.window_frames, "stores": None,
            "wide_layers": 0,
            "delta": None, "coded_attention": None, "complaints": [], "kv_percent": 100 * past / full, "memory": memory,
        }  # fmt: skip

    def layers(self) -> list[dict[str, Any]]:
        return [
            {"local": False, "delta": None, "kv_persistent": k.nbytes + v.nbytes, "deltas": 0}
            for k, v in self._loop.loop.past
        ]


def published(model: CausalWanDiT) -> list[Configuration]:
    """The loop that the published projects run, where it knows the model's way of rotating keys."""
    if model.spec.rope != "absolute":
        return []
    return [
        Configuration(
            name="published",
            model=model,
            options=StreamOptions(policy="full"),
            audit=audit,
            opener=lambda model, options, chunks: PublishedSteady(model),
            starts=False,
        )
    ]


def _counted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per kernel, with the number of layers and calls: a committed file need not list 400 layers."""
    counts: dict[tuple[str, str | None], dict[str, Any]] = {}
    for row in rows:
        key = row["kernel"], row["delta_mode"]
        kind = {"kernel": key[0], "delta_mode": key[1], "dtype": row["dtype"]}
        kept = counts.setdefault(key, {**kind, "layers": 0, "calls": 0, "wide_calls": 0})
        kept["layers"] += 1
        for count in ("calls", "wide_calls"):
            kept[count] += row[count] or 0
    return list(counts.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", choices=sorted(GEOMETRIES))
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="the report; Markdown lies beside it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--layers", type=int, help="fewer layers than the geometry has; every layer costs the same")
    parser.add_argument("--shared", action="store_true", help="busy machine: one thread, its CPU time")
    arguments = parser.parse_args(argv)
    if arguments.shared:
        torch.set_num_threads(1)
    if arguments.device == "cpu":
        quant.tune_allocator()
    plan = PLANS[arguments.device][arguments.geometry]
    plan = replace(plan, layers=arguments.layers or plan.layers)
    report = measure(arguments.geometry, plan, arguments.device, arguments.rounds, arguments.shared)
    write_json(arguments.json, report)
    write_text(arguments.json.with_suffix(".md"), markdown(report))
    Console().print(terminal(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
