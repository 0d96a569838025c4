"""`ispa-deploy plan`: what a model would hold and take on a device, and how wrong such predictions were before.

Every report is judged before it serves: one that ran in another dtype, or whose calls were too small to tell, is named
and left out, so that nothing is quoted that cannot be predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ispa_deploy.avatar.sizes import check_rings
from ispa_deploy.budget import Setup, predict
from ispa_deploy.errors import InputError
from ispa_deploy.planner.devices import Device, device_named, device_of
from ispa_deploy.planner.rates import (
    WIDTHS,
    Rates,
    Report,
    dtype_of,
    hardware,
    label,
    nearest,
    of_device,
    of_report,
    refusal,
    times,
)
from ispa_deploy.planner.stored import past_errors, stored_reports
from ispa_deploy.precision import last_pass_layers
from ispa_deploy.profile.grids import milliseconds
from ispa_deploy.profile.paper import keys_ratio
from ispa_deploy.profile.work import Setting, keys_of
from ispa_deploy.regions import FAMILIES
from ispa_deploy.slots import WindowSlots
from ispa_deploy.specs import ModelSpec, spec_for

MEASURED = "measured"


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
    `measured` where no report can serve. Of a speech-to-video model only the memory is predicted: `amdahl` is None, its
    runs have neither rows nor times.
    """
    spec = spec_for(model)
    if window is not None:
        spec = replace(spec, window_frames=window)
    if not 0 <= ratio <= 1:
        raise InputError(f"ratio {ratio}: expected a share of the layers between 0 and 1")
    _check_frames(spec, recent)
    stored = stored_reports(reports)
    device, served, unfit = _served(spec, gpu, stored)
    rates = _rates(device, served)
    runs = [_run(spec, variant, rates, device) for variant in variants(spec, ratio, recent)]
    return {
        "schema_version": 1,
        "model": {"name": spec.name, "layers": spec.layers, "dim": spec.dim, "window": spec.window_frames},
        "device": device.name if device else hardware(served or stored[0]),
        "memory": device.memory if device else None,
        "rates": rates.source,
        "runs": runs,
        "amdahl": None if spec.audio_blocks else _amdahl(spec, runs, ratio, recent),
        "unfit": unfit,
        "past": past_errors(stored),
    }


def _check_frames(spec: ModelSpec, recent: int) -> None:
    """InputError for recent frames that a stream of this model would refuse."""
    if spec.audio_blocks:
        check_rings(spec, recent)
    else:
        WindowSlots(spec.window_frames, spec.sink_frames, spec.chunk_frames, recent)


def _served(
    spec: ModelSpec, gpu: str, stored: Sequence[Report]
) -> tuple[Device | None, Report | None, list[dict[str, str]]]:
    """The device, the report whose rates serve, if any, and those of the same device that do not, with the reason."""
    device = None if gpu == MEASURED else device_named(gpu)
    own = [report for report in stored if device is None or device_of(report) == device]
    dtype = dtype_of(spec)
    reasons = [(report, refusal(spec, dtype, report)) for report in own]
    unfit = [{"report": f"{label(report)} on {hardware(report)}", "why": why} for report, why in reasons if why]
    found = nearest(spec, dtype, own)
    if found is None and device is None:
        what = "; ".join(f"{row['report']}: {row['why']}" for row in unfit) or "no stored report was found"
        raise InputError(
            f"--gpu measured: nothing stored can tell about '{spec.name}' ({what}); run `ispa-deploy profile -o`, name "
            "--reports"
        )
    return device, found, unfit


def _rates(device: Device | None, served: Report | None) -> Rates:
    """Rates measured on this hardware where there are any that serve, else those of its data sheet."""
    if served is not None:
        return of_report(served)
    assert device is not None
    return of_device(device)


