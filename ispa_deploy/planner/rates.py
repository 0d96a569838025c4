"""Seconds per unit of work, row by row: taken from stored reports, or from a data sheet where there is none.

Rows that multiply are counted in operations, rows that move in bytes, the rest in passes through a block. One report
gives two sets of rates, for floating-point and for 8-bit linear layers.

Rates carry only so far: they are those of a dtype, and of calls large enough for the work in them to set their time.
`refusal` says when a report cannot serve a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import log
from typing import Any

from ispa_deploy.errors import InputError
from ispa_deploy.planner.devices import BLOCK_SECONDS, REACHED, Device
from ispa_deploy.policies import POLICIES
from ispa_deploy.profile.work import Setting, Work, chunk_work, keys_of
from ispa_deploy.specs import SPECS, ModelSpec

ARITHMETIC = ("attention.kernel", "attention.cross", "linear.gemm")
MOVING = ("attention.cache", "linear.quantise", "linear.dequantise", "overhead.norm", "overhead.rope")
COUNTED = (*ARITHMETIC, *MOVING)
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
CLOSE = 2.0
"""Widths up to this factor apart are alike: calls of the one take the share of the peak that those of the other do."""
FIRM = 0.5
"""Share of the device's peak from which on a row's rate can be carried to larger models: there is no more than twice as
much to be had. Below it, calls that are too small to keep the device busy set the time."""
_SCHEMES_APART = ("w8a16-int8",)  # two products for each that is counted
_CARRIED = ("attention.kernel", "linear.gemm")

Report = Mapping[str, Any]
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Rates:
    """`seconds[eight_bit][row]` per operation, byte or pass through a block; `source` says in words where from.
    `block`: seconds that one pass through a block takes at least; what the rows leave of them is launches."""

    seconds: Mapping[bool, Mapping[str, float]]
    source: str
    dtype: str
    block: float = 0.0


def of_device(device: Device) -> Rates:
    """What the data sheet allows, at the shares of it that were seen elsewhere; products apply scales themselves."""
    attention, move = 1 / (device.flops * REACHED["attention"]), 1 / (device.bytes * REACHED["memory"])
    gemms = {False: 1 / (device.flops * REACHED["gemm"]), True: 1 / (device.ops8 * REACHED["gemm8"])}
    seconds = {
        eight: {
            **dict.fromkeys(MOVING, move),
            "attention.kernel": attention,
            "attention.cross": attention,
            "linear.gemm": gemm,
            "linear.dequantise": 0.0,
        }
        for eight, gemm in gemms.items()
    }
    shares = ", ".join(f"{name} {share:.0%}" for name, share in REACHED.items())
    source = (
        f"data sheet of {device.name}, assumed shares of it: {shares}; at least {1e3 * BLOCK_SECONDS:g} ms per block "
        "and pass, for launches"
    )
    return Rates(seconds, source, "bfloat16", BLOCK_SECONDS)


def of_report(report: Report, names: Iterable[str] | None = None) -> Rates:
    """What the runs of a report took per unit of work: means over runs, of all or of those in `names`."""
    spec = spec_of(report)
    seconds: dict[bool, dict[str, float]] = {}
    wanted = None if names is None else set(names)
    for eight in (False, True):
        runs = [
            run
            for run in report["runs"]
            if (run["scheme"] != "none") == eight and planned(run) and (wanted is None or run["name"] in wanted)
        ]
        if runs:
            seconds[eight] = _mean_rates(spec, report, runs)
    if not seconds:
        raise InputError(f"report of '{report['model']['name']}': expected runs to take rates from, found none")
    seconds.setdefault(True, seconds.get(False, {}))
    seconds.setdefault(False, seconds[True])
    return Rates(seconds, f"measured: {_where(report)}", report["model"]["dtype"])


def planned(run: Run) -> bool:
    """Whether a run does what a plan is about, by work that can be counted from its report."""
    policy = POLICIES.get(run["policy"])
    return (
        policy is not None  # the published loop
        and not policy.own_window  # of a length that the report does not say
        and run["scheme"] not in _SCHEMES_APART
        and run.get("kv_dtype", "auto") == "auto"  # its attention is another kernel, or decodes
        and run.get("launch") is None  # compiled or replayed: other kernels, and rows told by their names
    )


def _mean_rates(spec: ModelSpec, report: Report, runs: list[Run]) -> dict[str, float]:
    """Time of all runs over work of all runs."""
    totals: dict[str, tuple[float, float]] = {}
    for run in runs:
        units = units_of(spec, setting_of(spec, report, run))
        for row, ms in run["components"].items():
            time, work = totals.get(row, (0.0, 0.0))
            totals[row] = time + ms / 1e3, work + units.get(row, _block_passes(spec))
    return {row: time / work for row, (time, work) in totals.items() if work}


def units_of(spec: ModelSpec, setting: Setting) -> dict[str, float]:
    """Operations of the rows that multiply, bytes of those that move."""
    work = chunk_work(spec, setting)
    return {row: _unit(row, work.get(row, Work())) for row in COUNTED}


def _unit(row: str, work: Work) -> float:
    return work.flops if row in ARITHMETIC else work.bytes


def times(spec: ModelSpec, setting: Setting, rates: Rates) -> dict[str, float]:
    """Milliseconds of each row of a steady chunk."""
    units = units_of(spec, setting)
    rows = {
        row: 1e3 * seconds * units.get(row, _block_passes(spec))
        for row, seconds in rates.seconds[setting.eight_bit].items()
    }
    launches = 1e3 * rates.block * _block_passes(spec) - sum(rows.values())
    return {**rows, "overhead.python": rows.get("overhead.python", 0.0) + max(launches, 0.0)}


def _block_passes(spec: ModelSpec) -> float:
    return (len(spec.steps) + 1) * spec.layers


def setting_of(spec: ModelSpec, report: Report, run: Run) -> Setting:
    """What a run of a report computed."""
    local = round(run["ratio"] * spec.layers)
    near = (0 if run["policy"] == "no-sink" else 1) + run["recent"] + spec.chunk_frames
    width = WIDTHS[report["model"]["dtype"]]
    eight = run["scheme"] != "none"
    stores = run.get("stores", spec.layers)
    return Setting(
        keys=keys_of(spec, range(local), near), width=width, weight_width=1 if eight else width, stores=stores,
        wide=run.get("wide_layers", 0),
    )  # fmt: skip


def spec_of(report: Report) -> ModelSpec:
    """The geometry of a report as a spec: of the table where it is there, with what the report says differs."""
    model, geometry = report["model"], report["model"]["geometry"]
    channels, height, width = geometry["latent"]
    whole = geometry["frame_tokens"] == height * width
    base = SPECS.get(model["name"]) or ModelSpec(name=model["name"], dim=2, ffn_dim=1, heads=1, layers=1, sink_frames=1)
    return replace(
        base, dim=geometry["dim"], ffn_dim=geometry["ffn_dim"], heads=geometry["heads"], layers=geometry["layers"],
        text_len=geometry["text_len"], latent_channels=channels, latent_height=height, latent_width=width,
        patch=(1, 1, 1) if whole else (1, 2, 2), chunk_frames=model["chunk_frames"], window_frames=model["window"],
        steps=tuple(range(1, model["passes"])),
    )  # fmt: skip


def dtype_of(spec: ModelSpec) -> str:
    """What a model runs in unless told otherwise: published ones in bfloat16."""
    return "float32" if spec.name == "demo" else "bfloat16"


def refusal(spec: ModelSpec, dtype: str, report: Report) -> str:
    """Why the rates of `report` say nothing about `spec` in `dtype`; empty where they do."""
    found, width = report["model"]["dtype"], report["model"]["geometry"]["dim"]
    if spec_of(report).audio_blocks and not spec.audio_blocks:
        return "its model is for speech to video: rings, condition and audio layers are not counted"
    if found != dtype:
        return f"it ran in {found}, not in {dtype}"
    if width > CLOSE * spec.dim:
        return f"its width of {width} is {width / spec.dim:.1f} times this model's: calls this small take other time"
    if spec.dim > CLOSE * width and (weak := _weakest(report)):
        row, share = weak
        return (
            f"{row} reached {share:.0%} of the peak there, and may reach more at {spec.dim / width:.1f} times the width"
        )
    return ""


def _weakest(report: Report) -> tuple[str, float] | None:
    """The row that is furthest from its peak among those that make up most of a large model's time; None: all near."""
    full: Run = next((run for run in report["runs"] if run["name"] == "full"), {})
    shares = {entry["row"]: entry["share"] for entry in full.get("roofline") or ()}
    row = min(_CARRIED, key=lambda row: shares.get(row, 0.0))
    share = shares.get(row, 0.0)
    return None if share >= FIRM else (row, share)


def nearest(spec: ModelSpec, dtype: str, reports: Iterable[Report]) -> Report | None:
    """Of the reports that can serve, that of the model most like this one in width, then in tokens; None: none can."""

    def distance(report: Report) -> tuple[float, float]:
        geometry = report["model"]["geometry"]
        return abs(log(geometry["dim"] / spec.dim)), abs(log(geometry["frame_tokens"] / spec.frame_tokens))

    serving = [report for report in reports if not refusal(spec, dtype, report)]
    return min(serving, key=distance) if serving else None


def hardware(report: Report) -> str:
    env = report["env"]
    units = f" ({env['cpu_capability']})" if env.get("cpu_capability") else ""
    return str(env["gpu"] or f"{env['cpu']}{units}, {env['threads']} threads")


def label(report: Report) -> str:
    """A report in a few words: model, layers, dtype."""
    model = report["model"]
    return f"{model['name']} ({model['geometry']['layers']} layers, {model['dtype']})"


def _where(report: Report) -> str:
    return f"{label(report)} on {hardware(report)}"
