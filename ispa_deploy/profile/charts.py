"""The drawings of `report.html`, as HTML and SVG without a script: stacked bars and the timeline of a chunk.

Colours are classes of the style sheet, one per family, so that one drawing serves the light and the dark page.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10
from typing import Any

from ispa_deploy.profile.grids import milliseconds
from ispa_deploy.profile.trace import TRACKS, decode, track_of
from ispa_deploy.regions import FAMILIES, ROWS

Run = dict[str, Any]

_HELD = {
    "kv_persistent": "keys and values kept",
    "kv_scratch": "of the chunk in work",
    "deltas": "absorbed deltas",
    "statistics": "statistics",
}

_BINS, _LANE = 250, 32  # columns of a timeline, height of one of its lanes
_LABEL = 0.095  # a segment shorter than this share of the axis has no room for its number


def legend() -> str:
    items = "".join(f'<li><i class="{track}"></i>{track}</li>' for track in TRACKS)
    return f'<ul class="legend">{items}</ul>'


def stacked_bars(runs: Sequence[Run], titles: Sequence[str]) -> str:
    """One bar per run, its length in ms on a common axis; beside it the time and the speed-up."""
    ticks = _ticks(max(run["wall_ms"] for run in runs))
    bars = "".join(_bar(run, title, ticks[-1]) for run, title in zip(runs, titles, strict=True))
    marks = "".join(
        f'<span style="left:{100 * tick / ticks[-1]:.2f}%">{tick:,g}{" ms" if not tick else ""}</span>'
        for tick in ticks[:-1]
    )
    return f'{legend()}{bars}<div class="axis" aria-hidden="true">{marks}</div>'


def _bar(run: Run, title: str, scale: float) -> str:
    parts = {**run["families"], "unattributed": run["unattributed_ms"]}
    spans = "".join(
        f'<span class="{part}" style="width:{100 * ms / scale:.3f}%" title="{part}: {milliseconds(ms)} ms">'
        f"{milliseconds(ms) if ms > _LABEL * scale else ''}</span>"
        for part, ms in parts.items()
        if ms > 0.001 * scale
    )
    head = f"<span>{escape(title)}</span><b>{milliseconds(run['wall_ms'])} ms · {run['speedup']:.2f}×</b>"
    return f'<div class="bar-head">{head}</div><div class="bar">{spans}</div>'


def _ticks(longest: float) -> list[float]:
    """0 and up in even steps of 1, 2 or 5, the last one at or beyond `longest`."""
    raw = longest / 4
    base = 10.0 ** floor(log10(raw))
    step = base * min(nice for nice in (1, 2, 5, 10) if nice * base >= raw)
    return [step * count for count in range(ceil(longest / step) + 1)]


def timeline(run: Run) -> str:
    """What the chunk did when, a lane per family; a run that kept no timeline shows its components end to end."""
    if run.get("timeline"):
        return _lanes(run["timeline"])
    return _strip(run)


def _lanes(text: str) -> str:
    shares, total = _binned(text)
    paths = "".join(
        f'<path class="{family}" d="{_steps(shares[family], (index + 1) * _LANE)}"/>'
        for index, family in enumerate(FAMILIES)
    )
    names = "".join(f"<span>{family}</span>" for family in FAMILIES)
    picture = (
        f'<svg viewBox="0 0 {_BINS} {len(FAMILIES) * _LANE}" preserveAspectRatio="none" role="img" '
        f'aria-label="time of one chunk by family">{paths}</svg>'
    )
    scale = f"<span>0</span><span>{milliseconds(total / 2e3)}</span><span>{milliseconds(total / 1e3)} ms</span>"
    return f'<div class="lanes"><div class="names">{names}</div>{picture}<div class="scale">{scale}</div></div>'


def _binned(text: str) -> tuple[dict[str, list[float]], int]:
    """Share of each family in every column, and the chunk's microseconds."""
    pieces = list(decode(text))
    total = pieces[-1][1] + pieces[-1][2]
    width = total / _BINS
    shares = {track: [0.0] * _BINS for track in TRACKS}
    for row, start, length in pieces:
        lane = shares[track_of(row)]
        for column in range(int(start / width), min(ceil((start + length) / width), _BINS)):
            overlap = min(start + length, (column + 1) * width) - max(start, column * width)
            lane[column] += max(overlap, 0.0) / width
    return shares, total


def _steps(shares: Sequence[float], floor_y: int) -> str:
    """A path of steps as high as the shares, on a floor at `floor_y`; two units stay free above it."""
    path, last = f"M0 {floor_y}", None
    for column, share in enumerate(shares):
        height = round(share * (_LANE - 4))
        if height != last:
            path += f"H{column}V{floor_y - height}"
            last = height
    return f"{path}H{len(shares)}V{floor_y}Z"


def memory_chart(runs: Sequence[Run], titles: Sequence[str]) -> str:
    """Bytes held after every chunk of a stream from its start: keys and values, deltas, statistics, one bar per chunk.

    A run without a transition allocates everything before its first chunk and holds it; it has one bar.
    """
    kept = [(run["start"]["chunks"], title) for run, title in zip(runs, titles, strict=True) if run.get("start")]
    shown = [(chunks, title) for chunks, title in kept if chunks]
    if not shown:
        return ""
    longest = max(len(chunks) for chunks, _ in shown)
    most = max(sum(chunk[part] for part in _HELD) for chunks, _ in shown for chunk in chunks)
    names = "".join(f'<li><i class="{part}"></i>{label}</li>' for part, label in _HELD.items())
    charts = "".join(_memory_bars(chunks, title, longest, most) for chunks, title in shown)
    head = f"Memory over the first chunks of a stream; the highest bar is {most / 2**20:,.1f} MiB"
    return f'<h4>{head}</h4><ul class="legend">{names}</ul><div class="memory">{charts}</div>'


def _memory_bars(chunks: Sequence[Run], title: str, longest: int, most: int) -> str:
    bars = []
    for index in range(longest):
        chunk = chunks[min(index, len(chunks) - 1)]
        held = [(part, chunk[part]) for part in reversed(_HELD) if chunk[part]]
        total = sum(count for _, count in held)
        spans = "".join(f'<i class="{part}" style="height:{100 * count / most:.2f}%"></i>' for part, count in held)
        kind = "" if index < len(chunks) else ' class="same"'
        bars.append(f'<li{kind} title="chunk {index + 1}, {chunk["state"]}: {total / 2**20:,.2f} MiB">{spans}</li>')
    states = list(dict.fromkeys(chunk["state"] for chunk in chunks))
    last = sum(chunks[-1][part] for part in _HELD)
    note = f"{' → '.join(states)}; {last / 2**20:,.1f} MiB in the end"
    return f"<figure><ol>{''.join(bars)}</ol><figcaption>{escape(title)}<small>{note}</small></figcaption></figure>"


def _strip(run: Run) -> str:
    rows = [(row, ms) for row, ms in run["components"].items() if ms > 0.002 * run["wall_ms"]]
    total = sum(ms for _, ms in rows)
    spans = "".join(
        f'<span class="{track_of(row)}" style="width:{100 * ms / total:.2f}%" title="{row}: {milliseconds(ms)} ms">'
        "</span>"
        for row, ms in rows
    )
    names = "".join(f"<li>{escape(ROWS.get(row, row))}: {milliseconds(ms)} ms</li>" for row, ms in rows)
    return f'<div class="bar">{spans}</div><ul class="strip-names">{names}</ul>'
