"""A report as text: the main table, Markdown for files, and in plain words what is short and why.

Cells of the main table are kept short: five runs fit a terminal of 80 columns (`terminal.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ispa_deploy.profile.grids import (
    amdahl_grid,
    audit_grid,
    memory_grid,
    milliseconds,
    peak_line,
    roofline_grid,
    start_grid,
    times,
    window_grid,
)
from ispa_deploy.profile.paper import FIGURE_RUNS, LAST_PASS
from ispa_deploy.regions import FAMILIES, ROWS

Report = dict[str, Any]
Run = dict[str, Any]

GAIN = 1.03
"""A linear speed-up below this is no gain: it is within what two runs of the same thing differ by."""

_FIGURES = {"attention": "self-attention", "overall": "chunk, ISPA", "overall_w8a8": "chunk, ISPA + W8A8"}
FPS = {"dit": "frames/s, model", "with_vae": "  with decoding", "wall": "  wall"}
_SEEN = 0.0005  # a row below this share of every chunk is left out of the table, not of the report


def title(report: Report) -> str:
    """One line: model, window, dtype, hardware, versions."""
    model, env = report["model"], report["env"]
    device = env["gpu"] or f"{env['cpu']}, {env['threads']} threads"
    return (
        f"{model['name']} ({model['geometry']['layers']} layers, {model['dtype']}, "
        f"window {model['window']} frames, chunk {model['chunk_frames']}, "
        f"{model['passes']} passes) on {device}, torch {env['torch']}, {env['clock']} time"
    )


def grid(report: Report) -> list[list[str]]:
    """Rows of text, the heading first: one column per run, families above their rows."""
    runs: list[Run] = report["runs"]
    lines = [["ms per chunk", *(run["name"] for run in runs)]]

    def line(label: str, cells: Iterable[str]) -> None:
        lines.append([label, *cells])

    line("chunk, median", [milliseconds(run["chunk_ms"]["median"]) for run in runs])
    line("  quartiles", [f"±{milliseconds(run['chunk_ms']['spread'] / 2)}" for run in runs])
    line("  95 % interval", [_bounds(run["chunk_ms"].get("interval"), milliseconds) for run in runs])
    line("  90th percentile", [milliseconds(run["chunk_ms"]["p90"]) for run in runs])
    line("  99th percentile", [milliseconds(run["chunk_ms"]["p99"]) for run in runs])
    for family in FAMILIES:
        line(family, [_share(run["families"][family], run) for run in runs])
        for row in (row for row in ROWS if row.startswith(f"{family}.")):
            if any(run["components"].get(row, 0.0) >= _SEEN * run["wall_ms"] for run in runs):
                line("  " + row.partition(".")[2], [_share(run["components"].get(row, 0.0), run) for run in runs])
    line("unattributed", [_share(run["unattributed_ms"], run) for run in runs])
    line("speed-up", [times(run["speedup"]) for run in runs])
    line("  95 % interval", [_bounds(run.get("speedup_interval"), "{:.2f}".format) for run in runs])
    if any(run.get("speedup_published") for run in runs):
        line("  over published loop", [times(run["speedup_published"]) for run in runs])
    line("  self-attention", [times(run["attention_speedup"]) for run in runs])
    line("  linear", [times(run["linear_speedup"]) for run in runs])
    for key, label in FPS.items():
        if any(run["fps"][key] for run in runs):
            line(label, [f"{run['fps'][key]:.3g}" if run["fps"][key] else "-" for run in runs])
    line("KV cache, MiB", [_mib(run["memory"]["kv_persistent"]) for run in runs])
    line("KV cache, %", [f"{run['kv_percent']:.1f}" for run in runs])
    line("weights, MiB", [_mib(run["memory"]["weights"]) for run in runs])
    return lines


def paper_grid(report: Report) -> list[list[str]]:
    """The paper's figures beside ours, the heading first."""
    lines = [["speed-up", "paper", "here", "verdict"]]
    for figure, label in _FIGURES.items():
        entry = report["paper"][figure]
        lines.append([label, times(entry["paper"]), times(entry["ours"]), entry["verdict"]])
    return lines


def sentences(report: Report) -> list[str]:
    """What the numbers mean and what speaks against them, one plain sentence each."""
    peaks = [peak_line(report)] if report.get("peak") else []
    warnings = [f"Warning: {warning}" for warning in report["warnings"]]
    return [*explanations(report), *peaks, *account(report), *warnings]


def account(report: Report) -> list[str]:
    """How far the rows are from the time they account for, where every account closes; else warnings say it."""
    rules = [run["closing"] for run in report["runs"]]
    if not all(rule["closed"] for rule in rules):
        return []
    error, lost = (100 * max(rule[name] for rule in rules) for name in ("sum_error", "unattributed_share"))
    limit = 100 * rules[0]["limits"]["instrumented_over_plain"]
    return [
        f"Every account closes: rows and wall time differ by {error:.2g} % at most, at most {lost:.2g} % of a chunk is "
        f"in no row, and recording changes the time by less than {limit:g} %{_counted(report)}."
    ]


def _counted(report: Report) -> str:
    """Which runs' price of recording follows from their marks, for a comparison differs too much to tell."""
    names = [run["name"] for run in report["runs"] if (run.get("recording") or {}).get("judged_by") == "marks"]
    if not names:
        return ""
    return f" (in {', '.join(names)} by its marks, ten times their price: the comparison is too wide to tell)"


