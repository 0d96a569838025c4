"""`python -m tests.bench.readme [README.md] [--results docs/results]`: the README's figures of speed from result files.

None is typed by hand: the sentence at the top, the table (one part per report, in the order of geometries, CPUs first),
and what single parts take. `python -m tests.bench` ends with it.
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
HEADLINE = "<!-- headline:start -->", "<!-- headline:end -->"
PARTS = "<!-- parts:start -->", "<!-- parts:end -->"
RESULTS = Path("docs/results")
HEAD = (
    "configuration", "chunk, ms", "over the published loop", "over our full cache", "self-attention", "linear", "KV %",
    "weights, MiB", "frames/s",
)  # fmt: skip

_WHERE = {"attention": "in attention", "overall": "overall", "overall_w8a8": "overall with W8A8"}

Report = dict[str, Any]
Run = dict[str, Any]


def reports(folder: Path) -> list[tuple[Path, Report]]:
    """Reports of the geometries below a folder of results, CPUs before GPUs, small geometries before large ones."""
    order = [*(name for name in GEOMETRIES if name != "demo"), "demo"]  # too small to show what it is about
    files = [file for file in folder.glob("*/*.json") if file.stem in GEOMETRIES]
    found = [(file, _document(file)) for file in files]
    return sorted(found, key=lambda pair: (pair[1]["env"]["gpu"] or "", order.index(pair[0].stem), pair[0]))


def table(folder: Path) -> str:
    """The section between the markers."""
    parts = [_part(file, report) for file, report in reports(folder)]
    return "\n\n".join(parts) if parts else "No result has been stored yet: `make bench` writes one."


def headline(folder: Path) -> str:
    """One sentence: the mid geometry on a CPU against the published loop, and whether a GPU was measured."""
    stored = [report for _, report in reports(folder)]
    mid = next((each for each in stored if each["model"]["name"] == "mid" and each["env"]["gpu"] is None), None)
    gpus = sorted({report["env"]["gpu"] for report in stored if report["env"]["gpu"]})
    others = f"GPUs measured: {', '.join(gpus)}." if gpus else "No GPU has been measured yet."
    if mid is None:
        return others
    runs = {run["name"]: run for run in mid["runs"]}
    full, ours = runs["full"], runs["ispa+w8a8"]
    weights = 100 * ours["memory"]["weights"] / full["memory"]["weights"]
    return (
        f"On {mid['env']['threads']} CPU cores a steady chunk of the bench's mid geometry comes "
        f"{ours['speedup_published']:.1f} times as fast as from the published loop in plain PyTorch (kernels "
        f"{full['speedup_published']:.1f}x, ISPA and W8A8 {ours['speedup']:.1f}x), with {ours['kv_percent']:.0f} % of "
        f"the cache and {weights:.0f} % of the weights. {others}"
    )


def parts(folder: Path) -> str:
    """What 8-bit linears take, on each kind of CPU, and what splitting keys and merging costs."""
    linears = [_linears(_document(file)) for file in sorted(folder.glob("cpu-*/int8_linear.json"))]
    merges = [_merge(_document(file)) for file in sorted(folder.glob("cpu-*/merge.json"))]
    return "\n".join(linears + merges) or "Parts have not been measured yet: `make bench` does."


def _linears(document: dict[str, Any]) -> str:
    rows, units = document["results"], document["processor"]
    fp32 = _range([row["over_fp32"]["int8"] for row in rows])
    # Where bfloat16 has no instructions it is no rival.
    bf16 = _range([row["over_bf16"]["int8"] for row in rows]) if units.startswith("AVX512") else None
    rivals = f"{bf16} times the time of bf16 and {fp32} times that of" if bf16 else f"{fp32} times the time of"
    return f"On the linear layers of the 1.3B model alone, one thread with {units}, int8 takes {rivals} fp32."


def _merge(document: dict[str, Any]) -> str:
    cost = 100 * max(row["overhead"] for row in document["rows"])
    merge = 100 * max(row["merge_share"] for row in document["rows"])
    most = f"{max(cost, 0):.1f} % over a single call at most, the merge itself {merge:.1f} %"
    return f"Splitting keys and merging costs {most}."


def _range(values: list[float]) -> str:
    low, high = (f"{value:.2f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _document(file: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return document


def write(readme: Path, folder: Path) -> None:
    """Replace every part of the README that result files say."""
    for text, markers in ((headline(folder), HEADLINE), (table(folder), (START, END)), (parts(folder), PARTS)):
        replace_section(readme, text, *markers)


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
    figures = "; ".join(
        f"{entry['paper']:.2f}x {_WHERE[name]} is {entry['ours']:.2f}x here, {entry['verdict']}"
        for name, entry in report["paper"].items()
        if entry["ours"] is not None
    )
    windows = [row for row in report.get("windows") or () if row["window"] != report["model"]["window"]]
    long = [
        f"Self-attention alone at a window of {row['window']} frames: {row['attention_speedup']:.2f}x."
        for row in windows
    ]
    count = len(report["warnings"])
    doubts = f"{count} warning{'s' if count != 1 else ''} of its own" if count else "no warnings of its own"
    text = " ".join([f"Of the paper's figures {figures}.", *long] if figures else long)
    return f"{text} Made by `{report['command']}`; {file.parent.name}/{file.name} has {doubts}."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readme", type=Path, nargs="?", default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    write(arguments.readme, arguments.results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
