"""Laws of `inspect`: it tells what was written, finds damage without failing, and loads no tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from export import open_bundle
from export.deltas import save_deltas
from export.dialects import export_bundle
from export.inspect import describe
from ispa_deploy.absorb.solve import Ridge
from ispa_deploy.delta import Delta
from ispa_deploy.errors import InputError
from tests.bundles import SHARD, tiny_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


def test_a_bundle_is_told_as_it_opens(bundle: Path) -> None:
    document, opened = describe(bundle), open_bundle(bundle)
    assert json.loads(json.dumps(document)) == document
    assert (document["kind"], document["model"], document["scheme"]) == ("bundle", "tiny", "w8a8-int8")
    assert document["layers_quantised"] == len(opened.manifest.quantised) == 20
    assert sum(document["layers_kept"].values()) == len(opened.manifest.layers) - 20
    assert document["bytes"] == sum(path.stat().st_size for path in bundle.iterdir() if path.name != "ispa.json")
    assert document["base_sha256"] == opened.base_sha256
    assert document["versions"]["torch"] == torch.__version__
    assert (document["intact"], set(document["files"].values())) == (True, {"ok"})
    worst = document["worst_weight"]
    assert worst["sqnr_db"] == min(row.sqnr_db for row in opened.manifest.layers if row.sqnr_db is not None)
    linear = document["linear_bytes"]
    assert linear["after"] < 0.6 * linear["before"]


def test_damage_is_told_by_file_and_not_raised(bundle: Path) -> None:
    (bundle / "config.json").unlink()
    raw = bytearray((bundle / SHARD).read_bytes())
    raw[-1] ^= 1
    (bundle / SHARD).write_bytes(raw)
    index = bundle / "model.safetensors.index.json"
    size = index.stat().st_size
    index.write_bytes(index.read_bytes() + b"\n")
    document = describe(bundle)
    assert not document["intact"]
    assert document["files"]["config.json"] == "is missing"
    assert document["files"]["model.safetensors.index.json"] == f"has {size + 1} bytes, expected {size}"
    assert document["files"][SHARD].startswith("has sha256 ")


def test_deltas_are_told_from_their_header(tmp_path: Path) -> None:
    deltas = {layer: Delta(torch.ones(48, 48), torch.ones(48)) for layer in (0, 2)}
    path = save_deltas(
        tmp_path / "d.safetensors", deltas, base_sha256="ab" * 32, mode="side", policy="absorb", recent_frames=3,
        ratio=0.5, ranking="heldout", ridge=Ridge(relative=1e-2), records=[],
    )  # fmt: skip
    document = describe(path)
    assert (document["kind"], document["mode"], document["layers"]) == ("deltas", "side", [0, 2])
    assert (document["base_sha256"], document["recent_frames"]) == ("ab" * 32, 3)
    assert document["ridge"]["relative"] == 1e-2
    assert document["tensors"] == {
        "blocks.*.self_attn.o.delta_bias": "2 x F32 [48]",
        "blocks.*.self_attn.o.delta_weight": "2 x F32 [48, 48]",
    }


def test_any_safetensors_file_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "blocks.0.a": torch.ones(2, 3), "blocks.1.a": torch.ones(2, 3), "blocks.2.a": torch.ones(4).half(),
        "b": torch.tensor(1, dtype=torch.int64), "blocks.0.b.1": torch.ones(1),
    }  # fmt: skip
    save_file(tensors, path, {"by": "someone", "long": "x" * 1000})
    document = describe(path)
    assert document == {
        "kind": "safetensors", "path": str(path), "bytes": path.stat().st_size, "dialect": None,
        "dtypes": {"F16": 1, "F32": 3, "I64": 1},
        "metadata": {"by": "someone", "long": "x" * 200 + "... (1000 characters)"},
        "tensors": {"b": "I64 []", "blocks.*.a": "F16 [4], 2 x F32 [2, 3]", "blocks.*.b.1": "F32 [1]"},
    }  # fmt: skip


def test_dialects_are_recognised(bundle: Path, tmp_path: Path) -> None:
    document = describe(export_bundle(bundle, "bitsandbytes", tmp_path / "b.safetensors"))
    assert document["dialect"] == "bitsandbytes"
    assert document["tensors"]["blocks.*.ffn.0.weight"] == "2 x I8 [64, 48]"


def test_what_is_none_of_them_is_refused(tmp_path: Path) -> None:
    pickle = tmp_path / "p.safetensors"
    torch.save({}, pickle)
    for path, message in ((tmp_path, "is no bundle"), (tmp_path / "no", "does not exist"), (pickle, "is a pickle")):
        with pytest.raises(InputError, match=message):
            describe(path)
