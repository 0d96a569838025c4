"""From a source to a bundle; a checkpoint is converted tensor by tensor and is never in memory as a whole.

A tensor is read from its mapped file, merged with its adapter, converted, and written. What is held at a time is the
8-bit codes of one output shard and the intermediates of one tensor. The bundle is the one that converting the whole
model would give, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from export.calibrate import UNKNOWN, UNSEEN, Activations, Known, learn
from export.manifest import Source
from export.onestep import report_errors
from export.prompts import check_texts
from export.sources import NAMED, Say, Weights, empty, load_source, open_weights, quiet, spec_of
from export.tensors import Entry
from export.write import SHARD_BYTES, check_target, write_bundle, write_entries
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.specs import ModelSpec, spec_for
from quant.convert import Report, Row, check_range, convert_linear, kept, quantise_, scheme_of
from quant.layers import LAYERS, step_of
from quant.measure import plan_for
from quant.plan import Plan
from quant.schemes import Scheme


def quantise_source(
    source: str | Path,
    out: str | Path,
    *,
    scheme: Scheme,
    model: str | ModelSpec | None = None,
    skip: Sequence[str] = (),
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    overwrite: bool = False,
    plan: str = "none",
    candidates: Sequence[Scheme] = (),
    activations: Activations = UNSEEN,
    say: Say = quiet,
) -> tuple[Path, Report]:
    """Write the bundle of `demo`, `random` or a checkpoint; the folder and what was done to each linear.

    Arguments as in `load_source`, `quantise_` and `write_bundle`, and so are the errors. `plan`: `none`, `auto` or a
    file, as in `quant.measure.plan_for`; `candidates`: what `auto` may choose from, by default `scheme` alone.
    `activations`: what to calibrate with, how to smooth, what to keep for its error, and whether to report errors; a
    static scheme, smoothing and keeping calibrate on the model's own prompts where none are given.
    """
    check_target(out, overwrite)  # before minutes of work
    activations.check(scheme)
    spec = spec_for(model) if isinstance(model, str) else model
    if activations.report or activations.needed_for(scheme):
        kind = str(source) if str(source) in NAMED else "checkpoint"
        check_texts(spec_of(source, spec), kind, activations.prompts, activations.reader)

    def load(told: Say) -> tuple[CausalWanDiT, Source]:
        return load_source(source, model=spec, dtype=dtype, seed=seed, lora=lora, lora_alpha=lora_alpha, say=told)

    known = UNKNOWN
    if activations.needed_for(scheme):
        known = learn(*load(say), scheme, skip, activations, say)
        skip = (*skip, *known.keep)
    if str(source) in NAMED:
        network, origin = load(quiet if known is not UNKNOWN else say)
        planned = plan_for(
            plan, network, network.spec, candidates or [scheme], skip=skip, activations=known.samples
        )  # fmt: skip
        report = quantise_(network, scheme, skip=skip, plan=planned, ranges=known.ranges, smoothing=known.smooth)
        report = replace(report, calibration=known.document)
        folder = write_bundle(
            out, network, scheme=scheme, report=report, source=origin, skip=skip, overwrite=overwrite
        )  # fmt: skip
        del network
    else:
        folder, report = convert_checkpoint(
            source, out, spec=spec, scheme=scheme, skip=skip, lora=lora, lora_alpha=lora_alpha, dtype=dtype,
            overwrite=overwrite, plan=plan, candidates=candidates, known=known, say=say,
        )  # fmt: skip
    if activations.report:
        report_errors(folder, load(quiet)[0], known, activations, say)
    return folder, report


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    scheme: Scheme,
    spec: ModelSpec | None = None,
    skip: Sequence[str] = (),
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    plan: str = "none",
    candidates: Sequence[Scheme] = (),
    known: Known = UNKNOWN,
    shard_bytes: int = SHARD_BYTES,
    say: Say = quiet,
) -> tuple[Path, Report]:
    """A checkpoint's bundle, without ever holding the model: `shard_bytes` and a few times its largest tensor.

    `known`: what calibration found, which a static scheme needs, and by which `plan` judges the layers' errors.

    Raises InputError for what does not fit, RunError when the disk refuses; nothing is left of the bundle then.
    """
    weights = open_weights(source, spec=spec, dtype=dtype, lora=lora, lora_alpha=lora_alpha, say=say)
    network = empty(weights.spec).to(weights.dtype)
    planned = plan_for(
        plan, network, weights.spec, candidates or [scheme], skip=skip, activations=known.samples, read=weights.read
    )
    reasons = kept(network, scheme, skip, planned)
    eight = {name for name, reason in reasons.items() if reason is None}
    known = replace(known, smooth=known.smooth.of_layers(eight))
    conversion = _Conversion(weights, scheme, reasons, planned, known)
    conversion.check_ranges()
    folder = write_entries(
        out, conversion.entries(), spec=weights.spec, dtype=weights.dtype, scheme=scheme, report=conversion.report,
        source=weights.source, skip=skip, overwrite=overwrite, shard_bytes=shard_bytes,
    )  # fmt: skip
    return folder, conversion.report()


@dataclass(frozen=True)
class _Conversion:
    """A checkpoint on its way into a bundle. `reasons`: `quant.convert.kept`; `rows` fills while entries are read."""

    weights: Weights
    scheme: Scheme
    reasons: dict[str, str | None]
    plan: Plan | None = None
    known: Known = UNKNOWN
    rows: dict[str, Row] = field(default_factory=dict)

    def check_ranges(self) -> None:
        """InputError unless every layer of a static scheme has its range."""
        for name, reason in self.reasons.items():
            if reason is None:
                check_range(name, scheme_of(name, self.scheme, self.plan), self.known.ranges)

    def report(self) -> Report:
        """What was done, in the model's order; whole once every entry was read."""
        rows = tuple(self.rows[name] for name in self.reasons)
        return Report(self.scheme.name, rows, self.plan, self.known.document)

    def entries(self) -> dict[str, Entry]:
        """Every tensor of the bundle, as `export.write.stored_entries` would give them."""
        network = empty(self.weights.spec).to(self.weights.dtype)
        entries: dict[str, Entry] = {
            name: Entry(tensor.dtype, tuple(tensor.shape), self._reader(name))
            for name, tensor in network.state_dict().items()
        }
        for name, reason in self.reasons.items():
            linear = network.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            if reason is None:
                entries.update(self._layer_entries(name, linear))
            else:
                _, self.rows[name] = convert_linear(name, linear, self.scheme, reason)
        return entries

    def _reader(self, name: str) -> Callable[[], Tensor]:
        return lambda: self._read(name)

    def _read(self, name: str) -> Tensor:
        return self.known.smooth.apply(name, self.weights.read(name))

    def _layer_entries(self, name: str, linear: nn.Linear) -> dict[str, Entry]:
        """Codes and scales; whichever is read first converts the layer, and what was read is let go."""
        held: dict[str, Tensor] = {}
        kind = scheme_of(name, self.scheme, self.plan).layer
        assert kind != "float", "only layers that are converted come here"

        def part(which: str) -> Tensor:
            if not held:
                held.update(self._converted(name, linear))
            return held.pop(which)

        entries = {
            f"{name}.weight": Entry(LAYERS[kind].code_dtype, tuple(linear.weight.shape), lambda: part("weight")),
            f"{name}.weight_scale": Entry(torch.float32, (linear.out_features, 1), lambda: part("weight_scale")),
        }
        if kind == "int8-static":
            entries[f"{name}.input_scale"] = Entry.of(step_of(self.known.ranges[name], name))
        if (pre_scale := self.known.smooth.pre_scale(name)) is not None:
            entries[f"{name}.pre_quant_scale"] = Entry.of(pre_scale)
        return entries

    def _converted(self, name: str, linear: nn.Linear) -> dict[str, Tensor]:
        full = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        full.weight = nn.Parameter(self._read(f"{name}.weight"), requires_grad=False)
        if linear.bias is not None:
            full.bias = nn.Parameter(self._read(f"{name}.bias"), requires_grad=False)
        own, known = scheme_of(name, self.scheme, self.plan), self.known
        layer, self.rows[name] = convert_linear(
            name, full, own, None, known.ranges.get(name), known.smooth.pre_scale(name)
        )
        assert layer is not None
        return {"weight": layer.codes(), "weight_scale": layer.weight_scale}
