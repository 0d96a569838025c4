"""`python -m tests.bench [--suite cpu|storage|stream|gpu] [-o docs/results]`: every measurement.

Results go to `<output>/<device>/*.json`. The CPU suite takes under 10 minutes on 2 quiet cores. Each part runs in a
process of its own, so that none inherits another's memory, and writes its file as soon as it is done; at the end the
README's figures of speed are made anew. `--only` picks parts, also ones that the suite leaves out; `--rounds` trades
time for spread.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from ispa_deploy.profile.environment import environment, slug, wide_vectors
from tests.bench.readme import RESULTS, write

SUITES: dict[str, tuple[str, ...]] = {
    "cpu": ("demo", "mid", "ladder", "attention", "int8_linear", "merge", "memory"),
    "storage": ("kv", "deltas"),
    "stream": ("warmup", "memory"),
    "gpu": ("longlive-1.3b", "krea-14b", "attention"),
}
_ALONE = ("int8_linear", "merge", "memory", "warmup", "kv", "deltas", "attention")
"""Parts with a module of their own; the others are geometries for `tests.bench.chunk`, and the ladder."""

_ROUNDS = {"merge": 5, "attention": 5, "ladder": 4}
"""Rounds on a CPU where neighbours differ so little that fewer than the module's own are enough."""
_NARROW = {"merge": ("--rounds", "3"), "attention": ("--rounds", "3"), "mid": ("--layers", "4"),
           "ladder": ("--layers", "4")}  # fmt: skip
"""What keeps the suite within its minutes on a CPU without AVX-512, where bfloat16 is several times slower: fewer
rounds, and four of the twelve layers, of which each costs the same."""


def command(part: str, output: Path, arguments: argparse.Namespace) -> list[str]:
    """The command line of one part."""
    python = [sys.executable, "-m"]
    cuda = arguments.suite == "gpu"
    device = ["--device", "cuda" if cuda else "cpu"]
    rounds = [] if cuda or part not in _ROUNDS else ["--rounds", str(_ROUNDS[part])]
    narrow = list(_NARROW.get(part, ())) if not cuda and not wide_vectors() else []
    if part in _ALONE:
        own = device if part == "attention" else []
        return [*python, f"tests.bench.{part}", "--json", str(output), *own, *rounds, *narrow]
    asked = ["--rounds", str(arguments.rounds)] if arguments.rounds else rounds
    shared = ["--shared"] if arguments.shared else []
    module = ["tests.bench.ladder"] if part == "ladder" else ["tests.bench.chunk", part]
    return [*python, *module, "--json", str(output), *device, *asked, *narrow, *shared]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    parts = [part for suite in SUITES.values() for part in suite]
    parser.add_argument("--only", nargs="+", metavar="PART", choices=parts)
    parser.add_argument("--rounds", type=int, help="rounds of the side-by-side comparisons")
    parser.add_argument("--shared", action="store_true", help="busy machine: one thread, CPU instead of wall time")
    arguments = parser.parse_args(argv)
    if arguments.suite == "gpu" and not torch.cuda.is_available():
        parser.error("the GPU suite needs a CUDA device: none is visible to torch; use --suite cpu")
    device = torch.device("cuda" if arguments.suite == "gpu" else "cpu")
    folder = arguments.output / slug(environment(device))
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in arguments.only or SUITES[arguments.suite]:
        start = time.monotonic()
        print(f"== {part}", flush=True)
        done = subprocess.run(command(part, folder / f"{part}.json", arguments), check=False)
        print(f"== {part}: exit {done.returncode}, {time.monotonic() - start:.0f} s", flush=True)
        failed += [part] if done.returncode else []
    if Path("README.md").is_file() and arguments.output == RESULTS:
        write(Path("README.md"), RESULTS)
    if failed:
        print(f"beyond a limit or failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
