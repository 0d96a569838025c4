"""Laws of checkpoints: diffusers' names, shards and indices give the same network; families are told by layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from export import keymaps, load_source
from export.checkpoints import read_container
from export.keymaps import from_diffusers
from export.sources import initialise_
from ispa_deploy.errors import InputError
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.specs import ModelSpec
from tests.tiny import SPEC

State = dict[str, Tensor]

# Written out by hand from the published layout, upstream's module to diffusers'.
TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
BLOCK = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0", "self_attn.norm_q": "attn1.norm_q", "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k", "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0", "cross_attn.norm_q": "attn2.norm_q", "cross_attn.norm_k": "attn2.norm_k",
    "norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}  # fmt: skip


def state(spec: ModelSpec = SPEC, seed: int = 3) -> State:
    model = initialise_(CausalWanDiT(spec).requires_grad_(False), seed=seed)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def diffusers_name(name: str) -> str:
    if name == "head.modulation":
        return "scale_shift_table"
    module, _, kind = name.rpartition(".")
    if not name.startswith("blocks."):
        return f"{TOP[module]}.{kind}"
    _, number, inner = name.split(".", 2)
    if inner == "modulation":
        return f"blocks.{number}.scale_shift_table"
    return f"blocks.{number}.{BLOCK[inner.rpartition('.')[0]]}.{kind}"


def same(model: CausalWanDiT, want: State) -> bool:
    got = model.state_dict()
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def shards(folder: Path, tensors: State, *, stem: str = "model", index: bool = True) -> Path:
    """Three shards, as the Hub has them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    parts = [names[:9], names[9:40], names[40:]]
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-{number:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    if index:
        document = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(document))
    return folder


def test_every_name_has_its_diffusers_name() -> None:
    for name in state():
        assert from_diffusers(diffusers_name(name)) == name


@pytest.mark.parametrize("inside", [".", "transformer"])
def test_a_diffusers_folder_is_the_same_network(tmp_path: Path, inside: str) -> None:
    want = state()
    shards(tmp_path / inside, {diffusers_name(name): t for name, t in want.items()}, stem="diffusion_pytorch_model")
    (tmp_path / "model_index.json").write_text("{}")
    model, source = load_source(tmp_path, model=SPEC)
    assert same(model, want)
    assert source.name == tmp_path.name


def test_an_index_decides_which_files_count(tmp_path: Path) -> None:
    want = state()
    folder = shards(tmp_path / "a", {f"model.{name}": tensor for name, tensor in want.items()})
    save_file({"vae.weight": torch.ones(1)}, folder / "vae.safetensors")
    assert same(load_source(folder, model=SPEC)[0], want)


