"""Calibration: a floating-point model streams prompts, and every linear's inputs are watched on the way.

Real streams, because the inputs of an autoregressive model depend on the chunk, the denoising step and the keys of the
past: the full window is filled as in use, every pass counts (the clean one too), and so does the text, once per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.manifest import Source
from export.prompts import read_prompts, text_rows
from export.sensitivity import PROMPTS as SENSITIVITY_PROMPTS
from export.sensitivity import Sensitivity, check_share, sensitivity
from export.sources import Say
from ispa_deploy.errors import InputError, RunError
from ispa_deploy.evaluate.passes import TEXT, Pass, ToldStream
from ispa_deploy.media.text import PromptReader
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.specs import ModelSpec
from quant.convert import kept
from quant.ranges import Observer, Seen
from quant.schemes import Scheme
from quant.smooth import ALPHA, NOTHING, Smoothing, check_smoothing, columns, smoothing

VERSION = 1
# Added to the seed of calibration.
SENSITIVITY_SEED = 500
_WINDOWS = 2  # by default a stream runs for that many windows: the second half sees what eviction leaves


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What a conversion is to learn from activations, and by which streams.

    `prompts`: a text file of prompts, or safetensors with `prompt_embeds`; None: the model's own, where it has some,
    and only if needed. `frames` None: two windows. `reader`: a text encoder, for models that need one. `smooth` and
    `alpha`: see `quant.smooth.smoothing`. `keep_sensitive`: share of the weights that stay in floating point, those of
    the linears whose 8 bits the output feels most. `report`: measure the written bundle against the original.
    """

    prompts: Path | None = None
    frames: int | None = None
    seed: int = 0
    reader: Callable[[ModelSpec], PromptReader] | None = None
    device: torch.device | str = "cpu"
    smooth: str = "none"
    alpha: float = ALPHA
    keep_sensitive: float = 0.0
    report: bool = False

    def needed_for(self, scheme: Scheme) -> bool:
        """Whether a conversion to `scheme` calibrates: it was asked to, or cannot do without."""
        asked = self.prompts is not None or self.smooth != "none" or self.keep_sensitive > 0
        return asked or scheme.layer == "int8-static"

    def check(self, scheme: Scheme) -> None:
        """InputError for what can be told to be wrong before minutes of work: files, numbers, idle flags."""
        check_smoothing(self.smooth, self.alpha)
        check_share(self.keep_sensitive)
        if self.prompts is not None and self.prompts.suffix != ".safetensors":
            read_prompts(self.prompts)
        idle = [flag for flag, given in (("--calibrate-frames", self.frames), ("--text-encoder", self.reader)) if given]
        if idle and not (self.needed_for(scheme) or self.report):
            raise InputError(f"{idle[0]} with nothing to calibrate: add --calibrate PROMPTS.txt, --smooth or --report")
        if scheme.layer == "float" and self.needed_for(scheme):
            raise InputError(f"calibration for the scheme {scheme.name}: expected one that quantises, such as w8a8")


UNSEEN = Activations()


@dataclass(frozen=True)
class Known:
    """What calibration tells a conversion; nothing where there was none.

    `samples`: rows of each linear's input, before smoothing. `keep`: regular expressions of linears that are better
    left in floating point. `document`: see `Calibration.to_dict`.
    """

    ranges: Mapping[str, float] = field(default_factory=dict)
    smooth: Smoothing = NOTHING
    samples: Mapping[str, Tensor] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    document: dict[str, Any] | None = None


UNKNOWN = Known()


@dataclass(frozen=True)
class Calibration:
    """What was seen, by linear, and of what: `passes` are the moments of `seen`, in order."""

    prompts: int
    prompts_sha256: str
    frames: int
    seed: int
    passes: tuple[Pass, ...]
    seen: Mapping[str, Seen]
    smooth: str = "none"
    alpha: float | None = None

    def ranges(self) -> dict[str, float]:
        """The largest magnitude of each linear's input."""
        return {name: seen.amax for name, seen in self.seen.items()}

    def smoothed(
        self, mode: str, weight: Callable[[str], Tensor], alpha: float = ALPHA
    ) -> tuple[Smoothing, Calibration]:
        """Factors from these activations and from the weights (N, K) by linear (see `quant.smooth.smoothing`), and the
        same inputs as the smoothed model has them."""
        wide = self.seen if mode != "none" else {}
        found = smoothing(
            mode, {name: seen.channels for name, seen in wide.items()}, {name: columns(weight(name)) for name in wide},
            alpha,
        )  # fmt: skip
        if mode == "none":
            return found, self
        scaled = {
            name: seen.scaled(found.inputs[name]) if name in found.inputs else seen for name, seen in self.seen.items()
        }
        return found, replace(self, seen=scaled, smooth=mode, alpha=alpha)

    def to_dict(self) -> dict[str, Any]:
        """`recipe.calibration` of a bundle: the largest magnitude of each linear's input at every pass, null where it
        did not run, as the quantiser saw it (after smoothing)."""
        return {
            "version": VERSION,
            "prompts": self.prompts,
            "prompts_sha256": self.prompts_sha256,
            "frames": self.frames,
            "seed": self.seed,
            "smooth": self.smooth,
            "alpha": self.alpha,
            "passes": [one.to_dict() for one in self.passes],
            "layers": {name: _row(seen, self.passes) for name, seen in self.seen.items()},
        }

    def summary(self) -> str:
        """One line: how much was seen, and how far a layer's range moves from pass to pass."""
        spread = {name: float(seen.peaks.amax(1).max() / seen.peaks.amax(1).min()) for name, seen in self.seen.items()}
        worst = max(spread, key=lambda name: spread[name])
        return (
            f"calibrated on {self.prompts} prompts of {self.frames} frames: {len(self.seen)} linears, "
            f"{len(self.passes) - 1} passes; the range moves most in {worst}, {spread[worst]:.1f}x between passes"
        )


