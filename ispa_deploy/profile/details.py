"""The sections of `report.html` below its first screen: tables, timelines and audit of one report; and its names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from ispa_deploy.profile.breakdown import RULES
from ispa_deploy.profile.charts import memory_chart, timeline
from ispa_deploy.profile.grids import (
    amdahl_grid,
    layer_grid,
    memory_grid,
    milliseconds,
    peak_line,
    roofline_grid,
    start_grid,
    times,
    window_grid,
)
from ispa_deploy.profile.grids import span as bracketed
from ispa_deploy.profile.paper import LAST_PASS, PUBLISHED
from ispa_deploy.profile.table import FPS, explanations, paper_grid, setting_sentences
from ispa_deploy.regions import FAMILIES, ROWS

Report = dict[str, Any]
Run = dict[str, Any]

_TITLES = {
    "full": "Full cache",
    "ispa": "ISPA",
    "full+w8a8": "Full cache + W8A8",
    "ispa+w8a8": "ISPA + W8A8",
    f"ispa+w8a8{LAST_PASS}": "ISPA + W8A8, last pass",
    "local+w8a8": "All layers local + W8A8",
    "published": "Published loop, plain PyTorch",
}
_TIMES = {
    "median": "median", "p90": "90th percentile", "p99": "99th percentile", "spread": "between the quartiles",
}  # fmt: skip
_BADGES = {"reproduced": "good", "not reproduced": "bad", "inconclusive": "doubt"}


def section(report: Report, number: int) -> str:
    runs: list[Run] = report["runs"]
    titles = [title(run) for run in runs]
    blocks = [
        _block("The paper's figures", _paper(report), escape(" ".join(setting_sentences(report)))),
        _block("What is possible, what was reached", _possible(report)),
        *_grids(
            "Longer windows",
            window_grid(report),
            "Self-attention was measured by itself at each window; "
            "the whole chunk is composed from it and from everything else as measured at this model's window.",
        ),
        _block("Where the time goes", _components(runs, titles), "Milliseconds of one chunk and share of it."),
        _block(
            "How steady, and does the account close",
            _steadiness(runs, titles),
            "Recording: blocks with and without it, next to each other in time (95 % interval). Where that straddles "
            "the limit, its marks are counted, and ten times their price must be within the limit and agree with it.",
        ),
        *_grids(
            "Before the steady state",
            start_grid(report),
            "Cold: the first chunk this process ever made with this "
            "configuration. Warm: a new stream in a process that is already serving, up to its first frames.",
        ),
        _block("Memory", _memory(report) + memory_chart(runs, titles), _peak_note(report)),
        *_grids(
            "How near the hardware's limits",
            roofline_grid(report),
            f"{escape(peak_line(report))} A row is held "
            "against the nearer of both; 8-bit rows against the same peaks, so that runs compare.",
        ),
        *_timelines(report),
        _layers(report),
        _audit(runs, titles),
    ]
    return (
        f'<section><h2>{escape(model_line(report))}</h2><p class="soft">{escape(hardware(report))}</p>'
        f"{_warnings(report, number)}{''.join(blocks)}{_footer(report)}</section>"
    )


def _possible(report: Report) -> str:
    head, *lines = amdahl_grid(report)
    table = _table(head, [(None, [escape(cell) for cell in line]) for line in lines], kind="numbers")
    said = setting_sentences(report)
    return table + "".join(f"<p>{escape(text)}</p>" for text in explanations(report) if text not in said)


def _grids(heading: str, grid: Sequence[Sequence[str]], note: str) -> list[str]:
    """A card of one grid; none where the grid has no lines."""
    if len(grid) < 2:
        return []
    head, *lines = grid
    cells = [(None, [escape(cell.strip()) for cell in line]) for line in lines]
    return [_block(heading, _table([_named(cell) for cell in head], cells, kind="numbers"), note)]


def _named(cell: str) -> str:
    """A column's heading: the names of runs as the rest of the page writes them."""
    before, comma, name = cell.rpartition(", ")
    return escape(f"{before}{comma}{_TITLES.get(name, name)}")


def _layers(report: Report) -> str:
    """The blocks of the fastest run, folded away: where the local layers are, and what each takes and holds."""
    run = best_run(report) or base_run(report)
    head, *lines = layer_grid(run) or [[]]
    if not lines:
        return ""
    table = _table([escape(cell) for cell in head], [(None, line) for line in lines], kind="numbers")
    summary = f"<summary>Layer by layer, {escape(title(run))}</summary>"
    return f'<div class="card"><details>{summary}{table}</details></div>\n'


def _block(heading: str, body: str, note: str = "") -> str:
    below = f'<p class="soft small">{note}</p>' if note else ""
    return f'<div class="card"><h3>{heading}</h3>{body}{below}</div>\n'


