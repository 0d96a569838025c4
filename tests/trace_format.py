"""A strict reader of the trace-event format as chrome://tracing and Perfetto import it: what is doubtful is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

# Keys of the two kinds of events we write; the format's page calls all others optional.
COMPLETE = {"name": str, "cat": str, "ph": str, "ts": int, "dur": int, "pid": int, "tid": int}
METADATA = {"name": str, "ph": str, "pid": int, "tid": int, "args": dict}
NAMING = ("process_name", "thread_name")
SORTING = ("process_sort_index", "thread_sort_index")


def read(text: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(process, track) -> its slices; AssertionError for what an importer would drop or draw wrongly.

    Slices of a track must lie in order and must not overlap: importers nest what overlaps. Every slice needs a named
    process and a named track.
    """
    document = json.loads(text, parse_constant=_refuse)
    assert set(document) <= {"traceEvents", "displayTimeUnit"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    processes: dict[int, str] = {}
    tracks: dict[tuple[int, int], str] = {}
    slices: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in document["traceEvents"]:
        kind = {"X": COMPLETE, "M": METADATA}[event["ph"]]
        assert set(event) == set(kind), event
        assert all(type(event[key]) is kind[key] for key in kind), event
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] > 0
            slices.setdefault((event["pid"], event["tid"]), []).append(event)
        elif event["name"] in SORTING:
            assert set(event["args"]) == {"sort_index"}
        elif event["name"] == "process_name":
            assert event["pid"] not in processes, "a process has one name"
            processes[event["pid"]] = event["args"]["name"]
        else:
            assert event["name"] in NAMING
            tracks[event["pid"], event["tid"]] = event["args"]["name"]
    assert not {track for _, track in tracks} & set(processes), "a track numbered like a process is its main thread"
    for events in slices.values():
        for before, after in pairwise(events):
            assert before["ts"] + before["dur"] <= after["ts"], "slices of one track overlap"
    return {(processes[pid], tracks[pid, tid]): events for (pid, tid), events in slices.items()}


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
