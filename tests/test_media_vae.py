"""Laws of the VAE: chunks decode to the pixels of the whole, and upstream's weights mean the same in the library."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from cli import app
from export.companions import accompany, decoder_factory, open_vae
from export.manifest import Source
from export.write import write_bundle
from ispa_deploy.errors import InputError
from ispa_deploy.media.vae import MEAN, STD, WanVae, wan_vae
from ispa_deploy.media.video import read_video
from ispa_deploy.options import StreamOptions
from ispa_deploy.specs import SPECS, ModelSpec

diffusers = pytest.importorskip("diffusers")

BASE = 4
CPU = torch.device("cpu")
SPEC = ModelSpec(
    name="tiny", dim=32, ffn_dim=48, heads=2, layers=1, freq_dim=16, text_dim=24, text_len=6, latent_channels=16,
    latent_height=2, latent_width=4, patch=(1, 1, 1), window_frames=12, sink_frames=1, steps=(1000,), fps=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def library() -> Any:
    """The library's own class with random weights; the last convolution is scaled so that the picture has contrast."""
    torch.manual_seed(5)
    model = diffusers.AutoencoderKLWan(base_dim=BASE).eval().requires_grad_(False)
    for name, tensor in model.named_parameters():
        if name.endswith("gamma"):
            tensor.uniform_(0.8, 1.2)
        if "time_conv" in name and name.endswith("weight"):
            tensor.normal_(std=0.3)  # the neighbours in time must matter
    model.decoder.conv_out.weight.mul_(2)
    return model


@pytest.fixture
def latents(rng: torch.Generator) -> Tensor:
    """(B, F, C, H, W), normalised."""
    return torch.randn(2, 7, 16, 2, 3, generator=rng)


def whole(library: Any, latents: Tensor) -> Tensor:
    """The library's full decode of normalised latents, as (B, F', 3, h, w) in [0, 1]."""
    raw = latents * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return library.decode(raw.transpose(1, 2)).sample.transpose(1, 2) / 2 + 0.5


def upstream_name(name: str) -> str:
    """A tensor of the library under upstream's name."""
    inner = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    inner["conv_shortcut"] = "shortcut"
    rules: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
        (r"^quant_conv", lambda m: "conv1"),
        (r"^post_quant_conv", lambda m: "conv2"),
        (r"coder\.conv_in", lambda m: "coder.conv1"),
        (r"norm_out", lambda m: "head.0"),
        (r"conv_out", lambda m: "head.2"),
        (r"mid_block\.attentions\.0", lambda m: "middle.1"),
        (r"mid_block\.resnets\.(\d)\.(\w+)", lambda m: f"middle.{2 * int(m[1])}.{inner[m[2]]}"),
        (r"down_blocks\.(\d+)\.(norm\d|conv\d|conv_shortcut)\.", lambda m: f"downsamples.{m[1]}.{inner[m[2]]}."),
        (r"down_blocks\.", lambda m: "downsamples."),
        (
            r"up_blocks\.(\d)\.resnets\.(\d)\.(\w+)",
            lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}.{inner[m[3]]}",
        ),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}"),
    )
    for pattern, replacement in rules:
        name, hits = re.subn(pattern, replacement, name)
        if hits:
            break
    return name


