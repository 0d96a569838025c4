"""Turns a bundle into another reader's dialect and back, one tensor in memory at a time.

Codes and everything that is not quantised come back bit for bit, scales too where they are a float32 divided by 127,
as ours are. The manifest travels in the header, so a bundle that went out and came back has the same identity and its
stored deltas still fit. A file made elsewhere needs the model's name instead.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.dialects.origin import HEADER_KEY, check_state, origin_of, report_of, travelling
from export.dialects.table import DIALECTS, Dialect, recognise
from export.inspect import file_states
from export.manifest import dump_json, read_manifest
from export.tensors import CODES, Entry, check_finite, listing, reading, write_tensors
from export.write import all_or_nothing, check_target, write_entries
from ispa_deploy.errors import InputError, RunError, known_names
from ispa_deploy.media.output import output_path, partial_path
from quant.schemes import SCHEMES

_DTYPES = {code: dtype for dtype, code in CODES.items()}


def export_bundle(bundle: str | Path, dialect: str, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write the bundle in `dialect`: a `.safetensors` file, or a folder in those of diffusers; its path, absolute.

    InputError: no or a damaged bundle, no 8-bit layers, an unknown dialect, or a target that exists and `overwrite` is
    off. RunError: the disk refused; nothing is left then.
    """
    if dialect not in DIALECTS:
        raise known_names("dialect", dialect, DIALECTS)
    to, folder = DIALECTS[dialect], Path(bundle)
    manifest = read_manifest(folder)
    broken = {name: state for name, state in file_states(folder, manifest).items() if state != "ok"}
    if broken:
        raise InputError(f"bundle '{folder}': {', '.join(f'{n} {s}' for n, s in broken.items())}; copy it again")
    if not manifest.quantised:
        raise InputError(f"bundle '{folder}' has no 8-bit layers: expected some, made with --scheme w8a8-int8")
    with ExitStack() as stack:
        entries: dict[str, Entry] = {}
        for name in sorted(manifest.files):
            if name.endswith(".safetensors"):
                entries.update(_entries(stack.enter_context(reading(folder / name)), f"'{folder / name}'"))
        written = encode(to, entries, manifest.quantised, f"bundle '{folder}'")
        text = {**to.header(written, manifest), HEADER_KEY: travelling(manifest)}
        with _target(Path(out), to, overwrite) as (target, weights):
            write_tensors(weights, written, text)
            if to.config is not None:
                (weights.parent / "config.json").write_bytes(dump_json(to.config(manifest)))
    return target


def import_dialect(
    path: str | Path, dialect: str, out: str | Path, *, model: str | None = None, overwrite: bool = False
) -> Path:
    """Write a bundle from a file, or a diffusers folder, in `dialect`; `auto` recognises it. Returns the bundle.

    `model` names the network of a file that `export_bundle` did not write. InputError naming the file: an unknown
    dialect, tensors missing, unexpected or misshapen, codes with rotations, zero points or activation scales that a
    bundle cannot hold, numbers that are not finite.
    """
    if dialect not in (*DIALECTS, "auto"):
        raise known_names("dialect", dialect, [*DIALECTS, "auto"])
    check_target(out, overwrite)
    file = _weights_of(Path(path))
    where = f"'{file}'"
    with reading(file) as handle:
        metadata: dict[str, str] = handle.metadata() or {}
        entries = _entries(handle, where)
        found = DIALECTS[dialect] if dialect != "auto" else recognise(entries, metadata)
        if found is None:
            raise InputError(f"{where} is in no dialect that is known: expected one of {', '.join(DIALECTS)}")
        state, quantised = decode(found, entries, where)
        manifest = origin_of(metadata, quantised, model, file, state)
        check_state(state, manifest, where)
        return write_entries(
            out, state, spec=manifest.spec, dtype=getattr(torch, manifest.dtype), scheme=SCHEMES[manifest.scheme],
            report=lambda: report_of(manifest), source=manifest.source, skip=manifest.skip, overwrite=overwrite,
        )  # fmt: skip


def encode(to: Dialect, entries: Mapping[str, Entry], quantised: tuple[str, ...], where: str) -> dict[str, Entry]:
    """A bundle's tensors -> the dialect's; InputError for layers that hold no int8 codes or smooth their input."""
    rest = dict(entries)
    smoothed = [name for name in entries if name.endswith(".pre_quant_scale")]
    if smoothed:
        raise InputError(
            f"{where}: {smoothed[0]}: a reader that passes over it would compute something else; expected smoothing "
            "that is folded, made with --smooth fold"
        )
    written: dict[str, Entry] = {}
    for layer in quantised:
        codes, scale = rest.pop(f"{layer}.weight"), rest.pop(f"{layer}.weight_scale")
        if codes.dtype != torch.int8:
            raise InputError(f"{where}: {layer} holds {codes.dtype} codes: dialects are written from int8 only")
        name = to.rename(layer)
        written[name + to.codes] = codes
        shape = to.scale_shape(codes.shape[0])
        written[name + to.scale] = Entry(torch.float32, shape, partial(_through, scale, to.scale_of))
        for extra in to.extras:
            written[name + extra.suffix] = Entry.of(extra.make(codes.shape))
    written.update({to.rename(name): entry for name, entry in rest.items()})
    return written


