"""What lies in a bundle, a delta file or any safetensors file, told without loading a tensor."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from export.deltas import HEADER_KEY as DELTAS_KEY
from export.deltas import read_header
from export.manifest import Manifest, file_digest, read_manifest
from export.tensors import Shape, listing, reading

# A value of a header that a reader still wants to see whole.
SHOWN_CHARS = 200


def describe(path: str | Path) -> dict[str, Any]:
    """A JSON document about a bundle (its folder), a delta file or any other safetensors file; `kind` says which.

    A bundle's files are compared with their digests, and what is wrong with one is told, not raised. InputError: the
    path is none of the three.
    """
    path = Path(path)
    if path.is_dir():
        return _bundle(path)
    with reading(path) as file:
        metadata, found = file.metadata() or {}, listing(file)
    document = {"path": str(path), "bytes": path.stat().st_size}
    if DELTAS_KEY in metadata:
        return {"kind": "deltas", **document, **_deltas(read_header(metadata, str(path))), "tensors": _grouped(found)}
    return {"kind": "safetensors", **document, **_any(found, metadata)}


def file_states(folder: Path, manifest: Manifest) -> dict[str, str]:
    """`ok`, or what is wrong, for every file of a bundle; reads all of them."""
    return {name: _state(folder / name, digest.bytes, digest.sha256) for name, digest in sorted(manifest.files.items())}


def _state(path: Path, size: int, sha256: str) -> str:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes, expected {size}"
    found = file_digest(path).sha256
    return "ok" if found == sha256 else f"has sha256 {found[:12]}, expected {sha256[:12]}"


def _bundle(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    spec, layers = manifest.spec, manifest.layers
    states = file_states(folder, manifest)
    known = [(layer.sqnr_db, layer.name) for layer in layers if layer.sqnr_db is not None]
    return {
        "kind": "bundle",
        "path": str(folder),
        "model": spec.name,
        "geometry": f"{spec.layers} layers x {spec.dim}, {spec.heads} heads, {spec.frame_tokens} tokens per frame",
        "scheme": manifest.scheme,
        "dtype": manifest.dtype,
        "layers_quantised": len(manifest.quantised),
        "layers_kept": dict(Counter(layer.why for layer in layers if not layer.quantised)),
        "worst_weight": dict(zip(("sqnr_db", "name"), min(known), strict=True)) if known else None,
        "bytes": sum(digest.bytes for digest in manifest.files.values()),
        "linear_bytes": {
            "before": sum(layer.bytes_before for layer in layers),
            "after": sum(layer.bytes_after for layer in layers),
        },
        "source": asdict(manifest.source),
        "versions": dict(manifest.versions),
        "base_sha256": manifest.base_sha256,
        "files": states,
        "intact": all(state == "ok" for state in states.values()),
    }


def _deltas(header: Mapping[str, Any]) -> dict[str, Any]:
    shown = ("format_version", "base_sha256", "mode", "policy", "recent_frames", "ratio", "ranking", "ridge", "layers")
    return {name: header[name] for name in (*shown, "stream")}


def _any(found: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str]) -> dict[str, Any]:
    # Late: the dialects import this file.
    from export.dialects.table import recognise

    dialect = recognise(found, metadata)
    return {
        "dialect": dialect.name if dialect else None,
        "dtypes": dict(sorted(Counter(code for code, _ in found.values()).items())),
        "metadata": {name: _shown(text) for name, text in sorted(metadata.items())},
        "tensors": _grouped(found),
    }


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}... ({len(text)} characters)"


def _grouped(found: Mapping[str, tuple[str, Shape]]) -> dict[str, str]:
    """`blocks.*.ffn.0.weight`: `30 x I8 [8960, 1536]`; a model's layers are one line, not thirty."""
    counts = Counter(
        (re.sub(r"(?<=blocks\.)\d+(?=\.)", "*", name), f"{code} {json.dumps(list(shape))}")
        for name, (code, shape) in found.items()
    )
    rows: dict[str, str] = {}
    for (name, text), count in sorted(counts.items()):
        row = f"{count} x {text}" if count > 1 else text
        rows[name] = f"{rows[name]}, {row}" if name in rows else row
    return rows
