"""Laws of sources: every upstream wrapping gives the same network; what does not fit is listed; nothing runs code."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from export import load_source, sources
from export.bundle import stand_in_rows
from export.sources import initialise_
from ispa_deploy.errors import InputError
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.specs import SPECS, ModelSpec

TINY = ModelSpec(
    name="tiny", dim=32, ffn_dim=48, heads=2, layers=2, freq_dim=16, text_dim=24, text_len=6, latent_channels=4,
    latent_height=4, latent_width=4, patch=(1, 1, 1), window_frames=12, sink_frames=1, steps=(1000, 500),
)  # fmt: skip
State = dict[str, Tensor]


def state(spec: ModelSpec = TINY) -> State:
    model = initialise_(CausalWanDiT(spec).requires_grad_(False), seed=3)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def fsdp(tensors: State) -> State:
    """The infixes where the training wrappers put them: around the network and around each block."""
    wrapped = {name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): t for name, t in tensors.items()}
    return {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in wrapped.items()}


CONTAINERS: dict[str, Callable[[State], Any]] = {
    "flat": lambda t: t,
    "flat with prefix": prefixed("model."),
    "generator": lambda t: {"generator": prefixed("model.")(t), "step": 700},
    "generator_ema preferred": lambda t: {
        "generator": {name: torch.zeros_like(x) for name, x in t.items()}, "generator_ema": prefixed("model.")(t),
    },
    "model": lambda t: {"model": t, "config": {"lr": 1e-4}},
    "training wrappers": lambda t: {"generator_ema": fsdp(t)},
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_upstream_wrapping_is_the_same_network(tmp_path: Path, container: str, legacy: bool) -> None:
    path, want = tmp_path / "a.pt", state()
    torch.save(CONTAINERS[container](want), path, _use_new_zipfile_serialization=not legacy)
    model, source = load_source(path, model=TINY)
    got = model.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert (source.kind, source.name) == ("checkpoint", "a.pt")
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_safetensors_alone_or_in_a_folder_of_shards(tmp_path: Path) -> None:
    want = state()
    names = sorted(want)
    (tmp_path / "folder").mkdir()
    save_file(want, tmp_path / "one.safetensors")
    save_file({f"model.{name}": want[name] for name in names[:20]}, tmp_path / "folder" / "1.safetensors")
    save_file({f"model.{name}": want[name] for name in names[20:]}, tmp_path / "folder" / "2.safetensors")
    for path in (tmp_path / "one.safetensors", tmp_path / "folder"):
        model, source = load_source(path, model=TINY)
        assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
        assert source.name == path.name


def test_dtypes_are_kept_joined_without_loss_or_cast(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({name: tensor.bfloat16() for name, tensor in state().items()}, path)
    assert load_source(path, model=TINY)[0].dtype == torch.bfloat16
    assert load_source(path, model=TINY, dtype=torch.float32)[0].dtype == torch.float32
    mixed = state()
    mixed["head.head.weight"] = mixed["head.head.weight"].bfloat16()
    torch.save(mixed, path)
    model = load_source(path, model=TINY)[0]
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.head.head.weight, mixed["head.head.weight"].float())


def test_the_model_is_recognised_only_where_one_fits(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(state(SPECS["demo"]), path)
    assert load_source(path)[0].spec == SPECS["demo"]
    torch.save(state(), path)
    with pytest.raises(InputError, match=r"width 32 and 2 layers, which fits none of .*demo.*: say which by --model"):
        load_source(path)
    wide = {"patch_embedding.weight": torch.zeros(1536, 1), "blocks.29.norm3.bias": torch.zeros(1)}
    torch.save(wide, path)
    with pytest.raises(InputError, match=r"fits longlive-1\.3b, self-forcing-1\.3b, reward-forcing-1\.3b: say which"):
        load_source(path)
    with pytest.raises(InputError, match="unknown model 'wan'"):
        load_source(path, model="wan")


def without(tensors: State, part: str) -> State:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


CONTENT: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (
        lambda t: without(t, "norm3"),
        r"4 tensors missing \(blocks\.0\.norm3\.bias, blocks\.0\.norm3\.weight, blocks\.1\.norm3\.bias, \.\.\.\), 0 un",
    ),
    "unexpected": (lambda t: {**t, "lora": torch.ones(1)}, r"0 tensors missing, 1 unexpected \(lora\)"),
    "shape": (
        lambda t: {**t, "head.head.bias": torch.ones(9)},
        r"1 shapes differ from model 'tiny' \(head\.head\.bias \(9,\) for \(4,\)\)",
    ),
    "NaN": (lambda t: {**t, "head.head.bias": torch.full((4,), float("nan"))}, r"head\.head\.bias holds 4 NaN or Inf"),
    "integers": (lambda t: {**t, "head.head.bias": torch.ones(4).char()}, r"head\.head\.bias is torch\.int8"),
    "twice": (lambda t: {**t, "model.head.head.bias": t["head.head.bias"]}, "holds a tensor twice"),
    "no tensors": (lambda t: {"step": 3}, "'step' is no tensor"),
    "a list": (lambda t: [1, 2], "holds a list: expected a dictionary"),
}


@pytest.mark.parametrize("kind", CONTENT)
def test_what_does_not_fit_is_listed(tmp_path: Path, kind: str) -> None:
    change, message = CONTENT[kind]
    path = tmp_path / "a.pt"
    torch.save(change(state()), path)
    with pytest.raises(InputError, match=message) as caught:
        load_source(path, model=TINY)
    assert "a.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "a.pt"
    torch.save({"x": Bomb(tmp_path / "pwned")}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"a\.pt' holds objects that could run code") as caught:
        load_source(path, model=TINY)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_of_a_newer_protocol_is_refused_without_other_lines(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Torch warns of the protocol, then stumbles over an instruction that only code needs."""
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "pwned"), protocol=4))
    with pytest.raises(InputError, match=r"a\.pt' holds objects that could run code"):
        load_source(tmp_path / "a.pt", model=TINY)
    assert not recwarn.list
    assert not (tmp_path / "pwned").exists()


