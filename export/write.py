"""Writes a bundle: all of it or nothing, and the same model always as the same bytes.

    ispa.json                          manifest (export.manifest)
    config.json                        Wan's keys and compressed-tensors' `quantization_config`
    model-00001-of-0000N.safetensors   upstream names; `X.weight` int8 (N, K) with `X.weight_scale` float32 (N, 1)
    model.safetensors.index.json       which tensor lies in which shard

Everything that is not quantised keeps the dtype of the model that is handed in.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.manifest import MANIFEST, FileDigest, Layer, Manifest, Source, current_versions, dump_json, file_digest
from export.tensors import Entry, write_tensors
from ispa_deploy.errors import InputError, RunError
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.specs import ModelSpec
from quant.convert import Report, scheme_of
from quant.linear import QuantisedLinear
from quant.schemes import SCHEMES, LayerKind, Scheme

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2_000_000_000

# What Wan's readers assume where config.json is silent.
_WAN_DEFAULTS = {"patch_size": [1, 2, 2], "text_dim": 4096}
_ORDER: tuple[LayerKind, ...] = ("int8", "int8-wide", "int8-static", "fp8")  # of the groups
_EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}


def write_bundle(
    folder: str | Path,
    model: CausalWanDiT,
    *,
    scheme: Scheme,
    report: Report,
    source: Source,
    skip: Sequence[str] = (),
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `model`, converted by `quant.quantise_` with `report`, as a bundle; deltas it carries are left out.

    InputError: the target exists and is not a bundle, or is one and `overwrite` is off. RunError: the disk refused.
    """
    return write_entries(
        folder, stored_entries(model), spec=model.spec, dtype=model.dtype, scheme=scheme, report=lambda: report,
        source=source, skip=skip, overwrite=overwrite, shard_bytes=shard_bytes,
    )  # fmt: skip


def write_entries(
    folder: str | Path,
    entries: Mapping[str, Entry],
    *,
    spec: ModelSpec,
    dtype: torch.dtype,
    scheme: Scheme,
    report: Callable[[], Report],
    source: Source,
    skip: Sequence[str] = (),
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """`write_bundle` from tensors that are read when their turn comes; `report` is asked for after the last of them."""
    folder = check_target(folder, overwrite)
    try:
        with all_or_nothing(folder) as partial:
            files = _write_shards(partial, entries, shard_bytes)
            files[CONFIG] = _write_json(partial / CONFIG, config(spec, report()))
            manifest = Manifest(
                spec=spec, dtype=str(dtype).removeprefix("torch."), scheme=scheme.name, keep=scheme.keep,
                skip=tuple(skip), layers=_layers(report()), source=source, versions=current_versions(), files=files,
                plan=planned.to_dict() if (planned := report().plan) else None, calibration=report().calibration,
            )  # fmt: skip
            _write_json(partial / MANIFEST, manifest.to_dict())
    except OSError as error:
        raise RunError(
            f"could not write bundle '{folder}': {error.strerror or error}; nothing is left of it"
        ) from error
    return folder


def stored_entries(model: CausalWanDiT) -> dict[str, Entry]:
    """Every tensor of the bundle. A quantised layer's bias goes back to the model's dtype where that loses nothing."""
    entries: dict[str, Entry] = {}
    for prefix, module in model.named_modules():
        own: dict[str, Tensor] = {
            f"{prefix}.{name}".lstrip("."): value for name, value in module.named_parameters(recurse=False)
        }
        if isinstance(module, QuantisedLinear):
            shape = (module.out_features, module.in_features)
            scales = {name: value for name, value in module.named_buffers(recurse=False) if name.endswith("_scale")}
            own.update({f"{prefix}.{name}": value for name, value in scales.items()})
            entries[f"{prefix}.weight"] = Entry(module.code_dtype, shape, module.codes)
            if module.bias is not None:
                own[f"{prefix}.bias"] = _narrowed(module.bias, model.dtype)
        entries.update({name: Entry.of(value) for name, value in own.items()})
    return entries


def config(spec: ModelSpec, report: Report) -> dict[str, Any]:
    """`config.json`: upstream's keys, with what upstream leaves out only where it departs from upstream's default."""
    fields: dict[str, Any] = {
        "_class_name": "WanModel", "model_type": "t2v", "dim": spec.dim, "ffn_dim": spec.ffn_dim,
        "freq_dim": spec.freq_dim, "num_heads": spec.heads, "num_layers": spec.layers, "in_dim": spec.latent_channels,
        "out_dim": spec.latent_channels, "text_len": spec.text_len, "eps": spec.eps,
    }  # fmt: skip
    extra = {"patch_size": list(spec.patch), "text_dim": spec.text_dim}
    fields.update({name: value for name, value in extra.items() if value != _WAN_DEFAULTS[name]})
    if report.quantised:
        kept = [row.name for row in report.rows if not row.quantised]
        kinds = {name: scheme_of(name, SCHEMES[report.scheme], report.plan).layer for name in report.quantised}
        fields["quantization_config"] = compressed_tensors(kept, kinds)
    return fields


def compressed_tensors(kept: list[str], kinds: Mapping[str, LayerKind] | None = None) -> dict[str, Any]:
    """`quantization_config` as compressed-tensors reads it; `kept`: the linears that stayed in floating point.

    `kinds`: the layer kind of every quantised linear by name; all int8 where that is left out.
    """
    groups: dict[LayerKind, list[str]] = {}
    for name, kind in (kinds or {"": "int8"}).items():
        groups.setdefault("int8" if kind == "bnb" else kind, []).append(name)
    formats = {"float-quantized" if kind == "fp8" else "int-quantized" for kind in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": _group(names if len(groups) > 1 else ["Linear"], kind)
            for index, (kind, names) in enumerate(sorted(groups.items(), key=lambda group: _ORDER.index(group[0])))
        },
        "ignore": kept,
        "kv_cache_scheme": None,
    }


