"""The smaller tables of a report as rows of text, the heading first: what the terminal, Markdown and the page share."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from ispa_deploy.regions import ROWS

Report = dict[str, Any]
Run = dict[str, Any]
Grid = list[list[str]]

MEMORY = {
    "weights": "weights",
    "kv_persistent": "keys and values kept",
    "kv_scratch": "keys and values of the chunk in work",
    "deltas": "absorbed deltas",
    "statistics": "statistics, until the transition",
    "transient": "taken on top while a chunk is in work",
    "peak": "allocator's peak",
}


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def milliseconds(ms: float | None) -> str:
    """As many digits as a reader can use."""
    if ms is None:
        return "-"
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 1 else f"{ms:.2f}"


def span(interval: Sequence[float] | None, form: str = "{:.1f}") -> str:
    """An interval in brackets; `-` where there are too few values for one."""
    return "-" if interval is None else f"[{form.format(interval[0])}, {form.format(interval[1])}]"


def recording_price(run: Run) -> str:
    """What recording did to the time of a run, in words: by comparison, and by the marks alone."""
    price = run.get("recording") or {"interval": None, "pairs": None, "marks_share": None}
    change = run["instrumented_over_plain"] - 1
    text = f"recording changed the time by {100 * change:+.1f} %"
    if price["interval"]:
        low, high = (100 * (bound - 1) for bound in price["interval"])
        text += f", between {low:+.1f} and {high:+.1f} % by {price['pairs']} pairs of {price['unit']}"
    elif price["pairs"]:
        text += f" by {price['pairs']} pairs of {price['unit']}, too few for an interval"
    if price["marks_share"] is not None:
        text += f"; its {price['marks']:,} marks take {100 * price['marks_share']:.2g} %"
    return text


def start_grid(report: Report) -> Grid:
    """What comes before the steady state, and the steady chunk beside it; empty where nothing was measured."""
    runs = [run for run in report["runs"] if run.get("start")]
    if not runs:
        return []
    lines = [["ms", *(run["name"] for run in runs)]]
    if report.get("load_ms") is not None:
        lines.append(["loading the weights", *[milliseconds(report["load_ms"])] * len(runs)])
    starts = [run["start"] for run in runs]
    lines += [
        ["first chunk ever (cold)", *(milliseconds(start["first_chunk_ms"]) for start in starts)],
        ["time to first frame (warm)", *(milliseconds(start["first_frame_ms"]) for start in starts)],
        ["warm-up chunk, median", *(milliseconds(_warmup(start)) for start in starts)],
        ["chunk with the transition", *(milliseconds(start["transition_ms"]) for start in starts)],
        ["  of it solve and transition", *(milliseconds(_transition(start, "solve_ms")) for start in starts)],
        ["steady chunk, median", *(milliseconds(run["chunk_ms"]["median"]) for run in runs)],
    ]
    return lines


def _warmup(start: dict[str, Any]) -> float | None:
    """The first chunk is left out: it is cold, and some models take more steps for it."""
    found = [chunk["ms"] for chunk in start["chunks"][1:] if chunk["state"] == "warm-up"]
    return median(found) if found else None


def _transition(start: dict[str, Any], field: str) -> float | None:
    return next((chunk[field] for chunk in start["chunks"] if chunk["state"] == "transition"), None)


def memory_grid(report: Report) -> Grid:
    """MiB per run."""
    runs: list[Run] = report["runs"]
    lines = [["MiB", *(run["name"] for run in runs)]]
    for name, label in MEMORY.items():
        values = [run["memory"].get(name) for run in runs]
        if any(value is not None for value in values):
            lines.append([label, *("-" if value is None else f"{value / 2**20:,.1f}" for value in values)])
    lines.append(["keys and values, % of the full cache", *(f"{run['kv_percent']:.1f}" for run in runs)])
    return lines


def roofline_grid(report: Report) -> Grid:
    """The share of the nearer peak of every run's rows; operations and bytes are the baseline's, or those of the first
    run that has the row."""
    runs = [run for run in report["runs"] if run.get("roofline")]
    if not runs:
        return []
    lines = [["% of the nearer peak", *(run["name"] for run in runs), "GFLOP", "MB", "peak"]]
    found = [{entry["row"]: entry for entry in run["roofline"]} for run in runs]
    base = next((each for run, each in zip(runs, found, strict=True) if run["name"] == report["baseline"]), {})
    for row in ROWS:
        entries = [each.get(row) for each in found]
        first = next((entry for entry in (base.get(row), *entries) if entry), None)
        if first is None:
            continue
        shares = [f"{100 * entry['share']:.0f}" if entry else "-" for entry in entries]
        counts = [f"{first['flops'] / 1e9:,.1f}", f"{first['bytes'] / 1e6:,.0f}", first["bound"]]
        lines.append([row, *shares, *counts])
    return lines


def peak_line(report: Report) -> str:
    """The peaks that shares are of, in words; empty where none was measured."""
    peak = report.get("peak")
    if not peak:
        return ""
    return (
        f"Peaks measured in the same run: {_rate(peak['flops'])}FLOP/s (one {peak['side']}-wide product in "
        f"{peak['dtype']}), {_rate(peak['bytes'])}B/s (one copy of {peak['copied'] / 2**20:,.0f} MiB).{_beyond(report)}"
    )


def _beyond(report: Report) -> str:
    """Why shares above 1 are no mistake, where there are any."""
    entries = [entry for run in report["runs"] for entry in run.get("roofline") or ()]
    reasons = {
        "arithmetic": "products in 8 bits are held against the same peak",
        "memory": "data was still in a cache, or a fused pass spared the trip",
    }
    found = [text for bound, text in reasons.items() if any(e["bound"] == bound and e["share"] > 1 for e in entries)]
    return f" Above 100 %: {'; '.join(found)}." if found else ""


def _rate(value: float) -> str:
    scale, letter = next((pair for pair in ((1e12, "T"), (1e9, "G")) if value >= pair[0]), (1e6, "M"))
    return f"{value / scale:.3g} {letter}"


def window_grid(report: Report) -> Grid:
    """Self-attention alone at the model's window and at long ones; empty where it was not measured."""
    rows = report.get("windows") or []
    if not rows:
        return []
    head = ["window", "full, ms", "local, ms", "attention", "keys allow", "chunk", "with W8A8"]
    return [head] + [
        [
            f"{row['window']} frames", milliseconds(row["full_ms"]), milliseconds(row["local_ms"]),
            times(row["attention_speedup"]), times(row["ceiling"]), times(row["chunk_speedup"]),
            times(row["chunk_speedup_w8a8"]),
        ]
        for row in rows
    ]  # fmt: skip


