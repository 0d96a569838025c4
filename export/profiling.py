"""What `profile` compares: the same weights in floating point and in 8 bits, with the full cache and with ISPA."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from export.bundle import Bundle
from ispa_deploy.errors import InputError, RunError, known_names
from ispa_deploy.linear import Linear
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions
from ispa_deploy.precision import PART, check_bits
from ispa_deploy.profile.compare import Configuration, compare
from ispa_deploy.profile.geometries import GEOMETRIES, random_model
from ispa_deploy.profile.lane import Opener
from ispa_deploy.profile.launched import compiled, graphed
from ispa_deploy.profile.paper import LAST_PASS
from ispa_deploy.profile.steady import SteadyStream
from quant import SCHEMES, QuantisedLinear, quantise_, resolve
from quant.audit import audit, complaints

Say = Callable[[str], None]

LAUNCHES: dict[str, Opener] = {"": SteadyStream.open, "compile": compiled, "cuda-graphs": graphed}
"""What a run of `also` may say last -> how its stream is opened."""
FORM = "POLICY[:RATIO[:RECENT]][+SCHEME][+int8-kv|+int8-attention][+compile|+cuda-graphs]"
CACHES = {"": ("auto", "auto"), "int8-kv": ("int8", "auto"), "int8-attention": ("int8", "int8")}
"""What a run of `also` may say of its cache -> `kv_dtype` and `attention_dtype` of its stream."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What is compared beside the full cache: ISPA at `ratio` with `recent` frames, and the runs that `also` names.

    `also`: each as `FORM` says, for example `absorb:1:3+w8a8-int8` or `sink-local`; `int8-attention` reads an int8
    cache, `int8-kv` decodes it; `compile` and `cuda-graphs` are recorded by their kernels' names and have no cold
    start. A requested scheme that did not run in 8 bits, or a launch that did not take, is a `RunError`;
    `allow_fallback` makes it a warning in the report. `last_pass_bits`: of all runs, see `StreamOptions`.
    """

    rounds: int = 7
    ratio: float = 0.5
    recent: int = 0
    also: Sequence[str] = ()
    allow_fallback: bool = False
    last_pass_bits: int = 16

    def check(self) -> None:
        """InputError for a run that cannot be meant, before anything is loaded."""
        check_bits(self.last_pass_bits)
        for text in self.also:
            _asked(text)

    def applied(self, runs: Sequence[Configuration]) -> list[Configuration]:
        """The runs with what is asked of all of them."""
        return [replace(run, options=replace(run.options, last_pass_bits=self.last_pass_bits)) for run in runs]


def configurations(
    floating: CausalWanDiT, eight: CausalWanDiT | None, scheme: str, *, ratio: float = 0.5, recent: int = 0
) -> list[Configuration]:
    """full | ispa on the floating-point model, both again on the 8-bit one, and that with every layer local and one
    recent chunk, where the window has room for it."""
    spec = floating.spec
    options = {
        "full": StreamOptions(policy="full"),
        "ispa": StreamOptions(policy="absorb", ratio=ratio, recent_frames=recent),
    }
    kinds = [("", floating, "none")] + ([("+w8a8", eight, scheme)] if eight is not None else [])
    made = [_run(name + tail, model, value, label) for tail, model, label in kinds for name, value in options.items()]
    if eight is not None and spec.window_frames >= max(1, spec.sink_frames) + 2 * spec.chunk_frames:
        every = StreamOptions(policy="absorb", ratio=1.0, recent_frames=spec.chunk_frames)
        made.append(_run("local+w8a8", eight, every, scheme))
    return made


def by_pass(runs: Sequence[Configuration]) -> list[Configuration]:
    """Where one denoising pass stands for all of a chunk: those before the last, whose activations have 8 bits. What
    the last one takes has a run of its own, where a third of the layers is a third and its activations have 16 bits."""
    spec, found = runs[0].model.spec, []
    if len(spec.steps) > 1:
        return list(runs)
    for run in runs:
        found.append(replace(run, options=replace(run.options, last_pass_bits=8)))
        if run.name == "ispa+w8a8" and spec.layers % PART == 0 and run.options.last_pass_bits > 8:
            found.append(replace(run, name=f"{run.name}{LAST_PASS}", starts=False))
    return found


def _run(name: str, model: CausalWanDiT, options: StreamOptions, scheme: str, launch: str = "") -> Configuration:
    return Configuration(
        name=name, model=model, options=options, scheme=scheme, audit=audit,
        complaints=complaints if scheme != "none" else None, opener=LAUNCHES[launch], starts=not launch,
        traced=bool(launch),
    )  # fmt: skip


def further(also: Sequence[str], floating: CausalWanDiT, eight: CausalWanDiT, scheme: str) -> list[Configuration]:
    """The configurations that `also` names; InputError for a text that names none."""
    made, models = [], {"none": floating, scheme: eight}
    for text in also:
        options, wanted, launch = _asked(text)
        if launch == "cuda-graphs" and floating.device.type != "cuda":
            raise InputError(f"--also '{text}': CUDA graphs need a CUDA device, this is {floating.device.type}")
        chosen = resolve(wanted, floating.device)[0].name
        if chosen not in models:
            models[chosen] = copy.deepcopy(floating)
            quantise_(models[chosen], SCHEMES[chosen])
        made.append(_run(text, models[chosen], options, chosen, launch))
    return made


def _asked(text: str) -> tuple[StreamOptions, str, str]:
    """Options, scheme and launch of one run written as `FORM`."""
    what, *more = text.split("+")
    launch, cache = ([word for word in more if word in known] for known in (LAUNCHES, CACHES))
    more = [word for word in more if word not in (*launch, *cache)]
    for words in (launch, cache):
        if len(words) > 1:
            raise InputError(f"--also '{text}': {' and '.join(words)} exclude each other")
    kv, attention = CACHES[cache[0] if cache else ""]
    policy, *numbers = what.split(":")
    options = StreamOptions(policy=policy, kv_dtype=kv, attention_dtype=attention)
    own_window = options.policy_value().own_window
    try:
        (scheme,) = more or ["none"]
        if own_window:
            (frames,) = numbers
            options = replace(options, window=int(frames))
        elif numbers:
            ratio, recent = numbers if len(numbers) > 1 else (*numbers, "0")
            options = replace(options, ratio=float(ratio), recent_frames=int(recent))
    except ValueError:
        raise InputError(f"--also '{text}': expected {FORM} or window:FRAMES..., for example absorb:1:3+w8a8") from None
    if scheme not in (*SCHEMES, "w8a8"):
        raise known_names(f"scheme in --also {text}:", scheme, [*SCHEMES, "w8a8"])
    return options, scheme, launch[0] if launch else ""


def _audited(report: dict[str, Any], allow_fallback: bool) -> dict[str, Any]:
    """The report, unless a scheme that was asked for did not run."""
    for run in report["runs"]:
        if run["complaints"] and not allow_fallback:
            raise RunError(
                f"'{run['name']}' ({run['scheme']}): {'; '.join(run['complaints'])}; --allow-fallback measures it all "
                "the same"
            )
    return report


def profile_bundle(
    bundle: Bundle, asked: Compared, *, command: str = "", load_ms: float | None = None, say: Say | None = None
) -> dict[str, Any]:
    """The report of a bundle's own model; a bundle without 8-bit layers is compared with its quantised copy."""
    scheme = bundle.manifest.scheme
    if SCHEMES[scheme].layer == "float":
        chosen, line = resolve("w8a8", bundle.model.device)
        floating, eight, scheme = bundle.model, copy.deepcopy(bundle.model), chosen.name
        quantise_(eight, chosen)
        if say:
            say(line)
    else:
        floating, eight = dequantised(bundle.model), bundle.model
    runs = configurations(floating, eight, scheme, ratio=asked.ratio, recent=asked.recent)
    report = compare(
        asked.applied([*runs, *further(asked.also, floating, eight, scheme)]),
        rounds=asked.rounds,
        pixel_frames=bundle.spec.temporal_stride,
        decoder=bundle.decoder(),
        command=command,
        load_ms=load_ms,
        progress=say,
    )
    return _audited(report, asked.allow_fallback)