def _group(targets: list[str], kind: LayerKind) -> dict[str, Any]:
    bits, static = {**_EIGHT_BITS, "type": "float" if kind == "fp8" else "int"}, kind == "int8-static"
    inputs = {**bits, "strategy": "tensor" if static else "token", "dynamic": not static}
    return {
        "targets": targets,
        "weights": {**bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**inputs, "num_bits": 16} if kind == "int8-wide" else inputs,
    }


def header(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Text entries of one shard's header; ComfyUI finds its quantised layers there."""
    int8 = [name.removesuffix(".weight") for name, entry in sorted(entries.items()) if entry.dtype == torch.int8]
    layers = {name: {"format": "int8_tensorwise"} for name in int8}
    comfy = json.dumps({"format_version": "1.0", "layers": layers}, sort_keys=True)
    return {"format": "pt", **({"_quantization_metadata": comfy} if layers else {})}


def _write_shards(folder: Path, entries: Mapping[str, Entry], limit: int) -> dict[str, FileDigest]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(entries):
        if shards[-1] and filled + entries[name].nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += entries[name].nbytes
    files: dict[str, FileDigest] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        part = {name: entries[name] for name in names}
        files[file] = write_tensors(folder / file, part, header(part))
        weight_map.update(dict.fromkeys(names, file))
    total = sum(entry.nbytes for entry in entries.values())
    files[INDEX] = _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return files


def _write_json(path: Path, value: Any) -> FileDigest:
    with path.open("wb") as file:
        file.write(dump_json(value))
        file.flush()
        os.fsync(file.fileno())
    return file_digest(path)


def _layers(report: Report) -> tuple[Layer, ...]:
    return tuple(Layer(**row) for row in report.as_dict()["layers"])


def _narrowed(bias: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = bias.to(dtype)
    return narrow if torch.equal(narrow.to(bias.dtype), bias) else bias


def check_target(folder: str | Path, overwrite: bool) -> Path:
    """Where the bundle goes, absolute, so that `.` and a trailing slash have a name and a sibling.

    InputError when nothing can be written there.
    """
    folder = Path(folder).absolute()
    if not folder.parent.is_dir():
        raise InputError(f"bundle '{folder}': its folder does not exist, create '{folder.parent}' first")
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise InputError(f"bundle '{folder}' exists and is no bundle: expected a new name or an older bundle")
    if folder.exists() and not overwrite:
        raise InputError(f"bundle '{folder}' exists: choose another name, or replace it with --overwrite")
    return folder


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """A hidden sibling that becomes `folder` if the body succeeds and vanishes if it does not."""
    partial, old = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            # A folder cannot be renamed over another one: the old bundle steps aside and returns if that fails.
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        try:
            os.replace(partial, folder)
        except BaseException:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
