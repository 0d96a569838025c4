"""Where floating weights come from: the package, a random generator, or a checkpoint of an upstream project.

`export.checkpoints` undoes the wrapping, `export.keymaps` the names; what is left must fit the model's names and shapes
exactly. Tensors are taken one at a time, merged with an adapter in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

import ispa_deploy.demo
from export.checkpoints import Checkpoint, open_checkpoint
from export.keymaps import recognise
from export.lora import PUBLISHED, Lora, merge_lora_, read_lora
from export.manifest import Source, combined, file_digest
from export.tensors import Shape, aligned, check_finite, check_names, check_shapes
from ispa_deploy.errors import InputError
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.networks import network_of
from ispa_deploy.specs import SPECS, ModelSpec, spec_for

DEMO_WEIGHTS = Path(ispa_deploy.demo.__file__).with_name("weights.safetensors")
# Sources that are no path.
NAMED = ("demo", "random")

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Say = Callable[[str], None]


def quiet(line: str) -> None:
    """Nobody is told."""


def load_source(
    source: str | Path,
    *,
    model: str | ModelSpec | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    say: Say = quiet,
) -> tuple[CausalWanDiT, Source]:
    """The floating model behind `demo`, `random`, or the path of a checkpoint file or folder; in eval mode, on the CPU.

    `model` names its spec; a checkpoint may go without where its shapes and layout fit one spec only, and `say` is told
    what was concluded. `dtype` None: bfloat16, as upstream runs, for models of the table but the demo; else the
    checkpoint's own. `lora`: an adapter to merge, scaled by `lora_alpha` / its rank. Raises InputError naming the file
    and what does not fit.
    """
    spec = spec_for(model) if isinstance(model, str) else model
    if str(source) not in NAMED:
        weights = open_weights(source, spec=spec, dtype=dtype, lora=lora, lora_alpha=lora_alpha, say=say)
        return weights.model(), weights.source
    network, origin = _random(spec, dtype or torch.bfloat16, seed) if str(source) == "random" else _demo(spec, dtype)
    if lora is None:
        return network, origin
    adapter = merge_lora_(network, lora, alpha=lora_alpha)
    say(adapter.summary)
    return network, with_lora(origin, Path(lora), adapter)


@dataclass(frozen=True)
class Weights:
    """A checkpoint that fits `spec`: its tensors, read one by one, and what the manifest says of it."""

    spec: ModelSpec
    dtype: torch.dtype
    source: Source
    checkpoint: Checkpoint
    lora: Lora | None = None

    def read(self, name: str) -> Tensor:
        """One tensor in `dtype`, adapter merged; a view of the file where nothing had to be done.

        Raises InputError naming a tensor that holds NaN or Inf.
        """
        stored = check_finite(self.checkpoint.state[name], name, self.checkpoint.where)
        merged = self.lora.merged(name, stored) if self.lora else stored
        cast = merged.to(self.dtype)
        # A number of the file may be too large for a narrower dtype, and a sum for its own.
        return cast if cast is stored else check_finite(cast, f"{name} in {self.dtype}", self.checkpoint.where)

    def model(self) -> CausalWanDiT:
        """All of them, in a model."""
        model = empty(self.spec)
        model.load_state_dict({name: aligned(self.read(name)) for name in self.checkpoint.state}, assign=True)
        return _ready(model)


def open_weights(
    path: str | Path,
    *,
    spec: ModelSpec | None = None,
    dtype: torch.dtype | None = None,
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    say: Say = quiet,
) -> Weights:
    """A checkpoint and its adapter, checked by names and shapes; tensors stay in their files until they are read."""
    checkpoint = open_checkpoint(Path(path))
    if spec is None:
        spec, line = recognise(checkpoint.shapes, checkpoint.layout, checkpoint.where)
        say(line)
    expected = shapes_of(spec)
    check_names(checkpoint.state, expected, checkpoint.where, spec.name)
    check_shapes(checkpoint.shapes, expected, checkpoint.where, spec.name)
    stored = _stored_dtype(checkpoint)
    adapter = None if lora is None else read_lora(lora, alpha=lora_alpha)
    if adapter is not None:
        adapter.check(expected, spec.name)
        say(adapter.summary)
    elif spec.name in PUBLISHED:
        say(f"note: {spec.name} is published as a base and a LoRA ({PUBLISHED[spec.name]}): no --lora, the base alone")
    source = checkpoint.source(Path(path).absolute().name)
    if lora is not None and adapter is not None:
        source = with_lora(source, Path(lora), adapter)
    return Weights(spec, dtype or _usual_dtype(spec, stored), source, checkpoint, adapter)


def spec_of(source: str | Path, spec: ModelSpec | None) -> ModelSpec:
    """The spec that a source is of, from its headers alone; InputError as in `load_source`."""
    if spec is not None:
        return spec
    if str(source) == "demo":
        return SPECS["demo"]
    if str(source) == "random":
        raise _no_model()
    checkpoint = open_checkpoint(Path(source))
    return recognise(checkpoint.shapes, checkpoint.layout, checkpoint.where)[0]


def with_lora(source: Source, file: Path, adapter: Lora) -> Source:
    """The source with an adapter merged into it."""
    digest = file_digest(file).sha256
    return replace(
        source,
        name=f"{source.name} + {file.name}, alpha {adapter.alpha:g}",
        sha256=combined([source.sha256, digest]) if source.sha256 else None,
    )


def empty(spec: ModelSpec) -> CausalWanDiT:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return network_of(spec)


def shapes_of(spec: ModelSpec) -> dict[str, Shape]:
    """Name and shape of every tensor of a model."""
    return {name: tuple(tensor.shape) for name, tensor in empty(spec).state_dict().items()}


def initialise_(model: CausalWanDiT, seed: int = 0) -> CausalWanDiT:
    """Fill an empty model with random weights under which activations stay of order one at any depth and width.

    Norms are one, biases zero, everything else normal with variance 1 / fan-in, upstream's own scale of modulation.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1:
                tensor.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                fan_in = model.spec.dim if name.endswith("modulation") else tensor[0].numel()
                tensor.normal_(0.0, fan_in**-0.5, generator=generator)
    return model


