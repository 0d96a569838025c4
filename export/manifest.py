"""`ispa.json`: what a bundle holds, where it came from, what was done to every layer, and the digest of every file.

The manifest holds no time and no path, so the same bundle written twice is the same bytes. Importing this file does
not import torch. A field that is added or changes its meaning raises `SCHEMA_VERSION`; a reader refuses versions it
does not know rather than guess.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ispa_deploy import __version__
from ispa_deploy.errors import InputError
from ispa_deploy.specs import ModelSpec

MANIFEST = "ispa.json"
SCHEMA_VERSION = 1
SOURCE_KINDS = ("demo", "random", "checkpoint")
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
# Far above any real manifest; keeps a hostile one from filling the memory.
MAX_BYTES = 64 << 20

_NUMBER_OR_NONE = (int, float, type(None))
_FIELDS = {
    "schema_version": int, "model": dict, "dtype": str, "scheme": str, "recipe": dict, "layers": list, "source": dict,
    "versions": dict, "files": dict,
}  # fmt: skip
_RECIPE = {"keep": list, "skip": list}
# Of the recipe, where there is something to say.
_OPTIONAL = ("plan", "calibration")
_LAYER = {
    "name": str, "shape": list, "quantised": bool, "why": str, "sqnr_db": _NUMBER_OR_NONE, "bytes_before": int,
    "bytes_after": int,
}  # fmt: skip
_SOURCE = {"kind": str, "name": str, "sha256": (str, type(None))}
_FILE = {"sha256": str, "bytes": int}
_COUNTS = (
    "dim", "ffn_dim", "heads", "layers", "freq_dim", "text_dim", "text_len", "latent_channels", "latent_height",
    "latent_width", "chunk_frames", "window_frames", "max_frames", "fps",
    "spatial_stride",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """Where the floating weights came from. `kind`: `demo`, `random` or `checkpoint`; `name` is never a whole path."""

    kind: str
    name: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class FileDigest:
    """One file of a bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One linear layer. `shape` is (N, K); `sqnr_db` is of the weight, None where it was kept or nothing was lost."""

    name: str
    shape: tuple[int, int]
    quantised: bool
    why: str
    sqnr_db: float | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `ispa.json`. `dtype` is of the tensors that stayed floating point; `files` is all but itself.

    `plan`: that of `quant.plan.Plan.to_dict`, where the layers' schemes were measured. `calibration`: that of
    `export.calibrate.Calibration.to_dict`, where activations were.
    """

    spec: ModelSpec
    dtype: str
    scheme: str
    keep: tuple[str, ...]
    skip: tuple[str, ...]
    layers: tuple[Layer, ...]
    source: Source
    versions: Mapping[str, str]
    files: Mapping[str, FileDigest]
    plan: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None

    @property
    def base_sha256(self) -> str:
        """Identity of the bundle: sha256 over the file digests, sorted by file name."""
        return combined(self.files[name].sha256 for name in sorted(self.files))

    @property
    def quantised(self) -> tuple[str, ...]:
        """Names of the layers held in 8 bits."""
        return tuple(layer.name for layer in self.layers if layer.quantised)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        layers = [asdict(layer) for layer in self.layers]
        for layer in layers:
            layer.update(shape=list(layer["shape"]), sqnr_db=finite(layer["sqnr_db"]))
        optional = {name: dict(value) for name in _OPTIONAL if (value := getattr(self, name)) is not None}
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.spec.to_dict(),
            "dtype": self.dtype,
            "scheme": self.scheme,
            "recipe": {"keep": list(self.keep), "skip": list(self.skip), **optional},
            "layers": layers,
            "source": asdict(self.source),
            "versions": dict(self.versions),
            "files": {name: asdict(digest) for name, digest in self.files.items()},
        }

    @staticmethod
    def from_dict(fields: Any, where: str = MANIFEST) -> Manifest:
        """Inverse of `to_dict`; an unknown version, a missing, unknown or mistyped field is refused by its name."""
        known = fields.get("schema_version", SCHEMA_VERSION) if isinstance(fields, dict) else SCHEMA_VERSION
        if known != SCHEMA_VERSION:
            raise InputError(
                f"'{where}' has schema_version {known!r}: this version reads {SCHEMA_VERSION}; upgrade ispa-deploy or "
                "write the bundle again"
            )
        checked(fields, _FIELDS, where)
        optional = {name: dict for name in _OPTIONAL if name in fields["recipe"]}
        recipe = checked(fields["recipe"], {**_RECIPE, **optional}, f"{where}: recipe")
        source = Source(**checked(fields["source"], _SOURCE, f"{where}: source"))
        one_of(source.kind, SOURCE_KINDS, f"{where}: source.kind")
        one_of(fields["dtype"], FLOAT_DTYPES, f"{where}: dtype")
        return Manifest(
            spec=_spec(fields["model"], where),
            dtype=fields["dtype"],
            scheme=fields["scheme"],
            keep=tuple(map(str, recipe["keep"])),
            skip=tuple(map(str, recipe["skip"])),
            layers=tuple(_layer(row, f"{where}: layers[{index}]") for index, row in enumerate(fields["layers"])),
            source=source,
            versions={str(name): str(value) for name, value in fields["versions"].items()},
            files={name: _digest(name, row, where) for name, row in fields["files"].items()},
            **{name: recipe.get(name) for name in _OPTIONAL},
        )


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of the bundle in `folder`; InputError naming the file for a folder that is no bundle."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise InputError(
            f"'{folder}' is no bundle: expected a folder with {MANIFEST}; write one with `ispa-deploy quantize`"
        )
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"'{path}' has {path.stat().st_size} bytes: expected a manifest of at most {MAX_BYTES}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is not JSON ({str(error).splitlines()[0]}): write the bundle again") from None
    return Manifest.from_dict(fields, str(path))


