"""LiveAvatar from its published files to an mp4: quantise, run, absorb, decode, through the command line.

The container, the key layout and the classes around the model are the published ones; the sizes are tiny and the
numbers random.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from cli import app
from export.bundle import open_bundle
from export.companions import open_vae
from export.profiling import configurations, dequantised
from export.scenes import posed
from ispa_deploy.avatar.model import CausalS2V
from ispa_deploy.errors import InputError, RunError
from ispa_deploy.media.audio import read_audio
from ispa_deploy.media.image import covering, read_image
from ispa_deploy.media.video import VideoWriter, read_video
from ispa_deploy.profile.compare import compare
from ispa_deploy.sampler import Sampler
from ispa_deploy.specs import SPECS
from tests.test_media_audio import LAYERS, WIDTH, tiny_wav2vec2, tone, write_wav
from tests.test_media_vae import upstream_name
from tests.tiny_avatar import avatar_model

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

NAME = "liveavatar-14b"
TINY = replace(
    SPECS[NAME], dim=64, ffn_dim=96, heads=2, layers=4, freq_dim=16, text_dim=24, text_len=6, latent_height=8,
    latent_width=12, audio_blocks=(0, 1, 3), audio_states=LAYERS + 1, audio_dim=WIDTH,
)  # fmt: skip
RANK = 8
FRAMES = 24


@pytest.fixture(scope="module", autouse=True)
def tiny_table() -> Iterator[None]:
    """The model of that name is tiny here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPECS, NAME, TINY)
        yield


def _targets(model: CausalS2V) -> list[str]:
    """The modules that the published adapter holds: PEFT's suffixes q, k, v, o, ffn.0, ffn.2."""
    suffixes = (".q", ".k", ".v", ".o", ".ffn.0", ".ffn.2")
    return [name for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.endswith(suffixes)]  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in avatar_model(TINY).state_dict().items()}