def amdahl_grid(report: Report) -> Grid:
    """What Amdahl's law allows and what was reached."""
    law = report["amdahl"]
    achieved = law.get("achieved") or {}
    return [
        ["", "possible", "reached"],
        ["self-attention, by the keys that are dropped", times(law["attention_ceiling"]),
         times(achieved.get("attention"))],
        ["whole chunk by that alone (ISPA's ceiling)", times(law["ceiling"]), times(achieved.get("chunk"))],
        ["linear layers, needed for the paper's 1.86x", _needed(report), times(achieved.get("linear"))],
    ]  # fmt: skip


def _needed(report: Report) -> str:
    needed = report["amdahl"]["linear_speedup_needed"]
    if needed is None and report["paper"]["overall"]["ours"] is not None:
        return "not even free ones"
    return times(needed)


def layer_grid(run: Run) -> Grid:
    """One line per block of the model; empty where they were not timed."""
    rows = run.get("layers") or []
    if not rows or not any(row["ms"] for row in rows):
        return []
    head = ["layer", "attention", "ms", "keys and values, KiB", "delta", "delta, KiB"]
    return [head] + [
        [
            str(number), "local" if row["local"] else "full window", milliseconds(row["ms"]),
            f"{row['kv_persistent'] / 1024:,.0f}", row["delta"] or "-", f"{row['deltas'] / 1024:,.0f}",
        ]
        for number, row in enumerate(rows)
    ]  # fmt: skip


def audit_grid(run: Run) -> Grid:
    """Kernels of the linear layers: how many layers ran each, how often, on which weights, and how many of the
    calls had activations of 16 bits."""
    counts: dict[tuple[str, str, str], list[int]] = {}
    for row in run["audit"]:
        key = (row["kernel"], row.get("dtype") or "-", row["delta_mode"] or "-")
        entry = counts.setdefault(key, [0, 0, 0])
        entry[0] += row.get("layers", 1)
        entry[1] += row["calls"] or 0
        entry[2] += row.get("wide_calls") or 0
    head = ["kernel", "weights", "delta", "layers", "8-bit calls", "wide"]
    return [head] + [
        [*key, str(layers), str(calls or "-"), str(wide or "-")] for key, (layers, calls, wide) in counts.items()
    ]
