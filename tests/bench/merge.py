"""`python -m tests.bench.merge`: attention over split keys, merged, against the single call.

At the size of the 1.3B model, with one thread and in CPU time of the process, so that other processes on the machine do
not count. Single call and split take turns; the result is the median over rounds of the ratio of neighbours. The merge
is also timed alone: what remains is the price of a second call, whose keys end in a partial block of their own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ispa_deploy.attention import Attended, attend, merge
from ispa_deploy.profile.environment import environment
from ispa_deploy.profile.files import write_json

QUERIES, KEYS, LOCAL, HEADS, WIDTH = 1560, 18720, 4 * 1560, 12, 128
LIMIT = 0.05
"""Share of the single call that splitting and merging may cost."""


def seconds(run: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Times in CPU seconds and what the split costs, as shares of the single call."""
    q = torch.randn(1, QUERIES, HEADS, WIDTH).to(dtype)
    k, v = (torch.randn(1, KEYS, HEADS, WIDTH).to(dtype) for _ in range(2))

    def part(first: int, last: int) -> Attended:
        return attend(q, k[:, first:last], v[:, first:last])

    near, far = part(0, LOCAL), part(LOCAL, KEYS)  # also the warm-up
    single, split, fused = list[float](), list[float](), list[float]()
    runs: list[tuple[list[float], Callable[[], Attended]]] = [
        (single, lambda: part(0, KEYS)),
        (split, lambda: merge(part(0, LOCAL), part(LOCAL, KEYS))),
    ]
    for number in range(rounds):
        for times, run in runs if number % 2 else reversed(runs):
            times.append(seconds(run))
        fused.append(seconds(lambda: merge(near, far)))
    overhead = median(b / a for a, b in zip(single, split, strict=True)) - 1
    merging = median(c / a for a, c in zip(single, fused, strict=True))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "single_s": median(single),
        "split_s": median(split),
        "merge_s": median(fused),
        "overhead": overhead,
        "merge_share": merging,
        "second_call_share": overhead - merging,
        "within_limit": overhead < LIMIT,
    }


def main(argv: list[str] | None = None) -> int:
    """Print the table and one JSON line; 1 when the split costs more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [measure(dtype, arguments.rounds) for dtype in (torch.bfloat16, torch.float32)]
    for row in rows:
        print(
            f"{row['dtype']:>9}: single {row['single_s']:.3f} s, split + merge {row['split_s']:.3f} s: "
            f"{100 * row['overhead']:+.1f} % (merge alone {100 * row['merge_share']:.1f} %, "
            f"second call {100 * row['second_call_share']:+.1f} %)"
        )
    shape = {"queries": QUERIES, "keys": KEYS, "local": LOCAL, "heads": HEADS, "width": WIDTH}
    document = {
        "schema_version": 1,
        "command": "python -m tests.bench.merge",
        "env": environment(torch.device("cpu")),
        "shape": shape,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    if arguments.json:
        write_json(arguments.json, document)
    print(json.dumps(document))
    return 0 if all(row["within_limit"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
