"""`python -m tests.bench.memory [--chunks 2000]`: a long stream of the demo model grows neither in bytes nor in time.

Resident memory and the cache's bytes are read every ten chunks; growth is counted from the first reading after the
transition at which everything that is built once has been built. The cost of a chunk is the median of its CPU time over
the first and over the last quarter of what follows.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.profile.environment import environment
from ispa_deploy.profile.files import write_json
from ispa_deploy.profile.geometries import GEOMETRIES, random_model
from ispa_deploy.stream import Stream

CHUNKS, EVERY, SETTLED = 200, 10, 20
LIMIT = 2 << 20
"""Bytes of resident memory that may come and go: an allocator's pages, not a leak of 180 chunks."""


def resident() -> int:
    """Bytes of physical memory this process holds now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def reading(stream: Stream, chunk: int) -> dict[str, Any]:
    """What is held after `chunk` chunks."""
    gc.collect()
    return {
        "chunk": chunk,
        "state": stream.absorber.state,
        "rss": resident(),
        "kv_persistent": stream.cache.persistent_bytes(),
        "kv_scratch": stream.cache.scratch_bytes(),
        "deltas": stream.absorber.delta_bytes(),
        "statistics": stream.absorber.statistics_bytes(),
    }


def measure(chunks: int, every: int, passes: int) -> tuple[list[dict[str, Any]], list[float]]:
    """Readings of one stream with random weights, on which what is held does not depend, and every chunk's CPU ms."""
    demo = GEOMETRIES["demo"]
    model = random_model(replace(demo, steps=demo.steps[:passes]))
    spec = model.spec
    text = torch.randn(1, spec.text_len, spec.text_dim)
    stream = open_stream(model, text, StreamOptions(frames=chunks * spec.chunk_frames))
    rows, spent, clock = [], [], time.process_time()
    for chunk in stream:
        done = chunk.index + 1
        spent.append(1e3 * (time.process_time() - clock))
        if done % every == 0 or done == 1:
            rows.append(reading(stream, done))
            print("chunk {chunk:4d} {state:>9}: RSS {rss:,} KV {kv_persistent:,} + {kv_scratch:,}".format(**rows[-1]))
        clock = time.process_time()
    return rows, spent


def cost(spent: list[float]) -> dict[str, float]:
    """Median ms of a chunk in the first and the last quarter after the transition, and their ratio."""
    settled = spent[SETTLED:]
    quarter = max(1, len(settled) // 4)
    early, late = statistics.median(settled[:quarter]), statistics.median(settled[-quarter:])
    return {"early_ms": early, "late_ms": late, "late_over_early": late / early}


def main(argv: list[str] | None = None) -> int:
    """Print the readings and one JSON line; 1 when anything grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    parser.add_argument("--passes", type=int, default=4, help="denoising passes of a chunk; fewer for long streams")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, spent = measure(arguments.chunks, EVERY, arguments.passes)
    settled = [row for row in rows if row["chunk"] >= SETTLED]
    growth = {name: settled[-1][name] - settled[0][name] for name in ("rss", "kv_persistent", "kv_scratch", "deltas")}
    flat = growth.pop("rss") <= LIMIT and not any(growth.values())
    document = {
        "schema_version": 1,
        "command": f"python -m tests.bench.memory --chunks {arguments.chunks} --passes {arguments.passes}",
        "env": environment(torch.device("cpu")),
        "rss_growth": settled[-1]["rss"] - settled[0]["rss"],
        "flat": flat,
        "chunks": arguments.chunks,
        "passes": arguments.passes,
        "chunk_cost": cost(spent),
        "readings": rows,
    }
    if arguments.json:
        write_json(arguments.json, document)
    print(json.dumps({key: value for key, value in document.items() if key != "readings"}))
    return 0 if flat else 1


if __name__ == "__main__":
    raise SystemExit(main())
