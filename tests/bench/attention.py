"""`python -m tests.bench.attention [--device cpu|cuda]`: every attention backend that runs here, in bfloat16.

The table behind the order of preference in `ispa_deploy.attention`: one F-layer call (the whole window), one L-layer
call (sink + current), and cross-attention. On CUDA at the 1.3B model's sizes, timed by events; on a CPU at the size of
the geometry `mid`, with one thread and the CPU time of the process, so that other processes do not count. Medians over
rounds in which the backends take turns. The errors are against float64, on a slice.

Beside them: 8-bit attention over the same keys held in int8, which the others would have to decode first. At a window
of 72 frames that and the chosen backend alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ispa_deploy.attention import Attended, attend, backends, choose, works
from ispa_deploy.attention_int8 import SIMULATED, Coded, CodedAttention
from ispa_deploy.kvstore import PEAKS, Coder
from ispa_deploy.profile.environment import environment
from ispa_deploy.profile.files import write_json

SLICE = 64  # queries whose error is taken
LONG = 72


@dataclass(frozen=True)
class Sizes:
    """Tokens of a frame, heads and their width."""

    tokens: int
    heads: int
    width: int

    def cases(self) -> dict[str, tuple[int, int]]:
        """Queries and keys."""
        chunk = 3 * self.tokens
        windows = {f"window {frames}": (chunk, frames * self.tokens) for frames in (12, LONG)}
        return {**windows, "local": (chunk, 4 * self.tokens), "cross": (chunk, 512)}


SIZES = {"cuda": Sizes(1560, 12, 128), "cpu": Sizes(390, 12, 64)}


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call: by events on CUDA, CPU time of the process otherwise."""
    if device.type == "cpu":
        begun = time.process_time()
        run()
        return 1e3 * (time.process_time() - begun)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def measure(case: str, sizes: Sizes, names: list[str], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """One row per backend: milliseconds, TFLOP/s and errors."""
    queries, keys = sizes.cases()[case]
    names = [_chosen(sizes, device, queries, keys)] if case == f"window {LONG}" else names
    shapes = ((1, n, sizes.heads, sizes.width) for n in (queries, keys, keys))
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
    exact = attend(q[:, :SLICE].double(), k.double(), v.double(), backend="reference")
    runs: dict[str, Callable[[], Attended]] = {name: partial(attend, q, k, v, backend=name) for name in names}
    coded = CodedAttention(device, q.dtype, sizes.width)
    if coded.kernel != SIMULATED and case != "cross":
        held = [Coded(*Coder(*PEAKS["int8"], device).encode(x)) for x in (k, v)]
        runs[f"int8: {coded.kernel}"] = partial(coded, q, *held, None)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            ms = milliseconds(run, device)
            if number >= 2:
                times[name].append(ms)
    work = 4 * queries * keys * sizes.heads * sizes.width
    rows = []
    for name, ms in times.items():
        got = runs[name]()
        error = float((got.out[:, :SLICE].double() - exact.out).norm() / exact.out.norm())
        lse = float((got.lse[:, :SLICE].double() - exact.lse).abs().max())
        row = {"ms": median(ms), "tflops": work / median(ms) / 1e9, "relative_error": error, "lse_error": lse}
        rows.append({"case": case, "backend": name, **row, "chosen": name == _chosen(sizes, device, queries, keys)})
    return rows


def _chosen(sizes: Sizes, device: torch.device, queries: int, keys: int) -> str:
    return choose(device, torch.bfloat16, sizes.width, queries, keys)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(argv)
    device, sizes = torch.device(arguments.device), SIZES[arguments.device]
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    names = [name for name in backends() if name != "reference" and works(name, device, torch.bfloat16, sizes.width)]
    with torch.inference_mode():
        rows = [row for case in sizes.cases() for row in measure(case, sizes, names, device, arguments.rounds)]
    for row in rows:
        print(
            f"{row['case']:>10} {row['backend']:>21}: {row['ms']:8.3f} ms {row['tflops']:7.2f} TFLOP/s, error "
            f"{row['relative_error']:.1e}, lse {row['lse_error']:.0e}{'  chosen' if row['chosen'] else ''}"
        )
    document = {
        "schema_version": 3,
        "command": f"python -m tests.bench.attention --device {arguments.device}",
        "env": environment(device),
        "sizes": {"tokens": sizes.tokens, "heads": sizes.heads, "width": sizes.width},
        "rows": rows,
    }
    if arguments.json:
        write_json(arguments.json, document)
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