def explanations(report: Report) -> list[str]:
    """What the numbers mean: what Amdahl's law allows and what 8 bits did."""
    law = report["amdahl"]
    text = [
        f"Self-attention is {100 * law['attention_share']:.0f} % of the full run's chunk: gaining all that the dropped "
        f"keys allow ({law['attention_ceiling']:.2f}x) would make the chunk {law['ceiling']:.2f}x faster.",
        *_beyond_ceiling(report),
    ]
    if law["linear_speedup_needed"] is None:
        if report["paper"]["overall"]["ours"] is not None:
            text.append("The paper's 1.86x is out of reach here: not even linear layers that cost nothing would do.")
    else:
        text.append(f"The paper's 1.86x would need linear layers {law['linear_speedup_needed']:.2f}x faster.")
    return [*text, *setting_sentences(report), *_window_sentences(report), *_eight_bit_sentences(report)]


def _beyond_ceiling(report: Report) -> list[str]:
    """What else became faster where the chunk gained more than self-attention alone allows."""
    ispa = next((run for run in report["runs"] if run["name"] == FIGURE_RUNS["overall"]), None)
    gain = report["paper"]["overall"]["ours"]
    if ispa is None or gain is None or gain <= report["amdahl"]["ceiling"]:
        return []
    full = next(run for run in report["runs"] if run["name"] == report["baseline"])
    saved = {family: full["families"][family] - ispa["families"][family] for family in FAMILIES[1:]}
    less = [f"{family} {milliseconds(ms)} ms" for family, ms in saved.items() if ms > 0]
    where = f" in the recorded chunks: {', '.join(less)}" if less else ""
    return [f"The chunk gained more ({gain:.2f}x): other parts took less time as well{where}."]


def _window_sentences(report: Report) -> list[str]:
    return [
        f"Self-attention alone at a window of {row['window']} frames: {row['attention_speedup']:.2f}x, "
        f"the paper's 1.89x {row['verdict']}."
        for row in report.get("windows") or ()
    ]


def setting_sentences(report: Report) -> list[str]:
    """Where this report stands to the paper's setting."""
    setting = report.get("setting")
    if not setting:
        return []
    paper, needed = setting["paper"], setting["window_needed"]
    other = [name for name, same in setting["same"].items() if not same]
    where = f"in its {' and '.join(other)}" if other else "in nothing but hardware and software"
    text = (
        f"The paper measured {paper['model']} at {paper['height']}x{paper['width']}, window {paper['window']}, "
        f"{100 * paper['ratio']:.0f} % of the layers local; this report differs {where}."
    )
    if needed is None:
        return [text]
    return [text, f"At that ratio the dropped keys explain its 1.89x only from a window of {needed} frames on."]


def _eight_bit_sentences(report: Report) -> list[str]:
    """What is to be known of the 8-bit runs: that their one pass is not a chunk's last, that they gained nothing."""
    eight = [run for run in report["runs"] if run["scheme"] != "none" and not run["name"].endswith(LAST_PASS)]
    idle = [run for run in eight if run["linear_speedup"] is not None and run["linear_speedup"] < GAIN]
    width = report["model"]["geometry"]["dim"]
    one = report["model"]["passes"] == 2 and eight and not any(run.get("wide_layers", 1) for run in eight)
    said = [
        "The one denoising pass of the 8-bit runs has activations of 8 bits, as all but the last of a chunk; in that "
        "one the last third of the layers takes 16 (--last-pass-bits)."
    ]
    return (said if one else []) + [
        f"At this width ({width}) 8 bits gain nothing: the linear layers of '{run['name']}' ran at "
        f"{run['linear_speedup']:.2f}x of the baseline's speed; what is saved is memory."
        for run in idle[-1:]
    ]


def more(report: Report) -> list[tuple[str, list[list[str]], bool]]:
    """The tables below the first: heading, lines, and whether they are numbers throughout; empty ones are left out."""
    last = report["runs"][-1]
    tables = [
        ("the paper's figures", paper_grid(report), False),
        ("what Amdahl's law allows", amdahl_grid(report), False),
        ("ISPA at longer windows: self-attention measured alone, the chunk composed", window_grid(report), True),
        ("before the steady state", start_grid(report), True),
        ("memory", memory_grid(report), True),
        ("how near the device's peaks", roofline_grid(report), True),
        (f"what the linear layers of '{last['name']}' ran (wide: on 16-bit activations)", audit_grid(last), False),
    ]
    return [entry for entry in tables if len(entry[1]) > 1]


def markdown(report: Report) -> str:
    """The same as a Markdown section."""
    parts = [f"**{title(report)}**", _pipes(grid(report))]
    for heading, lines, _ in more(report):
        parts += [f"*{heading[0].upper()}{heading[1:]}*", _pipes(lines)]
    parts.append("\n".join(f"- {sentence}" for sentence in sentences(report)))
    if report["command"]:
        parts.append(f"`{report['command']}`")
    return "\n\n".join(parts) + "\n"


def _pipes(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    rows = [head, ["---", *("---:" for _ in head[1:])], *body]
    return "\n".join("| " + " | ".join(_indented(cell) for cell in row) + " |" for row in rows)


def _indented(cell: str) -> str:
    return "&nbsp;&nbsp;" + cell.strip() if cell.startswith("  ") else cell


def _share(ms: float, run: Run) -> str:
    return f"{milliseconds(ms)} {100 * ms / run['wall_ms']:2.0f}%" if ms else "-"


def _bounds(interval: Sequence[float] | None, form: Callable[[float], str]) -> str:
    """An interval without blanks or commas, as wide as a share beside its time."""
    return "-" if interval is None else "–".join(form(bound).replace(",", "") for bound in interval)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"
