"""Checkpoints as their projects publish them, seen as one flat mapping of upstream's names to tensors.

A file (`.safetensors`, `.pt` and its kin), a folder of shards with or without an index, or a diffusers folder. Tensors
are mapped from the file, so that opening a checkpoint reads headers only; nothing that is read can run code. Files in
torch's format from before 1.6 cannot be mapped and are held in memory.
"""

from __future__ import annotations

import json
import mmap
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from export.keymaps import undone
from export.manifest import MANIFEST, Source, combined, file_digest
from export.tensors import mapped, mapped_tensors, view
from ispa_deploy.errors import InputError

# In order of preference: the averaged weights are the ones to run.
WRAPPERS = ("generator_ema", "generator", "model")
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_INDICES = ("*.safetensors.index.json", "*.bin.index.json")
_DIFFUSERS_PART = "transformer"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`state`: tensors by upstream's names, as stored. `layout`: the wrapping they came in (`export.keymaps`)."""

    where: str
    state: Mapping[str, Tensor]
    layout: str
    files: tuple[Path, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}

    def source(self, name: str) -> Source:
        """What the manifest says of it; reads every file once."""
        digests = [file_digest(file).sha256 for file in self.files]
        return Source("checkpoint", name, digests[0] if len(digests) == 1 else combined(digests))


def open_checkpoint(path: Path) -> Checkpoint:
    """The weights in a file or folder, mapped. InputError naming the file that is missing, damaged or no checkpoint."""
    files = _files(path)
    where = f"'{files[0] if len(files) == 1 else files[0].parent}'"
    state: dict[str, Tensor] = {}
    layouts = []
    for file in files:
        part, layout = _unwrapped(read_container(file), f"'{file}'")
        twice = sorted(part.keys() & state.keys())
        if twice:
            raise InputError(f"{where} holds {twice[0]} in two of its {len(files)} files: expected one network")
        state.update(part)
        layouts.append(layout)
    return Checkpoint(where, state, layouts[0], tuple(files))


def read_container(path: Path) -> Any:
    """Tensors by name, or what a torch pickle of plain tensors holds, mapped where the format allows it."""
    if path.suffix == ".safetensors":
        return mapped_tensors(path)
    if path.suffix not in PICKLE_SUFFIXES:
        raise InputError(f"source '{path}': expected .safetensors or {', '.join(PICKLE_SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"'{path}' does not exist or is no file: expected a torch file")
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols: what cannot be read is told below
            if not zipfile.is_zipfile(path):
                return torch.load(path, map_location="cpu", weights_only=True)
            # Nothing but names, shapes and places; torch's own mapping refuses a file larger than the memory.
            return _filled(torch.load(path, map_location="meta", weights_only=True), mapped(path))
    except UnpicklingError as error:
        code = any(word in str(error).lower() for word in ("global", "operand", "instruction"))
        what = "holds objects that could run code" if code else "is not a whole torch file"
        raise InputError(f"'{path}' {what}: expected plain tensors only; save its state dict as safetensors") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OSError) as error:
        raise InputError(f"'{path}' is not a whole torch file ({_reason(error)}): copy it again") from None


def _reason(error: Exception) -> str:
    """The first sentence of a library's error, where it says something."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    sentence = (str(error).splitlines() or [""])[0].partition(". ")[0]
    return sentence if " " in sentence else type(error).__name__


def _filled(held: Any, memory: mmap.mmap) -> Any:
    """What a torch file holds, each tensor on the meta device replaced by its numbers in the mapped file."""
    if isinstance(held, Mapping):
        return {name: _filled(value, memory) for name, value in held.items()}
    if isinstance(held, (list, tuple)):
        return [_filled(value, memory) for value in held]
    if not isinstance(held, Tensor):
        return held
    storage: Any = held.untyped_storage()
    count = storage.nbytes() // held.dtype.itemsize
    numbers = view(memory, held.dtype, count, storage._checkpoint_offset if count else 0)
    return numbers.as_strided(held.shape, held.stride(), held.storage_offset())


def tensors_only(state: Any, where: str, expected: str) -> Mapping[str, Tensor]:
    """`state` if it maps names to tensors; InputError naming the first that is none."""
    if not isinstance(state, Mapping):
        raise InputError(f"{where} holds a {type(state).__name__}: expected a dictionary of tensors")
    strays = sorted(str(name) for name, value in state.items() if not isinstance(value, Tensor))
    if strays:
        raise InputError(f"{where}: '{strays[0]}' is no tensor: expected {expected}")
    return {str(name): value for name, value in state.items()}


def _unwrapped(loaded: Any, where: str) -> tuple[dict[str, Tensor], str]:
    """State dict under upstream's names, whatever it was wrapped in, and that wrapping."""
    held = loaded if isinstance(loaded, Mapping) else {}
    if any("_lora" in str(name) or ".lora_A." in str(name) for name in held):
        raise InputError(f"{where} is a LoRA: expected the checkpoint that it goes on; name this file by --lora")
    wrappers = [name for name in WRAPPERS if isinstance(held.get(name), Mapping)]
    state = tensors_only(
        held[wrappers[0]] if wrappers else loaded, where, f"a state dict, alone or under {', '.join(WRAPPERS)}"
    )
    names = undone(state, where)
    layout = "flat, with the prefix model." if names.prefixed else "flat"
    # Both a network and its average: no published layout, so it tells nothing about the family.
    layout = " and ".join(wrappers) or ("diffusers" if names.diffusers else layout)
    return {plain: state[name] for name, plain in names.plain.items()}, layout


def _files(path: Path) -> list[Path]:
    """The file, or the files of the folder that hold its weights."""
    if not path.exists():
        raise InputError(f"source '{path}' does not exist: expected demo, random, or a checkpoint file or folder")
    if path.is_file():
        return [path]
    if (path / MANIFEST).exists():
        raise InputError(f"source '{path}' is a bundle already: expected a floating checkpoint")
    for folder in (path, path / _DIFFUSERS_PART):
        indices = next((found for pattern in _INDICES if (found := sorted(folder.glob(pattern)))), [])
        if len(indices) > 1:
            names = ", ".join(index.name for index in indices)
            raise InputError(f"source folder '{folder}' has several checkpoints ({names}): expected one")
        files = _indexed(indices[0]) if indices else sorted(folder.glob("*.safetensors"))
        if files:
            return files
    others = sorted(file.name for suffix in PICKLE_SUFFIXES for file in path.glob(f"*{suffix}"))
    there = f"; it has {', '.join(others)}" if others else ""
    raise InputError(
        f"source folder '{path}' has no .safetensors file{there}: expected a checkpoint; name the file itself"
    )


def _indexed(index: Path) -> list[Path]:
    """The shards an index lists, all of them there."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"'{index}' is no index of shards: expected JSON with a weight_map; copy it again") from None
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if strange:
        raise InputError(f"'{index}' lists the file '{strange[0]}': expected plain names inside the folder")
    lost = [name for name in names if not (index.parent / name).is_file()]
    if lost or not names:
        raise InputError(
            f"'{index}' lists {len(names)} files of which {len(lost)} are missing "
            f"({', '.join(lost[:3])}): expected all of them; copy the folder again"
        )
    return [index.parent / name for name in names]
