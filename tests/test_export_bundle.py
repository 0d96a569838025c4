"""Laws of the bundle: what is written is what is read, bit for bit; damage is refused by name; all or nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import export.write
from export import Bundle, Source, open_bundle, read_manifest, write_bundle
from export.manifest import MANIFEST, Manifest, dump_json
from export.sources import initialise_
from ispa_deploy.errors import InputError, RunError
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions
from ispa_deploy.specs import SPECS, ModelSpec
from quant.convert import prepare_, quantise_
from quant.kernels import runs
from quant.linear import QuantisedLinear
from quant.schemes import SCHEMES
from tests.bundles import SHARD, tiny_bundle

TINY = ModelSpec(
    name="tiny", dim=32, ffn_dim=48, heads=2, layers=2, freq_dim=16, text_dim=24, text_len=6, latent_channels=4,
    latent_height=4, latent_width=4, patch=(1, 1, 1), window_frames=12, sink_frames=1, steps=(1000, 500),
)  # fmt: skip
SOURCE = Source("random", "tiny, seed 0")


def tiny(scheme: str = "w8a8-int8", dtype: torch.dtype = torch.float32, spec: ModelSpec = TINY) -> tuple[Any, Any]:
    """A model whose biases are not zero, and the report of its conversion."""
    model = initialise_(CausalWanDiT(spec).requires_grad_(False).eval())
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            tensor.normal_(0, 0.1)
    model.to(dtype)
    return model, quantise_(model, SCHEMES[scheme], ranges=ranges(model) if "static" in scheme else None)


def ranges(model: Any) -> dict[str, float]:
    """A calibrated range for every linear, no two alike."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {name: 4 + 0.1 * index for index, name in enumerate(names)}