@pytest.fixture(scope="module")
def upstream(library: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`Wan2.1_VAE.pth` in the folder of a base model, beside a DiT that is none of the VAE's business."""
    folder = tmp_path_factory.mktemp("base")
    state = {upstream_name(name): tensor.clone() for name, tensor in library.state_dict().items()}
    torch.save(state, folder / "Wan2.1_VAE.pth")
    save_file({"patch_embedding.weight": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors")
    return folder


def test_upstreams_file_has_its_194_tensors(upstream: Path) -> None:
    """The names themselves, where the two layouts differ most."""
    names = set(torch.load(upstream / "Wan2.1_VAE.pth", weights_only=True))
    assert len(names) == 194
    assert names >= {
        "conv1.weight", "conv2.bias", "encoder.conv1.weight", "encoder.downsamples.3.shortcut.weight",
        "encoder.downsamples.5.time_conv.weight", "encoder.downsamples.2.resample.1.weight",
        "encoder.middle.1.to_qkv.weight", "encoder.head.2.weight", "decoder.middle.2.residual.6.bias",
        "decoder.upsamples.4.shortcut.bias", "decoder.upsamples.7.time_conv.bias",
        "decoder.upsamples.11.resample.1.weight", "decoder.upsamples.14.residual.3.gamma", "decoder.head.0.gamma",
    }  # fmt: skip


def test_the_published_geometry_is_read_off_the_shapes() -> None:
    with torch.device("meta"):
        published = diffusers.AutoencoderKLWan().state_dict()
    # Stride 0: no memory.
    state = {upstream_name(name): torch.zeros(()).expand(tensor.shape) for name, tensor in published.items()}
    model = wan_vae(state, "here")
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in published.items()
    }
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(126.9e6, rel=1e-3)


@pytest.mark.parametrize("layout", ["file", "base folder", "library folder"])
def test_every_layout_opens_as_the_librarys_own_model(
    library: Any, upstream: Path, tmp_path: Path, latents: Tensor, layout: str
) -> None:
    path = {"file": upstream / "Wan2.1_VAE.pth", "base folder": upstream, "library folder": tmp_path}[layout]
    if layout == "library folder":
        library.save_pretrained(str(tmp_path / "vae"))
    vae = open_vae(path, SPEC, CPU)
    torch.testing.assert_close(vae.decoder()(latents), whole(library, latents), atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunks", [(7,), (1,) * 7, (3, 3, 1), (1, 3, 3), (2, 5)], ids=str)
def test_chunks_decode_to_the_pixels_of_the_whole(library: Any, latents: Tensor, chunks: tuple[int, ...]) -> None:
    decoder = WanVae(library).decoder()
    pieces = [decoder(part) for part in latents.split(list(chunks), 1)]
    assert [piece.shape[1] for piece in pieces] == [4 * n - 3 * (i == 0) for i, n in enumerate(chunks)]
    expected = whole(library, latents)
    pixels = torch.cat(pieces, 1)
    assert (pixels.shape, pixels.dtype) == ((2, 25, 3, 16, 24), torch.float32)
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1
    assert float(pixels.std()) > 0.1
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def test_the_past_matters_to_a_chunk(library: Any, latents: Tensor) -> None:
    """Else the law above would hold for a decoder that forgets."""
    forgetful = WanVae(library).decoder()(latents[:, 3:])
    assert float((forgetful[:, 1:] - whole(library, latents)[:, 13:]).abs().max()) > 1e-2


def test_streams_share_weights_and_nothing_else(library: Any, latents: Tensor) -> None:
    """Two streams and an encoding, interleaved."""
    vae = WanVae(library)
    first, second = vae.decoder(), vae.decoder()
    pieces = []
    for part in latents.split(3, 1):
        pieces.append(first(part))
        second(part.flip(1))
        vae.encode(pieces[-1][:, :1])
    torch.testing.assert_close(torch.cat(pieces, 1), whole(library, latents), atol=1e-5, rtol=0)


def test_memory_is_constant_and_as_the_facts_count_it(library: Any, latents: Tensor) -> None:
    """32 tensors of two frames: at 480x832, base width 96 and 16 bit, 1.76 GiB."""
    decoder = WanVae(library).decoder()
    assert decoder.nbytes == 0
    sizes = [decoder(part) is None or decoder.nbytes for part in latents.split(1, 1)]
    assert len(set(sizes[2:])) == 1
    held = [entry for entry in decoder._memory if isinstance(entry, Tensor)]
    assert len(held) == 32
    assert {entry.shape[2] for entry in held} == {2}
    # All but the latents themselves grow with the base width; all grow with the area.
    area = (60 * 104) / (2 * 3)
    narrow = 2 * 2 * 16 * 2 * 3 * 4  # the first convolution's: batch 2, two frames, 16 channels
    at_480p = ((sizes[-1] - narrow) * 96 / BASE + narrow) * area / 2 / 2  # one sample, 16 bit
    assert at_480p / 2**30 == pytest.approx(1.76, abs=0.01)


@pytest.mark.parametrize("frames", [1, 9])
def test_encoding_is_the_mode_in_normalised_units(library: Any, rng: torch.Generator, frames: int) -> None:
    pixels = torch.rand(1, frames, 3, 16, 24, generator=rng)
    latents = WanVae(library).encode(pixels)
    assert latents.shape == (1, 1 + frames // 4, 16, 2, 3)
    raw = latents * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    mode = library.encode((pixels * 2 - 1).transpose(1, 2)).latent_dist.mean
    torch.testing.assert_close(raw, mode.transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("through_a_stream", [False, True])
def test_an_offloaded_vae_encodes_where_it_visits(
    library: Any, monkeypatch: pytest.MonkeyPatch, through_a_stream: bool
) -> None:
    """Told by where it is sent; tests/test_gpu.py sends it there."""
    gpu, sent = torch.device("cuda", 0), []
    pixels = torch.rand(1, 5, 3, 16, 24)
    want = WanVae(library).encode(pixels)
    monkeypatch.setattr(library, "to", lambda device: sent.append(device))
    vae = WanVae(library, gpu)
    got = vae.decoder().encode(pixels) if through_a_stream else vae.encode(pixels)
    assert torch.equal(got, want)
    assert sent == [gpu, torch.device("cpu")]
    monkeypatch.setattr(library, "encode", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vae.encode(pixels)
    assert sent[2:] == [gpu, torch.device("cpu")], "home again whatever happens"


def test_mean_and_std_are_the_librarys(library: Any) -> None:
    assert (list(MEAN), list(STD)) == (library.config.latents_mean, library.config.latents_std)


class Stripes(nn.Module):
    """A decoder of a user: grey frames that count, brighter by one step for every frame."""

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        self.step = nn.Parameter(load_file(weights)["step"] if weights else torch.tensor(0.01))
        self.seen = 0

    def forward(self, latents: Tensor) -> Tensor:
        count = self.seen + torch.arange(latents.shape[1], device=latents.device)
        self.seen += latents.shape[1]
        return (count * self.step)[None, :, None, None, None].expand(1, -1, 3, 16, 32)


not_callable = type("not_callable", (), {})


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of random weights, which stand-in rows can prompt."""
    from export.sources import initialise_
    from ispa_deploy.model import CausalWanDiT
    from quant.convert import quantise_
    from quant.schemes import SCHEMES

    model = initialise_(CausalWanDiT(SPEC).requires_grad_(False).eval())
    report = quantise_(model, SCHEMES["none"])
    source = Source("random", "tiny, seed 0")
    return write_bundle(tmp_path / "bundle", model, scheme=SCHEMES["none"], report=report, source=source)


def test_a_decoder_of_the_users_own_keeps_its_state_for_one_stream(bundle: Path, tmp_path: Path) -> None:
    from export.bundle import open_bundle

    save_file({"step": torch.tensor(0.1)}, tmp_path / "w.safetensors")
    opened = accompany(open_bundle(bundle), decoder=f"{__name__}:Stripes", vae=tmp_path / "w.safetensors")
    for _ in range(2):
        stream = opened.stream("x", StreamOptions(frames=6, policy="full"))
        seen = torch.cat([chunk.pixels[0, :, 0, 0, 0] for chunk in stream if chunk.pixels is not None])
        torch.testing.assert_close(seen, torch.arange(6) * 0.1)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_run_writes_a_video_of_the_vae(bundle: Path, upstream: Path, library: Any, tmp_path: Path) -> None:
    """The file's frames are the full decode of the latents it reports, at the model's frame rate."""
    out, kept = tmp_path / "v.mp4", tmp_path / "l.safetensors"
    command = ("run", bundle, "--frames", 6, "--policy", "full", "--vae", upstream, "--threads", 1)
    done = run(*command, "--out", out, "--latents", kept, "--json")
    assert done.exit_code == 0, done.output
    frames, fps = read_video(out)
    assert (frames.shape, fps) == ((21, 16, 32, 3), 16)
    expected = whole(library, load_file(kept)["latents"])[0].permute(0, 2, 3, 1) * 255
    # The codec keeps colour per 2x2 pixels: the picture as a whole is what can be compared.
    assert float((torch.from_numpy(frames).float() - expected).mean((1, 2)).abs().max()) < 4


def refused(match: str, call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_cannot_be_used_is_refused_in_one_line(library: Any, tmp_path: Path) -> None:
    def vae(state: dict[str, Tensor]) -> Path:
        save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "vae.safetensors")
        return tmp_path / "vae.safetensors"

    good = library.state_dict()
    lacking = vae({name: tensor for name, tensor in good.items() if name != "decoder.conv_in.bias"})
    refused("1 missing .decoder.conv_in.bias", lambda: open_vae(lacking, SPEC, CPU))
    for bad in (float("nan"), float("inf")):
        name = "encoder.conv_in.weight"
        damaged = vae({**good, name: good[name].clone().index_fill_(0, torch.tensor([2]), bad)})
        refused("encoder.conv_in.weight holds NaN or Inf", lambda path=damaged: open_vae(path, SPEC, CPU))
    refused("no tensor 'post_quant_conv.weight'", lambda: open_vae(vae({"x": torch.zeros(1)}), SPEC, CPU))
    refused("48 channels", lambda: wan_vae({"post_quant_conv.weight": torch.zeros(48, 48, 1, 1, 1)}, "here"))
    refused("expected a file, or a folder", lambda: open_vae(tmp_path / "none.pth", SPEC, CPU))
    refused("leave it out", lambda: open_vae(lacking, SPECS["demo"], CPU))
    refused(r"expected \(B, F, 16, H, W\)", lambda: WanVae(library).decoder()(torch.zeros(1, 3, 4, 2, 2)))
    for shape in ((1, 1, 3, 12, 16), (1, 4, 3, 16, 16), (1, 1, 4, 16, 16), (1, 3, 16, 16)):
        refused("crop it", lambda shape=shape: WanVae(library).encode(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("Stripes", "expected package.module:Class"),
        ("no.such.module:Class", "No module named.*PYTHONPATH"),
        (f"{__name__}:Absent", "has no class 'Absent'"),
        ("os:path", "has no class 'path'"),
        ("fractions:Decimal", "cannot be called"),
        ("zipfile:ZipFile", "cannot be made without arguments, and --vae names none"),
        (f"{__name__}:not_callable", "cannot be called"),
    ],
)
def test_a_decoder_that_cannot_be_used_is_refused(name: str, match: str) -> None:
    refused(match, lambda: decoder_factory(name, None, CPU)())


class Planted:
    """A pickle that would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_a_pickle_with_code_is_refused_and_does_not_run(library: Any, tmp_path: Path) -> None:
    torch.save({**library.state_dict(), "x": Planted(tmp_path / "made")}, tmp_path / "Wan2.1_VAE.pth")
    refused("Wan2.1_VAE.pth", lambda: open_vae(tmp_path, SPEC, CPU))
    assert not (tmp_path / "made").exists()
    whole = (tmp_path / "Wan2.1_VAE.pth").read_bytes()
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(whole[: len(whole) // 2])
    refused("Wan2.1_VAE.pth", lambda: open_vae(tmp_path, SPEC, CPU))


def test_without_diffusers_the_command_that_installs_it_is_named(
    upstream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(r"pip install 'ispa-deploy\[hf\]'", lambda: open_vae(upstream, SPEC, CPU))


@pytest.mark.parametrize("options", [("--tokenizer", "x"), ("--prompt-cache", "x")])
def test_options_that_need_another_say_so(bundle: Path, options: tuple[str, str]) -> None:
    done = run("run", bundle, *options)
    assert isinstance(done.exception, InputError)
    assert "--text-encoder" in str(done.exception)