def calibrate(model: CausalWanDiT, names: Sequence[str], kind: str, request: Activations) -> Calibration:
    """Stream every prompt with the whole window and watch the inputs of the linears `names`; `kind` as `Source.kind`.

    InputError: prompts that cannot be read. RunError: activations that are not finite, by layer and pass.
    """
    spec = model.spec
    texts, digest = text_rows(spec, kind, request.prompts, request.reader)
    frames = request.frames or default_frames(spec)
    observer = Observer(model, names)
    with _placed(model, request.device, running_dtype(model.dtype, torch.device(request.device))):
        for index, rows in enumerate(texts):
            observer.at(TEXT)
            with observer:
                options = StreamOptions(frames=frames, seed=request.seed + index, policy="full")
                stream = open_stream(model, rows.to(model.device), options)
                for _ in ToldStream.of(stream, lambda one, _: observer.at(one)):
                    pass
    seen = observer.seen()
    _check_seen(seen, names)
    moments = {moment for one in seen.values() for moment in one.moments if isinstance(moment, Pass)}
    return Calibration(len(texts), digest, frames, request.seed, tuple(sorted(moments)), seen)


@contextmanager
def _placed(model: CausalWanDiT, device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """The model on `device` in `dtype`, which holds its numbers, and back again."""
    home = model.device, model.dtype
    model.to(torch.device(device), dtype)
    try:
        yield
    finally:
        model.to(*home)


def running_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a model is run in: CPUs are slow in float16, and float32 holds the same numbers."""
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype


def learn(
    model: CausalWanDiT, source: Source, scheme: Scheme, skip: Sequence[str], request: Activations, say: Say
) -> Known:
    """Calibrate the linears that `scheme` converts; choose the factors that smooth them, and which to keep."""
    names = [name for name, reason in kept(model, scheme, skip).items() if reason is None]
    found = calibrate(model, names, source.kind, request)
    samples = {name: seen.sample for name, seen in found.seen.items()}
    smooth, found = found.smoothed(request.smooth, linear_weights(model), request.alpha)
    say(found.summary())
    document = found.to_dict()
    known = Known(found.ranges(), smooth, samples, document=document)
    if not request.keep_sensitive:
        return known
    felt = _felt(model, scheme, source, found, request)
    say(felt.summary())
    document = document | {"sensitivity": felt.to_dict()}
    return replace(known, keep=felt.patterns, document=document)


def _felt(model: CausalWanDiT, scheme: Scheme, source: Source, found: Calibration, request: Activations) -> Sensitivity:
    """On the first prompts of the calibration, with noise of its own.

    In float32: bfloat16's own rounding is drawn anew in all layers behind a change, and is larger than what 8 bits in
    one linear do.
    """
    texts, _ = text_rows(model.spec, source.kind, request.prompts, request.reader)
    with _placed(model, request.device, torch.float32):
        return sensitivity(
            model, scheme, found.ranges(), texts[:SENSITIVITY_PROMPTS], share=request.keep_sensitive,
            frames=found.frames, seed=request.seed + SENSITIVITY_SEED,
        )  # fmt: skip


def default_frames(spec: ModelSpec) -> int:
    """Two windows, in whole chunks, or what the model can stream."""
    first = spec.first_chunk_frames or spec.chunk_frames
    most = min(_WINDOWS * spec.window_frames, spec.max_frames if spec.rope == "absolute" else 1 << 30)
    most = most if spec.rolls else min(most, spec.window_frames)
    return first + max(0, most - first) // spec.chunk_frames * spec.chunk_frames


def linear_weights(model: nn.Module) -> Callable[[str], Tensor]:
    """The weight of a linear by its name."""
    return lambda name: model.get_parameter(f"{name}.weight").detach()


def _row(seen: Seen, passes: Sequence[Pass]) -> dict[str, Any]:
    at = dict(zip(seen.moments, seen.peaks.amax(1).tolist(), strict=True))
    return {"amax": seen.amax, "passes": [_rounded(at.get(one)) for one in passes]}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _check_seen(seen: Mapping[str, Seen], names: Sequence[str]) -> None:
    bad = [
        (moment, name)
        for name, one in seen.items()
        for moment, peak in zip(one.moments, one.peaks, strict=True)
        if isinstance(moment, Pass) and not bool(peak.isfinite().all())
    ]
    if bad:
        first, name = min(bad, key=lambda found: found[0])  # of the layers at that pass the first of the model
        raise RunError(
            f"calibration: the input of '{name}' is not finite in chunk {first.chunk}, step {first.step}: expected "
            "finite activations; float16 overflows, take bfloat16 or float32"
        )
    silent = sorted(set(names) - set(seen))
    assert not silent, f"linears that never ran: {silent[:3]}"