def write(folder: Path, model: Any, report: Any, **options: Any) -> Path:
    return write_bundle(folder, model, scheme=SCHEMES[report.scheme], report=report, source=SOURCE, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def latents(model: CausalWanDiT, prompt: str = "x") -> Tensor:
    from export.bundle import stand_in_rows
    from ispa_deploy.options import open_stream

    stream = open_stream(model, stand_in_rows(prompt, model.spec), StreamOptions(frames=6, policy="full"))
    return torch.cat([chunk.latents for chunk in stream], 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "bundle", *tiny())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_the_reopened_bundle_computes_the_same_bits(tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    if scheme == "bnb-int8" and not runs("bnb", "cpu"):
        pytest.skip("bitsandbytes does not run here")
    model, report = tiny(scheme, dtype)
    bundle = open_bundle(write(tmp_path / "b", model, report), allow_fallback=True)
    prepare_(model, allow_fallback=True)
    assert torch.equal(latents(bundle.model), latents(model))
    assert (bundle.model.dtype, bundle.spec) == (dtype, TINY)
    assert not bundle.model.training
    assert not any(parameter.requires_grad for parameter in bundle.model.parameters())
    int8 = [module for module in bundle.model.modules() if isinstance(module, QuantisedLinear)]
    assert len(int8) == len(report.quantised)
    assert all(layer.weight is None for layer in int8), "kernels are prepared"


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_write_read_write_is_byte_equal(tmp_path: Path, scheme: str) -> None:
    model, report = tiny(scheme, torch.bfloat16)
    first, again = write(tmp_path / "a", model, report), write(tmp_path / "b", model, report)
    assert contents(first) == contents(again)
    reread = write(tmp_path / "c", open_bundle(first, allow_fallback=True).model, report)
    assert contents(first) == contents(reread)


def test_shards_split_and_join(tmp_path: Path) -> None:
    model, report = tiny()
    whole = open_bundle(write(tmp_path / "whole", model, report))
    split = write(tmp_path / "split", model, report, shard_bytes=8000)
    shards = sorted(split.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((split / "model.safetensors.index.json").read_text())
    held = {name: path.name for path in shards for name in load_file(path)}
    assert index["weight_map"] == held
    assert torch.equal(latents(open_bundle(split).model), latents(whole.model))


def test_the_layout_is_what_other_readers_expect(folder: Path) -> None:
    """Golden: names, dtypes and shapes; ComfyUI's header; compressed-tensors' and Wan's configuration."""
    raw = (folder / SHARD).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    spans = [(value["data_offsets"], name) for name, value in header.items() if name != "__metadata__"]
    assert [span[0] for span, _ in sorted(spans)] == [0, *(span[1] for span, _ in sorted(spans))][:-1]
    assert (8 + length) % 8 == 0
    assert len(raw) == 8 + length + max(span[1] for span, _ in spans)
    tensors = load_file(folder / SHARD)
    assert tensors["blocks.0.self_attn.o.weight"].dtype == torch.int8
    assert tensors["blocks.0.ffn.0.weight"].shape == (48, 32)
    assert tensors["blocks.0.ffn.0.weight_scale"].shape == (48, 1)
    assert tensors["blocks.0.ffn.0.weight_scale"].dtype == torch.float32
    assert tensors["head.head.weight"].dtype == torch.float32
    comfy = json.loads(header["__metadata__"]["_quantization_metadata"])
    assert header["__metadata__"]["format"] == "pt"
    assert comfy["format_version"] == "1.0"
    assert comfy["layers"]["blocks.1.cross_attn.q"] == {"format": "int8_tensorwise"}
    assert len(comfy["layers"]) == 20  # ten linears in each of two blocks
    config = json.loads((folder / "config.json").read_text())
    quantisation = config.pop("quantization_config")
    assert config == {
        "_class_name": "WanModel", "model_type": "t2v", "dim": 32, "ffn_dim": 48, "freq_dim": 16, "num_heads": 2,
        "num_layers": 2, "in_dim": 4, "out_dim": 4, "text_len": 6, "eps": 1e-6, "patch_size": [1, 1, 1], "text_dim": 24,
    }  # fmt: skip
    kept = ["text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1"]
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    assert quantisation == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": [*kept, "head.head"],
        "kv_cache_scheme": None,
    }


def test_the_manifest_tells_every_file_and_layer(folder: Path) -> None:
    manifest = read_manifest(folder)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items() if name != "ispa.json"}
    assert {name: file.sha256 for name, file in manifest.files.items()} == digests
    joined = "".join(digests[name] for name in sorted(digests))
    assert manifest.base_sha256 == hashlib.sha256(joined.encode()).hexdigest()
    assert len(manifest.layers) == 26
    assert all(30 < (layer.sqnr_db or 0) < 60 for layer in manifest.layers if layer.quantised)
    assert str(folder.parent) not in (folder / "ispa.json").read_text()
    assert Manifest.from_dict(manifest.to_dict()) == manifest


def test_a_delta_in_place_is_not_written(tmp_path: Path) -> None:
    from ispa_deploy.delta import Delta

    model, report = tiny()
    before = contents(write(tmp_path / "a", model, report))
    model.blocks[0].self_attn.o.set_delta(Delta(torch.randn(32, 32), torch.randn(32)))
    assert contents(write(tmp_path / "b", model, report)) == before


def test_a_cast_on_opening_leaves_codes_and_scales(folder: Path) -> None:
    model = open_bundle(folder, dtype=torch.bfloat16).model
    stored = load_file(folder / SHARD)
    layer = model.blocks[1].ffn[2]
    assert torch.equal(layer.codes(), stored["blocks.1.ffn.2.weight"])
    assert torch.equal(layer.weight_scale, stored["blocks.1.ffn.2.weight_scale"])
    assert torch.equal(model.head.head.weight, stored["head.head.weight"].bfloat16())
    assert latents(model).isfinite().all()


# All or nothing


class Killed(BaseException):
    """What no `except Exception` catches."""


@pytest.mark.parametrize("when", ["config.json", "ispa.json"])
def test_a_write_that_dies_leaves_nothing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    before, real = contents(folder), export.write._write_json

    def dies(path: Path, value: Any) -> Any:
        if path.name == when:
            path.write_bytes(b"half")
            raise Killed
        return real(path, value)

    monkeypatch.setattr(export.write, "_write_json", dies)
    model, report = tiny("none")
    for target, options in ((tmp_path / "new", {}), (folder, {"overwrite": True})):
        with pytest.raises(Killed):
            write(target, model, report, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]
    assert contents(folder) == before


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.write, "write_tensors", full)
    with pytest.raises(RunError, match="No space left on device"):
        write(tmp_path / "b", *tiny())
    assert not list(tmp_path.iterdir())