def test_an_adapter_is_no_source(tmp_path: Path) -> None:
    pair = {f"base_model.model.blocks.0.ffn.0.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    for held in (pair, {"generator_lora": pair, "critic_lora": pair, "step": 3}):
        torch.save(held, tmp_path / "lora.pt")
        with pytest.raises(InputError, match=r"lora\.pt' is a LoRA: .*name this file by --lora"):
            load_source(tmp_path / "lora.pt")


def write_truncated(path: Path) -> None:
    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[:-500])


def write_beginning(path: Path) -> None:
    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        write_truncated,
        write_beginning,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\0" * 999),
        lambda path: path.write_bytes(b"a page that says: no such file\n" * 9),
    ],
    ids=["truncated", "beginning", "empty", "zeros", "text"],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, suffix: str, damage: Callable[[Path], object]) -> None:
    path = tmp_path / f"a{suffix}"
    damage(path)
    with pytest.raises(InputError, match=rf"a\{suffix}' is ") as caught:
        load_source(path, model=TINY)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "ispa.json").write_text("{}")
    for name, message in (
        ("nowhere", "does not exist: expected demo, random, or"),
        ("a.txt", r"expected \.safetensors or \.pt"),
        ("empty", r"has no \.safetensors file"),
        ("bundle", "is a bundle already"),
    ):
        with pytest.raises(InputError, match=message):
            load_source(tmp_path / name, model=TINY)


def test_random_is_repeatable_and_stays_finite_at_depth() -> None:
    deep = replace(TINY, layers=40)
    model, source = load_source("random", model=deep, dtype=torch.float32, seed=5)
    same, other = (load_source("random", model=deep, dtype=torch.float32, seed=seed)[0] for seed in (5, 6))
    assert torch.equal(model.blocks[7].ffn[0].weight, same.blocks[7].ffn[0].weight)
    assert not torch.equal(model.blocks[7].ffn[0].weight, other.blocks[7].ffn[0].weight)
    assert (source.kind, source.name, source.sha256) == ("random", "tiny, seed 5", None)
    stream = open_stream(model, stand_in_rows("x", deep), StreamOptions(frames=6, policy="full"))
    latents = torch.cat([chunk.latents for chunk in stream], 1)
    assert 0.3 < float(latents.std()) < 10
    assert load_source("random", model=TINY)[0].dtype == torch.bfloat16
    with pytest.raises(InputError, match="source random without --model"):
        load_source("random")


def test_demo_is_the_shipped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, want = tmp_path / "weights.safetensors", state(SPECS["demo"])
    save_file({name: tensor.half() for name, tensor in want.items()}, path)
    monkeypatch.setattr(sources, "DEMO_WEIGHTS", path)
    model, source = load_source("demo")
    assert model.spec == SPECS["demo"]
    assert model.dtype == torch.float16
    assert torch.equal(model.head.head.weight, want["head.head.weight"].half())
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(InputError, match=r"--model longlive-1\.3b with the source demo"):
        load_source("demo", model="longlive-1.3b")
