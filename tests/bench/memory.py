"""`python -m tests.bench.memory [--chunks 2000]`: a long stream of the demo model grows neither in bytes nor in time.

Resident memory and the cache's bytes are read every ten chunks; growth is counted from the first reading after the
transition at which everything that is built once has been built. At its end the stream takes turns with one that is
just past its own transition, so that a busy machine slows both: what age costs is the ratio of their medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.profile.environment import environment
from ispa_deploy.profile.files import write_json
from ispa_deploy.profile.geometries import GEOMETRIES, random_model
from ispa_deploy.stream import Chunk, Stream

CHUNKS, EVERY, SETTLED, TURNS = 200, 10, 20, 40
LIMIT = 2 << 20
"""Bytes of resident memory that may come and go: an allocator's pages, not a leak of 180 chunks."""
COST_LIMIT = 1.1
"""A chunk of the old stream over one of the young; noise on a shared machine reaches a twentieth."""


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


def opened(chunks: int, passes: int) -> Stream:
    """A stream with random weights, on which what is held does not depend, over a model of its own."""
    demo = GEOMETRIES["demo"]
    model = random_model(replace(demo, steps=demo.steps[:passes]))
    spec = model.spec
    text = torch.randn(1, spec.text_len, spec.text_dim)
    return open_stream(model, text, StreamOptions(frames=chunks * spec.chunk_frames))


def spent(stream: Iterator[Chunk]) -> float:
    """CPU ms of the next chunk."""
    start = time.process_time()
    next(stream)
    return 1e3 * (time.process_time() - start)


def measure(chunks: int, every: int, passes: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Readings of one stream, and what its last chunks cost beside those of a young one."""
    young, stream = iter(opened(SETTLED + TURNS + 1, passes)), opened(chunks, passes)
    for _ in range(SETTLED):
        next(young)
    rows, old = [], iter(stream)
    cost: dict[str, list[float]] = {"young_ms": [], "old_ms": []}
    for done in range(1, chunks + 1):
        last = spent(old)
        if done > chunks - TURNS:
            cost["old_ms"].append(last)
            cost["young_ms"].append(spent(young))
        if done % every == 0 or done == 1:
            rows.append(reading(stream, done))
            print("chunk {chunk:4d} {state:>9}: RSS {rss:,} KV {kv_persistent:,} + {kv_scratch:,}".format(**rows[-1]))
    medians = {name: statistics.median(times) for name, times in cost.items()}
    return rows, {**medians, "old_over_young": medians["old_ms"] / medians["young_ms"]}


def main(argv: list[str] | None = None) -> int:
    """Print the readings and one JSON line; 1 when anything grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    parser.add_argument("--passes", type=int, default=4, help="denoising passes of a chunk; fewer for long streams")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, cost = measure(arguments.chunks, EVERY, arguments.passes)
    settled = [row for row in rows if row["chunk"] >= SETTLED]
    growth = {name: settled[-1][name] - settled[0][name] for name in ("rss", "kv_persistent", "kv_scratch", "deltas")}
    flat = growth.pop("rss") <= LIMIT and not any(growth.values()) and cost["old_over_young"] <= COST_LIMIT
    document = {
        "schema_version": 1,
        "command": f"python -m tests.bench.memory --chunks {arguments.chunks} --passes {arguments.passes}",
        "env": environment(torch.device("cpu")),
        "rss_growth": settled[-1]["rss"] - settled[0]["rss"],
        "flat": flat,
        "chunks": arguments.chunks,
        "passes": arguments.passes,
        "chunk_cost": cost,
        "readings": rows,
    }
    if arguments.json:
        write_json(arguments.json, document)
    print(json.dumps({key: value for key, value in document.items() if key != "readings"}))
    return 0 if flat else 1


if __name__ == "__main__":
    raise SystemExit(main())
