"""Where floating weights come from: the package, a random generator, or a checkpoint of an upstream project.

Upstream saves the same network under many wrappings. All are undone by three rules: unwrap `generator_ema`,
`generator` or `model`; drop the infixes of the training wrappers; drop one leading `model.`. What is left must fit the
model's names and shapes exactly.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

import ispa_deploy.demo
from export.manifest import MANIFEST, Source, combined, file_digest
from export.tensors import aligned, check_finite, check_names, check_shapes, reading
from ispa_deploy.errors import InputError
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.specs import SPECS, ModelSpec, spec_for

DEMO_WEIGHTS = Path(ispa_deploy.demo.__file__).with_name("weights.safetensors")

_WRAPPERS = ("generator_ema", "generator", "model")
_INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_source(
    source: str | Path, *, model: str | ModelSpec | None = None, dtype: torch.dtype | None = None, seed: int = 0
) -> tuple[CausalWanDiT, Source]:
    """The floating model behind `demo`, `random`, or the path of a checkpoint file or folder; in eval mode, on the CPU.

    `model` names its spec; a checkpoint may go without where its shapes fit one spec only. `dtype` None keeps the
    checkpoint's (bfloat16 for `random`, as upstream runs). Raises InputError naming the file and what does not fit.
    """
    spec = spec_for(model) if isinstance(model, str) else model
    if str(source) == "random":
        return _random(spec, dtype or torch.bfloat16, seed)
    if str(source) == "demo":
        if spec is not None and spec.name != "demo":
            raise InputError(f"--model {spec.name} with the source demo: expected no --model, or demo")
        return _loaded([DEMO_WEIGHTS], SPECS["demo"], dtype), Source("demo", "demo", file_digest(DEMO_WEIGHTS).sha256)
    path = Path(source)
    files = _files(path)
    digests = [file_digest(file).sha256 for file in files]
    digest = digests[0] if len(digests) == 1 else combined(digests)
    return _loaded(files, spec, dtype), Source("checkpoint", path.absolute().name, digest)


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


def _random(spec: ModelSpec | None, dtype: torch.dtype, seed: int) -> tuple[CausalWanDiT, Source]:
    if spec is None:
        raise InputError(f"source random without --model: expected one of {', '.join(sorted(SPECS))}")
    # Never wider than it will be: in float32 first, the 14B geometry would take 57 GB.
    model = _empty(spec).to(dtype).to_empty(device="cpu")
    return _ready(initialise_(model, seed)), Source("random", f"{spec.name}, seed {seed}")


def _loaded(files: list[Path], spec: ModelSpec | None, dtype: torch.dtype | None) -> CausalWanDiT:
    where = f"'{files[0] if len(files) == 1 else files[0].parent}'"
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(_unwrapped(_read(file), f"'{file}'"))
    spec = spec or _recognised(state, where)
    model = _empty(spec)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_names(state, expected, where, spec.name)
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, expected, where, spec.name)
    for name, tensor in state.items():
        if tensor.dtype not in _FLOATS:
            raise InputError(
                f"{where}: {name} is {tensor.dtype}: expected floating weights, not a quantised checkpoint"
            )
        check_finite(tensor, name, where)
    # The narrowest dtype that holds all of them: a mixed checkpoint loses nothing.
    stored = reduce(torch.promote_types, {tensor.dtype for tensor in state.values()})
    kind = dtype or (torch.float32 if stored == torch.float64 else stored)
    model.load_state_dict({name: aligned(tensor.to(kind)) for name, tensor in state.items()}, assign=True)
    return _ready(model)


def _empty(spec: ModelSpec) -> CausalWanDiT:
    with torch.device("meta"):
        return CausalWanDiT(spec)


def _ready(model: CausalWanDiT) -> CausalWanDiT:
    return model.eval().requires_grad_(False)


def _files(path: Path) -> list[Path]:
    """The file, or every safetensors file of the folder."""
    if not path.exists():
        raise InputError(f"source '{path}' does not exist: expected demo, random, or a checkpoint file or folder")
    if path.is_file():
        return [path]
    if (path / MANIFEST).exists():
        raise InputError(f"source '{path}' is a bundle already: expected a floating checkpoint")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"source folder '{path}' has no .safetensors file: expected a checkpoint; name the file itself"
        )
    return files


def _read(path: Path) -> Any:
    """Tensors by name, or what a torch pickle of plain tensors holds; nothing that is read can run code."""
    if path.suffix == ".safetensors":
        with reading(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    if path.suffix not in _PICKLE_SUFFIXES:
        raise InputError(f"source '{path}': expected .safetensors or {', '.join(_PICKLE_SUFFIXES)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        what = "holds objects that could run code" if "global" in str(error).lower() else "is not a whole torch file"
        raise InputError(f"'{path}' {what}: expected plain tensors only; save its state dict as safetensors") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"'{path}' is not a whole torch file ({reason:.120}): copy it again") from None


def _unwrapped(loaded: Any, where: str) -> dict[str, Tensor]:
    """State dict under upstream's names, whatever it was wrapped in."""
    state = loaded
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    if not isinstance(state, Mapping):
        raise InputError(f"{where} holds a {type(state).__name__}: expected a dictionary of tensors")
    strays = sorted(str(name) for name, value in state.items() if not isinstance(value, Tensor))
    if strays:
        raise InputError(f"{where}: '{strays[0]}' is no tensor: expected a state dict, alone or under {_WRAPPERS}")
    names = {name: _plain_name(str(name)) for name in state}
    if len(set(names.values())) != len(names):
        raise InputError(f"{where} holds a tensor twice under different wrappings: expected one network")
    return {plain: state[name] for name, plain in names.items()}


def _plain_name(name: str) -> str:
    for infix in _INFIXES:
        name = name.replace(infix, "")
    return name.removeprefix("model.")


def _recognised(state: Mapping[str, Tensor], where: str) -> ModelSpec:
    """The one spec whose width and depth these are."""
    blocks = [int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))]
    patch = state.get("patch_embedding.weight")
    if not blocks or patch is None:
        raise InputError(f"{where} has no blocks or no patch_embedding.weight: expected a causal Wan checkpoint")
    size = len(patch), max(blocks) + 1
    fitting = [spec for spec in SPECS.values() if (spec.dim, spec.layers) == size]
    if len(fitting) != 1:
        names = ", ".join(spec.name for spec in fitting) or f"none of {', '.join(SPECS)}"
        raise InputError(f"{where} has width {size[0]} and {size[1]} layers, which fits {names}: say which by --model")
    return fitting[0]
