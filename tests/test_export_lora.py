"""Laws of LoRA: the merged weight is W + alpha / rank * B A, in every published layout; what does not fit is listed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from export import load_source, merge_lora_
from export.lora import Lora, read_lora
from ispa_deploy.errors import InputError
from ispa_deploy.model import CausalWanDiT
from tests.test_export_sources import Bomb
from tests.tiny import SPEC, tiny_model, weights_of

RANK = 4
State = dict[str, Tensor]


def adapter(model: CausalWanDiT, rank: int = RANK, seed: int = 5) -> dict[str, tuple[Tensor, Tensor]]:
    """Every linear of every block, as LongLive trains them."""
    rng = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, m.in_features, generator=rng), torch.randn(m.out_features, rank, generator=rng) * 0.1)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name.startswith("blocks.")
    }


def peft(pairs: dict[str, tuple[Tensor, Tensor]], prefix: str = "base_model.model.", infix: str = "") -> State:
    keys = {f"{prefix}{name}.lora_{side}{infix}.weight": i for i, side in enumerate("AB") for name in pairs}
    return {key: pairs[key.removeprefix(prefix).split(".lora_")[0]][i] for key, i in keys.items()}


def expected(model: CausalWanDiT, pairs: dict[str, tuple[Tensor, Tensor]], scale: float) -> State:
    """In float64, by the formula."""
    want = weights_of(model)
    for name, (a, b) in pairs.items():
        key = f"{name}.weight"
        want[key] = (want[key].double() + scale * (b.double() @ a.double())).to(want[key].dtype)
    return want


LAYOUTS: dict[str, Callable[[dict[str, tuple[Tensor, Tensor]]], Any]] = {
    "LongLive": lambda p: {"generator_lora": peft(p), "critic_lora": {"x": torch.ones(1)}, "step": 700},
    "bare": lambda p: peft(p),
    "adapter name": lambda p: peft(p, infix=".default"),
    "no prefix": lambda p: peft(p, prefix="", infix=".default"),
    "training wrappers": lambda p: peft(p, prefix="base_model.model.model._fsdp_wrapped_module."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_adds_the_product(tmp_path: Path, layout: str) -> None:
    model = tiny_model()
    pairs, path = adapter(model), tmp_path / "lora.pt"
    assert len(pairs) == 10 * SPEC.layers
    torch.save(LAYOUTS[layout](pairs), path)
    want = expected(model, pairs, 6.0 / RANK)
    found = merge_lora_(model, path, alpha=6.0)
    torch.testing.assert_close(weights_of(model), want, rtol=1e-6, atol=1e-6)
    assert found.summary.endswith("40 modules, rank 4, alpha 6, scale 1.5")


def test_safetensors_and_a_narrow_model_round_once(tmp_path: Path) -> None:
    model = tiny_model().bfloat16()
    pairs, path = adapter(model), tmp_path / "lora.safetensors"
    save_file(peft(pairs), path)
    want = expected(model, pairs, 1.0)
    merge_lora_(model, path)
    for name, tensor in model.state_dict().items():
        # The same sum but for float32's own rounding, which may tip a tie of bfloat16.
        assert (tensor == want[name]).float().mean() > 0.999, name
        torch.testing.assert_close(tensor, want[name])


def test_alpha_is_the_published_one_unless_given() -> None:
    pairs = adapter(tiny_model(), rank=8)
    longlive = Lora.of(peft(pairs), "x")
    assert (longlive.alpha, longlive.assumed) == (8.0, True)
    assert "alpha 8 assumed (--lora-alpha says otherwise), scale 1" in longlive.summary
    audio = {**pairs, "audio_injector.injector.0.q": (torch.ones(128, 4), torch.ones(4, 128))}
    assert Lora.of(peft(audio), "x").alpha == 64.0
    assert not Lora.of(peft(pairs), "x", 3.0).assumed


def test_a_checkpoint_and_its_adapter_are_summed_before_the_cast(tmp_path: Path) -> None:
    model = tiny_model()
    pairs = adapter(model)
    torch.save({"generator": {f"model.{n}": t for n, t in weights_of(model).items()}}, tmp_path / "base.pt")
    torch.save({"generator_lora": peft(pairs)}, tmp_path / "lora.pt")
    before = (tmp_path / "base.pt").read_bytes()
    lines: list[str] = []
    base, lora = tmp_path / "base.pt", tmp_path / "lora.pt"
    merged, source = load_source(base, model=SPEC, dtype=torch.bfloat16, lora=lora, lora_alpha=8, say=lines.append)
    plain = load_source(tmp_path / "base.pt", model=SPEC)[1]
    want = {name: tensor.bfloat16() for name, tensor in expected(model, pairs, 2.0).items()}
    differing = sum(int((merged.state_dict()[name] != want[name]).sum()) for name in want)
    assert differing <= 5
    assert source.name == "base.pt + lora.pt, alpha 8"
    assert source.sha256 not in (None, plain.sha256)
    assert len(lines) == 1
    assert "40 modules" in lines[0]
    assert (tmp_path / "base.pt").read_bytes() == before


def test_the_demo_and_random_weights_take_adapters_too(tmp_path: Path) -> None:
    plain = load_source("random", model=SPEC, dtype=torch.float32)[0]
    pairs = adapter(plain)
    torch.save(peft(pairs), tmp_path / "lora.pt")
    want = expected(plain, pairs, 1.0)
    merged, source = load_source("random", model=SPEC, dtype=torch.float32, lora=tmp_path / "lora.pt")
    torch.testing.assert_close(weights_of(merged), want, rtol=1e-6, atol=1e-6)
    assert source.name == "tiny, seed 0 + lora.pt, alpha 4"


def _renamed(old: str, new: str) -> Callable[[State], Any]:
    return lambda t: {name.replace(old, new): tensor for name, tensor in t.items()}


A0 = "base_model.model.blocks.0.ffn.0.lora_A.weight"
BAD: dict[str, tuple[Callable[[State], Any], str]] = {
    "nothing matches": (_renamed("blocks.", "layers."), r"40 of 40 LoRA modules match no .* 'tiny' \(layers\.0"),
    "some do not": (_renamed("blocks.3", "blocks.4"), r"10 of 40 LoRA modules match no .*blocks\.4\.cross_attn\.k"),
    "no adapter": (lambda t: {"blocks.0.ffn.0.weight": torch.ones(2, 2)}, "holds no LoRA tensors"),
    "empty": (lambda t: {"generator_lora": {}}, "holds no LoRA tensors"),
    "other tensors": (lambda t: {**t, "head.head.bias": torch.ones(4)}, r"1 tensors are no part .*\(head\.head"),
    "half a pair": (lambda t: {k: t[k] for k in t if k != A0}, r"1 LoRA modules lack A or B \(blocks\.0\.ffn\.0\)"),
    "ranks": (lambda t: {**t, A0: t[A0][:3]}, r"A and B of 1 LoRA modules differ in rank"),
    "shapes": (lambda t: {**t, A0: t[A0][:, :9]}, r"1 LoRA modules differ in shape .*\(64, 9\) for \(64, 48\)"),
    "NaN": (lambda t: {**t, A0: t[A0] * float("nan")}, r"blocks\.0\.ffn\.0\.weight \(LoRA\) holds 192 NaN or Inf"),
    "twice": (lambda t: {**t, A0.replace("base_model.model.", ""): t[A0]}, r"lora_A of blocks\.0\.ffn\.0 twice"),
    "a list": (lambda t: [1], "holds a list"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_listed_and_nothing_is_merged(tmp_path: Path, kind: str) -> None:
    change, message = BAD[kind]
    model = tiny_model()
    before, path = weights_of(model), tmp_path / "lora.pt"
    torch.save(change(peft(adapter(model))), path)
    with pytest.raises(InputError, match=message) as caught:
        merge_lora_(model, path)
    assert "\n" not in str(caught.value)
    assert "lora.pt" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_files_and_numbers_that_are_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"LoRA '.*nowhere\.pt' does not exist"):
        read_lora(tmp_path / "nowhere.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"cut\.pt' is not a whole torch file"):
        read_lora(tmp_path / "cut.pt")
    torch.save({"generator_lora": Bomb(tmp_path / "pwned")}, tmp_path / "bomb.pt")
    with pytest.raises(InputError, match=r"bomb\.pt' holds objects that could run code"):
        read_lora(tmp_path / "bomb.pt")
    assert not (tmp_path / "pwned").exists()
    torch.save(peft(adapter(tiny_model())), tmp_path / "a.pt")
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"--lora-alpha .*expected a number above 0"):
            read_lora(tmp_path / "a.pt", alpha=alpha)
