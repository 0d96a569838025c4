"""Safetensors files, written byte for byte reproducibly and read as if an enemy had made them.

The format is an eight-byte length, a JSON header and the raw tensors. It is written here because the library puts the
header's text entries in random order and wants every tensor in memory at once. It is read by the library, which checks
every offset; what this file adds is one-line errors that name the file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from export.manifest import FileDigest
from ispa_deploy.errors import InputError

Shape = tuple[int, ...]

CODES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
# What checkpoints also hold, if only to be told that it is not wanted.
_STORED = {code: dtype for dtype, code in CODES.items()} | {
    "F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "BOOL": torch.bool,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
ALIGNMENT = 64
FLOATS = ("F32", "BF16", "F16")
_PART = 1 << 18
# First bytes of what `torch.save` writes: a zip archive, or a bare pickle.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written; `read` is called once, when its turn comes, so packed weights are unpacked one by one."""

    dtype: torch.dtype
    shape: Shape
    read: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor) -> Entry:
        """A tensor that is at hand."""
        return Entry(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_tensors(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> FileDigest:
    """Write a safetensors file; the same content is the same bytes. Widest numbers come first, so all are aligned."""
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order:
        entry = entries[name]
        span = [offset, offset + entry.nbytes]
        header[name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in chain((len(text).to_bytes(8, "little"), text), (_raw(name, entries[name]) for name in order)):
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
        return FileDigest(digest.hexdigest(), file.tell())


def _raw(name: str, entry: Entry) -> Any:
    tensor = entry.read().detach().cpu().contiguous()
    assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), f"{name} changed while it was written"
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def reading(path: Path, device: torch.device | str = "cpu", framework: str = "pt") -> Iterator[Any]:
    """A safetensors file, open; InputError naming it when it is missing, damaged, or something else in disguise."""
    if not path.is_file():
        raise InputError(f"'{path}' does not exist or is no file: expected a safetensors file")
    with path.open("rb") as raw:
        if raw.read(4).startswith(_PICKLES):
            raise InputError(f"'{path}' is a pickle, which may carry code: expected a safetensors file; convert it")
    try:
        with safe_open(str(path), framework=framework, device=str(device)) as file:
            yield file
    except SafetensorError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"'{path}' is not a whole safetensors file ({reason}): copy or write it again") from None


def named_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, as float32; InputError: no such tensor, values not finite, or as `reading`."""
    with reading(path) as file:
        found = listing(file)
        if name not in found:
            raise InputError(f"'{path}' holds {sorted(found)[:3]}: expected a tensor named '{name}'")
        return check_finite(file.get_tensor(name).float(), name, f"'{path}'")


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, which may be larger than the machine's memory; errors as `reading`."""
    with reading(path, framework="numpy") as file:  # checks the header; "pt" would map the file as well
        found = listing(file)
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    strange = [f"{name} as {code}" for name, (code, _) in sorted(found.items()) if code not in _STORED]
    if strange:
        raise InputError(f"'{path}' holds {strange[0]}: expected one of {', '.join(sorted(_STORED))}")
    memory = mapped(path)
    return {
        name: view(memory, _STORED[code], torch.Size(shape).numel(), 8 + length + header[name]["data_offsets"][0])
        .view(shape)
        for name, (code, shape) in found.items()
    }  # fmt: skip


def mapped(path: Path) -> mmap.mmap:
    """A whole file, read where it is looked at; a page that is written to is a copy, and the file stays as it is."""
    with path.open("rb") as file:
        if sys.platform != "linux":
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        # The kernel sets memory aside for pages that could be copied, and refuses more than it has: torch's own mapping
        # and the safetensors library's end there for a file larger than the memory.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def view(memory: mmap.mmap, dtype: torch.dtype, count: int, offset: int) -> Tensor:
    """`count` numbers from byte `offset` on; ValueError where the file is shorter."""
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset) if count else torch.empty(0, dtype=dtype)


def listing(file: Any) -> dict[str, tuple[str, Shape]]:
    """Dtype code and shape of every tensor, from the header alone."""
    parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    return {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in parts.items()}


def check_names(found: Iterable[str], expected: Iterable[str], where: str, model: str) -> None:
    """InputError listing the first missing and unexpected names and how many there are."""
    found, expected = set(found), set(expected)
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing or unexpected:
        raise InputError(
            f"{where}: {len(missing)} tensors missing{few(missing)}, {len(unexpected)} unexpected{few(unexpected)}: "
            f"expected the {len(expected)} tensors of model '{model}'; choose the model this file was made for"
        )


def check_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str, model: str) -> None:
    """InputError listing the first tensors whose shape is not the model's."""
    wrong = [f"{name} {found[name]} for {shape}" for name, shape in sorted(expected.items()) if found[name] != shape]
    if wrong:
        raise InputError(f"{where}: {len(wrong)} shapes differ from model '{model}'{few(wrong)}; choose its own model")


def check_finite(tensor: Tensor, name: str, where: str) -> Tensor:
    """The tensor, unless it holds NaN or Inf."""
    # A sum of magnitudes would be faster and could overflow; in parts, so that little is held beside the tensor.
    bad = sum(part.numel() - int(torch.isfinite(part).sum()) for part in tensor.detach().reshape(-1).split(_PART))
    if bad:
        raise InputError(f"{where}: {name} holds {bad} NaN or Inf: expected finite numbers; the file is damaged")
    return tensor


def aligned(tensor: Tensor) -> Tensor:
    """The tensor where matrix products want it; those mapped from a file may start anywhere.

    The kernels choose their path by the address, so a model left unaligned would differ in its last bits from the one
    that was written.
    """
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def few(names: list[str], limit: int = 3) -> str:
    """` (a, b, c, ...)`, or nothing."""
    return f" ({', '.join(names[:limit])}{', ...' if len(names) > limit else ''})" if names else ""
