"""The deltas of one stream in one file, bound to the bundle they were fitted on.

Deltas never mix with the base. A file holds `blocks.N.self_attn.o.delta_weight` (O, I) in the dtype that ran and
`.delta_bias` (O,) float32, or in place of the weight its factors `.delta_up` (O, r) and `.delta_down` (r, I). The
header holds one JSON text: version, base, policy, the options that the fit depends on, and every layer's record.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from export.manifest import checked, finite
from export.tensors import FLOATS, Entry, Shape, check_finite, few, listing, reading, write_tensors
from ispa_deploy.absorb.absorber import Absorber
from ispa_deploy.absorb.records import LayerRecord
from ispa_deploy.absorb.solve import Ridge
from ispa_deploy.delta import DELTA_MODES, Delta
from ispa_deploy.errors import InputError, RunError
from ispa_deploy.media.output import output_path, partial_path
from ispa_deploy.options import StreamOptions
from ispa_deploy.specs import ModelSpec

FORMAT_VERSION = 1
HEADER_KEY = "ispa_deltas"

_FIELDS = {
    "format_version": int, "base_sha256": str, "mode": str, "policy": str, "recent_frames": int, "ratio": (int, float),
    "ranking": str, "ridge": dict, "layers": list, "records": list, "quantisation_aware": bool, "stream": dict,
}  # fmt: skip
_LATER: dict[str, Any] = {"quantisation_aware": False, "stream": {}}
"""Fields that files written before them lack, and what those files meant; an empty `stream` says nothing of it."""
_REMEDIES = {
    "window_frames": "give both streams the same window (--kv-frames)",
    "sink_frames": "pass --sink {}",
    "rope": "pass --infinity to both streams or to none",
    "height": "pass --height {}",
    "width": "pass --width {}",
    "kv_bias": "pass --kv-bias {}",
}
"""What a correction stands for depends on these of its stream; what to do where another stream differs."""
_PARTS = ("delta_weight", "delta_up", "delta_down", "delta_bias")


@dataclass(frozen=True, slots=True)
class StoredDeltas:
    """Deltas by layer number, and what the header says of their fit."""

    deltas: dict[int, Delta]
    header: Mapping[str, Any]

    def to(self, device: torch.device | str) -> dict[int, Delta]:
        """The deltas on another device, same numbers."""
        return {layer: delta.to(device) for layer, delta in self.deltas.items()}

    def options(self, options: StreamOptions) -> StreamOptions:
        """`options` with the mode of the stored stream for `auto`; InputError where the fit would not hold."""
        for flag, given in (("policy", options.policy), ("recent_frames", options.recent_frames)):
            if given != self.header[flag]:
                name = flag.replace("_", "-")
                raise InputError(
                    f"deltas fitted with --{name} {self.header[flag]} on a stream with {given}: pass --{name} "
                    f"{self.header[flag]}"
                )
        return replace(options, delta=self.header["mode"]) if options.delta == "auto" else options

    def check(self, spec: ModelSpec, kv_bias: float = 1.0) -> None:
        """InputError where the stream that these were fitted on differs from one under `spec`, naming how."""
        fitted, given = self.header["stream"], fitted_on(spec, kv_bias)
        for name, remedy in _REMEDIES.items():
            if name in fitted and fitted[name] != given[name]:
                raise InputError(
                    f"deltas fitted with {name.replace('_', ' ')} {fitted[name]} on a stream with {given[name]}: "
                    f"{remedy.format(fitted[name])}, or run a warm-up on this one"
                )


def fitted_on(spec: ModelSpec, kv_bias: float = 1.0) -> dict[str, Any]:
    """What the corrections of a stream under `spec` depend on, for their header: frames, pixels and names."""
    return {
        "window_frames": spec.window_frames, "sink_frames": spec.sink_frames, "rope": spec.rope,
        "height": spec.latent_height * spec.spatial_stride, "width": spec.latent_width * spec.spatial_stride,
        "kv_bias": round(kv_bias, 6),
    }  # fmt: skip


def save_deltas(
    path: str | Path,
    deltas: Mapping[int, Delta],
    *,
    base_sha256: str,
    mode: str,
    policy: str,
    recent_frames: int,
    ratio: float,
    ranking: str,
    ridge: Ridge,
    records: Sequence[LayerRecord],
    quantisation_aware: bool = False,
    stream: Mapping[str, Any] | None = None,
) -> Path:
    """Write the deltas of a stream (`absorber.deltas`, `absorber.records`) to a `.safetensors` file.

    `stream` as `fitted_on` makes it.

    InputError: there is nothing to write, or nowhere to. RunError: the disk refused. Never leaves half a file.
    """
    target = output_path(path, ".safetensors", "deltas")
    if not deltas:
        raise InputError(f"deltas '{path}': the stream has none; let it run past its warm-up, with policy absorb")
    entries: dict[str, Entry] = {}
    for layer, delta in deltas.items():
        entries |= {f"{_prefix(layer)}.{name}": Entry.of(tensor) for name, tensor in delta.tensors().items()}
    header = {
        "format_version": FORMAT_VERSION, "base_sha256": base_sha256, "mode": mode, "policy": policy,
        "recent_frames": recent_frames, "ratio": ratio, "ranking": ranking, "ridge": asdict(ridge),
        "layers": sorted(deltas), "records": [_plain(record) for record in records],
        "quantisation_aware": quantisation_aware, "stream": dict(stream or {}),
    }  # fmt: skip
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    partial = partial_path(target)
    try:
        write_tensors(partial, entries, {"format": "pt", HEADER_KEY: text})
        os.replace(partial, target)
    except OSError as error:
        raise RunError(f"could not write deltas '{path}': {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def save_deltas_of(path: str | Path, absorber: Absorber, *, base_sha256: str) -> Path:
    """Write the deltas of a stream that has passed its transition; see `save_deltas`."""
    settings, cache = absorber.settings, absorber.cache
    return save_deltas(
        path, absorber.deltas, base_sha256=base_sha256, mode=absorber.mode, policy=absorber.policy.name,
        recent_frames=cache.recent, ratio=absorber.choice.ratio, ranking=settings.ranking,
        ridge=settings.ridge, records=absorber.records, quantisation_aware=settings.quantisation_aware,
        stream=fitted_on(cache.spec, math.exp(cache.past_bias)),
    )  # fmt: skip


def load_deltas(path: str | Path, *, base_sha256: str, spec: ModelSpec) -> StoredDeltas:
    """Read deltas for the bundle whose identity is `base_sha256`; InputError naming the file and what does not fit."""
    path = Path(path)
    where = f"'{path}'"
    with reading(path) as file:
        header = read_header(file.metadata(), str(path))
        if header["base_sha256"] != base_sha256:
            raise InputError(
                f"{where} was fitted on base {header['base_sha256'][:12]}, this bundle is {base_sha256[:12]}: deltas "
                "hold for one base only; use that bundle or run a warm-up on this one"
            )
        _check_layers(header["layers"], spec, where)
        found = listing(file)
        _check_tensors(found, header["layers"], spec, where)
        tensors = {name: check_finite(file.get_tensor(name), name, where) for name in found}
    deltas = {}
    for layer in header["layers"]:
        own = {name: tensors[full] for name in _PARTS if (full := f"{_prefix(layer)}.{name}") in tensors}
        deltas[layer] = Delta.of(own, on_codes=header["quantisation_aware"])
    return StoredDeltas(deltas, header)


def _prefix(layer: int) -> str:
    return f"blocks.{layer}.self_attn.o"


def _plain(record: LayerRecord) -> dict[str, Any]:
    """Singular statistics have an infinite condition, which JSON cannot say."""
    return {key: finite(value) if isinstance(value, float) else value for key, value in record.to_dict().items()}


def read_header(metadata: Mapping[str, str] | None, where: str) -> dict[str, Any]:
    """The fields of a delta file's header, from its text entries; InputError naming what is wrong with them."""
    text = (metadata or {}).get(HEADER_KEY)
    if text is None:
        raise InputError(f"'{where}' holds no deltas: expected a file written by --save-deltas")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"'{where}' has a header that is not JSON: the file is damaged") from None
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version not in (None, FORMAT_VERSION):
        raise InputError(f"'{where}' has format_version {version!r}: this version reads {FORMAT_VERSION}; upgrade")
    header = checked({**_LATER, **fields} if isinstance(fields, dict) else fields, _FIELDS, where)
    if header["mode"] not in DELTA_MODES:
        raise InputError(f"'{where}' has delta mode {header['mode']!r:.40}: expected one of {', '.join(DELTA_MODES)}")
    return header