def test_shards_of_pickles_with_an_index(tmp_path: Path) -> None:
    want = state()
    names = sorted(want)
    for file, part in (("p-1.bin", names[:30]), ("p-2.bin", names[30:])):
        torch.save({name: want[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: "p-1.bin" if name in names[:30] else "p-2.bin" for name in names}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same(load_source(tmp_path, model=SPEC)[0], want)


def _lose_a_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def _damage_index(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


def _second_index(folder: Path) -> None:
    (folder / "other.safetensors.index.json").write_text("{}")


def _cut_a_shard(folder: Path) -> None:
    path = folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "lost shard": (_lose_a_shard, r"lists 3 files of which 1 are missing \(model-00002-of-00003\.safetensors\)"),
    "no JSON": (_damage_index("{"), "is no index of shards"),
    "no map": (_damage_index('{"weight_map": 3}'), "is no index of shards"),
    "empty map": (_damage_index('{"weight_map": {}}'), "lists 0 files"),
    "outside": (_damage_index('{"weight_map": {"a": "../x.safetensors"}}'), r"lists the file '\.\./x\.safetensors'"),
    "two indices": (_second_index, "has several checkpoints"),
    "truncated shard": (_cut_a_shard, r"model-00003-of-00003\.safetensors' is not a whole safetensors file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_one_line(tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    folder = shards(tmp_path / "a", state())
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_source(folder, model=SPEC)
    assert "\n" not in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = shards(tmp_path, state(), index=False)
    save_file({"model.head.head.bias": torch.zeros(1)}, folder / "more.safetensors")
    with pytest.raises(InputError, match=r"holds head\.head\.bias in two of its 4 files"):
        load_source(folder, model=SPEC)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads /proc")
def test_a_file_larger_than_the_memory_is_mapped(tmp_path: Path) -> None:
    """A hole in the file takes no disk; the kernel would refuse a plain private mapping of it."""
    memory = 1024 * sum(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()
                        if line.startswith(("MemTotal", "SwapTotal")))  # fmt: skip
    size = 2 * memory // 4
    entry = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
    header = json.dumps({"huge": entry, "one": {**entry, "shape": [], "data_offsets": [4 * size, 4 * size + 4]}})
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 4 * size)
        file.seek(0, 2)
        file.write(torch.tensor(3.0).numpy().tobytes())
    found = read_container(tmp_path / "a.safetensors")
    assert (found["huge"].shape, float(found["huge"][size // 2]), float(found["one"])) == ((size,), 0.0, 3.0)
    found["one"].zero_()
    assert float(read_container(tmp_path / "a.safetensors")["one"]) == 3.0, "what is written stays out of the file"


def test_a_torch_file_keeps_views_containers_and_dtypes(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    held = {"a": whole, "turned": whole.t()[1:], "b": torch.nn.Parameter(torch.ones(2).half()),
            "none": torch.zeros(0, 3), "in": [{"c": torch.tensor(True)}, (torch.tensor(4, dtype=torch.int64),)],
            "step": 3}  # fmt: skip
    torch.save(held, tmp_path / "a.pt")
    found = read_container(tmp_path / "a.pt")
    assert torch.equal(found["a"], whole)
    assert torch.equal(found["turned"], whole.t()[1:])
    assert (found["b"].dtype, found["b"].tolist(), found["none"].shape) == (torch.float16, [1.0, 1.0], (0, 3))
    assert (bool(found["in"][0]["c"]), int(found["in"][1][0]), found["step"]) == (True, 4, 3)


def test_a_folder_of_pickles_alone_names_them(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "longlive_base.pt")
    with pytest.raises(InputError, match=r"has no \.safetensors file; it has longlive_base\.pt: .* name the file"):
        load_source(tmp_path, model=SPEC)


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModelSpec]:
    """The table in small: three families of one geometry, one that is wider."""
    names = ("longlive-1.3b", "self-forcing-1.3b", "reward-forcing-1.3b")
    small = {name: replace(SPEC, name=name) for name in names}
    table = {**small, "krea-14b": replace(SPEC, name="krea-14b", dim=96)}
    monkeypatch.setattr(keymaps, "SPECS", table)
    return table


def _prefixed(tensors: State) -> State:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


PUBLISHED: dict[str, tuple[Callable[[State], Any], str]] = {
    "longlive-1.3b": (lambda t: {"generator": _prefixed(t)}, "weights under 'generator' alone"),
    "self-forcing-1.3b": (lambda t: {"generator_ema": _prefixed(t)}, "weights under 'generator_ema' alone"),
    "reward-forcing-1.3b": (_prefixed, "weights flat, with the prefix model."),
    "krea-14b": (_prefixed, "width 96 and 4 layers: model krea-14b"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_layout_is_told_and_said(tmp_path: Path, families: dict[str, ModelSpec], name: str) -> None:
    wrap, said = PUBLISHED[name]
    path = tmp_path / "a.pt"
    torch.save(wrap(state(families[name])), path)
    lines: list[str] = []
    assert load_source(path, say=lines.append)[0].spec is families[name]
    assert said in lines[0]
    assert name in lines[0]
    without_lora = "note: longlive-1.3b is published as a base and a LoRA (models/lora.pt): no --lora, the base alone"
    assert lines[1:] == ([without_lora] if name == "longlive-1.3b" else [])
    assert ("assumed" in lines[0]) == (name != "krea-14b")


@pytest.mark.parametrize(
    "wrap",
    [lambda t: t, lambda t: {"model": t}, lambda t: {"generator": t, "generator_ema": t}],
    ids=["bare", "model", "both"],
)
def test_a_layout_nobody_publishes_asks_for_the_model(
    tmp_path: Path, families: dict[str, ModelSpec], wrap: Callable[[State], Any]
) -> None:
    path = tmp_path / "a.pt"
    torch.save(wrap(state()), path)
    with pytest.raises(InputError, match=r"fits longlive.*, self-forcing.*, reward-forcing.*: say which by --model"):
        load_source(path)
    lines: list[str] = []
    assert load_source(path, model=families["longlive-1.3b"], say=lines.append)[0].spec.name == "longlive-1.3b"
    assert not [line for line in lines if "assumed" in line]


def test_a_speech_checkpoint_is_not_taken_for_its_t2v_twin(tmp_path: Path, families: dict[str, ModelSpec]) -> None:
    tensors = state(families["krea-14b"]) | {"audio_injector.injector.0.q.weight": torch.zeros(1)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="hears audio"):
        load_source(tmp_path / "a.safetensors")