@pytest.fixture(scope="module")
def base(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model's folder: four shards with an index, VAE and speech model beside them, and the adapter."""
    folder = tmp_path_factory.mktemp("Wan2.2-S2V-14B")
    names = sorted(weights)
    files = {name: f"diffusion_pytorch_model-0000{1 + i * 4 // len(names)}-of-00004.safetensors"
             for i, name in enumerate(names)}  # fmt: skip
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "s2v", "dim": TINY.dim}))
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLWan(base_dim=4)
    torch.save({upstream_name(name): t.clone() for name, t in vae.state_dict().items()}, folder / "Wan2.1_VAE.pth")
    speech = folder / "wav2vec2-large-xlsr-53-english"
    tiny_wav2vec2().save_pretrained(speech)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(speech)
    adapter = {}
    for name in _targets(CausalS2V(TINY)):
        out, inner = weights[f"{name}.weight"].shape
        adapter[f"{name}.lora_A.default.weight"] = torch.randn(RANK, inner).bfloat16() / 8
        adapter[f"{name}.lora_B.default.weight"] = torch.randn(out, RANK).bfloat16() / 64
    assert len(adapter) == 2 * (10 * TINY.layers + 4 * len(TINY.audio_blocks))
    save_file(adapter, folder.parent / "liveavatar.safetensors")
    save_file({"prompt_embeds": torch.randn(4, TINY.text_dim)}, folder.parent / "rows.safetensors")
    return folder


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def document(*arguments: object) -> dict[str, Any]:
    done = invoke(*arguments, "--threads", 1, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def bundle(base: Path) -> Path:
    folder = base.parent / "bundle"
    # Nothing but the folder and the adapter: the family is told from the keys.
    document(
        "quantize",
        base,
        "-o",
        folder,
        "--scheme",
        "w8a8-int8",
        "--dtype",
        "float32",
        "--lora",
        base.parent / "liveavatar.safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def given(base: Path) -> tuple[object, ...]:
    """Flags of everything a run is given."""
    write_wav(base.parent / "voice.wav", tone(2.0, 22050), 22050)
    picture = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    (base.parent / "face.ppm").write_bytes(b"P6 90 50 255\n" + picture.tobytes())
    home = base.parent
    return (
        "--prompt-embeds", home / "rows.safetensors", "--image", home / "face.ppm", "--audio", home / "voice.wav",
        "--audio-encoder", base, "--vae", base, "--frames", FRAMES, "--allow-fallback", "--dtype", "float32",
    )  # fmt: skip


def test_adapter_is_merged_at_half_its_strength(base: Path, bundle: Path, weights: dict[str, Tensor]) -> None:
    """alpha 64 whatever the rank: with 8 the scale is 8; kept layers show the merge, coded ones within a step."""
    stored: dict[str, Tensor] = {}
    for file in bundle.glob("*.safetensors"):
        stored |= load_file(file)
    adapter = load_file(base.parent / "liveavatar.safetensors")
    for name in ("blocks.2.ffn.2", "audio_injector.injector.1.q"):
        a, b = (adapter[f"{name}.lora_{side}.default.weight"].float() for side in "AB")
        merged = weights[f"{name}.weight"] + 64 / RANK * b @ a
        ours = stored[f"{name}.weight"].float()
        if f"{name}.weight_scale" in stored:
            ours = ours * stored[f"{name}.weight_scale"]
            assert float(((ours - merged).abs() / stored[f"{name}.weight_scale"]).max()) <= 0.501
        else:
            assert torch.equal(ours, merged)
    assert stored["blocks.2.self_attn.q.weight"].dtype == torch.int8
    assert stored["casual_audio_encoder.encoder.final_linear.weight"].dtype == torch.float32


def test_sound_and_image_become_a_talking_video(bundle: Path, given: tuple[object, ...], tmp_path: Path) -> None:
    out, kept = tmp_path / "talk.mp4", tmp_path / "l.safetensors"
    done = document("run", bundle, *given, "--out", out, "--latents", kept)
    assert (done["model"], done["absorption"]["state"]) == (NAME, "absorbed")
    assert done["prompt"] == "rows.safetensors", "not the default text, which nobody read"
    assert len(done["absorption"]["local_layers"]) == 2
    ring = 12 * 4 * 24 * 64 * 4 * 2
    condition = 58 * 64 * 4 * 2
    assert done["kv"]["full_bytes"] == 4 * (ring + condition)
    assert done["kv"]["persistent_bytes"] == 2 * (ring + condition) + 2 * condition
    assert done["kv"]["per_chunk_bytes"][0] == done["kv"]["full_bytes"]
    frames, rate = read_video(out)
    assert (frames.shape, rate) == ((1 + 4 * (FRAMES - 1), 64, 96, 3), 25)
    heard = read_audio(out)
    assert abs(len(heard) / 16000 - 2.0) < 0.15  # the sound ends before the pictures do
    assert load_file(kept)["latents"].shape == (1, FRAMES, 16, 8, 12)


def without(given: tuple[object, ...], flag: str) -> tuple[object, ...]:
    """Flags without one of them and its value."""
    at = given.index(flag)
    return (*given[:at], *given[at + 2 :])


def pose_video(folder: Path, pictures: int) -> Path:
    """Noise that moves, at the model's own rate and another size than its own."""
    with VideoWriter(folder / "pose.mp4", fps=TINY.fps) as writer:
        writer.write(torch.rand(pictures, 3, 48, 64, generator=torch.Generator().manual_seed(0)))
    return folder / "pose.mp4"


def half_masks(folder: Path) -> list[Path]:
    """A picture that is white on its left, and one that is white on its right."""
    made = []
    for name, row in (("left", b"\xff" * 6 + b"\0" * 6), ("right", b"\0" * 6 + b"\xff" * 6)):
        made.append(folder / f"{name}.pgm")
        made[-1].write_bytes(b"P5 12 8 255\n" + row * 8)
    return made


SHORT = ("--policy", "full", "--frames", 15)


@pytest.fixture(scope="module")
def usual(bundle: Path, given: tuple[object, ...]) -> Tensor:
    """Latents of a short run with everything as given."""
    document("run", bundle, *given, *SHORT, "--latents", bundle.parent / "usual.safetensors")
    return load_file(bundle.parent / "usual.safetensors")["latents"]


@pytest.mark.parametrize("change", ["nothing", "offload", "image", "audio", "table", "pose"])
def test_everything_that_is_given_matters(
    bundle: Path, given: tuple[object, ...], usual: Tensor, change: str, tmp_path: Path
) -> None:
    (tmp_path / "black.ppm").write_bytes(b"P6 8 8 255\n" + bytes(8 * 8 * 3))
    changes: dict[str, tuple[object, ...]] = {
        "nothing": (),
        "offload": ("--offload",),
        "image": ("--image", tmp_path / "black.ppm"),
        "audio": ("--audio", write_wav(tmp_path / "low.wav", tone(2.0, 16000, 110.0), 16000)),
        "table": ("--rope-table", "fp16"),
        "pose": ("--pose", pose_video(tmp_path, 20)),
    }
    kept = without(given, "--audio") if change == "audio" else given  # a second one would be another speaker
    document("run", bundle, *kept, *SHORT, *changes[change], "--latents", tmp_path / "l.safetensors")
    latents = load_file(tmp_path / "l.safetensors")["latents"]
    assert torch.equal(latents, usual) == (change in ("nothing", "offload"))
    assert torch.allclose(latents, usual, atol=2e-2) or change != "table"  # a matter of rounding


def test_two_speakers_are_heard_where_their_masks_are(bundle: Path, given: tuple[object, ...], tmp_path: Path) -> None:
    home = bundle.parent
    low = write_wav(tmp_path / "low.wav", tone(2.0, 16000, 110.0), 16000)
    left, right = half_masks(tmp_path)

    def said(*speakers: tuple[Path, Path]) -> Tensor:
        flags = [flag for audio, mask in speakers for flag in ("--audio", audio, "--speaker-mask", mask)]
        alone = ("--policy", "full", "--frames", 3)
        document("run", bundle, *without(given, "--audio"), *alone, *flags, "--latents", tmp_path / "l.safetensors")
        return load_file(tmp_path / "l.safetensors")["latents"]

    voice = home / "voice.wav"
    both = said((voice, left), (low, right))
    torch.testing.assert_close(said((low, right), (voice, left)), both, atol=1e-3, rtol=1e-3)
    for other in (said((voice, right), (low, left)), said((voice, left))):
        assert float((other - both).abs().max()) > 1e-2


def test_a_pose_is_encoded_clip_by_clip_and_ends_in_black(base: Path, tmp_path: Path) -> None:
    """As upstream: each clip behind its first picture, the first latent left out; black pictures where it ends."""
    spec = replace(TINY, window_frames=3)
    vae = open_vae(base, spec, torch.device("cpu"))
    latents = posed(pose_video(tmp_path, 22), vae, spec, 12)
    assert latents.shape == (1, 12, *spec.latent_shape)
    pictures = torch.from_numpy(read_video(tmp_path / "pose.mp4")[0]).permute(0, 3, 1, 2).float() / 255
    pixels = torch.cat([covering(pictures, 64, 96), torch.zeros(14, 3, 64, 96)])
    for clip, start in enumerate((0, 12, 24)):
        wanted = vae.encode(pixels[[start, *range(start, start + 12)]][None])[:, 1:]
        torch.testing.assert_close(latents[:, 3 * clip : 3 * clip + 3], wanted)
    assert torch.equal(latents[:, 9:], latents[:, 6:9])
    save_file({"latents": latents}, tmp_path / "p.safetensors")
    torch.testing.assert_close(posed(tmp_path / "p.safetensors", vae, spec, 3), latents[:, :3])
    longer = posed(tmp_path / "p.safetensors", vae, spec, 15)
    assert longer.shape[1] == 15
    assert not longer[:, 12:].any()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--audio", "{home}/voice.wav"), "2 of --audio and 0 of --speaker-mask"),
        (("--speaker-mask", "{left}", "--speaker-mask", "{left}"), "1 of --audio and 2 of --speaker-mask"),
        (("--speaker-mask", "{black}"), "black.pgm' is black"),
        (("--speaker-mask", "nowhere.png"), "image 'nowhere.png' cannot be read"),
        (("--audio", "nowhere.wav", "--speaker-mask", "{left}", "--speaker-mask", "{left}"), "'nowhere.wav' cannot"),
        (("--pose", "nowhere.mp4"), "--pose 'nowhere.mp4' does not exist"),
        (("--pose", "{left}"), "has 1 pictures: expected at least 4"),
        (("--pose", "{home}/rows.safetensors"), "expected a tensor named 'latents'"),
    ],
)
def test_a_speaker_or_a_pose_that_does_not_fit_is_one_line(
    bundle: Path, given: tuple[object, ...], flags: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    (tmp_path / "black.pgm").write_bytes(b"P5 2 2 255\n" + bytes(4))
    names = {"home": bundle.parent, "left": half_masks(tmp_path)[0], "black": tmp_path / "black.pgm"}
    done = invoke("run", bundle, *given, *(flag.format(**names) for flag in flags), "--latents", "m.safetensors")
    assert isinstance(done.exception, InputError)
    assert said in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_moved_sink_is_watched_from_where_it_moves(bundle: Path, given: tuple[object, ...], usual: Tensor) -> None:
    """The first clip cannot tell, the next one must; the warm-up is frames 12 to 24."""
    kept = bundle.parent / "o.safetensors"
    done = document("run", bundle, *given, "--online-reference", "--frames", 27, "--latents", kept)
    latents = load_file(kept)["latents"]
    # The usual run attends in one call where this one watches in parts: equal up to rounding, and 8-bit steps of it.
    assert torch.allclose(latents[:, :12], usual[:, :12], atol=2e-2)
    gap = (latents[:, :15] - usual).abs()
    moved = [float(gap[:, frames].max()) for frames in (slice(9, 12), slice(12, 15))]
    assert moved[1] > 3 * moved[0]
    held = done["kv"]["per_chunk_bytes"]
    assert held[:7] == [done["kv"]["full_bytes"]] * 7
    assert held[8] < held[6]
    assert done["absorption"]["state"] == "absorbed"


@pytest.mark.parametrize(
    ("flag", "said"),
    [("--image", "missing: --image"), ("--audio", "missing: --audio"), ("--vae", "missing: --vae"),
     ("--audio-encoder", "missing: --audio-encoder")],
)  # fmt: skip
def test_what_is_missing_is_named(bundle: Path, given: tuple[object, ...], flag: str, said: str) -> None:
    done = invoke("run", bundle, *without(given, flag), "--latents", bundle.parent / "m.safetensors")
    assert isinstance(done.exception, InputError)
    assert said in str(done.exception)


@pytest.mark.parametrize(
    "flags",
    [
        ("--kv-dtype", "int8"),
        ("--attention-dtype", "int8"),
        ("--rope-table", "half"),
        ("--recent-frames", 2),
        ("--infinity",),
        ("--per-step", "--save-deltas", "d.safetensors"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    bundle: Path, given: tuple[object, ...], flags: tuple[object, ...]
) -> None:
    done = invoke("run", bundle, *given, *flags, "--latents", bundle.parent / "m.safetensors")
    assert isinstance(done.exception, InputError)
    assert "\n" not in str(done.exception)


INJECTED = "audio_injector.injector.2.q.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {n: v for n, v in t.items() if n != INJECTED}, f"1 tensors missing ({INJECTED})"),
        (lambda t: {**t, "audio_injector.extra": torch.ones(2)}, "1 unexpected (audio_injector.extra)"),
        (lambda t: {**t, INJECTED: torch.ones(64, 3)}, INJECTED),
        (lambda t: {**t, INJECTED: t[INJECTED] * torch.nan}, f"{INJECTED} holds"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_told_by_its_tensors(
    weights: dict[str, Tensor], tmp_path: Path, change: Any, said: str
) -> None:
    save_file(change(weights), tmp_path / "base.safetensors")
    done = invoke("quantize", tmp_path / "base.safetensors", "--model", NAME, "-o", tmp_path / "b")
    assert isinstance(done.exception, InputError)
    assert said in str(done.exception)
    assert [item.name for item in tmp_path.iterdir()] == ["base.safetensors"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--frames", 20), "20 frames: expected 3 plus a multiple of 3"),
        (("--frames", 45_003), "45000 absolute positions; ask for fewer --frames"),
        (("--height", 100), "--height 100: expected a multiple of 16 pixels; nearest is 96"),
        (("--ratio", 1.5), "ratio 1.5"),
        (("--warmup", 6), "warm-up of 6"),
        (("--kv-frames", 6), "--kv-frames with model"),
        (("--renew-sink",), "--renew-sink with model"),
        (("--roll",), "its rings roll by themselves"),
        (("--initial", "l.safetensors"), "l.safetensors"),
    ],
)
def test_a_bad_number_is_one_line(
    bundle: Path, given: tuple[object, ...], flags: tuple[object, ...], said: str, tmp_path: Path
) -> None:
    done = invoke("run", bundle, *given, *flags, "--latents", tmp_path / "m.safetensors")
    assert isinstance(done.exception, InputError)
    assert said in str(done.exception)
    assert "\n" not in str(done.exception)
    assert "--infinity" not in str(done.exception), "it is refused here"
    assert not list(tmp_path.iterdir())


def test_out_of_memory_names_what_this_model_can_do(
    bundle: Path, given: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(Sampler, "denoise", fail)
    done = invoke("run", bundle, *given, "--latents", tmp_path / "m.safetensors")
    assert isinstance(done.exception, RunError)
    for flag in ("--offload (", "--stats-device cpu (", "--height ", "--ratio 1 "):
        assert flag in str(done.exception)
    assert "--kv-dtype" not in str(done.exception), "its rings are not coded"
    assert not list(tmp_path.iterdir())


def test_ctrl_c_closes_the_video_with_its_sound(
    bundle: Path, given: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    denoise = Sampler.denoise

    def interrupted(self: Sampler, chunk: int, *rest: Any) -> Tensor:
        if chunk == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return denoise(self, chunk, *rest)

    monkeypatch.setattr(Sampler, "denoise", interrupted)
    done = invoke("run", bundle, *given, "--out", tmp_path / "v.mp4", "--json")
    assert done.exit_code == 130
    assert json.loads(done.stdout)["complete"] is False
    pictures, rate = read_video(tmp_path / "v.mp4")
    assert (len(pictures), rate) == (1 + 4 * 5, 25)
    assert len(read_audio(tmp_path / "v.mp4")) == pytest.approx(16000 * len(pictures) / rate, abs=2000)


def test_another_resolution_and_what_is_foreseen_of_it(bundle: Path, given: tuple[object, ...], tmp_path: Path) -> None:
    size = ("--height", 96, "--width", 80, "--frames", 6, "--policy", "full")
    done = document("run", bundle, *given, *size, "--latents", tmp_path / "l.safetensors")
    assert load_file(tmp_path / "l.safetensors")["latents"].shape == (1, 6, 16, 12, 10)
    condition = 30 + 30 + 3 * 2 + 4 * 1  # tokens: reference, then motion at three scales
    assert done["kv"]["full_bytes"] == 4 * (12 * 4 * 30 + condition) * 64 * 4 * 2


def test_a_profile_has_its_rings_its_condition_and_its_audio(bundle: Path) -> None:
    model = open_bundle(bundle, allow_fallback=True).model
    runs = configurations(dequantised(model), model, "w8a8-int8")[:4]
    report = compare(runs, rounds=1, price_pairs=1, timeline=False, windows=())
    assert (report["model"]["passes"], report["model"]["window"]) == (4, 12)
    tokens, condition = 24, 58
    ring, kept = 4 * 12 * tokens, condition
    for run in report["runs"]:
        local = run["name"].startswith("ispa")
        assert run["kv_percent"] == pytest.approx(100 * (1 - 0.5 * local * ring / (ring + kept)), abs=1e-3)
        assert run["memory"]["kv_persistent"] == (4 * (ring + kept) - 2 * local * ring) * 64 * 4 * 2
        rows = run["components"]
        assert all(rows[row] > 0 for row in ("attention.kernel", "attention.cross", "overhead.audio", "linear.gemm"))
        assert sum(rows.values()) + run["unattributed_ms"] == pytest.approx(run["wall_ms"], rel=0.01)
    warm = next(run for run in report["runs"] if run["name"] == "ispa")["start"]
    assert [chunk["state"] for chunk in warm["chunks"]] == ["warm-up"] * 3 + ["transition", "steady", "steady"]
    # An F-layer sees the ring and the condition, an L-layer the condition and the chunk.
    seen = (12 + condition / tokens, 3 + condition / tokens)
    assert report["amdahl"]["attention_ceiling"] == pytest.approx(1 / (0.5 + 0.5 * seen[1] / seen[0]), rel=1e-4)
    assert report["windows"][0]["window"] == round(seen[0], 1)


# -- pictures


def test_a_picture_is_scaled_to_cover_and_cut_around_its_centre(tmp_path: Path) -> None:
    ramp = np.zeros((40, 80, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(80) * 3
    (tmp_path / "ramp.ppm").write_bytes(b"P6 80 40 255\n" + ramp.tobytes())
    whole = read_image(tmp_path / "ramp.ppm", 40, 80)
    torch.testing.assert_close(whole[0, 0] * 255, torch.arange(80) * 3.0, atol=1.01, rtol=0)
    square = read_image(tmp_path / "ramp.ppm", 40, 40)
    torch.testing.assert_close(square, whole[:, :, 20:60])
    half = read_image(tmp_path / "ramp.ppm", 20, 20)
    assert half.shape == (3, 20, 20)
    torch.testing.assert_close(half[0, 5, 2:18], square[0, 10].unflatten(0, (20, 2)).mean(1)[2:18], atol=5e-3, rtol=0)


@pytest.mark.parametrize("content", [None, b"once upon a time"])
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        read_image(path, 8, 8)
