"""One recorded chunk moment by moment: the compact text kept in a report, and the trace that Perfetto opens.

A timeline is a string of `row:microseconds` stretches with a blank between them, from the chunk's first moment to its
last. `row` counts in the order of `ispa_deploy.regions.ROWS`; the number after the last row is `unattributed`. The rows
must not change their order within a schema version.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ispa_deploy.errors import InputError
from ispa_deploy.regions import FAMILIES, ROWS

NAMES = (*ROWS, "unattributed")
TRACKS = (*FAMILIES, "unattributed")
"""What a trace shows below each other; a row's track is its family."""

_US_PER_MS = 1e3


def encode(stretches: Sequence[tuple[int, float]]) -> str:
    """`stretches` (index into `NAMES`, ms) as a timeline; what rounds to no microsecond is left out."""
    parts: list[tuple[int, int]] = []
    end = 0.0
    written = 0
    for row, ms in stretches:
        end += ms * _US_PER_MS
        length = round(end) - written
        if not length:
            continue
        written += length
        if parts and parts[-1][0] == row:
            length += parts.pop()[1]
        parts.append((row, length))
    return " ".join(f"{row}:{length}" for row, length in parts)


def decode(timeline: str) -> Iterator[tuple[str, int, int]]:
    """(row's name, start, length) in microseconds, in order and without holes."""
    start = 0
    for part in timeline.split():
        try:
            row, length = map(int, part.split(":"))
            name = NAMES[row]
        except (ValueError, IndexError):
            raise InputError(f"timeline with '{part}': expected ROW:MICROSECONDS; profile again") from None
        yield name, start, length
        start += length


def trace(document: dict[str, Any]) -> str:
    """Chrome trace JSON of all runs that kept a timeline: a process per run, a track per family.

    Opens in ui.perfetto.dev and chrome://tracing. A document without timelines gives a trace without events.
    """
    events: list[dict[str, Any]] = []
    number = 0
    for report in document["reports"]:
        for run in report["runs"]:
            if run.get("timeline"):
                number += 1
                events += _process(number, f"{report['model']['name']}: {run['name']}")
                events += _slices(number, run["timeline"])
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":")) + "\n"


def _process(number: int, title: str) -> list[dict[str, Any]]:
    """Names and order of a process and its tracks; Perfetto puts the busiest process first, all the same."""

    def meta(kind: str, track: int, **values: Any) -> dict[str, Any]:
        return {"name": kind, "ph": "M", "pid": number, "tid": _thread(number, track), "args": values}

    events = [meta("process_name", 0, name=title), meta("process_sort_index", 0, sort_index=number)]
    for track, name in enumerate(TRACKS):
        events += [meta("thread_name", track, name=name), meta("thread_sort_index", track, sort_index=track)]
    return events


def _thread(number: int, track: int) -> int:
    """No other process has this track's number, and none is its process's own: viewers call that a main thread."""
    return number * 10 + track


def _slices(number: int, timeline: str) -> list[dict[str, Any]]:
    return [
        {
            "name": row,
            "cat": track_of(row),
            "ph": "X",
            "ts": start,
            "dur": length,
            "pid": number,
            "tid": _thread(number, TRACKS.index(track_of(row))),
        }
        for row, start, length in decode(timeline)
    ]


def track_of(row: str) -> str:
    """The family of a row; `unattributed` is its own."""
    return row.partition(".")[0]
