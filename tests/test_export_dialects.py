"""Laws of the dialects: out and back is the same bundle; what a bundle cannot hold is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import export.dialects.convert
from cli import app
from export import open_bundle, read_manifest
from export.dialects import DIALECTS, export_bundle, import_dialect, recognise
from export.dialects.names import from_diffusers, to_diffusers
from export.dialects.table import amax_of
from ispa_deploy.errors import InputError, IspaError, RunError
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.specs import SPECS
from quant.layers import WideInt8Linear
from tests.bundles import ONE_STEP, SHARD, contents, dequantised, tiny_bundle

LAYER = "blocks.1.ffn.0"  # (64, 48)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


def target(folder: Path, dialect: str) -> Path:
    """A name for an export in a dialect."""
    return folder / (f"as-{dialect}" if DIALECTS[dialect].folder else f"as-{dialect}.safetensors")


def weights(path: Path) -> Path:
    return path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path


def metadata(path: Path) -> dict[str, str]:
    with safe_open(weights(path), "pt") as file:
        text: dict[str, str] = file.metadata()
        return text


# Out and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_out_and_back_is_the_same_bundle_byte_for_byte(tmp_path: Path, dialect: str, dtype: torch.dtype) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", dtype=dtype)
    path = export_bundle(bundle, dialect, target(tmp_path, dialect))
    assert recognise(load_file(weights(path)), metadata(path)) == DIALECTS[dialect]
    for origin in ("auto", dialect):
        assert contents(import_dialect(path, origin, tmp_path / origin)) == contents(bundle)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_which_activations_are_wide_travels_along(tmp_path: Path, dialect: str) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", wide=(LAYER,))
    path = export_bundle(bundle, dialect, target(tmp_path, dialect))
    back = import_dialect(path, "auto", tmp_path / "back")
    assert contents(back) == contents(bundle)
    assert type(open_bundle(back).model.get_submodule(LAYER)) is WideInt8Linear
    if dialect == "diffusers":
        groups = json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"].values()
        assert {group["input_activations"]["num_bits"]: len(group["targets"]) for group in groups}[16] == 1


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_same_export_is_the_same_bytes(bundle: Path, tmp_path: Path, dialect: str) -> None:
    first, again = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    export_bundle(bundle, dialect, first)
    export_bundle(bundle, dialect, again)
    assert weights(first).read_bytes() == weights(again).read_bytes()


STORED: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {
    "torchao": {
        f"{LAYER}._weight_qdata": (torch.int8, (64, 48)), f"{LAYER}._weight_scale": (torch.float32, (64, 1)),
        f"{LAYER}._weight_zero_point": (torch.int8, (64, 1)), f"{LAYER}.bias": (torch.float32, (64,)),
    },
    "diffusers-torchao": {
        "blocks.1.ffn.net.0.proj._weight_qdata": (torch.int8, (64, 48)),
        "blocks.1.ffn.net.0.proj._weight_scale": (torch.float32, (64, 1)),
        "blocks.1.ffn.net.0.proj._weight_zero_point": (torch.int8, (64, 1)),
        "blocks.1.ffn.net.0.proj.bias": (torch.float32, (64,)),
    },
    "bitsandbytes": {
        f"{LAYER}.weight": (torch.int8, (64, 48)), f"{LAYER}.SCB": (torch.float32, (64,)),
        f"{LAYER}.weight_format": (torch.uint8, ()), f"{LAYER}.bias": (torch.float32, (64,)),
    },
    "diffusers": {
        "blocks.1.ffn.net.0.proj.weight": (torch.int8, (64, 48)),
        "blocks.1.ffn.net.0.proj.weight_scale": (torch.float32, (64, 1)),
        "blocks.1.ffn.net.0.proj.bias": (torch.float32, (64,)),
    },
    "comfyui": {
        f"{LAYER}.weight": (torch.int8, (64, 48)), f"{LAYER}.weight_scale": (torch.float32, (64, 1)),
        f"{LAYER}.comfy_quant": (torch.uint8, (29,)), f"{LAYER}.bias": (torch.float32, (64,)),
    },
    "lightx2v": {
        f"{LAYER}.weight": (torch.int8, (64, 48)), f"{LAYER}.weight_scale": (torch.float32, (64, 1)),
        f"{LAYER}.bias": (torch.float32, (64,)),
    },
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_layout_is_the_dialect_s(bundle: Path, tmp_path: Path, dialect: str) -> None:
    """Golden: every tensor of one layer, with the numbers of the bundle."""
    path = export_bundle(bundle, dialect, target(tmp_path, dialect))
    stored, ours = load_file(weights(path)), load_file(bundle / SHARD)
    layer = "blocks.1.ffn.net.0.proj." if dialect.startswith("diffusers") else f"{LAYER}."
    found = {name: (t.dtype, tuple(t.shape)) for name, t in stored.items() if name.startswith(layer)}
    assert found == STORED[dialect]
    entry = DIALECTS[dialect]
    assert torch.equal(stored[layer[:-1] + entry.codes], ours[f"{LAYER}.weight"])
    scale = stored[layer[:-1] + entry.scale].reshape(-1, 1)
    assert torch.equal(scale / 127 if dialect == "bitsandbytes" else scale, ours[f"{LAYER}.weight_scale"])
    assert metadata(path)["format"] == "pt"


def test_scb_gives_back_the_very_scale_of_a_division_by_127_and_any_other_to_one_ulp() -> None:
    amax = torch.rand(200_000) * torch.tensor(10.0) ** torch.randint(-30, 30, (200_000,))
    made = (amax / 127)[:, None]
    assert torch.equal(amax_of(made) / 127, made[:, 0])
    assert torch.equal(amax_of(torch.tensor([[2.0**-126]])) / 127, torch.tensor([2.0**-126])), "a row of zeros"
    any_scale = torch.rand(200_000, 1) + 1e-3
    back = amax_of(any_scale) / 127
    bits = back.view(torch.int32) - any_scale[:, 0].view(torch.int32)
    assert bits.abs().max() <= 1
    assert (bits != 0).any(), "so that the exact half of the law says something"


def test_names_map_one_to_one_and_swap_the_norms() -> None:
    names = list(CausalWanDiT(ONE_STEP).state_dict())
    theirs = [to_diffusers(name) for name in names]
    assert len(set(theirs)) == len(names)
    assert [from_diffusers(name) for name in theirs] == names
    assert to_diffusers("blocks.12.norm3.weight") == "blocks.12.norm2.weight"
    assert to_diffusers("blocks.0.self_attn.o.weight_scale") == "blocks.0.attn1.to_out.0.weight_scale"
    assert to_diffusers("head.modulation") == "scale_shift_table"
    for name in ("blocks.0.audio.weight", "img_emb.proj.0.weight", "blocks.0.norm4", ""):
        with pytest.raises(InputError, match="none of Wan's text-to-video network"):
            to_diffusers(name)


# Files made elsewhere


def foreign(change: Callable[[dict[str, Tensor]], object] = lambda tensors: None) -> Callable[[Path, Path], Path]:
    """Writes a bundle's tensors, changed, as a plain file without our header."""

    def write(bundle: Path, path: Path) -> Path:
        tensors = load_file(bundle / SHARD)
        change(tensors)
        save_file(tensors, path)
        return path

    return write


