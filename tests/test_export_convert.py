"""Laws of conversion: tensor by tensor gives the bytes that the whole model would, in bounded memory, or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from cli import app
from export import convert_checkpoint, load_source, open_bundle, quantise_source, write_bundle
from export.sources import Weights, empty
from ispa_deploy.errors import InputError, IspaError, RunError
from ispa_deploy.specs import SPECS
from quant import SCHEMES, quantise_
from tests.test_export_lora import adapter, peft
from tests.tiny import SPEC, tiny_model, weights_of

INT8 = SCHEMES["w8a8-int8"]
ROOT = Path(__file__).resolve().parent.parent


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Mixed dtypes, published names, an adapter beside it."""
    model = tiny_model()
    tensors = {f"model.{name}": tensor for name, tensor in weights_of(model).items()}
    tensors["model.head.head.weight"] = tensors["model.head.head.weight"].bfloat16()
    torch.save({"generator": tensors, "step": 3}, tmp_path / "base.pt")
    torch.save({"generator_lora": peft(adapter(model))}, tmp_path / "lora.pt")
    return tmp_path / "base.pt"


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "adapter": {"lora": "lora.pt", "lora_alpha": 6.0},
    "cast": {"dtype": torch.bfloat16, "lora": "lora.pt"},
    "skip": {"skip": (r"ffn\.2$", "blocks.0.")},
    "many shards": {"shard_bytes": 5000},
    "half, many shards": {"shard_bytes": 9000, "dtype": torch.float16},
    "none": {"scheme": SCHEMES["none"]},
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_bundle_of_the_whole_model(tmp_path: Path, checkpoint: Path, case: str) -> None:
    options = dict(CASES[case])
    scheme, skip = options.pop("scheme", INT8), options.pop("skip", ())
    shard = {name: options.pop(name) for name in ("shard_bytes",) if name in options}
    if "lora" in options:
        options["lora"] = tmp_path / options["lora"]
    model, source = load_source(checkpoint, model=SPEC, **options)
    report = quantise_(model, scheme, skip=skip)
    write_bundle(tmp_path / "whole", model, scheme=scheme, report=report, source=source, skip=skip, **shard)
    folder, found = convert_checkpoint(
        checkpoint, tmp_path / "streamed", spec=SPEC, scheme=scheme, skip=skip, **options, **shard
    )
    assert contents(folder) == contents(tmp_path / "whole")
    assert found == report
    assert (len(contents(folder)) > 5) == bool(shard)


def test_the_bundle_opens_and_holds_the_merged_weights(tmp_path: Path, checkpoint: Path) -> None:
    folder, _ = convert_checkpoint(
        checkpoint, tmp_path / "b", spec=SPEC, scheme=SCHEMES["none"], lora=tmp_path / "lora.pt"
    )
    want = load_source(checkpoint, model=SPEC, lora=tmp_path / "lora.pt")[0]
    opened = open_bundle(folder)
    assert all(torch.equal(t, want.state_dict()[name]) for name, t in opened.model.state_dict().items())
    assert opened.manifest.source.name == "base.pt + lora.pt, alpha 4"


@pytest.mark.parametrize("name", ["head.head.bias", "blocks.3.ffn.2.weight", "blocks.1.norm3.weight"])
def test_a_number_that_is_none_leaves_nothing(tmp_path: Path, name: str) -> None:
    tensors = weights_of(tiny_model())
    tensors[name].view(-1)[3] = float("inf")
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(InputError, match=rf"a\.pt': {name} holds 1 NaN or Inf"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "b", spec=SPEC, scheme=INT8)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pt"]


def test_a_number_too_large_for_the_dtype_is_said(tmp_path: Path) -> None:
    tensors = weights_of(tiny_model())
    tensors["head.head.bias"][0] = 1e6
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"head\.head\.bias in torch\.float16 holds 1 NaN or Inf"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "b", spec=SPEC, scheme=INT8, dtype=torch.float16)


