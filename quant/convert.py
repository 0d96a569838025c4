"""Turns a model's linear layers into quantised ones, in place, and reports every one of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ispa_deploy.errors import InputError
from ispa_deploy.linear import Linear
from quant.kernels import runs
from quant.layers import LAYERS, StaticInt8Linear
from quant.linear import QuantisedLinear
from quant.plan import Plan
from quant.primitives import check_finite, dequantise, sqnr_db
from quant.schemes import SCHEMES, Scheme
from quant.smooth import NOTHING, Smoothing, smooth_

# At or below this width the passes around the product cost what eight bits win.
NO_GAIN_WIDTH = 256


@dataclass(frozen=True, slots=True)
class Row:
    """One linear layer: what was done and why. `shape` is (N, K); `sqnr_db` of the weight, None where it was kept."""

    name: str
    shape: tuple[int, int]
    quantised: bool
    why: str
    sqnr_db: float | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did to every linear layer of a model, in the model's order, and the plan it followed.

    `calibration`: plain JSON types, of whoever calibrated.
    """

    scheme: str
    rows: tuple[Row, ...]
    plan: Plan | None = None
    calibration: Mapping[str, Any] | None = None

    @property
    def quantised(self) -> tuple[str, ...]:
        """Names of the layers that were converted."""
        return tuple(row.name for row in self.rows if row.quantised)

    @property
    def bytes_before(self) -> int:
        """Bytes of all linears before."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all linears after."""
        return sum(row.bytes_after for row in self.rows)

    def summary(self) -> str:
        """One line: how many layers, how many bytes, the worst weight."""
        known = [(row.sqnr_db, row.name) for row in self.rows if row.sqnr_db is not None]
        tail = ", worst weight {:.1f} dB ({})".format(*min(known)) if known else ""
        return (
            f"{self.scheme}: {len(self.quantised)} of {len(self.rows)} linears quantised, "
            f"{self.bytes_before / 2**20:.1f} -> {self.bytes_after / 2**20:.1f} MiB{tail}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        planned = {"plan": self.plan.to_dict()} if self.plan is not None else {}
        calibrated = {"calibration": dict(self.calibration)} if self.calibration is not None else {}
        return {"scheme": self.scheme, "layers": [asdict(row) for row in self.rows], **planned, **calibrated}


def quantise_(
    model: nn.Module,
    scheme: Scheme,
    *,
    skip: Sequence[str] = (),
    plan: Plan | None = None,
    ranges: Mapping[str, float] | None = None,
    smoothing: Smoothing = NOTHING,
) -> Report:
    """Replace the model's linears by `scheme`'s, in place; the floating weights are released one by one.

    `skip`: more regular expressions beside the scheme's own; each must match a linear. `plan`: for every linear that
    is not kept anyway its own scheme. `ranges`: largest magnitude seen at each linear's input, for static schemes;
    with `smoothing`, which is applied first, of the smoothed input.
    Layers whose kernels do not run on this device keep their plain codes, ready to be written or moved.

    Raises `InputError` for a pattern that is malformed or matches nothing, for a weight that is not finite, for a
    missing range, for a plan of another model, and when a scheme other than `none` converts no layer at all without a
    plan that says so; the model is then as it was.
    """
    reasons = kept(model, scheme, skip, plan)
    linears, amax = _linears(model), ranges or {}
    for name, reason in reasons.items():
        if reason is None:
            check_finite(linears[name].weight, f"{name}.weight")
            check_range(name, scheme_of(name, scheme, plan), amax)
    smoothing = smoothing.of_layers({name for name, reason in reasons.items() if reason is None})
    smooth_(model, smoothing)
    rows = []
    for name, reason in reasons.items():
        linear = linears.pop(name)  # the last reference but the model's: its weight goes when it is replaced
        own, pre_scale = scheme_of(name, scheme, plan), smoothing.pre_scale(name)
        layer, row = convert_linear(name, linear, own, reason, amax.get(name), pre_scale)
        rows.append(row)
        if layer is not None:
            _replace(model, {name: layer})
            if runs(layer.family, str(linear.weight.device)):
                layer.prepare()
    return Report(scheme.name, tuple(rows), plan)


def kept(model: nn.Module, scheme: Scheme, skip: Sequence[str] = (), plan: Plan | None = None) -> dict[str, str | None]:
    """Every linear of the model, in its order, and why it stays in floating point; None where it is to be converted.

    Needs no weights: a model on the meta device will do. Raises `InputError` as `quantise_` does for patterns and plan.
    """
    linears = _linears(model)
    _check_patterns(skip, linears)
    reasons = {name: _kept_because(name, linear, scheme, skip) for name, linear in linears.items()}
    if plan is not None:
        for name, linear in linears.items():
            if reasons[name] is None:
                row = plan.layer(name, (linear.out_features, linear.in_features))
                reasons[name] = f"plan: {row.why}" if row.scheme == "none" else None
    elif scheme.layer != "float" and all(reasons.values()):
        raise InputError(
            f"scheme {scheme.name} on a model of {len(linears)} linears: all are kept in floating point, expected at "
            "least one to convert; remove a skip pattern or choose the scheme none"
        )
    return reasons


def scheme_of(name: str, scheme: Scheme, plan: Plan | None) -> Scheme:
    """The scheme of one linear: the plan's where that has the layer, else the model's."""
    row = plan.find(name) if plan is not None else None
    return scheme if row is None else SCHEMES[row.scheme]


def convert_linear(
    name: str,
    linear: nn.Linear,
    scheme: Scheme,
    reason: str | None,
    amax: float | None = None,
    pre_scale: Tensor | None = None,
) -> tuple[QuantisedLinear | None, Row]:
    """One linear in `scheme`, not yet packed, or None where `kept` gave a `reason` to keep it; and its row.

    `pre_scale` (K,): what its input is multiplied by; its weight has been divided by it.
    """
    layer = None if reason else make_layer(linear, scheme, f"{name}.weight", amax)
    if layer is not None and pre_scale is not None:
        layer.pre_quant_scale = pre_scale.to(linear.weight.device)
    return layer, _row(name, linear, layer, reason)


def make_layer(linear: nn.Linear, scheme: Scheme, name: str, amax: float | None = None) -> QuantisedLinear:
    """One linear as a layer of `scheme`, which is not `none`; `amax` is its calibrated range, for a static scheme."""
    assert scheme.layer != "float"
    kind = LAYERS[scheme.layer]
    if issubclass(kind, StaticInt8Linear):
        check_range(name, scheme, {} if amax is None else {name: amax})
        assert amax is not None
        return kind.calibrated(linear, amax, name)
    return kind.from_float(linear, name)


def empty_quantised_(
    model: nn.Module, scheme: Scheme, names: Iterable[str], plan: Plan | None = None, smoothed: Iterable[str] = ()
) -> None:
    """Replace the named linears by empty layers of `scheme`, on their device (meta included), for loading a bundle.

    A `plan` gives layers schemes of their own, those in `smoothed` multiply their input first. Load the state, then
    `prepare_`. Raises `InputError` when a name is not a linear of this model.
    """
    layers: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for name in names:
        linear = modules.get(name)
        own = scheme_of(name, scheme, plan)
        if not isinstance(linear, Linear) or own.layer == "float":
            raise InputError(f"quantised layer '{name}' of the bundle is no linear of this model; choose its own model")
        layers[name] = LAYERS[own.layer](
            linear.in_features, linear.out_features, linear.bias is not None, device=linear.weight.device
        )
    for name in smoothed:
        layer = layers.get(name)
        if isinstance(layer, QuantisedLinear):
            layer.pre_quant_scale = torch.ones(layer.in_features, device=layer.weight_scale.device)
    _replace(model, layers)


def prepare_(model: nn.Module, *, allow_fallback: bool = False) -> None:
    """Pack every quantised layer for its kernel now rather than on its first call.

    Raises `InputError` where a layer's kernels do not run on its device, unless `allow_fallback` accepts simulated
    arithmetic.
    """
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            module.allow_fallback = allow_fallback
            if module.weight is not None:
                module.prepare()


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def check_range(name: str, scheme: Scheme, ranges: Mapping[str, float]) -> None:
    """InputError for a linear of a static scheme that has no range."""
    if scheme.layer == "int8-static" and name not in ranges:
        raise InputError(
            f"scheme {scheme.name} on '{name}': no calibrated activation range, expected one for every layer it "
            "converts; calibrate first or choose w8a8-int8"
        )


def _check_patterns(skip: Sequence[str], names: Iterable[str]) -> None:
    listed = list(names)
    for pattern in skip:
        try:
            matches = any(re.search(pattern, name) for name in listed)
        except re.error as error:
            raise InputError(f"skip pattern '{pattern}': not a regular expression ({error})") from error
        if not matches:
            example = f", for example '{listed[0]}'" if listed else ""
            raise InputError(f"skip pattern '{pattern}' matches none of the model's {len(listed)} linears{example}")


def _kept_because(name: str, linear: nn.Linear, scheme: Scheme, skip: Sequence[str]) -> str | None:
    if scheme.layer == "float":
        return "scheme none"
    for whose, patterns in (("asked for", skip), (f"{scheme.name} keeps", scheme.keep)):
        for pattern in patterns:
            if re.search(pattern, name):
                return f"{whose} {pattern}"
    return None if isinstance(linear, Linear) else "a plain nn.Linear, which cannot carry a delta"


def _row(name: str, linear: nn.Linear, layer: QuantisedLinear | None, reason: str | None) -> Row:
    before = linear.weight.nbytes + (0 if linear.bias is None else linear.bias.nbytes)
    shape = (linear.out_features, linear.in_features)
    if layer is None:
        return Row(name, shape, False, reason or "", None, before, before)
    small = min(shape) <= NO_GAIN_WIDTH
    why = f"quantised for its bytes: at width {min(shape)} eight bits gain no time" if small else "quantised"
    decibels = sqnr_db(linear.weight.detach(), dequantise(layer.codes(), layer.weight_scale))
    return Row(name, shape, True, why, decibels, before, layer.nbytes)


def _replace(model: nn.Module, layers: dict[str, Any]) -> None:
    """Put each layer where the linear of its name is, and wherever else the model holds that same linear."""
    by_identity = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if id(child) in by_identity:
                setattr(parent, child_name, by_identity[id(child)])
