"""The 1.3B families from their published containers to a video: quantize, run, absorb, with tiny networks in the real
classes and the table's own windows, sinks and steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from export.bundle import open_bundle
from export.companions import open_vae
from ispa_deploy.media.video import read_video
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.specs import SPECS, ModelSpec
from tests.test_cli import RUN, command, refused
from tests.test_media_text import DIM, make_tokeniser, upstream_weights
from tests.test_media_vae import upstream_name

diffusers = pytest.importorskip("diffusers")

SIZE = {
    "dim": 48, "ffn_dim": 64, "heads": 2, "layers": 4, "freq_dim": 16, "text_dim": DIM, "text_len": 12,
    "latent_height": 4, "latent_width": 4,
}  # fmt: skip
FAMILIES = ("longlive-1.3b", "self-forcing-1.3b", "reward-forcing-1.3b")
FRAMES = 15
RANK = 8


def spec_of(name: str) -> ModelSpec:
    return replace(SPECS[name], **SIZE)


def weights(spec: ModelSpec) -> dict[str, Tensor]:
    torch.manual_seed(2)
    model = CausalWanDiT(spec).requires_grad_(False)
    for name, tensor in model.named_parameters():
        if "self_attn" in name and name.endswith("weight") and tensor.ndim == 2:
            tensor.normal_(std=1.5 * spec.dim**-0.5)
    return dict(model.state_dict())


def adapter(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """LongLive's: every linear of every block, PEFT's names, no wrapper's prefix."""
    made = {}
    for name, tensor in state.items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            made[f"{module}.lora_A.weight"] = torch.randn(RANK, tensor.shape[1]) * tensor.shape[1] ** -0.5
            made[f"{module}.lora_B.weight"] = torch.randn(tensor.shape[0], RANK) * 0.1
    return made


def publish(name: str, folder: Path) -> tuple[Path, tuple[object, ...]]:
    """The family's file as its project publishes it, float32; flags that go with it."""
    state = weights(spec_of(name))
    wrapped = {f"model.{key}": tensor for key, tensor in state.items()}
    if name == "self-forcing-1.3b":
        fsdp = {key.replace("model.", "model._fsdp_wrapped_module.", 1): tensor for key, tensor in wrapped.items()}
        torch.save({"generator_ema": fsdp}, folder / "self_forcing_dmd.pt")
        return folder / "self_forcing_dmd.pt", ()
    if name == "reward-forcing-1.3b":
        torch.save(wrapped, folder / "rewardforcing.pt")
        return folder / "rewardforcing.pt", ()
    torch.save({"generator": wrapped}, folder / "longlive_base.pt")
    lora = adapter(state)
    torch.save({"generator_lora": lora, "critic_lora": dict(lora), "step": 700}, folder / "lora.pt")
    return folder / "longlive_base.pt", ("--lora", folder / "lora.pt")