def test_the_disk_refuses_and_the_old_bundle_stays(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = convert_checkpoint(checkpoint, tmp_path / "b", spec=SPEC, scheme=INT8)
    before = contents(folder)

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError, match="No space left on device; nothing is left of it"):
        convert_checkpoint(checkpoint, folder, spec=SPEC, scheme=SCHEMES["none"], overwrite=True)
    assert contents(folder) == before
    assert {file.name for file in tmp_path.iterdir()} == {"b", "base.pt", "lora.pt"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if "norm3" not in n}, r"8 tensors missing \(blocks\.0\.norm3\.bias"),
        (lambda t: {**t, "extra": torch.ones(1)}, r"1 unexpected \(extra\)"),
        (lambda t: {**t, "head.modulation": torch.ones(1, 2, 9)}, r"head\.modulation \(1, 2, 9\) for \(1, 2, 48\)"),
        (lambda t: {**t, "head.head.bias": torch.ones(16).int()}, r"head\.head\.bias is torch\.int32"),
        (lambda t: {"step": 1}, "'step' is no tensor"),
    ],
    ids=["missing", "unexpected", "shape", "integers", "no tensors"],
)
def test_what_does_not_fit_is_listed_and_nothing_written(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    torch.save(change(weights_of(tiny_model())), tmp_path / "a.pt")
    with pytest.raises(InputError, match=message) as caught:
        quantise_source(tmp_path / "a.pt", tmp_path / "b", model=SPEC, scheme=INT8)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_an_interrupt_half_way_leaves_nothing(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Weights.read

    def interrupted(weights: Weights, name: str) -> torch.Tensor:
        if name == "blocks.2.ffn.0.weight":
            raise KeyboardInterrupt
        return read(weights, name)

    monkeypatch.setattr(Weights, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(checkpoint, tmp_path / "b", spec=SPEC, scheme=INT8, shard_bytes=9000)
    assert {file.name for file in tmp_path.iterdir()} == {"base.pt", "lora.pt"}


def test_patterns_and_targets_are_refused_before_a_tensor_is_read(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(InputError, match="skip pattern 'nothing' matches none"):
        convert_checkpoint(checkpoint, tmp_path / "b", spec=SPEC, scheme=INT8, skip=["nothing"])
    with pytest.raises(InputError, match="all are kept in floating point"):
        convert_checkpoint(checkpoint, tmp_path / "b", spec=SPEC, scheme=INT8, skip=["."])
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="exists and is no bundle"):
        quantise_source(tmp_path / "not looked at", tmp_path / "b", scheme=INT8)


def test_quantize_reports_the_adapter_and_the_model(tmp_path: Path) -> None:
    tensors = {f"model.{name}": t for name, t in weights_of(tiny_model(SPECS["demo"])).items()}
    torch.save({"generator": tensors}, tmp_path / "base.pt")
    torch.save({"generator_lora": peft(adapter(tiny_model(SPECS["demo"])))}, tmp_path / "lora.pt")
    command = ["quantize", str(tmp_path / "base.pt"), "-o", str(tmp_path / "b"), "--json"]
    done = CliRunner().invoke(app, [*command, "--lora", str(tmp_path / "lora.pt"), "--lora-alpha", "8"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["bundle"] == str(tmp_path / "b")
    assert "width 128 and 10 layers: model demo" in done.stderr
    assert "100 modules, rank 4, alpha 8, scale 2" in done.stderr
    assert open_bundle(tmp_path / "b").manifest.source.name == "base.pt + lora.pt, alpha 8"
    bad = CliRunner().invoke(app, [*command, "--overwrite", "--lora", str(tmp_path / "base.pt")])
    assert isinstance(bad.exception, IspaError)
    assert "'generator' is no tensor: expected LoRA tensors" in str(bad.exception)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_memory_is_a_shard_and_four_tensors(tmp_path: Path, suffix: str) -> None:
    spec = replace(SPECS["longlive-1.3b"], layers=3)
    rng = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.empty(t.shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02, generator=rng)
        for name, t in empty(spec).state_dict().items()
    }
    path, shard = tmp_path / f"a{suffix}", 50_000_000
    save_file(tensors, path) if suffix == ".safetensors" else torch.save({"generator": tensors}, path)
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_dict()))
    command = [sys.executable, "-m", "tests.peak", str(path), str(tmp_path / "b"), str(tmp_path / "spec.json")]
    done = subprocess.run([*command, str(shard)], cwd=ROOT, capture_output=True, text=True, check=True)
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert sum(tensor.nbytes for tensor in tensors.values()) > 2 * (shard + 4 * largest)
    assert 0 < int(done.stdout) <= shard + 4 * largest
