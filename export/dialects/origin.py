"""What a dialect's file says of the bundle that it was made from, or what stands in where it says nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from export.manifest import FLOAT_DTYPES, Layer, Manifest, Source, file_digest
from export.sources import empty
from export.tensors import CODES, FLOATS, Entry, check_names, check_shapes
from ispa_deploy.errors import InputError, known_names
from ispa_deploy.specs import spec_for
from quant.convert import Report, Row, empty_quantised_
from quant.plan import Plan
from quant.schemes import SCHEMES

HEADER_KEY = "ispa_bundle"
# What int8 codes with a scale per row are, wherever they were made.
SCHEME = "w8a8-int8"
_TRAVELS = ("schema_version", "model", "dtype", "scheme", "recipe", "layers", "source")


def travelling(manifest: Manifest) -> str:
    """The part of the manifest that every dialect of a bundle carries in its header; the bundle's files stay behind."""
    fields = manifest.to_dict()
    return json.dumps({name: fields[name] for name in _TRAVELS}, sort_keys=True, allow_nan=False)


def origin_of(
    metadata: Mapping[str, str], quantised: tuple[str, ...], model: str | None, file: Path, state: Mapping[str, Entry]
) -> Manifest:
    """The manifest that travelled, or for a file made elsewhere one of its `model`; it lists no files.

    InputError naming the file: no model is known, or header, `model` and tensors contradict each other.
    """
    text = metadata.get(HEADER_KEY)
    if text is None:
        return _elsewhere(quantised, model, file, state)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"'{file}' has a header that is not JSON: the file is damaged") from None
    if not isinstance(fields, dict):
        raise InputError(f"'{file}' has a {type(fields).__name__} for a manifest: the file is damaged")
    manifest = Manifest.from_dict({**fields, "versions": {}, "files": {}}, f"{file}: {HEADER_KEY}")
    if manifest.scheme not in SCHEMES:
        raise known_names("scheme", manifest.scheme, SCHEMES)
    if model not in (None, manifest.spec.name):
        raise InputError(f"'{file}' was made from model '{manifest.spec.name}', not '{model}': leave --model out")
    if set(manifest.quantised) != set(quantised):
        raise InputError(f"'{file}': its header and its tensors name different 8-bit layers; export the bundle again")
    if manifest.spec.layers > len(state):
        # Before the network is built: a hostile number of layers would take for ever.
        raise InputError(f"'{file}' has {len(state)} tensors: too few for {manifest.spec.layers} layers")
    return manifest


def check_state(state: Mapping[str, Entry], manifest: Manifest, where: str) -> None:
    """InputError unless names, shapes and kinds of number are those of the network, its 8-bit layers included."""
    model = empty(manifest.spec)
    empty_quantised_(model, SCHEMES[manifest.scheme], manifest.quantised)
    expected = model.state_dict()
    check_names(state, expected, where, manifest.spec.name)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    check_shapes({name: entry.shape for name, entry in state.items()}, shapes, where, manifest.spec.name)
    for name, entry in state.items():
        if expected[name].dtype.is_floating_point and CODES[entry.dtype] not in FLOATS:
            raise InputError(f"{where}: {name} is {CODES[entry.dtype]}: expected {' or '.join(FLOATS)}")


def report_of(manifest: Manifest) -> Report:
    """The manifest's layers as the report that writing a bundle asks for."""
    plan = Plan.from_dict(manifest.plan, "recipe.plan") if manifest.plan is not None else None
    rows = tuple(Row(**asdict(layer)) for layer in manifest.layers)
    return Report(manifest.scheme, rows, plan, manifest.calibration)


def _elsewhere(quantised: tuple[str, ...], model: str | None, file: Path, state: Mapping[str, Entry]) -> Manifest:
    if model is None:
        raise InputError(f"'{file}' does not say its model: pass --model, one of those `ispa-deploy models` lists")
    spec = spec_for(model)
    patch = state.get("patch_embedding.weight")
    dtype = str(patch.dtype).removeprefix("torch.") if patch else "absent"
    if patch is None or dtype not in FLOAT_DTYPES:
        raise InputError(f"'{file}': patch_embedding.weight is {dtype}: expected {' or '.join(FLOAT_DTYPES)}")
    rows = []
    for name, linear in empty(spec).named_modules():
        if isinstance(linear, nn.Linear):
            count = linear.out_features * linear.in_features
            bytes_before = (count + linear.out_features) * patch.dtype.itemsize
            row = Layer(
                name=name, shape=(linear.out_features, linear.in_features), quantised=False, why="kept elsewhere",
                sqnr_db=None, bytes_before=bytes_before, bytes_after=bytes_before,
            )  # fmt: skip
            if name in quantised:
                after = count + 8 * linear.out_features  # codes, and in float32 a scale and a bias per output
                row = replace(row, quantised=True, why="quantised elsewhere", bytes_after=after)
            rows.append(row)
    return Manifest(
        spec=spec, dtype=dtype, scheme=SCHEME, keep=SCHEMES[SCHEME].keep, skip=(), layers=tuple(rows),
        source=Source("checkpoint", file.name, file_digest(file).sha256), versions={}, files={},
    )  # fmt: skip
