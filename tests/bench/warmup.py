"""`python -m tests.bench.warmup`: what the warm-up's statistics and the transition cost on the mid geometry.

Two things are asked: the share of the warm-up that statistics take, and how much longer than a usual chunk with the
full cache the slowest chunk takes, with the solve at once and spread over one and two chunks. A full stream and the
absorbing ones take turns, chunk by chunk, so that a busy machine slows all of them. All five passes of a chunk run; the
layers all cost the same, so a few of them stand for the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import quant
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.profile.environment import environment
from ispa_deploy.profile.files import write_json
from ispa_deploy.profile.geometries import MID, random_model
from ispa_deploy.profile.recorder import CLOCKS, measure
from ispa_deploy.specs import SPECS
from ispa_deploy.stream import Chunk

WARMUP, CHUNKS = 4, 8
"""Chunks watched in all passes or before those, and chunks in all; from the fifth on the window is full."""
STATISTICS_LIMIT, STALL_LIMIT = 0.03, 1.10


def run(layers: int, spreads: tuple[int, ...]) -> dict[str, Any]:
    """Milliseconds of CPU time of every chunk, with what statistics and solve took of it."""
    spec = replace(MID, layers=layers, steps=SPECS["longlive-1.3b"].steps)
    model = random_model(spec, torch.bfloat16)
    text = torch.randn(1, spec.text_len, spec.text_dim)
    options = {"full": StreamOptions(policy="full")}
    options |= {f"spread {n}": StreamOptions(spread_solve=n) for n in spreads}
    lanes: dict[str, Iterator[Chunk]] = {}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in options}
    for name, value in options.items():
        lanes[name] = iter(open_stream(model, text, replace(value, frames=3 * CHUNKS)))
    for number in range(CHUNKS):
        for name, chunks in lanes.items():
            # A layer's correction belongs to one stream: nothing is measured once the other's has been taken on.
            if name != "full" and number >= WARMUP + max(1, int(name.split()[1])):
                continue
            found = measure(lambda chunks=chunks: next(chunks), model, torch.device("cpu"), CLOCKS["cpu"])
            parts = {part: found.components[f"overhead.{part}"] for part in ("statistics", "solve")}
            rows[name].append({"ms": found.wall, **parts})
            print(f"{name:>9} chunk {number}: " + " ".join(f"{k} {v:.0f}" for k, v in rows[name][-1].items()))
            if name != "full":
                for block in model.layers():
                    block.self_attn.o.set_delta(None)
    return summary(rows)


def summary(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """The share of the statistics, over all absorbing streams, and each one's slowest chunk.

    With a full window a chunk is set against the full stream's of the same turn, before that against their median.
    """
    full = [row["ms"] for row in rows["full"]]
    usual = statistics.median(full[WARMUP:])
    beside = [usual] * WARMUP + full[WARMUP:]
    warm = [row for name, lane in rows.items() if name != "full" for row in lane[:WARMUP]]
    share = sum(row["statistics"] for row in warm) / sum(row["ms"] for row in warm)
    slowest = {
        name: max(row["ms"] / other for row, other in zip(lane, beside, strict=False))
        for name, lane in rows.items()
        if name != "full"
    }
    return {"full_chunk_ms": usual, "statistics_share": share, "slowest_over_full": slowest, "chunks": rows}


def main(argv: list[str] | None = None) -> int:
    """Print one JSON line; 1 when statistics, or every way of spreading, miss their limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--spread", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    quant.tune_allocator()
    spreads = map(str, arguments.spread)
    found = run(arguments.layers, tuple(arguments.spread))
    within = found["statistics_share"] <= STATISTICS_LIMIT and min(found["slowest_over_full"].values()) <= STALL_LIMIT
    document = {
        "schema_version": 1,
        "command": " ".join(["python -m tests.bench.warmup", f"--layers {arguments.layers} --spread", *spreads]),
        "env": environment(torch.device("cpu")),
        "limits": {"statistics": STATISTICS_LIMIT, "stall": STALL_LIMIT},
        "within": within,
        **found,
    }
    if arguments.json:
        write_json(arguments.json, document)
    print(json.dumps({key: value for key, value in document.items() if key not in ("chunks", "env")}))
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