def _warnings(report: Report, number: int) -> str:
    if not report["warnings"]:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in report["warnings"])
    head = "<strong>Do not quote these numbers without what follows</strong>"
    return f'<div class="warnings" id="warnings-{number}">{head}<ul>{items}</ul></div>'


def _paper(report: Report) -> str:
    head, *lines = paper_grid(report)
    return _table(head, [(None, [escape(label), paper, here, _badge(text)]) for label, paper, here, text in lines])


def _badge(verdict: str) -> str:
    word, colon, reason = verdict.partition(":")
    return f'<span class="badge {_BADGES.get(word, "none")}">{escape(word)}</span>{escape(reason) if colon else ""}'


def _components(runs: Sequence[Run], titles: Sequence[str]) -> str:
    lines: list[tuple[str | None, list[str]]] = []
    for family in FAMILIES:
        lines.append(("sum", [family, *(_share(run["families"][family], run) for run in runs)]))
        for row in ROWS:
            if row.startswith(f"{family}.") and any(run["components"].get(row, 0.0) for run in runs):
                lines.append((None, [ROWS[row], *(_share(run["components"].get(row, 0.0), run) for run in runs)]))
    lines.append(("sum", ["in no row", *(_share(run["unattributed_ms"], run) for run in runs)]))
    lines.append(("sum", ["whole chunk, recorded", *(_share(run["wall_ms"], run) for run in runs)]))
    return _table(["", *map(escape, titles)], lines, kind="numbers tree")


def _steadiness(runs: Sequence[Run], titles: Sequence[str]) -> str:
    lines: list[tuple[str | None, list[str]]] = [
        (None, [f"chunk, {name}, ms", *(milliseconds(run["chunk_ms"][key]) for run in runs)])
        for key, name in _TIMES.items()
    ]
    lines.append((None, ["95 % interval of the median", *(bracketed(run["chunk_ms"].get("interval")) for run in runs)]))
    lines.append((None, ["speed-up", *(times(run["speedup"]) for run in runs)]))
    lines.append((None, ["95 % interval of it", *(bracketed(run.get("speedup_interval"), "{:.2f}") for run in runs)]))
    lines.append((None, ["chunks timed", *(str(run["chunk_ms"]["n"]) for run in runs)]))
    for key, name in FPS.items():
        if any(run["fps"][key] for run in runs):
            cells = (f"{run['fps'][key]:.3g}" if run["fps"][key] else "-" for run in runs)
            lines.append((None, [name.replace("  ", "&nbsp;&nbsp;"), *cells]))
    for rule, name in RULES.items():
        lines.append((None, [name.rstrip(":"), *(_rule(run, rule) for run in runs)]))
    for label, text in {"by comparison of blocks": _compared, "by its marks alone": _marked}.items():
        lines.append((None, [f"&nbsp;&nbsp;{label}", *(text(run) for run in runs)]))
    return _table(["", *map(escape, titles)], lines, kind="numbers")


def _rule(run: Run, rule: str) -> str:
    closing = run["closing"]
    undecided = rule in closing.get("undecided", ())
    kind = "bad" if rule in closing["broken"] else "doubt" if undecided else "good"
    text = f"{100 * closing[rule]:.2g} % of {100 * closing['limits'][rule]:g} %"
    if rule == "instrumented_over_plain" and "recording" in run:
        state = {"bad": "more than", "doubt": "undecided:", "good": "less than"}[kind]
        text = f"{state} {100 * closing['limits'][rule]:g} %"
    return f'<span class="badge {kind}" title="found of allowed">{text}</span>'


def _compared(run: Run) -> str:
    price = run.get("recording") or {}
    if not price.get("interval"):
        return "-"
    low, high = (100 * (bound - 1) for bound in price["interval"])
    return f"{low:+.1f} to {high:+.1f} %"


def _marked(run: Run) -> str:
    share = (run.get("recording") or {}).get("marks_share")
    return "-" if share is None else f"{100 * share:.2g} %"


def _memory(report: Report) -> str:
    head, *lines = memory_grid(report)
    last = len(lines) - 1
    body = [("sum" if number == last else None, line) for number, line in enumerate(lines)]
    return _table([_named(cell) for cell in head], body, kind="numbers")


def _peak_note(report: Report) -> str:
    if report["env"]["gpu"]:
        return "Peak: what one run holds and what the allocator took on top of it."
    return "Peak: of the whole process, with the models and caches of all runs in it, while this run was at work."


def _timelines(report: Report) -> list[str]:
    """Of the baseline and of the best run: what went, and what is left."""
    best = best_run(report)
    chosen = [base_run(report)] + ([best] if best else [])
    return [_block(f"One chunk, {escape(title(run))}", timeline(run), _moments(run)) for run in chosen]


