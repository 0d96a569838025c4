"""Krea from its published container to a video: quantize, run, absorb, with tiny networks in the real classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from cli import app
from ispa_deploy.errors import InputError
from ispa_deploy.media.video import VideoWriter, read_video
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.specs import SPECS, ModelSpec
from tests.test_media_text import DIM, make_tokeniser, upstream_weights
from tests.test_media_vae import upstream_name

diffusers = pytest.importorskip("diffusers")

KREA = replace(
    SPECS["krea-14b"], dim=48, ffn_dim=64, heads=2, layers=4, freq_dim=16, text_dim=DIM, text_len=12, latent_height=4,
    latent_width=4,
)  # fmt: skip
PIXELS = 8 * KREA.latent_height
NAME = "krea-realtime-video-14b.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as Krea publishes it, one flat file with the prefix `model.`, and the base model's folder."""
    folder = tmp_path_factory.mktemp("krea")
    torch.manual_seed(2)
    model = CausalWanDiT(KREA).requires_grad_(False)
    for name, tensor in model.named_parameters():
        if "self_attn" in name and name.endswith("weight") and tensor.ndim == 2:
            tensor.normal_(std=1.5 * KREA.dim**-0.5)
    save_file({f"model.{name}": tensor.bfloat16() for name, tensor in model.state_dict().items()}, folder / NAME)
    base = folder / "Wan2.1-T2V-1.3B"
    base.mkdir()
    torch.save(upstream_weights(torch.Generator().manual_seed(3)), base / "models_t5_umt5-xxl-enc-bf16.pth")
    make_tokeniser(base / "google" / "umt5-xxl", ends=True)
    vae = diffusers.AutoencoderKLWan(base_dim=4).eval()
    torch.save({upstream_name(n): t.clone() for n, t in vae.state_dict().items()}, base / "Wan2.1_VAE.pth")
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """The table's Krea, only smaller: its window, steps and rules are the published ones."""
    monkeypatch.setitem(SPECS, "krea-14b", KREA)
    return KREA