def _run(spec: ModelSpec, variant: Variant, rates: Rates, device: Device | None) -> dict[str, Any]:
    setup = Setup(dtype=rates.dtype, scheme=variant.scheme, policy=variant.policy, ratio=variant.ratio,
                  recent_frames=variant.recent)  # fmt: skip
    budget = predict(spec, setup).to_dict()
    memory = {"memory": budget, "fits": None if device is None else budget["peak"] <= device.memory}
    if spec.audio_blocks:
        return {"name": variant.name, **memory}
    width = WIDTHS[rates.dtype]
    local = int(variant.ratio * spec.layers + 0.5)
    near = 1 + variant.recent + spec.chunk_frames
    setting = Setting(
        keys=keys_of(spec, range(local), near), width=width,
        weight_width=width if variant.scheme == "none" else 1, stores=spec.layers,
        wide=0 if variant.scheme == "none" else len(last_pass_layers(spec.layers)),
    )  # fmt: skip
    rows = times(spec, setting, rates)
    chunk = sum(rows.values())
    return {
        "name": variant.name,
        "components": rows,
        "families": {name: sum(ms for row, ms in rows.items() if row.startswith(f"{name}.")) for name in FAMILIES},
        "chunk_ms": chunk,
        "fps": 1e3 * spec.chunk_frames * spec.temporal_stride / chunk,
        **memory,
    }


def _amdahl(spec: ModelSpec, runs: list[dict[str, Any]], ratio: float, recent: int) -> dict[str, float]:
    """What dropping keys can gain; every run gets its speed-up over the first."""
    base = runs[0]["chunk_ms"]
    for run in runs:
        run["speedup"] = base / run["chunk_ms"]
    share = (runs[0]["components"]["attention.kernel"] + runs[0]["components"].get("attention.cache", 0.0)) / base
    keys = keys_ratio(ratio, spec.window_frames, 1 + recent + spec.chunk_frames)
    return {"attention_share": share, "attention_ceiling": keys, "ceiling": 1 / (1 - share + share / keys)}


# -- in words


def grid(document: dict[str, Any]) -> list[list[str]]:
    """The plan as rows of text, the heading first: one column per configuration."""
    runs = document["runs"]

    def memory(name: str) -> list[str]:
        return [f"{run['memory'][name] / 2**30:.2f}" for run in runs]

    lines = [["predicted", *(run["name"] for run in runs)]]
    if document["amdahl"]:
        lines += [[f"{family}, ms", *(milliseconds(run["families"][family]) for run in runs)] for family in FAMILIES]
        lines += [
            ["chunk, ms", *(milliseconds(run["chunk_ms"]) for run in runs)],
            ["speed-up", *(f"{run['speedup']:.2f}x" for run in runs)],
            ["frames/s, DiT only", *(f"{run['fps']:.2g}" if run["fps"] < 10 else f"{run['fps']:.1f}" for run in runs)],
        ]
    lines += [
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
    law = document["amdahl"]
    if law is None:
        return ["Latency is not predicted for speech to video: its rings, condition and audio layers are not counted."]
    text = [
        f"Rates: {document['rates']}.",
        *(f"Not used: {row['report']}: {row['why']}." for row in document["unfit"]),
        f"Self-attention is {100 * law['attention_share']:.0f} % of the full run's chunk: dropping keys makes it "
        f"{law['attention_ceiling']:.2f}x faster at most, the chunk {law['ceiling']:.2f}x.",
    ]
    return text + _past(document["past"])


def _past(past: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each kind of earlier prediction; and what none of them tells."""
    text = []
    for what in dict.fromkeys(row["what"] for row in past):
        errors = [abs(row["error"]) for row in past if row["what"] == what]
        text.append(
            f"Past prediction, {what}: off by {100 * median(errors):.0f} % (at most {100 * max(errors):.0f} %)."
        )
    if not any(row["across"] for row in past):
        text.append(
            "No stored report allows a check of how far rates carry from one model to another, or from a data sheet."
        )
    return text
