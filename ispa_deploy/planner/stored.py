"""Reports that were kept: finding them, and how far predictions from some of them are from what others measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ispa_deploy.errors import InputError
from ispa_deploy.planner.devices import device_of
from ispa_deploy.planner.rates import (
    Rates,
    Report,
    hardware,
    label,
    nearest,
    of_device,
    of_report,
    planned,
    setting_of,
    spec_of,
    times,
)

RESULTS = Path("docs/results")


def stored_reports(place: Path | None) -> list[Report]:
    """Reports below a folder, or in one file; files that are something else are passed over."""
    if place is None:
        place = RESULTS if RESULTS.is_dir() else Path(__file__).resolve().parents[2] / RESULTS
    elif not place.exists():
        raise InputError(f"reports '{place}': expected a folder of report.json files, or one of them")
    files = [place] if place.is_file() else sorted(place.rglob("*.json"))
    found: list[Report] = []
    for file in files:
        document = _document(file)
        candidates = document.get("reports", [document]) if isinstance(document, dict) else []
        found += [report for report in candidates if isinstance(report, dict) and {"runs", "paper"} <= set(report)]
    return found


def _document(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def past_errors(stored: Sequence[Report]) -> list[dict[str, Any]]:
    """Predictions of what was measured: `{what, across, run, predicted_ms, measured_ms, error}`.

    Of every stored report: its ISPA runs from its full-cache runs alone; and, `across` models, all of it from the
    nearest other report of the same hardware that can serve, and from the data sheet of its GPU.
    """
    found = []
    for report in stored:
        if spec_of(report).audio_blocks:
            continue  # its work is not counted
        able = {run["name"] for run in report["runs"] if planned(run)}
        full = [name for name in ("full", "full+w8a8") if name in able]
        if full:
            found += _errors(report, of_report(report, full), "its own full-cache runs", skip=full)
        spec, dtype = spec_of(report), report["model"]["dtype"]
        others = [other for other in stored if other is not report and hardware(other) == hardware(report)]
        other = nearest(spec, dtype, others)
        if other is not None:
            found += _errors(report, of_report(other), label(other), across=True)
        device = device_of(report)
        if device is not None:
            found += _errors(report, of_device(device), "the data sheet", across=True)
    return found


def _errors(
    report: Report, rates: Rates, origin: str, skip: Sequence[str] = (), *, across: bool = False
) -> list[dict[str, Any]]:
    spec = spec_of(report)
    rows = []
    for run in report["runs"]:
        if run["name"] in skip or not planned(run):
            continue
        predicted = sum(times(spec, setting_of(spec, report, run), rates).values())
        measured = run["wall_ms"]
        rows.append({
            "what": f"{label(report)} from {origin}", "across": across, "run": run["name"], "predicted_ms": predicted,
            "measured_ms": measured, "error": predicted / measured - 1,
        })  # fmt: skip
    return rows