@dataclass(frozen=True)
class Family:
    """A family on disk: its spec, the flags and file it was made of, its bundle, and the base model's folder."""

    spec: ModelSpec
    source: Path
    flags: tuple[object, ...]
    bundle: Path
    base: Path

    def run(self, *arguments: object, frames: int = FRAMES) -> Any:
        return command(
            "run", self.bundle, "--frames", frames, "--prompt", "a red ring", "--text-encoder", self.base,
            "--prompt-cache", self.base / "cache", "--vae", self.base, "--json", *RUN, *arguments,
        )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model's folder, upstream's layout."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(4)
    torch.save(upstream_weights(torch.Generator().manual_seed(3)), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    make_tokeniser(folder / "google" / "umt5-xxl", ends=True)
    vae = diffusers.AutoencoderKLWan(base_dim=4).eval()
    torch.save({upstream_name(n): t.clone() for n, t in vae.state_dict().items()}, folder / "Wan2.1_VAE.pth")
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for name in FAMILIES:
            patch.setitem(SPECS, name, spec_of(name))
        source, flags = publish(request.param, folder)
        done = command("quantize", source, *flags, "-o", folder / "bundle", "--json")
        assert done.document["scheme"] == "w8a8-int8"
        assert request.param in done.err, "the family is told by its container"
        yield Family(SPECS[request.param], source, flags, folder / "bundle", base)


def test_quantize_run_absorb_video(family: Family, tmp_path: Path) -> None:
    done = family.run("--out", tmp_path / "v.mp4", "--latents", tmp_path / "l.safetensors")
    document = done.document
    assert document["model"] == family.spec.name
    assert (document["absorption"]["state"], len(document["absorption"]["local_layers"])) == ("absorbed", 2)
    window = family.spec.window_frames
    assert document["kv"]["percent"] == pytest.approx(100 * (1 - 0.5 * (window - 1) / window))
    assert {54.2, 52.4, 55.6} & {round(document["kv"]["percent"], 1)}, "the paper's column"
    pictures, rate = read_video(tmp_path / "v.mp4")
    assert (pictures.shape, rate) == ((1 + 4 * (FRAMES - 1), 32, 32, 3), 16)
    assert load_file(tmp_path / "l.safetensors")["latents"].shape == (1, FRAMES, 16, 4, 4)
    held, budget = document["memory"]["allocated"], document["memory"]["predicted"]
    for name in ("weights", "text_kv", "statistics", "deltas", "kv_scratch"):
        assert held[name] == pytest.approx(budget[name], rel=0.05), name
    assert held["kv"] == budget["kv_full"]


def test_the_bundle_holds_the_published_numbers_in_bfloat16(family: Family) -> None:
    """float32 in the file, bfloat16 in the bundle as upstream runs it, the adapter merged at alpha / rank = 1."""
    bundle = open_bundle(family.bundle)
    assert bundle.manifest.dtype == "bfloat16"
    state = weights(family.spec)
    if family.flags:
        lora = torch.load(Path(str(family.flags[1])), weights_only=True)["generator_lora"]
        for name in list(state):
            pair = [lora.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight") for side in "AB"]
            if pair[0] is not None and name.endswith(".weight"):
                state[name] = state[name] + pair[1] @ pair[0]
    stored = bundle.model.state_dict()
    head = stored["head.head.weight"]
    assert torch.equal(head, state["head.head.weight"].bfloat16())
    for index in range(family.spec.layers):
        layer = bundle.model.blocks[index].self_attn.o
        want = state[f"blocks.{index}.self_attn.o.weight"].bfloat16().float()
        step = want.abs().amax(1, keepdim=True) / 127
        assert bool(((layer.reference_weight() - want).abs() <= 0.51 * step).all())


def test_a_prompt_switch_a_longer_stream_and_the_end_of_it(family: Family, tmp_path: Path) -> None:
    switched = family.run("--at", "13:a cat on the moon", frames=21).document
    assert [(cue["chunk"], cue["frame"]) for cue in switched["prompts"]] == [(0, 0), (5, 15)]
    full = switched["kv"]["full_bytes"]
    assert [held < full for held in switched["kv"]["per_chunk_bytes"]] == [False] * 4 + [True] + [False] * 2
    if family.spec.name != "self-forcing-1.3b":
        assert family.run(frames=24).document["frames"] == 24
        return
    refused(
        family.run("--latents", tmp_path / "l.safetensors", frames=24), "24 frames", "21 at most", "--roll --sink 1"
    )
    rolled = family.run("--roll", "--sink", 1, frames=24).document
    assert (rolled["frames"], rolled["options"]["sink_frames"]) == (24, 1)
    assert not list(tmp_path.iterdir())


def test_a_family_that_is_not_the_container_s_is_taken_at_its_word(family: Family, tmp_path: Path) -> None:
    """All three share names and shapes: --model decides where it is given."""
    other = FAMILIES[(FAMILIES.index(family.spec.name) + 1) % 3]
    done = command("quantize", family.source, "--model", other, "-o", tmp_path / "b", "--json", "--scheme", "none")
    assert done.code == 0, done.err
    assert open_bundle(tmp_path / "b").spec.name == other


def test_an_image_is_the_first_frame(family: Family, tmp_path: Path) -> None:
    """A chunk of one frame, as upstream's independent first frame; the VAE's own encoding of the picture."""
    from PIL import Image

    Image.new("RGB", (64, 48), (200, 40, 40)).save(tmp_path / "i.png")
    done = family.run("--image", tmp_path / "i.png", "--latents", tmp_path / "l.safetensors", frames=19)
    document = done.document
    assert (document["chunks"], document["options"]["warmup"], document["absorption"]["state"]) == (7, 13, "absorbed")
    latents = load_file(tmp_path / "l.safetensors")["latents"]
    vae = open_vae(family.base, family.spec, torch.device("cpu"))
    colour = torch.tensor([200, 40, 40])[:, None, None].expand(3, 32, 32) / 255
    torch.testing.assert_close(latents[:, :1], vae.encode(colour[None, None]), atol=2e-2, rtol=1e-2)
    refused(family.run("--image", tmp_path / "i.png", frames=21), "21 frames", "1 plus a multiple of 3")
    refused(family.run("--image", tmp_path / "none.png", frames=19), "none.png")
