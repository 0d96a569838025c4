"""Laws of sound: samples are the file's, features are wav2vec2's own at the video's rate, the track ends with it."""

from __future__ import annotations

import math
import struct
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ispa_deploy.errors import InputError
from ispa_deploy.media.audio import AudioEncoder, interpolate, open_wav2vec2, read_audio, sample
from ispa_deploy.media.video import VideoWriter, read_video

transformers = pytest.importorskip("transformers")

LAYERS, WIDTH = 2, 32


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return np.sin(2 * math.pi * hertz * np.arange(int(seconds * rate)) / rate)


def write_wav(path: Path, samples: np.ndarray, rate: int) -> Path:
    """(N,) or (N, channels) floats in [-1, 1] as 16-bit PCM."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).round().astype("<i2").tobytes())
    return path


def write_coded(path: Path, samples: np.ndarray, rate: int, codec: str) -> Path:
    """(N,) floats in [-1, 1] as mono in a lossy code."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def tiny_wav2vec2() -> torch.nn.Module:
    config = transformers.Wav2Vec2Config(
        vocab_size=12, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=40,
        conv_dim=(16,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
        do_stable_layer_norm=True, conv_bias=True,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: a CTC model, which carries a head that we do not use, and its feature extractor."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("wav2vec2")
    tiny_wav2vec2().save_pretrained(home)
    extractor = transformers.Wav2Vec2FeatureExtractor(
        sampling_rate=16000, do_normalize=True, return_attention_mask=True
    )
    extractor.save_pretrained(home)
    return home


# -- samples


def test_samples_at_the_wanted_rate_come_as_they_lie_in_the_file(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, 5000)
    read = read_audio(write_wav(tmp_path / "a.wav", samples, 16000))
    assert torch.equal(read, torch.from_numpy((samples * 32767).round() / 32768).float())


def test_another_rate_and_two_channels_become_one_tone(tmp_path: Path) -> None:
    left = tone(1.0, 44100)
    read = read_audio(write_wav(tmp_path / "a.wav", np.stack([left, 0.5 * left], 1) / 2, 44100)).numpy()
    assert abs(len(read) - 16000) <= 1
    middle = slice(500, 15500)  # the filter's ends are its own
    assert similarity(read[middle], tone(1.0, 16000)[: len(read)][middle]) > 0.9999
    assert abs(read[middle]).max() == pytest.approx(0.375, rel=0.01)


def test_a_name_with_a_colon_is_a_file_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_wav(Path("take:2.wav"), tone(1.0, 16000), 16000)
    assert len(read_audio(path)) == 16000
    with VideoWriter("v.mp4", fps=16, audio=[path]) as writer:
        writer.write(torch.rand(16, 3, 32, 32))
    assert len(read_audio("v.mp4")) >= 16000


@pytest.mark.parametrize(
    ("content", "parts"),
    [(None, ("No such file",)), (b"once upon a time", ("cannot be read", ".wav")), (b"", ("cannot be read",))],
)
def test_what_is_no_sound_is_refused(tmp_path: Path, content: bytes | None, parts: tuple[str, ...]) -> None:
    path = tmp_path / "a.wav"
    if content is not None:
        path.write_bytes(content)
    for reader in (read_audio, lambda path: VideoWriter(tmp_path / "v.mp4", fps=8, audio=[path])):
        with pytest.raises(InputError) as error:
            reader(path)
        assert str(path) in str(error.value)
        assert all(part in str(error.value) for part in parts)


def test_samples_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    samples = np.zeros(800, np.float32)
    samples[7] = np.nan
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + 3200, b"WAVE", b"fmt ", 16, 3, 1, 16000, 64000, 4, 32,
                       b"data", 3200)  # fmt: skip
    (tmp_path / "a.wav").write_bytes(head + samples.tobytes())
    with pytest.raises(InputError, match=r"a\.wav' holds NaN or Inf"):
        read_audio(tmp_path / "a.wav")


def test_a_silent_film_and_an_empty_file_have_no_sound(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "v.mp4", fps=8) as writer:
        writer.write(torch.zeros(2, 3, 16, 16))
    with pytest.raises(InputError, match="it has no sound"):
        read_audio(tmp_path / "v.mp4")
    with pytest.raises(InputError, match="holds no samples"):
        read_audio(write_wav(tmp_path / "a.wav", np.zeros(0), 16000))


# -- features


def test_hidden_states_are_those_of_the_published_class(folder: Path) -> None:
    samples = torch.randn(16000) * 0.1 + 0.05
    published = transformers.Wav2Vec2ForCTC.from_pretrained(folder).eval()
    normal = (samples - samples.mean()) / (samples.var(correction=0) + 1e-7).sqrt()
    with torch.inference_mode():
        expected = torch.cat(published(normal[None], output_hidden_states=True).hidden_states)
    states = open_wav2vec2(folder).hidden_states(samples)
    assert states.shape == (1 + LAYERS, 49, WIDTH)
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


def straight(states: Tensor, rate: int, target: int) -> np.ndarray:
    """The same by numpy's own interpolation, first and last point kept."""
    length = int(states.shape[1] / rate * target)
    at = np.linspace(0, states.shape[1] - 1, length)
    columns = states.double().numpy().transpose(0, 2, 1)
    return np.stack([[np.interp(at, np.arange(len(c)), c) for c in layer] for layer in columns]).transpose(0, 2, 1)


def test_features_follow_the_videos_clock(rng: torch.Generator) -> None:
    states = torch.randn(3, 101, 4, generator=rng)
    slow = interpolate(states, 50, 30)
    np.testing.assert_allclose(slow.numpy(), straight(states, 50, 30), atol=1e-4)  # float32 positions
    picked = sample(slow, 30, 25, 60)
    for frame in range(60):
        nearest = round(frame / 25 * 30)
        expected = slow[:, nearest] if nearest < slow.shape[1] else torch.zeros(3, 4)
        assert torch.equal(picked[:, frame], expected), frame
    assert nearest >= slow.shape[1], "the last frames outlast the sound"


def test_features_of_a_sound(folder: Path) -> None:
    encoder = open_wav2vec2(folder)
    samples = torch.randn(2 * 16000)
    heard = encoder.features(samples, fps=25)
    assert heard.shape == (1, 1 + LAYERS, WIDTH, 49)
    longer = encoder.features(samples, fps=25, frames=60)
    assert torch.equal(longer[..., :49], heard)
    assert not longer[..., 50:].any()
    with pytest.raises(InputError, match="at least 400"):
        encoder.features(torch.zeros(399), fps=25)
    assert isinstance(encoder, AudioEncoder)
    assert encoder.features(torch.randn(400), fps=25).shape[-1] == 1


def test_a_folder_that_is_no_wav2vec2_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        open_wav2vec2(tmp_path)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(InputError, match="copy the whole folder"):
        open_wav2vec2(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layers.1.attention.q_proj.weight" in name)
    save_file(
        {key: tensor for key, tensor in tensors.items() if key != name},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(InputError, match=r"lacks 1 tensors .*q_proj"):
        open_wav2vec2(tmp_path)
    save_file({**tensors, name: tensors[name] * torch.nan}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"q_proj.weight holds NaN or Inf"):
        open_wav2vec2(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(InputError, match="copy the whole folder"):
        open_wav2vec2(tmp_path)


# -- the track


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (22050, 2), (11000, 1)])
@pytest.mark.parametrize("seconds", [0.5, 4.0])
def test_the_sound_lies_beside_the_pictures_and_ends_with_them(
    tmp_path: Path, rate: int, channels: int, seconds: float
) -> None:
    sound = 0.5 * tone(seconds, rate)
    path = write_wav(tmp_path / "a.wav", np.stack([sound] * channels, 1), rate)
    frames, fps = 33, 16
    with VideoWriter(tmp_path / "v.mp4", fps=fps, audio=[path]) as writer:
        for _ in range(frames):
            writer.write(torch.rand(1, 3, 32, 32))
    pictures, found = read_video(tmp_path / "v.mp4")
    assert (len(pictures), found) == (frames, fps)
    heard = read_audio(tmp_path / "v.mp4").numpy()
    expected = tone(min(seconds, frames / fps), 16000)
    assert 0 <= len(heard) - len(expected) < 1500, "AAC works in blocks of 1024 samples"
    assert similarity(heard[1000 : len(expected) - 1000], expected[1000:-1000]) > 0.99
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_several_sounds_are_mixed_and_each_ends_in_its_time(tmp_path: Path) -> None:
    low = write_wav(tmp_path / "low.wav", 0.4 * tone(1.0, 16000, 220.0), 16000)
    high = write_wav(tmp_path / "high.wav", np.stack([0.4 * tone(2.0, 22050, 880.0)] * 2, 1), 22050)
    with VideoWriter(tmp_path / "v.mp4", fps=16, audio=[low, high]) as writer:
        writer.write(torch.rand(32, 3, 32, 32))
    heard = read_audio(tmp_path / "v.mp4").numpy()
    assert 0 <= len(heard) - 32000 < 1500
    both, alone = heard[1000:15000], heard[18000:31000]
    first, second = tone(2.0, 16000, 220.0), tone(2.0, 16000, 880.0)
    assert similarity(both, (first + second)[1000:15000]) > 0.99
    assert similarity(alone, second[18000:31000]) > 0.99


def talking(path: Path, audio: Path, frames: int) -> Path:
    with VideoWriter(path, fps=16, audio=[audio]) as writer:
        writer.write(torch.rand(frames, 3, 32, 32))
    return path


def test_the_sound_may_be_an_mp3(tmp_path: Path) -> None:
    """Its times begin behind the encoder's delay, not at 0."""
    path = write_coded(tmp_path / "a.mp3", 0.5 * tone(2.0, 44100), 44100, "libmp3lame")
    heard = read_audio(talking(tmp_path / "v.mp4", path, 32)).numpy()
    assert 0 <= len(heard) - 32000 < 1500
    assert similarity(heard[1000:31000], read_audio(path).numpy()[1000:31000]) > 0.99


@pytest.mark.parametrize("rates", [(44100, 22050), (22050, 44100)])
def test_a_file_that_changes_its_rate_goes_on(tmp_path: Path, rates: tuple[int, int]) -> None:
    """Streams of packets may be joined end to end."""
    halves = [
        write_coded(tmp_path / f"{rate}.aac", 0.5 * tone(1.0, rate, hertz), rate, "aac").read_bytes()
        for rate, hertz in zip(rates, (440.0, 1000.0), strict=True)
    ]
    path = tmp_path / "a.aac"
    path.write_bytes(b"".join(halves))
    for heard in (read_audio(path), read_audio(talking(tmp_path / "v.mp4", path, 32))):
        assert abs(len(heard) - 32000) < 3000
        for second, hertz in ((heard[2000:12000], 440), (heard[19000:29000], 1000)):
            peak = int(torch.fft.rfft(second).abs().argmax()) * 16000 / len(second)
            assert peak == pytest.approx(hertz, abs=5)


def test_a_sound_that_is_damaged_further_on_is_named(tmp_path: Path) -> None:
    path = write_coded(tmp_path / "a.aac", 0.5 * tone(3.0, 44100), 44100, "aac")
    path.write_bytes(path.read_bytes()[:-200])
    for reader in (read_audio, lambda path: talking(tmp_path / "v.mp4", path, 60)):
        with pytest.raises(InputError, match=r"a\.aac' cannot be read"):
            reader(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.aac"]


def test_a_broken_run_lets_go_of_the_sound(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tone(1.0, 16000), 16000)
    writer = VideoWriter(tmp_path / "v.mp4", fps=8, audio=[path])
    writer.write(torch.zeros(2, 3, 16, 16))
    writer.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.wav"]