def prefixed(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[f"model.diffusion_model.{name}"] = tensors.pop(name)
    marker = torch.tensor(list(b'{"format":"int8_tensorwise","full_precision_matrix_mult":false}'), dtype=torch.uint8)
    tensors[f"model.diffusion_model.{LAYER}.comfy_quant"] = marker


def flat_scales(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name] = tensors[name].flatten()


@pytest.mark.parametrize("change", [lambda tensors: None, prefixed, flat_scales])
def test_a_file_made_elsewhere_needs_its_model_and_keeps_its_numbers(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    monkeypatch.setitem(SPECS, "tiny", ONE_STEP)
    path = foreign(change)(bundle, tmp_path / "foreign.safetensors")
    with pytest.raises(InputError, match="does not say its model: pass --model"):
        import_dialect(path, "auto", tmp_path / "back")
    back = import_dialect(path, "auto", tmp_path / "back", model="tiny")
    assert (back / SHARD).read_bytes() == (bundle / SHARD).read_bytes()
    assert open_bundle(back).base_sha256 == open_bundle(bundle).base_sha256
    ours, theirs = read_manifest(bundle), read_manifest(back)
    assert (theirs.source.kind, theirs.source.name) == ("checkpoint", "foreign.safetensors")
    assert [(row.name, row.shape, row.quantised) for row in theirs.layers] == [
        (row.name, row.shape, row.quantised) for row in ours.layers
    ]
    assert [row.bytes_before for row in theirs.layers] == [row.bytes_before for row in ours.layers]
    assert [row.bytes_after for row in theirs.layers] == [row.bytes_after for row in ours.layers]


def test_one_scale_for_a_whole_weight_becomes_one_per_row(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SPECS, "tiny", ONE_STEP)
    scalar = foreign(lambda tensors: tensors.update({f"{LAYER}.weight_scale": torch.tensor(0.25).bfloat16()}))
    back = import_dialect(scalar(bundle, tmp_path / "f.safetensors"), "comfyui", tmp_path / "back", model="tiny")
    weight = load_file(bundle / SHARD)[f"{LAYER}.weight"]
    assert torch.equal(dequantised(back)[f"{LAYER}.weight"], weight * 0.25)


# What is refused


def edited(dialect: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path, Path], Path]:
    """Exports in a dialect and then changes tensors of the file, header kept."""

    def write(bundle: Path, path: Path) -> Path:
        export_bundle(bundle, dialect, path)
        tensors, text = load_file(weights(path)), metadata(path)
        change(tensors)
        save_file(tensors, weights(path), text)
        return path

    return write


def rewritten(key: str, text: str) -> Callable[[Path, Path], Path]:
    """Exports and then changes one text of the header."""

    def write(bundle: Path, path: Path) -> Path:
        export_bundle(bundle, "comfyui", path, overwrite=True)
        save_file(load_file(path), path, {**metadata(path), key: text})
        return path

    return write


def with_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], Path]:
    def write(bundle: Path, path: Path) -> Path:
        export_bundle(bundle, "comfyui", path)
        fields = json.loads(metadata(path)["ispa_bundle"])
        change(fields)
        return rewritten("ispa_bundle", json.dumps(fields))(bundle, path)

    return write


