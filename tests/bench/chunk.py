"""`python -m tests.bench.chunk GEOMETRY --json FILE`: full | full+w8a8 | ispa | ispa+w8a8 on random weights.

The GEOMETRY `demo` has a trained checkpoint, which is not used here: latency does not depend on the weights.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import quant
from export.profiling import configurations
from ispa_deploy.profile.compare import compare
from ispa_deploy.profile.files import write_json, write_text
from ispa_deploy.profile.geometries import GEOMETRIES, random_model
from ispa_deploy.profile.table import markdown, terminal


@dataclass(frozen=True)
class Plan:
    """How a geometry is measured: rounds of `chunks` plain and `chunks` recorded chunks per configuration.

    `shared_clock`: what `--shared` reads. A reading of the CPU clock is a system call, too dear for the demo's marks.
    """

    dtype: torch.dtype
    rounds: int
    chunks: int
    shared_clock: str = "cpu"


PLANS = {
    "demo": Plan(torch.float32, rounds=10, chunks=2, shared_clock="wall"),
    "mid": Plan(torch.bfloat16, rounds=3, chunks=1),
    "longlive-1.3b": Plan(torch.bfloat16, rounds=6, chunks=3),
    "krea-14b": Plan(torch.bfloat16, rounds=3, chunks=1),
}


def measure(geometry: str, plan: Plan, device: str, rounds: int | None, shared: bool) -> dict[str, Any]:
    """The report of one geometry."""
    scheme, line = quant.resolve("w8a8", device)
    print(line)
    model = random_model(GEOMETRIES[geometry], plan.dtype, device)
    eight = copy.deepcopy(model)
    print(quant.quantise_(eight, scheme).summary())
    start = time.monotonic()
    report = compare(
        configurations(model, eight, scheme.name),
        chunks=plan.chunks,
        rounds=rounds or plan.rounds,
        pixel_frames=model.spec.temporal_stride,
        clock=plan.shared_clock if shared else "wall",
        timeline=False,
        command=f"python -m tests.bench.chunk {geometry} --device {device}{' --shared' if shared else ''}",
        progress=lambda step: print(f"{time.monotonic() - start:6.0f} s  {step}", flush=True),
    )
    for row in report["runs"]:
        row["audit"] = _counted(row["audit"])
    return report


def _counted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per kernel, with the number of layers and calls: a committed file need not list 400 layers."""
    counts: dict[tuple[str, str | None], dict[str, Any]] = {}
    for row in rows:
        key = row["kernel"], row["delta_mode"]
        kept = counts.setdefault(key, {"kernel": key[0], "delta_mode": key[1], "layers": 0, "calls": 0})
        kept["layers"] += 1
        kept["calls"] += row["calls"] or 0
    return list(counts.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", choices=sorted(GEOMETRIES))
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="the report; Markdown lies beside it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--shared", action="store_true", help="busy machine: one thread, its CPU time")
    arguments = parser.parse_args(argv)
    if arguments.shared:
        torch.set_num_threads(1)
    if arguments.device == "cpu":
        quant.tune_allocator()
    plan = PLANS[arguments.geometry]
    report = measure(arguments.geometry, plan, arguments.device, arguments.rounds, arguments.shared)
    write_json(arguments.json, report)
    write_text(arguments.json.with_suffix(".md"), markdown(report))
    Console().print(terminal(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