def _demo(spec: ModelSpec | None, dtype: torch.dtype | None) -> tuple[CausalWanDiT, Source]:
    if spec is not None and spec.name != "demo":
        raise InputError(f"--model {spec.name} with the source demo: expected no --model, or demo")
    weights = open_weights(DEMO_WEIGHTS, spec=SPECS["demo"], dtype=dtype)
    return weights.model(), Source("demo", "demo", weights.source.sha256)


def _random(spec: ModelSpec | None, dtype: torch.dtype, seed: int) -> tuple[CausalWanDiT, Source]:
    if spec is None:
        raise _no_model()
    # Never wider than it will be: in float32 first, the 14B geometry would take 57 GB.
    model = empty(spec).to(dtype).to_empty(device="cpu")
    return _ready(initialise_(model, seed)), Source("random", f"{spec.name}, seed {seed}")


def _no_model() -> InputError:
    return InputError(f"source random without --model: expected one of {', '.join(sorted(SPECS))}")


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The narrowest dtype that holds all of its tensors, float32 at most: a mixed checkpoint loses nothing."""
    for name, tensor in checkpoint.state.items():
        if tensor.dtype not in _FLOATS:
            raise InputError(
                f"{checkpoint.where}: {name} is {tensor.dtype}: expected floating weights, not a quantised checkpoint"
            )
    widest = reduce(torch.promote_types, {tensor.dtype for tensor in checkpoint.state.values()})
    return torch.float32 if widest == torch.float64 else widest


def _usual_dtype(spec: ModelSpec, stored: torch.dtype) -> torch.dtype:
    """What upstream runs a published checkpoint in, which it stores wider; the stored one for other models."""
    published = spec.name in SPECS and spec.name != "demo"
    return torch.bfloat16 if published else stored


def _ready(model: CausalWanDiT) -> CausalWanDiT:
    return model.eval().requires_grad_(False)