def command(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def bundle(published: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPECS, "krea-14b", KREA)
        document = command("quantize", published / NAME, "--model", "krea-14b", "-o", published / "bundle", "--json")
    assert document["scheme"] == "w8a8-int8"
    return published / "bundle"


def run(bundle: Path, folder: Path, *arguments: object, frames: int = 24) -> dict[str, Any]:
    base = bundle.parent / "Wan2.1-T2V-1.3B"
    document: dict[str, Any] = command(
        "run", bundle, "--prompt", "a red ring", "--frames", frames, "--text-encoder", base, "--vae", base,
        "--prompt-cache", folder / "prompts", "--dtype", "bfloat16", "--threads", 1, "--no-tune-allocator", "--json",
        *arguments,
    )  # fmt: skip
    return document


def latents_of(path: Path) -> Tensor:
    return load_file(path)["latents"]


def test_from_the_published_file_to_a_video(bundle: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "v.mp4", tmp_path / "l.safetensors"
    document = run(bundle, tmp_path, "--out", out, "--latents", kept)
    pictures, rate = read_video(out)
    assert (pictures.shape, rate) == ((1 + 4 * 23, PIXELS, PIXELS, 3), 16)
    assert latents_of(kept).shape == (1, 24, *KREA.latent_shape)
    assert document["absorption"]["state"] == "absorbed"
    assert len(document["absorption"]["local_layers"]) == 2
    assert document["kv"]["full_bytes"] == 4 * 6 * 2 * 4 * 48 * 2, "four layers, K + 3 frames, keys and values, bf16"
    assert document["kv"]["percent"] == pytest.approx(100 * (1 - 0.5 * 5 / 6))
    options = document["options"]
    assert (options["kv_frames"], options["kv_bias"], options["first_frame"]) == (3, 1.0, "reencode")
    assert options["steps"] == [1000, 750, 500, 250, 0]
    assert (options["height"], options["width"]) == (PIXELS, PIXELS)
    assert document["absorption"]["notes"] == []


def test_flags_change_what_they_say(bundle: Path, tmp_path: Path) -> None:
    def latents(*arguments: object, frames: int = 18) -> Tensor:
        path = tmp_path / "l.safetensors"
        run(bundle, tmp_path, "--policy", "full", "--latents", path, *arguments, frames=frames)
        return latents_of(path)

    plain = latents()
    assert torch.equal(plain, latents("--kv-bias", 1, "--first-frame", "reencode", "--kv-frames", 3, "--steps", 5))
    # Each sets in where it must: at once, with the first past, with the first frame that falls out of the window.
    for start, flags in {
        0: ("--steps", 4),
        3: ("--kv-bias", 0.3),
        6: ("--kv-frames", 6),
        7: ("--first-frame", "keep"),
    }.items():
        first = {0: 0, 3: 3, 6: 6, 7: 6}[start]
        other = latents(*flags)
        assert torch.equal(plain[:, :first], other[:, :first]), flags
        assert not torch.allclose(plain[:, first : first + 3], other[:, first : first + 3], atol=1e-3), flags
    wide = latents("--height", 32, "--width", 64, frames=9)
    assert wide.shape == (1, 9, 16, 4, 8)


def test_deltas_are_for_the_context_they_were_fitted_on(bundle: Path, tmp_path: Path) -> None:
    stored = tmp_path / "d.safetensors"
    document = run(bundle, tmp_path, "--save-deltas", stored, "--kv-frames", 6, "--kv-bias", 0.3)
    assert document["absorption"]["state"] == "absorbed"
    same = run(bundle, tmp_path, "--deltas", stored, "--kv-frames", 6, "--kv-bias", 0.3, frames=9)
    assert same["absorption"]["local_layers"] == document["absorption"]["local_layers"]
    for flags, line in (
        (("--kv-bias", 0.3), "window frames 9 on a stream with 6"),
        (("--kv-frames", 6), "pass --kv-bias 0.3"),
        (("--kv-frames", 6, "--kv-bias", 0.3, "--height", 64), f"pass --height {PIXELS}"),
    ):
        arguments = ("run", bundle, "--policy", "absorb", "--frames", 9, "--deltas", stored, *flags)
        done = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--prompt-embeds", rows(tmp_path))])
        assert isinstance(done.exception, InputError)
        assert line in str(done.exception)


def rows(folder: Path) -> Path:
    path = folder / "rows.safetensors"
    save_file({"prompt_embeds": torch.ones(2, KREA.text_dim)}, path)
    return path


def test_a_prompt_turns_over_four_chunks(bundle: Path, tmp_path: Path) -> None:
    """The model's default: the first of them is still under the old prompt; the warm-up ends after the last."""
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    switch = ("--at", "12:the moon")
    document = run(bundle, tmp_path, *switch, "--latents", paths[0], frames=36)
    run(bundle, tmp_path, "--latents", paths[1], frames=36)
    run(bundle, tmp_path, *switch, "--interpolate", 0, "--latents", paths[2], frames=36)
    turning, plain, at_once = (latents_of(path) for path in paths)
    assert torch.equal(turning[:, :15], plain[:, :15])
    assert not torch.allclose(turning[:, 15:18], plain[:, 15:18], atol=1e-3)
    assert torch.equal(at_once[:, :12], plain[:, :12])
    assert not torch.allclose(at_once[:, 12:15], plain[:, 12:15], atol=1e-3)
    full = document["kv"]["full_bytes"]
    absorbed = [held < full for held in document["kv"]["per_chunk_bytes"]]
    assert absorbed == [False] * 4 + [True] + [False] * 6 + [True]


def test_a_given_video_is_repainted_or_continued(bundle: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{name}.safetensors" for name in "abc")
    clip, common = tmp_path / "clip.mp4", ("--policy", "full")
    run(bundle, tmp_path, *common, "--latents", first, "--out", clip, frames=9)
    given = latents_of(first)
    run(bundle, tmp_path, *common, "--initial", first, "--latents", second, "--seed", 5, frames=15)
    assert torch.equal(latents_of(second)[:, :9], given)
    errors = []
    for strength in ("0.05", "0.4", "1"):
        run(
            bundle, tmp_path, *common, "--initial", first, "--strength", strength, "--seed", 5, "--latents", third,
            frames=9,
        )  # fmt: skip
        errors.append(float((latents_of(third) - given).square().mean()))
    assert errors == sorted(errors)
    run(bundle, tmp_path, *common, "--seed", 5, "--latents", second, frames=9)
    assert torch.equal(latents_of(third), latents_of(second)), "at strength 1 the video is forgotten"
    document = run(bundle, tmp_path, *common, "--initial", clip, "--strength", "0.4", "--latents", third, frames=9)
    assert document["options"]["steps"] == [400, 300, 200, 100, 0]


def test_a_video_is_brought_to_the_models_rate_and_size(bundle: Path, tmp_path: Path) -> None:
    """At twice the rate, every other frame is seen; of those, whole latent frames and whole chunks count."""
    from export.bundle import open_bundle
    from export.companions import accompany
    from export.initial import read_initial
    from ispa_deploy.options import StreamOptions

    opened = accompany(open_bundle(bundle), vae=bundle.parent / "Wan2.1-T2V-1.3B")
    brightness = torch.linspace(0, 1, 34)
    with VideoWriter(tmp_path / "v.mp4", fps=32) as writer:
        writer.write(brightness[:, None, None, None].expand(-1, 3, 64, 64))
    said: list[str] = []
    found = read_initial(tmp_path / "v.mp4", opened, StreamOptions(), said.append)
    pictures = torch.from_numpy(read_video(tmp_path / "v.mp4")[0])[::2].permute(0, 3, 1, 2).float()[None] / 255
    want = opened.decoder().encode(pictures[..., ::2, ::2])
    assert found.shape == (1, 3, 16, 4, 4)
    (line,) = said
    assert line.endswith("v.mp4' is 5 latent frames: the first 3 are taken, whole chunks of 3")
    torch.testing.assert_close(found, want[:, :3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--kv-frames", "4"), "3 to 21 frames in steps of 3"),
        (("--kv-frames", "24"), "3 to 21 frames in steps of 3"),
        (("--kv-frames", "0"), "shorter than sink"),
        (("--infinity",), "its context has positions of its own"),
        (("--kv-frames", "6", "--policy", "window", "--window", "9"), "leave one out"),
        (("--kv-bias", "0"), "above 0 and at most 1"),
        (("--kv-bias", "1.5"), "above 0 and at most 1"),
        (("--kv-bias", "nan"), "above 0 and at most 1"),
        (("--interpolate", "1"), "0 (at once), or 2 or more"),
        (("--strength", "0.5"), "name it by --initial FILE"),
        (("--strength", "0"), "above 0 and at most 1"),
        (("--first-frame", "reencode"), "name it by --vae PATH"),
        (("--first-frame", "second"), "expected one of auto, keep, reencode"),
        (("--height", "40"), "a multiple of 16 pixels; nearest is 32"),
        (("--initial", "missing.safetensors"), "missing.safetensors"),
        (("--initial", "clip.mp4"), "expected --vae PATH"),
    ],
)
def test_bad_flags_are_refused_in_one_line(
    bundle: Path, tmp_path: Path, flags: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.test_cli import RUN, refused
    from tests.test_cli import command as whole_command

    monkeypatch.chdir(tmp_path)
    save_file({"prompt_embeds": torch.randn(5, DIM)}, tmp_path / "rows.safetensors")
    arguments = ("run", bundle, "--frames", 15, "--prompt-embeds", tmp_path / "rows.safetensors", *RUN, *flags)
    refused(whole_command(*arguments), said)


def test_latents_of_another_resolution_or_too_few_are_refused(bundle: Path, tmp_path: Path) -> None:
    from tests.test_cli import RUN, refused
    from tests.test_cli import command as whole_command

    save_file({"prompt_embeds": torch.randn(5, DIM)}, tmp_path / "rows.safetensors")
    start = ("run", bundle, "--frames", 15, "--prompt-embeds", tmp_path / "rows.safetensors", *RUN, "--initial")
    for shape, extra, said in (
        ((1, 15, 16, 4, 6), (), "(1, 15, 16, 4, 6)"),
        ((1, 12, 16, 4, 4), ("--strength", 0.5), "12 initial frames for a stream of 15"),
        ((1, 18, 16, 4, 4), (), "18 initial frames"),
        ((1, 2, 16, 4, 4), (), "expected at least 3"),
    ):
        save_file({"latents": torch.zeros(shape)}, tmp_path / "l.safetensors")
        refused(whole_command(*start, tmp_path / "l.safetensors", *extra), said)


def test_flags_of_krea_are_for_krea(tmp_path: Path) -> None:
    from tests.test_cli import RUN, refused, tiny_bundle
    from tests.test_cli import command as whole_command

    bundle = tiny_bundle(tmp_path / "b", "none")
    for flags in (("--kv-frames", 3), ("--kv-bias", 0.5), ("--steps", 4), ("--first-frame", "keep")):
        refused(whole_command("run", bundle, "--frames", 15, *RUN, *flags), flags[0], "krea-14b")