def profile_geometry(
    name: str,
    device: torch.device,
    asked: Compared,
    *,
    layers: int | None = None,
    command: str = "",
    say: Say | None = None,
) -> dict[str, Any]:
    """The report of a geometry with random bf16 weights, of all its layers or only as many as asked for.

    Fewer layers stand for all of them, so their clean passes run to the end: stopping in the last one saves little of
    many and much of few.
    """
    spec = GEOMETRIES[name]
    model = random_model(replace(spec, layers=layers or spec.layers), torch.bfloat16, device)
    chosen, _ = resolve("w8a8", device)
    eight = copy.deepcopy(model)
    quantise_(eight, chosen)
    runs = configurations(model, eight, chosen.name, ratio=asked.ratio, recent=asked.recent)
    runs = by_pass(asked.applied([*runs, *further(asked.also, model, eight, chosen.name)]))
    report = compare(
        runs if model.spec.layers == spec.layers else whole(runs),
        rounds=asked.rounds,
        pixel_frames=spec.temporal_stride,
        command=command,
        progress=say,
    )
    return _audited(report, asked.allow_fallback)


def whole(runs: Sequence[Configuration]) -> list[Configuration]:
    """The same runs with clean passes that run to their end."""
    return [replace(run, options=replace(run.options, full_commit=True)) for run in runs]


def dequantised(model: CausalWanDiT) -> CausalWanDiT:
    """The floating-point model that the 8-bit weights stand for: the baseline multiplies the same numbers."""
    twin = copy.deepcopy(model)
    for parent in twin.modules():
        for name, child in parent.named_children():
            if isinstance(child, QuantisedLinear):
                setattr(parent, name, _floating(child, model.dtype))
    return twin


def _floating(layer: QuantisedLinear, dtype: torch.dtype) -> Linear:
    weight = layer.reference_weight().to(dtype)
    linear = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return linear.eval()