def test_targets_are_protected(tmp_path: Path, folder: Path) -> None:
    model, report = tiny("none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"mine' exists and is no bundle"):
            write(tmp_path / "mine", model, report, overwrite=overwrite)
    with pytest.raises(InputError, match=r"bundle' exists: choose another name"):
        write(folder, model, report)
    with pytest.raises(InputError, match=r"create '.*nowhere' first"):
        write(tmp_path / "nowhere" / "b", model, report)
    assert read_manifest(write(folder, model, report, overwrite=True)).scheme == "none"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "mine"]


# Damage


def reseal(folder: Path) -> None:
    """Make the manifest's digests true again: what lies behind them must be checked for its own sake."""
    manifest = json.loads((folder / "ispa.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "ispa.json").write_bytes(dump_json(manifest))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def oversize(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])


def edit(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


def poke(name: str, value: float) -> Callable[[Path], None]:
    return edit(lambda tensors: tensors[name].view(-1)[:1].fill_(value))


DAMAGE: dict[str, tuple[Callable[[Path], object], bool, str]] = {
    "missing": (Path.unlink, False, r"safetensors' is missing"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), False, r"has \d+ bytes: expected \d+"),
    "bit flipped": (flip, False, r"has sha256 [0-9a-f]{12}: expected [0-9a-f]{12}"),
    "truncated, resealed": (lambda p: p.write_bytes(p.read_bytes()[:-1]), True, "not a whole safetensors file"),
    "empty, resealed": (lambda path: path.write_bytes(b""), True, "not a whole safetensors file"),
    "no safetensors": (lambda path: path.write_bytes(b"\0" * 4096), True, "not a whole safetensors file"),
    "header too large": (oversize, True, "not a whole safetensors file"),
    "pickle": (lambda path: torch.save({"x": torch.ones(1)}, path), True, "is a pickle, which may carry code"),
    "bare pickle": (lambda path: path.write_bytes(b"\x80\x04N."), True, "is a pickle, which may carry code"),
    "renamed tensor": (
        edit(lambda t: t.update({"blocks.9.norm": t.pop("blocks.0.norm3.bias")})), True,
        r"1 tensors missing \(blocks\.0\.norm3\.bias\), 1 unexpected \(blocks\.9\.norm\): .* 'tiny'",
    ),
    "wrong shape": (
        edit(lambda t: t.update({"head.head.bias": torch.ones(5)})), True,
        r"1 shapes differ from model 'tiny' \(head\.head\.bias \(5,\) for \(4,\)\)",
    ),
    "codes as floats": (
        edit(lambda t: t.update({"blocks.0.ffn.0.weight": t["blocks.0.ffn.0.weight"].float()})), True,
        r"blocks\.0\.ffn\.0\.weight F32: expected I8",
    ),
    "weight in integers": (
        edit(lambda t: t.update({"head.head.bias": t["head.head.bias"].char()})), True,
        r"head\.head\.bias I8: expected F32 or BF16 or F16",
    ),
    "NaN weight": (poke("head.head.weight", float("nan")), True, r"head\.head\.weight holds 1 NaN or Inf"),
    "Inf scale": (poke("blocks.0.ffn.0.weight_scale", float("inf")), True, r"weight_scale holds 1 NaN or Inf"),
    "zero scale": (poke("blocks.0.ffn.0.weight_scale", 0.0), True, "a scale of 0 or less"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_name_in_one_line(folder: Path, kind: str) -> None:
    damage, sealed, message = DAMAGE[kind]
    damage(folder / SHARD)
    if sealed:
        reseal(folder)
    with pytest.raises(InputError, match=message) as caught:
        open_bundle(folder)
    assert "bundle" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_digests_can_be_left_out_but_nothing_else(folder: Path) -> None:
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes().replace(b'"dim": 32', b'"dim": 33'))
    with pytest.raises(InputError, match=r"config\.json' has sha256"):
        open_bundle(folder)
    assert open_bundle(folder, verify=False).spec == TINY


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version": (lambda m: m.update(schema_version=7), "schema_version 7: this version reads 1"),
    "field missing": (lambda m: m.pop("scheme"), r"lacks \['scheme'\]"),
    "field unknown": (lambda m: m.update(extra=1), r"has unknown \['extra'\]"),
    "field mistyped": (lambda m: m.update(files=[]), r"has files = \[\]"),
    "layer field missing": (lambda m: m["layers"][3].pop("why"), r"layers\[3\]' lacks \['why'\]"),
    "layer mistyped": (lambda m: m["layers"][3].update(quantised=1), r"layers\[3\]' has quantised = 1"),
    "scheme": (lambda m: m.update(scheme="w2a2"), "unknown scheme 'w2a2'"),
    "scheme at odds": (lambda m: m.update(scheme="none"), "quantised layers under scheme 'none'"),
    "source": (lambda m: m["source"].update(kind="theft"), "source.kind' is 'theft'"),
    "path outside": (lambda m: m["files"].update({"../x": {"sha256": "", "bytes": 1}}), r"file '\.\./x'"),
    "no heads": (lambda m: m["model"].update(heads=0), r"model\.heads is 0"),
    "patch": (lambda m: m["model"].update(patch=[1, 0, 1]), r"model\.patch is \[1, 0, 1\]"),
    "endless layers": (lambda m: m["model"].update(layers=10**9), "too few for 1000000000 layers"),
    "other width": (lambda m: m["model"].update(dim=64), "shapes differ from model 'tiny'"),
    "layer elsewhere": (lambda m: m["layers"][6].update(name="blocks.7.q"), r"'blocks\.7\.q' of the bundle is no"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_bad_manifest_is_refused_by_field(folder: Path, kind: str) -> None:
    change, message = MANIFESTS[kind]
    fields = json.loads((folder / "ispa.json").read_text())
    change(fields)
    (folder / "ispa.json").write_bytes(dump_json(fields))
    with pytest.raises(InputError, match=message) as caught:
        open_bundle(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 200_000])
def test_a_manifest_that_is_no_object_is_refused(folder: Path, text: bytes) -> None:
    (folder / "ispa.json").write_bytes(text)
    with pytest.raises(InputError, match=r"ispa\.json"):
        open_bundle(folder)


def test_a_folder_without_manifest_is_no_bundle(folder: Path) -> None:
    (folder / "ispa.json").unlink()
    with pytest.raises(InputError, match=r"bundle' is no bundle: expected a folder with ispa\.json"):
        open_bundle(folder)
    with pytest.raises(InputError, match="is no bundle"):
        open_bundle(folder / "nowhere")


# Streams of a bundle


def opened(tmp_path: Path, spec: ModelSpec, source: Source) -> Bundle:
    model, report = tiny("none", spec=spec)
    return open_bundle(write_bundle(tmp_path / "b", model, scheme=SCHEMES["none"], report=report, source=source))


def test_random_weights_read_any_prompt_and_always_alike(tmp_path: Path) -> None:
    bundle = opened(tmp_path, TINY, SOURCE)
    rows = bundle.text_rows("a cat")
    assert rows.shape == (1, 6, 24)
    assert torch.equal(rows, bundle.text_rows("a cat"))
    assert not torch.equal(rows, bundle.text_rows("a dog"))
    assert bundle.decoder() is None
    chunks = list(bundle.stream("a cat", StreamOptions(frames=6, policy="full")))
    assert torch.equal(torch.cat([chunk.latents for chunk in chunks], 1), latents(bundle.model, "a cat"))
    assert chunks[0].pixels is None


def test_checkpoints_need_prompt_embeds(tmp_path: Path) -> None:
    bundle = opened(tmp_path, TINY, Source("checkpoint", "x.pt", "0" * 64))
    with pytest.raises(InputError, match=r"pass --prompt-embeds FILE\.safetensors with .* \(L, 24\)"):
        bundle.text_rows("a cat")
    path, rows = tmp_path / "e.safetensors", torch.randn(4, 24)
    save_file({"prompt_embeds": rows}, path)
    read = bundle.text_rows("a cat", path)
    stream = open_bundle(bundle.folder, prompt_embeds=path).stream("a cat", StreamOptions(frames=3))
    assert torch.equal(stream.text.layers[0][0], bundle.model.encode_text(read).layers[0][0])
    assert torch.equal(read[0, :4], rows)
    assert read.shape == (1, 6, 24)
    assert not read[0, 4:].any()
    for bad, message in (
        ({"prompt_embeds": torch.ones(7, 24)}, r"shape \(1, 7, 24\): expected \(1, up to 6, 24\)"),
        ({"prompt_embeds": torch.full((2, 24), float("nan"))}, "prompt_embeds holds 48 NaN"),
        ({"other": rows}, "expected a tensor named 'prompt_embeds'"),
    ):
        save_file(bad, path)
        with pytest.raises(InputError, match=message):
            bundle.text_rows("a cat", path)


def test_float16_runs_in_float32_on_a_cpu(tmp_path: Path) -> None:
    model, report = tiny("w8a8-int8", torch.float16)
    folder = write(tmp_path / "b", model, report)
    assert read_manifest(folder).dtype == "float16"
    bundle = open_bundle(folder)
    assert bundle.model.dtype == torch.float32
    assert torch.equal(latents(bundle.model), latents(model.float()))


def test_the_demo_reads_prompts_and_decodes(tmp_path: Path) -> None:
    from ispa_deploy.demo.prompts import embed, parse_prompt

    bundle = opened(tmp_path, SPECS["demo"], Source("demo", "demo", "0" * 64))
    assert torch.equal(bundle.text_rows("a red ring"), embed(parse_prompt("a red ring")[None]))
    decoder = bundle.decoder()
    assert decoder is not None
    assert decoder(torch.zeros(1, 3, 40, 5, 5)).shape == (1, 3, 3, 40, 40)


def test_reading_a_manifest_does_not_import_torch(folder: Path) -> None:
    code = (
        "import sys, export; manifest = export.read_manifest(sys.argv[1]); "
        "print(manifest.spec.name, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.stdout.split() == ["tiny", "False"]


def test_a_copied_bundle_is_the_same_bundle(tmp_path: Path, folder: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert open_bundle(copy).base_sha256 == open_bundle(folder).base_sha256


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mappings")
def test_an_opened_bundle_keeps_no_map_of_its_file(tmp_path: Path) -> None:
    """Where the header's length happens to align the tensors, views of the file would hold all its codes in memory."""
    folder = tiny_bundle(tmp_path / "bundle", dtype=torch.bfloat16)
    manifest, weights = json.loads((folder / MANIFEST).read_text()), load_file(folder / SHARD)
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    for pad in range(0, 64, 8):
        save_file(weights, folder / SHARD, metadata={"format": "pt", "pad": "x" * pad})
        manifest["files"][SHARD]["bytes"] = (folder / SHARD).stat().st_size
        (folder / MANIFEST).write_text(json.dumps(manifest))
        opened = open_bundle(folder, verify=False)
        assert opened.model.blocks[0].self_attn.q.weight is None
        assert str(folder) not in Path("/proc/self/maps").read_text()