def dump_json(value: Any) -> bytes:
    """Sorted keys, one trailing newline: the same value is always the same bytes. NaN and Inf are our own slips."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def finite(value: float | None) -> float | None:
    """JSON knows neither NaN nor Inf."""
    return value if value is not None and math.isfinite(value) else None


def combined(digests: Iterable[str]) -> str:
    """sha256 over hexadecimal digests in the given order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def file_digest(path: Path) -> FileDigest:
    """Read the whole file."""
    with path.open("rb") as file:
        return FileDigest(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def current_versions() -> dict[str, str]:
    """What writes now."""
    return {"ispa-deploy": __version__, "torch": version("torch"), "python": platform.python_version()}


def checked(fields: Any, kinds: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`fields` if it is an object with exactly these fields of these types; InputError names what is wrong."""
    if not isinstance(fields, dict):
        raise InputError(f"'{where}' is {type(fields).__name__}: expected an object with {', '.join(sorted(kinds))}")
    missing, unknown = sorted(set(kinds) - set(fields)), sorted(set(fields) - set(kinds))
    if missing or unknown:
        parts = [f"{text} {names}" for text, names in (("lacks", missing), ("has unknown", unknown)) if names]
        raise InputError(f"'{where}' {' and '.join(parts)}: expected the fields {', '.join(sorted(kinds))}")
    for name, kind in kinds.items():
        # A bool is an int to Python, but no count.
        if not isinstance(fields[name], kind) or (isinstance(fields[name], bool) and kind is not bool):
            raise InputError(f"'{where}' has {name} = {fields[name]!r:.60}: expected another type; write it again")
    return fields


def one_of(value: str, known: Iterable[str], where: str) -> None:
    """InputError unless `value` is in the list."""
    if value not in known:
        raise InputError(f"'{where}' is '{value}': expected one of {', '.join(known)}")


def _spec(fields: dict[str, Any], where: str) -> ModelSpec:
    bad = [name for name in _COUNTS if name in fields and (type(fields[name]) is not int or fields[name] < 1)]
    if bad:
        raise InputError(f"'{where}': model.{bad[0]} is {fields[bad[0]]!r:.60}: expected a whole number of at least 1")
    patch = fields.get("patch", [1, 1, 1])
    if not isinstance(patch, list) or len(patch) != 3 or not all(type(n) is int and n > 0 for n in patch):
        raise InputError(f"'{where}': model.patch is {patch!r:.60}: expected three whole numbers of at least 1")
    return ModelSpec.from_dict(fields)


def _layer(row: Any, where: str) -> Layer:
    fields = checked(row, _LAYER, where)
    shape = fields["shape"]
    if len(shape) != 2 or not all(type(n) is int for n in shape):
        raise InputError(f"'{where}' has shape {shape!r:.60}: expected [N, K]")
    return Layer(**{**fields, "shape": (shape[0], shape[1])})


def _digest(name: str, row: Any, where: str) -> FileDigest:
    if Path(name).name != name or name in ("", ".", "..", MANIFEST):
        raise InputError(f"'{where}' lists the file '{name}': expected plain names inside the bundle")
    return FileDigest(**checked(row, _FILE, f"{where}: files.{name}"))
