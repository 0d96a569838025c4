"""`python -m tests.bench.attention`: the attention backends at the 1.3B model's sizes, every one that runs on this GPU.

The table behind the order of preference in `ispa_deploy.attention`: one F-layer call (the whole window), one L-layer
call (sink + current), and cross-attention, timed by events; medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ispa_deploy.attention import attend, backends, choose, works
from ispa_deploy.profile.environment import environment
from ispa_deploy.profile.files import write_json

TOKENS, HEADS, WIDTH = 1560, 12, 128
CASES = {"window 12": (3 * TOKENS, 12 * TOKENS), "local": (3 * TOKENS, 4 * TOKENS), "cross": (3 * TOKENS, 512)}


def measure(case: str, names: list[str], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """One row per backend: milliseconds and TFLOP/s."""
    queries, keys = CASES[case]
    q, k, v = (torch.randn(1, n, HEADS, WIDTH, device=device, dtype=torch.bfloat16) for n in (queries, keys, keys))
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 2):
        for name in names:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            attend(q, k, v, backend=name)
            stop.record()
            stop.synchronize()
            if number >= 2:
                times[name].append(start.elapsed_time(stop))
    work = 4 * queries * keys * HEADS * WIDTH
    return [
        {"case": case, "backend": name, "ms": median(ms), "tflops": work / median(ms) / 1e9}
        for name, ms in times.items()
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args(argv)
    device = torch.device("cuda")
    names = [name for name in backends() if name != "reference" and works(name, device, torch.bfloat16, WIDTH)]
    with torch.inference_mode():
        rows = [row for case in CASES for row in measure(case, names, device, arguments.rounds)]
    for row in rows:
        print(f"{row['case']:>10} {row['backend']:>15}: {row['ms']:8.3f} ms {row['tflops']:7.1f} TFLOP/s")
    document = {
        "schema_version": 1,
        "command": "python -m tests.bench.attention",
        "env": environment(device),
        "chosen": choose(device, torch.bfloat16, WIDTH),
        "rows": rows,
    }
    if arguments.json:
        write_json(arguments.json, document)
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