def decode(dialect: Dialect, entries: Mapping[str, Entry], where: str) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """The dialect's tensors -> a bundle's and the names of the 8-bit layers; what is left over keeps its name."""
    rest = {dialect.rename_back(name): entry for name, entry in entries.items()}
    layers = sorted(
        name.removesuffix(dialect.codes)
        for name, entry in rest.items()
        if name.endswith(dialect.codes) and entry.dtype == torch.int8
    )
    if not layers:
        raise InputError(f"{where} has no int8 codes in dialect {dialect.name}: expected tensors 'X{dialect.codes}'")
    state: dict[str, Entry] = {}
    for layer in layers:
        codes, scale = rest.pop(layer + dialect.codes), rest.pop(layer + dialect.scale, None)
        if scale is None or not scale.dtype.is_floating_point or len(codes.shape) != 2:
            raise InputError(f"{where}: {layer} has int8 codes and no '{dialect.scale}': expected floating scales")
        for extra in dialect.extras:
            beside = rest.pop(layer + extra.suffix, None)
            if beside is not None and not extra.agrees(beside.read()):
                raise InputError(f"{where}: {layer}{extra.suffix} asks for more than symmetric scales per row: refused")
        outputs = codes.shape[0]
        if math.prod(scale.shape) not in (1, outputs):
            raise InputError(f"{where}: {layer}{dialect.scale} has shape {scale.shape}: expected 1 or {outputs} scales")
        state[f"{layer}.weight"] = codes
        back = partial(_scales, scale, dialect, outputs, f"{layer}{dialect.scale}", where)
        state[f"{layer}.weight_scale"] = Entry(torch.float32, (outputs, 1), back)
    state.update({name: _checked(entry, name, where) for name, entry in rest.items()})
    return state, tuple(layers)


def _entries(handle: Any, where: str) -> dict[str, Entry]:
    """Every tensor of an open file, read when asked for."""
    found = listing(handle)
    unknown = [f"{name} {code}" for name, (code, _) in sorted(found.items()) if code not in _DTYPES]
    if unknown:
        raise InputError(f"{where}: {unknown[0]}: expected int8 codes and tensors in {', '.join(_DTYPES)}")
    return {
        name: Entry(_DTYPES[code], shape, partial(handle.get_tensor, name)) for name, (code, shape) in found.items()
    }


def _through(entry: Entry, function: Any) -> Tensor:
    changed: Tensor = function(entry.read())
    return changed


def _scales(entry: Entry, dialect: Dialect, outputs: int, name: str, where: str) -> Tensor:
    scale = dialect.scale_back(check_finite(entry.read(), name, where).float()).reshape(-1, 1)
    if not bool((scale > 0).all()):
        raise InputError(f"{where}: {name} holds a scale of 0 or less: expected positive scales; the file is damaged")
    return scale.expand(outputs, 1)


def _checked(entry: Entry, name: str, where: str) -> Entry:
    return Entry(entry.dtype, entry.shape, lambda: check_finite(entry.read(), name, where))


def _weights_of(path: Path) -> Path:
    """The file of weights: the path itself, or inside a folder that a dialect writes."""
    if not path.is_dir():
        return path
    inside = [path / dialect.folder for dialect in DIALECTS.values() if dialect.folder]
    for file in inside:
        if file.is_file():
            return file
    raise InputError(f"'{path}' is a folder without {inside[0].name}: expected a safetensors file or such a folder")


@contextmanager
def _target(out: Path, to: Dialect, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """Where the result goes in the end, and where its weights are written now."""
    out = out.absolute()
    if out.exists() and not overwrite:
        raise InputError(f"'{out}' exists: choose another name, or replace it with --overwrite")
    try:
        if to.folder is None:
            half = partial_path(output_path(out, ".safetensors", f"{to.name} export"))
            try:
                yield out, half
                os.replace(half, out)
            finally:
                half.unlink(missing_ok=True)
            return
        if out.exists() and not (out / to.folder).is_file():
            raise InputError(f"'{out}' exists and has no {to.folder}: expected a new name or an older export")
        if not out.parent.is_dir():
            raise InputError(f"'{out}': its folder does not exist, create '{out.parent}' first")
        with all_or_nothing(out) as folder:
            yield out, folder / to.folder
    except OSError as error:
        raise RunError(f"could not write '{out}': {error.strerror or error}; nothing is left of it") from error