def marker(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


REFUSED: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "rotated weight": (
        edited("comfyui", lambda t: t.update({
            f"{LAYER}.comfy_quant": marker(b'{"format": "int8_tensorwise", "convrot": true}')})),
        r"ffn\.0\.comfy_quant asks for more than symmetric scales per row",
    ),
    "other format": (
        edited("comfyui", lambda t: t.update({f"{LAYER}.comfy_quant": marker(b'{"format": "nvfp4"}')})),
        r"comfy_quant asks for more",
    ),
    "marker is no JSON": (
        edited("comfyui", lambda t: t.update({f"{LAYER}.comfy_quant": marker(b"\xff{")})), r"comfy_quant asks for more",
    ),
    "zero point": (
        edited("torchao", lambda t: t[f"{LAYER}._weight_zero_point"].fill_(3)), r"_weight_zero_point asks for more",
    ),
    "column order": (edited("bitsandbytes", lambda t: t[f"{LAYER}.weight_format"].fill_(1)), "weight_format asks"),
    "activation scale": (
        edited("lightx2v", lambda t: t.update({f"{LAYER}.input_scale": torch.ones(1)})),
        r"1 unexpected \(blocks\.1\.ffn\.0\.input_scale\)",
    ),
    "smoothed activations": (
        edited("torchao", lambda t: t.update({f"{LAYER}._weight_act_pre_scale": torch.ones(48)})), "1 unexpected",
    ),
    "no scale": (
        edited("lightx2v", lambda t: t.pop(f"{LAYER}.weight_scale")), r"blocks\.1\.ffn\.0 has int8 codes and no",
    ),
    "scales of another layer": (
        edited("lightx2v", lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(32, 1)})),
        r"has shape \(32, 1\): expected 1 or 64 scales",
    ),
    "scale of zero": (
        edited("lightx2v", lambda t: t[f"{LAYER}.weight_scale"].zero_()), "holds a scale of 0 or less",
    ),
    "scale of infinity": (
        edited("bitsandbytes", lambda t: t[f"{LAYER}.SCB"].fill_(float("inf"))), r"ffn\.0\.SCB holds 64 NaN or Inf",
    ),
    "NaN": (
        edited("lightx2v", lambda t: t["head.head.weight"].fill_(float("nan"))), r"head\.head\.weight holds",
    ),
    "tensor missing": (
        edited("diffusers", lambda t: t.pop("proj_out.bias")), r"1 tensors missing \(head\.head\.bias\)",
    ),
    "tensor misshapen": (
        edited("comfyui", lambda t: t.update({"head.head.bias": torch.ones(3)})),
        r"head\.head\.bias \(3,\) for \(16,\)",
    ),
    "codes in a float's place": (
        edited("comfyui", lambda t: t.update({"head.head.bias": torch.ones(16, dtype=torch.int8)})),
        r"head\.head\.bias is I8: expected F32",
    ),
    "floating point of 8 bits": (
        edited("comfyui", lambda t: t.update({"head.head.bias": torch.ones(16).to(torch.float8_e4m3fn)})),
        r"head\.head\.bias is F8_E4M3: expected F32",
    ),
    "layer floating again": (
        edited("lightx2v", lambda t: (t.pop(f"{LAYER}.weight_scale"),
                                      t.update({f"{LAYER}.weight": torch.ones(64, 48)}))),
        "name different 8-bit layers",
    ),
    "nothing quantised": (
        foreign(lambda t: [t.pop(name) for name in list(t) if "weight_scale" in name]), "is in no dialect",
    ),
    "manifest no JSON": (rewritten("ispa_bundle", "{"), "header that is not JSON"),
    "manifest no object": (rewritten("ispa_bundle", "[]"), "a list for a manifest"),
    "manifest of the future": (with_manifest(lambda m: m.update(schema_version=99)), "has schema_version 99"),
    "manifest without end": (with_manifest(lambda m: m["model"].update(layers=10**9)), "too few for 1000000000 layers"),
    "scheme unknown": (with_manifest(lambda m: m.update(scheme="w1a1")), "unknown scheme 'w1a1'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_bundle_cannot_hold_is_refused_in_one_line(bundle: Path, tmp_path: Path, kind: str) -> None:
    make, message = REFUSED[kind]
    path = make(bundle, tmp_path / "made.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        import_dialect(path, "auto", tmp_path / "back")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"


def test_requests_that_make_no_sense_are_refused(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    path = export_bundle(bundle, "comfyui", tmp_path / "c.safetensors")
    wrong: list[tuple[Callable[[], Path], str]] = [
        (lambda: export_bundle(bundle, "gguf", out), "unknown dialect 'gguf': expected one of bitsandbytes"),
        (lambda: import_dialect(path, "gguf", out), "unknown dialect 'gguf': expected one of auto"),
        (lambda: export_bundle(tmp_path / "none", "comfyui", out), "is no bundle"),
        (lambda: export_bundle(bundle, "comfyui", tmp_path / "out.pt"), r"suffix '\.pt': expected '\.safetensors'"),
        (lambda: export_bundle(bundle, "comfyui", path), "exists: choose another name"),
        (lambda: export_bundle(bundle, "diffusers", bundle, overwrite=True), "exists and has no diffusion_pytorch"),
        (lambda: export_bundle(bundle, "diffusers", tmp_path / "a" / "b"), "its folder does not exist"),
        (lambda: export_bundle(tiny_bundle(tmp_path / "f", "none"), "comfyui", out), "has no 8-bit layers"),
        (lambda: import_dialect(path, "auto", bundle), "exists: choose another name"),
        (lambda: import_dialect(bundle, "auto", out), "is a folder without diffusion_pytorch_model"),
        (lambda: import_dialect(path, "torchao", out), "has no int8 codes in dialect torchao"),
        (lambda: import_dialect(path, "auto", out, model="demo"), "was made from model 'tiny', not 'demo'"),
    ]
    for request, message in wrong:
        with pytest.raises(InputError, match=message):
            request()
    assert not out.exists()


def test_a_damaged_bundle_is_not_exported(bundle: Path, tmp_path: Path) -> None:
    shard = bundle / SHARD
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(InputError, match=rf"{SHARD} has sha256 .*copy it again"):
        export_bundle(bundle, "comfyui", tmp_path / "out.safetensors")


@pytest.mark.parametrize("dialect", ["comfyui", "diffusers-torchao"])
def test_a_full_disk_leaves_what_was_there(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dialect: str
) -> None:
    path = export_bundle(bundle, dialect, target(tmp_path, dialect))
    before, listed = weights(path).read_bytes(), sorted(tmp_path.rglob("*"))
    real = export.dialects.convert.write_tensors

    def full(file: Path, *rest: Any) -> None:
        real(file, *rest)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.dialects.convert, "write_tensors", full)
    with pytest.raises(RunError, match="No space left on device; nothing is left of it"):
        export_bundle(bundle, dialect, path, overwrite=True)
    assert weights(path).read_bytes() == before
    assert sorted(tmp_path.rglob("*")) == listed
    monkeypatch.undo()
    export_bundle(bundle, dialect, path, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == listed


# The command


def test_the_command_goes_out_and_back(bundle: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "c.safetensors", tmp_path / "back"
    done = CliRunner().invoke(app, ["export", str(bundle), "--to", "comfyui", "-o", str(out), "--json"])
    assert json.loads(done.stdout) == {"source": str(bundle), "dialect": "comfyui", "path": str(out)}
    shutil.move(bundle, tmp_path / "away")
    done = CliRunner().invoke(app, ["export", str(out), "--from", "auto", "-o", str(back)])
    assert done.exit_code == 0
    assert contents(back) == contents(tmp_path / "away")


@pytest.mark.parametrize("flags", [[], ["--to", "comfyui", "--from", "auto"], ["--to", "comfyui", "--model", "demo"]])
def test_the_command_wants_one_direction(bundle: Path, tmp_path: Path, flags: list[str]) -> None:
    done = CliRunner().invoke(app, ["export", str(bundle), "-o", str(tmp_path / "x.safetensors"), *flags])
    assert isinstance(done.exception, IspaError)
    assert "one of --to DIALECT and --from DIALECT" in str(done.exception)