def _check_layers(layers: list[Any], spec: ModelSpec, where: str) -> None:
    bad = [layer for layer in layers if type(layer) is not int or not 0 <= layer < spec.layers]
    if bad or len(set(layers)) != len(layers):
        raise InputError(
            f"{where} lists layers {bad or layers}: expected distinct numbers from 0 to {spec.layers - 1} of model "
            f"'{spec.name}'"
        )


def _check_tensors(found: Mapping[str, tuple[str, Shape]], layers: list[int], spec: ModelSpec, where: str) -> None:
    expected: dict[str, tuple[Shape, tuple[str, ...]]] = {}
    for layer in layers:
        name = _prefix(layer)
        shape = found.get(f"{name}.delta_down", ("", ()))[1]
        rank = shape[0] if len(shape) == 2 else 0
        weight = {"delta_up": (spec.dim, rank), "delta_down": (rank, spec.dim)}
        for part, wanted in (weight if rank else {"delta_weight": (spec.dim, spec.dim)}).items():
            expected[f"{name}.{part}"] = wanted, FLOATS
        if f"{name}.delta_bias" in found:
            expected[f"{name}.delta_bias"] = (spec.dim,), ("F32",)
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        raise InputError(
            f"{where}: {len(missing)} tensors missing{few(missing)}, {len(unexpected)} unexpected{few(unexpected)}: "
            "expected those of the layers in its header"
        )
    for name, (code, shape) in sorted(found.items()):
        if shape != expected[name][0] or code not in expected[name][1]:
            raise InputError(
                f"{where}: {name} is {code} {shape}: expected {' or '.join(expected[name][1])} {expected[name][0]}"
            )
