"""Two reports of the same models side by side, and the thresholds that fail a build."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ispa_deploy.errors import InputError, known_names

Run = dict[str, Any]
Key = tuple[str, str]

_HELD = ("weights", "kv_persistent", "kv_scratch", "deltas")

METRICS: dict[str, Callable[[Run], float]] = {
    "latency": lambda run: run["chunk_ms"]["median"],
    "attention": lambda run: run["families"]["attention"],
    "linear": lambda run: run["families"]["linear"],
    # Not the peak: on a CPU it is that of the process with all runs in it.
    "memory": lambda run: sum(run["memory"][name] for name in _HELD),
    "kv": lambda run: run["memory"]["kv_persistent"],
}
"""What two runs are compared by; less is better. Times in ms, memory in bytes."""

_SAME = ("device", "cpu", "gpu", "threads", "torch", "clock")


def load(path: str | Path) -> list[dict[str, Any]]:
    """The reports in a file: what `profile` writes, or one report alone; InputError for anything else."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"report '{path}': {error.strerror}; expected a report.json written by `profile`") from None
    except ValueError:
        raise InputError(f"report '{path}' is not JSON: expected a report.json written by `profile`") from None
    reports = document.get("reports", [document]) if isinstance(document, dict) else []
    shaped = isinstance(reports, list) and all(isinstance(report, dict) and "runs" in report for report in reports)
    if not reports or not shaped:
        raise InputError(f"report '{path}' holds no runs: expected a report.json written by `profile`")
    return reports


def threshold(text: str) -> tuple[str, float]:
    """`latency:8%` as ("latency", 0.08)."""
    found = re.fullmatch(r"\s*(\w+)\s*:\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if not found:
        raise InputError(f"--fail-on '{text}': expected METRIC:PERCENT%, for example latency:8%")
    if found[1] not in METRICS:
        raise known_names("metric", found[1], METRICS)
    return found[1], float(found[2]) / 100


def difference(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], fail_on: Sequence[str] = ()
) -> dict[str, Any]:
    """`{rows, notes, failed}` as plain JSON types; runs are matched by model, geometry and name.

    A row is one metric of one run: `{model, run, metric, before, after, change}`, `change` as a share of `before` and
    None where that is 0. `failed` says in words which thresholds were exceeded; with any threshold set, a run that is
    missing after fails too, for it would pass unseen.
    """
    limits = dict(threshold(text) for text in fail_on)
    versions = {report.get("schema_version") for report in (*before, *after)}
    if len(versions) > 1:
        raise InputError(f"reports of schema versions {versions}: expected one and the same, profile again")
    old, new = _runs(before), _runs(after)
    common = [key for key in old if key in new]
    if not common:
        raise InputError(
            f"the reports have no run in common: {_names(old)} before, {_names(new)} after; "
            "compare reports of the same models"
        )
    rows = [_row(key, metric, old[key], new[key]) for key in common for metric in METRICS]
    missing = [f"{model}, {run}: missing after" for model, run in old if (model, run) not in new]
    failed = [text for row in rows if (text := _exceeded(row, limits))] + (missing if limits else [])
    return {"rows": rows, "notes": [*_notes(before, after), *missing], "failed": failed}


def grid(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows as text, the heading first; without the first column where all are of one model (`compared_models`)."""
    lines: list[tuple[str, ...]] = [("model", "run", "metric", "before", "after", "change")]
    for row in document["rows"]:
        unit = _mib if row["metric"] in ("memory", "kv") else _ms
        change = "-" if row["change"] is None else f"{100 * row['change']:+.1f} %"
        lines.append((row["model"], row["run"], row["metric"], unit(row["before"]), unit(row["after"]), change))
    return lines if len(compared_models(document)) > 1 else [line[1:] for line in lines]


def compared_models(document: dict[str, Any]) -> list[str]:
    """The models whose runs are compared."""
    return list(dict.fromkeys(row["model"] for row in document["rows"]))


def _runs(reports: Sequence[dict[str, Any]]) -> dict[Key, Run]:
    try:
        return {(_model(report["model"]), run["name"]): run for report in reports for run in report["runs"]}
    except (KeyError, TypeError) as error:
        raise _damaged(error) from None


def _model(model: dict[str, Any]) -> str:
    return f"{model['name']} {model['dtype']}, {model['geometry']['layers']} layers, window {model['window']}"


def _row(key: Key, metric: str, old: Run, new: Run) -> dict[str, Any]:
    try:
        before, after = float(METRICS[metric](old)), float(METRICS[metric](new))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(error) from None
    change = after / before - 1 if before else None
    return {"model": key[0], "run": key[1], "metric": metric, "before": before, "after": after, "change": change}


def _exceeded(row: dict[str, Any], limits: dict[str, float]) -> str | None:
    limit = limits.get(row["metric"])
    if limit is None or row["after"] <= row["before"] * (1 + limit):
        return None
    grown = "from nothing" if row["change"] is None else f"by {100 * row['change']:.1f} %"
    return f"{row['model']}, {row['run']}: {row['metric']} grew {grown}, allowed {100 * limit:g} %"


def _notes(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[str]:
    """What makes the two not comparable: other hardware, versions, clock, or warnings of their own."""
    old, new = before[0].get("env", {}), after[0].get("env", {})
    notes = [
        f"{name} differs: {old.get(name)} before, {new.get(name)} after"
        for name in _SAME
        if old.get(name) != new.get(name)
    ]
    for when, reports in (("before", before), ("after", after)):
        count = sum(len(report.get("warnings", ())) for report in reports)
        if count:
            notes.append(f"the report {when} has {count} warning{'s' * (count > 1)} of its own about its numbers")
    return notes


def _damaged(error: Exception) -> InputError:
    return InputError(f"a report without what is compared ({error}): expected a report.json of schema version 1")


def _names(runs: dict[Key, Run]) -> str:
    return "; ".join(f"{model}, {name}" for model, name in runs)


def _ms(value: float) -> str:
    return f"{value:.1f} ms"


def _mib(value: float) -> str:
    return f"{value / 2**20:.1f} MiB"
