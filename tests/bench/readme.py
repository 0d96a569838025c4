"""`python -m tests.bench.readme [README.md] [--results docs/results]`: the README's speed table from the result files.

Nothing in the table is typed by hand: one part per report, in the order of geometries, CPUs first. `python -m
tests.bench` ends with it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ispa_deploy.evaluate.table import replace_section
from ispa_deploy.profile.details import hardware, title
from ispa_deploy.profile.geometries import GEOMETRIES
from ispa_deploy.profile.grids import milliseconds, span, times

START, END = "<!-- speed:start -->", "<!-- speed:end -->"
RESULTS = Path("docs/results")
HEAD = (
    "configuration", "chunk, ms", "over the published loop", "over our full cache", "self-attention", "linear", "KV %",
    "weights, MiB", "frames/s",
)  # fmt: skip

Report = dict[str, Any]
Run = dict[str, Any]


def reports(folder: Path) -> list[tuple[Path, Report]]:
    """Reports of the geometries below a folder of results, CPUs before GPUs, small geometries before large ones."""
    order = [*(name for name in GEOMETRIES if name != "demo"), "demo"]  # too small to show what it is about
    files = [file for file in folder.glob("*/*.json") if file.stem in GEOMETRIES]
    found = [(file, json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return sorted(found, key=lambda pair: (pair[1]["env"]["gpu"] or "", order.index(pair[0].stem)))


def table(folder: Path) -> str:
    """The section between the markers."""
    parts = [_part(file, report) for file, report in reports(folder)]
    return "\n\n".join(parts) if parts else "No result has been stored yet: `make bench` writes one."


def _part(file: Path, report: Report) -> str:
    model, layers = report["model"], report["model"]["geometry"]["layers"]
    lines = [HEAD, (":--", *["--:"] * (len(HEAD) - 1)), *(_row(run) for run in report["runs"])]
    pipes = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    head = (
        f"**{model['name']}**: {layers} layers of width {model['geometry']['dim']}, {model['dtype']}, window "
        f"{model['window']} frames, {model['passes']} passes, on {hardware(report)}"
    )
    return f"{head}\n\n{pipes}\n\n{_notes(file, report)}"


def _row(run: Run) -> tuple[str, ...]:
    interval = run["chunk_ms"].get("interval")
    chunk = milliseconds(run["chunk_ms"]["median"]) + (f" {span(interval, '{:,.0f}')}" if interval else "")
    return (
        title(run), chunk, times(run.get("speedup_published")), times(run["speedup"]), times(run["attention_speedup"]),
        times(run["linear_speedup"]), f"{run['kv_percent']:.0f}", f"{run['memory']['weights'] / 2**20:,.0f}",
        f"{run['fps']['dit']:.2f}",
    )  # fmt: skip


def _notes(file: Path, report: Report) -> str:
    """Command and file, how the paper's figures stand, and how many warnings the report has of its own."""
    figures = ", ".join(
        f"{entry['paper']:.2f}x: {entry['verdict']}" for entry in report["paper"].values() if entry["ours"] is not None
    )
    windows = [row for row in report.get("windows") or () if row["window"] != report["model"]["window"]]
    long = [
        f"Self-attention alone at a window of {row['window']} frames: {row['attention_speedup']:.2f}x."
        for row in windows
    ]
    count = len(report["warnings"])
    doubts = f"{count} warning{'s' if count != 1 else ''} of its own" if count else "no warnings of its own"
    text = " ".join([f"The paper's {figures}.", *long] if figures else long)
    return f"{text} Made by `{report['command']}`; {file.parent.name}/{file.name} has {doubts}."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readme", type=Path, nargs="?", default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    replace_section(arguments.readme, table(arguments.results), START, END)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
