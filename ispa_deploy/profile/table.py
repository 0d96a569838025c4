"""A report as text: a table for the terminal, Markdown for files, and in plain words what is short and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ispa_deploy.regions import FAMILIES, ROWS

if TYPE_CHECKING:
    from rich.console import RenderableType

Report = dict[str, Any]
Run = dict[str, Any]

GAIN = 1.03
"""A linear speed-up below this is no gain: it is within what two runs of the same thing differ by."""

_FIGURES = {"attention": "self-attention", "overall": "chunk, ISPA", "overall_w8a8": "chunk, ISPA + W8A8"}
_SEEN = 0.0005  # a row below this share of every chunk is left out of the table, not of the report


def title(report: Report) -> str:
    """One line: model, window, dtype, hardware, versions."""
    model, env = report["model"], report["env"]
    device = env["gpu"] or f"{env['cpu']}, {env['threads']} threads"
    return (
        f"{model['name']} ({model['dtype']}, window {model['window']} frames, chunk {model['chunk_frames']}, "
        f"{model['passes']} passes) on {device}, torch {env['torch']}, {env['clock']} time"
    )


def grid(report: Report) -> list[list[str]]:
    """Rows of text, the heading first: one column per run, families above their rows."""
    runs: list[Run] = report["runs"]
    lines = [["ms per chunk", *(run["name"] for run in runs)]]

    def line(label: str, cells: Iterable[str]) -> None:
        lines.append([label, *cells])

    line("chunk, median", [f"{run['chunk_ms']['median']:.1f}" for run in runs])
    line("  quartiles", [f"±{run['chunk_ms']['spread'] / 2:.1f}" for run in runs])
    for family in FAMILIES:
        line(family, [_share(run["families"][family], run) for run in runs])
        for row in (row for row in ROWS if row.startswith(f"{family}.")):
            if any(run["components"][row] >= _SEEN * run["wall_ms"] for run in runs):
                line("  " + row.partition(".")[2], [_share(run["components"][row], run) for run in runs])
    line("unattributed", [_share(run["unattributed_ms"], run) for run in runs])
    line("speed-up", [_times(run["speedup"]) for run in runs])
    line("  self-attention", [_times(run["attention_speedup"]) for run in runs])
    line("  linear", [_times(run["linear_speedup"]) for run in runs])
    line("frames per second", [f"{run['fps']['dit']:.2f}" for run in runs])
    line("KV cache, MiB", [_mib(run["memory"]["kv_persistent"]) for run in runs])
    line("KV cache, %", [f"{run['kv_percent']:.1f}" for run in runs])
    line("weights, MiB", [_mib(run["memory"]["weights"]) for run in runs])
    return lines


def paper_grid(report: Report) -> list[list[str]]:
    """The paper's figures beside ours, the heading first."""
    lines = [["speed-up", "paper", "here", "verdict"]]
    for figure, label in _FIGURES.items():
        entry = report["paper"][figure]
        lines.append([label, _times(entry["paper"]), _times(entry["ours"]), entry["verdict"]])
    return lines


def sentences(report: Report) -> list[str]:
    """What the numbers mean and what speaks against them, one plain sentence each."""
    return [*explanations(report), *(f"Warning: {warning}" for warning in report["warnings"])]


def explanations(report: Report) -> list[str]:
    """What the numbers mean: what Amdahl's law allows and what 8 bits did."""
    law = report["amdahl"]
    text = [
        f"Self-attention is {100 * law['attention_share']:.0f} % of the full run's chunk: gaining all that the dropped "
        f"keys allow ({law['attention_ceiling']:.2f}x) would make the chunk {law['ceiling']:.2f}x faster."
    ]
    if law["linear_speedup_needed"] is None:
        if report["paper"]["overall"]["ours"] is not None:
            text.append("The paper's 1.86x is out of reach here: not even linear layers that cost nothing would do.")
    else:
        text.append(f"The paper's 1.86x would need linear layers {law['linear_speedup_needed']:.2f}x faster.")
    return [*text, *_eight_bit_sentences(report)]


def _eight_bit_sentences(report: Report) -> list[str]:
    idle = [run for run in report["runs"] if run["scheme"] != "none" and (run["linear_speedup"] or 0) < GAIN]
    width = report["model"]["geometry"]["dim"]
    return [
        f"At this width ({width}) 8 bits gain nothing: the linear layers of '{run['name']}' ran at "
        f"{run['linear_speedup']:.2f}x of the baseline's speed; what is saved is memory."
        for run in idle[-1:]
    ]


def terminal(report: Report) -> RenderableType:
    """For `rich.console.Console.print`."""
    from rich.console import Group
    from rich.table import Table

    def table(lines: Sequence[Sequence[str]], right: bool, heading: str) -> Table:
        made = Table(title=heading, title_justify="left")
        for index, column in enumerate(lines[0]):
            made.add_column(column, justify="right" if right and index else "left", no_wrap=right)
        for line in lines[1:]:
            made.add_row(*line, style="bold" if line[0] in (*FAMILIES, "speed-up") else None)
        return made

    return Group(
        table(grid(report), True, title(report)),
        table(paper_grid(report), False, "the paper's figures"),
        *sentences(report),
    )


def markdown(report: Report) -> str:
    """The same as a Markdown section."""
    parts = [f"**{title(report)}**", _pipes(grid(report)), _pipes(paper_grid(report))]
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
    return f"{ms:.1f} {100 * ms / run['wall_ms']:3.0f}%"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