def _moments(run: Run) -> str:
    if run.get("timeline"):
        return "The chunk recorded last. Height: share of each moment that belongs to the family."
    return "No moments of this run were kept: its rows are shown end to end, in the order of the table."


def _audit(runs: Sequence[Run], titles: Sequence[str]) -> str:
    """Which kernel every linear layer ran: layers alike but for their block share a line."""
    columns = [_kernels(run["audit"]) for run in runs]
    groups = list(dict.fromkeys(group for column in columns for group in column))
    if not groups:
        return ""
    lines = [[f"<code>{escape(group)}</code>", *(column.get(group, "-") for column in columns)] for group in groups]
    table = _table(["layer", *map(escape, titles)], [(None, line) for line in lines])
    return f'<div class="card"><details><summary>What every linear layer really ran</summary>{table}</details></div>\n'


def _kernels(audit: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Layer, `*` for the block's number -> the kernels it ran, with the blocks where these differ."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in audit:
        name = row.get("name", "all linear layers")
        wide = row.get("wide_calls") and "16-bit activations in last passes"
        notes = (wide, row["delta_mode"] and f"delta {row['delta_mode']}", row.get("why"))
        kernel = ", ".join((row["kernel"], *(note for note in notes if note)))
        block = re.search(r"\.(\d+)\.", name)
        count = f"{row['layers']} layers" if "layers" in row else str(block[1]) if block else ""
        found.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), {}).setdefault(kernel, []).append(count)
    return {group: "<br>".join(_blocks(kinds)) for group, kinds in found.items()}


def _blocks(kinds: dict[str, list[str]]) -> Iterable[str]:
    for kernel, blocks in kinds.items():
        where = f' <span class="soft">({escape(_spans(blocks))})</span>' if len(kinds) > 1 else ""
        yield escape(kernel) + where


def _spans(blocks: Sequence[str]) -> str:
    """Numbers in a row as `first-last`; anything else as it is."""
    spans: list[list[str]] = []
    for block in blocks:
        if spans and block.isdigit() and spans[-1][-1] == str(int(block) - 1):
            spans[-1] = [spans[-1][0], block]
        else:
            spans.append([block])
    return ", ".join("-".join(span) for span in spans)


def _footer(report: Report) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in report["env"].get("packages", {}).items())
    env = report["env"]
    return (
        f'<footer class="soft small"><code>{escape(report["command"])}</code><br>'
        f"Python {escape(str(env['python']))}, {escape(str(env['system']))}, torch {escape(env['torch'])}"
        f"{', ' + escape(packages) if packages else ''}; schema version {report['schema_version']}</footer>"
    )


def _table(head: Sequence[str], lines: Sequence[tuple[str | None, list[str]]], *, kind: str = "words") -> str:
    """A table that scrolls by itself where it is too wide; cells are HTML already, a line may have a class."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr class="{line or ""}"><th scope="row" class="row">{cells[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells[1:])
        + "</tr>"
        for line, cells in lines
    )
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _share(ms: float, run: Run) -> str:
    return f"{milliseconds(ms)}<small>{100 * ms / run['wall_ms']:.0f} %</small>" if ms else "-<small></small>"


# -- names


def title(run: Run) -> str:
    name = str(run["name"])
    return _TITLES.get(name, name)


def span(run: Run) -> str:
    """A median chunk in words."""
    ms = run["chunk_ms"]["median"]
    return f"{ms / 1e3:.2f} s" if ms >= 1e3 else f"{milliseconds(ms)} ms"


def base_run(report: Report) -> Run:
    return next(run for run in report["runs"] if run["name"] == report["baseline"])


def best_run(report: Report) -> Run | None:
    """The fastest run of ours that is not the baseline, nor a last pass: no stream has only those."""
    apart = (report["baseline"], PUBLISHED)
    others = [run for run in report["runs"] if run["name"] not in apart and not run["name"].endswith(LAST_PASS)]
    return max(others, key=lambda run: run["speedup"]) if others else None


def model_line(report: Report) -> str:
    model = report["model"]
    geometry = model["geometry"]
    return (
        f"{model['name']}: {geometry['layers']} layers of width {geometry['dim']}, {model['dtype']}, "
        f"window of {model['window']} frames"
    )


def hardware(report: Report) -> str:
    env = report["env"]
    threads = f"{env['threads']} thread{'s' if env['threads'] != 1 else ''}"
    units = f" ({env['cpu_capability']})" if env.get("cpu_capability") else ""
    device = env["gpu"] or f"{env['cpu']}{units}, {threads}"
    clock = {"wall": "wall time", "cpu": "CPU time"}.get(env.get("clock"), "")
    chunks = min(run["chunk_ms"]["n"] for run in report["runs"])
    return ", ".join(part for part in (device, f"torch {env['torch']}", clock, f"{chunks} chunks per run") if part)
