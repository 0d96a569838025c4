"""`ispa-deploy plan`: what a model would hold and take on a device, and how wrong such predictions were before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ispa_deploy.budget import Setup, predict
from ispa_deploy.errors import InputError
from ispa_deploy.planner.devices import Device, device_named
from ispa_deploy.planner.rates import (
    WIDTHS,
    Rates,
    Report,
    hardware,
    nearest,
    of_device,
    of_report,
    setting_of,
    spec_of,
    times,
)
from ispa_deploy.profile.paper import keys_ratio
from ispa_deploy.profile.work import Setting, keys_of
from ispa_deploy.regions import FAMILIES
from ispa_deploy.specs import ModelSpec, spec_for

MEASURED = "measured"
RESULTS = Path("docs/results")


@dataclass(frozen=True)
class Variant:
    """One configuration to predict."""

    name: str
    policy: str
    ratio: float
    recent: int
    scheme: str


def variants(spec: ModelSpec, ratio: float, recent: int) -> list[Variant]:
    """What `profile` compares, as far as the window has room for it."""
    found = [
        Variant("full", "full", 0.0, 0, "none"),
        Variant("ispa", "absorb", ratio, recent, "none"),
        Variant("full+w8a8", "full", 0.0, 0, "w8a8"),
        Variant("ispa+w8a8", "absorb", ratio, recent, "w8a8"),
    ]
    if spec.window_frames >= max(1, spec.sink_frames) + 2 * spec.chunk_frames:
        found.append(Variant("local+w8a8", "absorb", 1.0, spec.chunk_frames, "w8a8"))
    return found


def plan(
    model: str, gpu: str, *, reports: Path | None = None, ratio: float = 0.5, recent: int = 0, window: int | None = None
) -> dict[str, Any]:
    """The plan as plain JSON types. `gpu`: a name of `DEVICES`, or `measured`: the hardware of the stored reports.

    `reports`: a folder that is searched for them, or one file. Raises InputError for an unknown model or GPU, and for
    `measured` without a report.
    """
    spec = spec_for(model)
    if window is not None:
        spec = replace(spec, window_frames=window)
    if not 0 <= ratio <= 1:
        raise InputError(f"ratio {ratio}: expected a share of the layers between 0 and 1")
    stored = stored_reports(reports)
    device, rates = _rates(spec, gpu, stored)
    runs = [_run(spec, variant, rates, device) for variant in variants(spec, ratio, recent)]
    base = runs[0]["chunk_ms"]
    for run in runs:
        run["speedup"] = base / run["chunk_ms"]
    share = (runs[0]["components"]["attention.kernel"] + runs[0]["components"]["attention.cache"]) / base
    keys = keys_ratio(ratio, spec.window_frames, 1 + recent + spec.chunk_frames)
    return {
        "schema_version": 1,
        "model": {"name": spec.name, "layers": spec.layers, "dim": spec.dim, "window": spec.window_frames},
        "device": device.name if device else hardware(stored[0]),
        "memory": device.memory if device else None,
        "rates": rates.source,
        "runs": runs,
        "amdahl": {
            "attention_share": share,
            "attention_ceiling": keys,
            "ceiling": 1 / (1 - share + share / keys),
        },
        "past": past_errors(stored),
    }


def _rates(spec: ModelSpec, gpu: str, stored: Sequence[Report]) -> tuple[Device | None, Rates]:
    """Rates measured on this hardware where there are any, else those of its data sheet."""
    if gpu == MEASURED:
        found = nearest(spec, stored)
        if found is None:
            raise InputError("--gpu measured: no stored report was found; run `ispa-deploy profile`, name --reports")
        return None, of_report(found)
    device = device_named(gpu)
    own = [report for report in stored if report["env"]["gpu"] and device.name.lower() in report["env"]["gpu"].lower()]
    found = nearest(spec, own)
    return device, of_report(found) if found else of_device(device)


def _run(spec: ModelSpec, variant: Variant, rates: Rates, device: Device | None) -> dict[str, Any]:
    width = WIDTHS[rates.dtype]
    local = int(variant.ratio * spec.layers + 0.5)
    near = 1 + variant.recent + spec.chunk_frames
    setting = Setting(
        keys=keys_of(spec, range(local), near), width=width,
        weight_width=width if variant.scheme == "none" else 1, stores=spec.layers,
    )  # fmt: skip
    rows = times(spec, setting, rates)
    setup = Setup(dtype=rates.dtype, scheme=variant.scheme, policy=variant.policy, ratio=variant.ratio,
                  recent_frames=variant.recent)  # fmt: skip
    budget = predict(spec, setup).to_dict()
    chunk = sum(rows.values())
    return {
        "name": variant.name,
        "components": rows,
        "families": {name: sum(ms for row, ms in rows.items() if row.startswith(f"{name}.")) for name in FAMILIES},
        "chunk_ms": chunk,
        "fps": 1e3 * spec.chunk_frames * spec.temporal_stride / chunk,
        "memory": budget,
        "fits": None if device is None else budget["peak"] <= device.memory,
    }


# -- what was measured before


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
    """Predictions of what was measured later: `{what, run, predicted_ms, measured_ms, error}`.

    Of every stored report: its ISPA runs from its full-cache runs alone, and all of it from the nearest other report of
    the same hardware.
    """
    found = []
    for report in stored:
        full = [name for name in ("full", "full+w8a8") if any(run["name"] == name for run in report["runs"])]
        if full:
            rates = of_report(report, full)
            found += _errors(report, rates, "from its own full-cache runs", skip=full)
        others = [other for other in stored if other is not report and hardware(other) == hardware(report)]
        other = nearest(spec_of(report), others)
        if other is not None:
            found += _errors(report, of_report(other), f"from {other['model']['name']}")
    return found


def _errors(report: Report, rates: Rates, what: str, skip: Sequence[str] = ()) -> list[dict[str, Any]]:
    spec = spec_of(report)
    rows = []
    for run in report["runs"]:
        if run["name"] in skip or run["name"] == "published" or run.get("kv_dtype", "auto") != "auto":
            continue
        predicted = sum(times(spec, setting_of(spec, report, run), rates).values())
        measured = run["wall_ms"]
        rows.append({
            "what": f"{report['model']['name']} {what}", "run": run["name"], "predicted_ms": predicted,
            "measured_ms": measured, "error": predicted / measured - 1,
        })  # fmt: skip
    return rows


# -- in words


def grid(document: dict[str, Any]) -> list[list[str]]:
    """The plan as rows of text, the heading first: one column per configuration."""
    runs = document["runs"]

    def memory(name: str) -> list[str]:
        return [f"{run['memory'][name] / 2**30:.2f}" for run in runs]

    lines = [["predicted", *(run["name"] for run in runs)]]
    lines += [[f"{family}, ms", *(f"{run['families'][family]:,.1f}" for run in runs)] for family in FAMILIES]
    lines += [
        ["chunk, ms", *(f"{run['chunk_ms']:,.1f}" for run in runs)],
        ["speed-up", *(f"{run['speedup']:.2f}x" for run in runs)],
        ["frames per second, DiT only", *(f"{run['fps']:.1f}" for run in runs)],
        ["weights, GiB", *memory("weights")],
        ["keys and values, GiB", *memory("kv")],
        ["statistics until the transition, GiB", *memory("statistics")],
        ["peak with activations, GiB", *memory("peak")],
    ]
    if document["memory"]:
        lines.append(["fits the device", *("yes" if run["fits"] else "no" for run in runs)])
    return lines


def sentences(document: dict[str, Any]) -> list[str]:
    """What the plan rests on, what limits it, and how wrong earlier ones were."""
    law, past = document["amdahl"], document["past"]
    text = [
        f"Rates: {document['rates']}.",
        f"Self-attention is {100 * law['attention_share']:.0f} % of the full run's chunk: dropping keys makes it "
        f"{law['attention_ceiling']:.2f}x faster at most, the chunk {law['ceiling']:.2f}x.",
    ]
    for what in dict.fromkeys(row["what"] for row in past):
        errors = [abs(row["error"]) for row in past if row["what"] == what]
        text.append(
            f"Past prediction, {what}: off by {100 * median(errors):.0f} % (at most {100 * max(errors):.0f} %)."
        )
    return text if past else [*text, "No stored report to judge earlier predictions by."]
