"""Sound: a file's samples, what wav2vec2 hears in them frame by frame, and the track beside a video's pictures.

Features are those that S2V models were trained on: every hidden state of wav2vec2 at 50 Hz, interpolated to 30 Hz and
sampled at the video's rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from ispa_deploy.errors import InputError, reason_of
from ispa_deploy.media.output import local_file
from ispa_deploy.media.weights import check_finite, hushed, library

if TYPE_CHECKING:
    import av

SAMPLE_RATE = 16_000
"""Samples per second that wav2vec2 hears."""
STATE_RATE = 50
"""Hidden states per second."""
FEATURE_RATE = 30
"""Rate of the features before a video's frames pick theirs."""
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)


def read_audio(path: str | Path, rate: int = SAMPLE_RATE) -> Tensor:
    """All samples of a sound file, the mean of its channels: (N,) float32 in [-1, 1] at `rate` per second.

    InputError when `path` is not readable, or holds no sound.
    """
    import av

    try:
        with av.open(local_file(path)) as container:
            frames = resampled(container.decode(container.streams.audio[0]), rate)
            pieces = [frame.to_ndarray().mean(0) for frame in frames]
    except (av.FFmpegError, OSError, IndexError, UnicodeError) as error:
        raise _unreadable(path, error) from None
    samples = torch.from_numpy(np.concatenate(pieces or [np.zeros(0, np.float32)]))
    if not len(samples):
        raise InputError(f"audio '{path}' holds no samples: expected some sound")
    if not bool(samples.isfinite().all()):
        raise InputError(f"audio '{path}' holds NaN or Inf: expected finite samples; write the file again")
    return samples


def resampled(frames: Iterable[av.AudioFrame], rate: int, layout: str | None = None) -> Iterator[av.AudioFrame]:
    """Frames as float32 at `rate`, in `layout` or their own, also where a file changes its rate or channels midway."""
    import av

    resampler, known = None, None
    for frame in frames:
        kind = frame.sample_rate, frame.layout.name, frame.format.name
        if kind != known:
            if resampler is not None:
                yield from resampler.resample(None)
            resampler, known = av.AudioResampler(format="fltp", layout=layout, rate=rate), kind
        assert resampler is not None
        yield from resampler.resample(frame)
    if resampler is not None:
        yield from resampler.resample(None)


def _unreadable(path: str | Path, error: Exception) -> InputError:
    reason = reason_of(error, "it has no sound")
    return InputError(f"audio '{path}' cannot be read ({reason}): expected a sound file, for example .wav")


@dataclass(frozen=True)
class AudioEncoder:
    """wav2vec2 and the feature extractor of its folder, which normalises samples as the network was trained."""

    model: Any
    extractor: Any

    @torch.inference_mode()
    def hidden_states(self, samples: Tensor) -> Tensor:
        """(N,) samples at 16 kHz -> (1 + layers, T, width) float32 at 50 Hz on the model's device.

        The first state is the embedding. InputError for sound shorter than one state.
        """
        least = self._reach()
        if len(samples) < least:
            raise InputError(
                f"audio of {len(samples)} samples at {SAMPLE_RATE} Hz: expected at least {least}, one state of wav2vec2"
            )
        given = self.extractor(samples.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values
        weight = next(self.model.parameters())
        states = self.model(given.to(weight), output_hidden_states=True).hidden_states
        return torch.cat(states).float()

    def features(self, samples: Tensor, *, fps: int, frames: int | None = None) -> Tensor:
        """What each of a video's `frames` pixel frames hears: (1, 1 + layers, width, frames) float32.

        None: as many frames as the sound lasts, at least one. Zeros where the video outlasts the sound.
        """
        heard = interpolate(self.hidden_states(samples), STATE_RATE, FEATURE_RATE)
        if frames is None:
            frames = max(1, int(heard.shape[1] * fps / FEATURE_RATE))
        return sample(heard, FEATURE_RATE, fps, frames).transpose(1, 2)[None]

    def _reach(self) -> int:
        """Samples behind one hidden state."""
        reach = 1
        for kernel, stride in reversed(
            list(zip(self.model.config.conv_kernel, self.model.config.conv_stride, strict=True))
        ):
            reach = (reach - 1) * stride + kernel
        return reach


def interpolate(states: Tensor, rate: int, target: int) -> Tensor:
    """(L, T, D) at `rate` -> (L, T * target / rate, D), linear, first and last state kept as they are."""
    length = max(1, int(states.shape[1] / rate * target))
    return F.interpolate(states.transpose(1, 2), size=length, mode="linear", align_corners=True).transpose(1, 2)


def sample(states: Tensor, rate: int, fps: int, frames: int) -> Tensor:
    """The state nearest to each frame's time: (L, T, D) at `rate` -> (L, frames, D) at `fps`, zeros past the end."""
    nearest = (torch.arange(frames, dtype=torch.float64) * rate / fps).round().long()
    picked = states[:, nearest.clamp(max=states.shape[1] - 1)]
    return picked * (nearest < states.shape[1]).to(picked)[:, None]


def open_wav2vec2(folder: Path, device: torch.device | str = "cpu") -> AudioEncoder:
    """The wav2vec2 in an HF folder, float32, nothing downloaded; a CTC head beside it is left out.

    InputError: transformers is missing, no such folder, or its tensors are not all of the network's.
    """
    transformers = library("transformers", "the audio encoder")
    if not (folder / "config.json").is_file():
        raise InputError(
            f"audio encoder '{folder}': expected a folder with config.json (wav2vec2-large-xlsr-53-english)"
        )
    try:
        with hushed(), _quiet(transformers.utils.logging):  # it reports the head we leave out
            model, found = transformers.Wav2Vec2Model.from_pretrained(
                str(folder), local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
            extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = f"{(str(error).splitlines() or ['?'])[0]:.120}"
        raise InputError(f"audio encoder '{folder}' cannot be read ({reason}): copy the whole folder again") from None
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(f"audio encoder '{folder}' lacks {len(missing)} tensors ({missing[0]}): expected wav2vec2")
    check_finite(model.state_dict(), f"audio encoder '{folder}'")
    return AudioEncoder(model.eval().requires_grad_(False).to(device), extractor)


@contextmanager
def _quiet(log: Any) -> Iterator[None]:
    """transformers without its progress bar and warnings."""
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()


class AudioTrack:
    """The sound that goes beside a video's pictures, decoded as far as the pictures have come; several are mixed."""

    def __init__(self, *paths: Path) -> None:
        """InputError when a file is not readable, or holds no sound."""
        self._sources: list[_Source] = []
        try:
            for path in paths:
                self._sources.append(_Source(path))
        except InputError:
            self.close()
            raise
        first = self._sources[0].rate
        self.rate = first if first in AAC_RATES else 48_000
        self.layout = "mono" if all(source.channels == 1 for source in self._sources) else "stereo"
        for source in self._sources:
            source.start(self.rate)
        self._given = 0

    def until(self, seconds: float) -> av.AudioFrame | None:
        """The samples from where the last call ended to `seconds` after the start; None when there are none."""
        import av

        wanted = int(seconds * self.rate) - self._given
        heard = [part for source in self._sources if (part := source.take(wanted)) is not None]
        if not heard:
            return None
        # Rows are added here: libraries make mono softer on its way to stereo.
        mixed = np.zeros((1 if self.layout == "mono" else 2, max(part.shape[1] for part in heard)), np.float32)
        for part in heard:
            mixed[:, : part.shape[1]] += part
        frame = av.AudioFrame.from_ndarray(np.clip(mixed, -1, 1), format="fltp", layout=self.layout)
        frame.sample_rate, frame.pts, frame.time_base = self.rate, self._given, Fraction(1, self.rate)
        self._given += mixed.shape[1]
        return frame

    def close(self) -> None:
        """Let go of the files."""
        for source in self._sources:
            source.close()


class _Source:
    """One sound file on its way into a track."""

    def __init__(self, path: Path) -> None:
        import av

        try:
            self._container = av.open(local_file(path))
            self._stream = self._container.streams.audio[0]
        except (av.FFmpegError, OSError, IndexError, UnicodeError) as error:
            raise _unreadable(path, error) from None
        self._path = path
        self.rate, self.channels = self._stream.rate, self._stream.layout.nb_channels
        self._fifo = av.AudioFifo()

    def start(self, rate: int) -> None:
        """What `take` gives is resampled to this."""
        layout = "mono" if self.channels == 1 else "stereo"
        self._frames = resampled(self._container.decode(self._stream), rate, layout)

    def take(self, wanted: int) -> NDArray[np.float32] | None:
        """The next samples, one row for mono and two for more, at most `wanted`; None when there are none.

        InputError where the file turns out to be damaged.
        """
        import av

        try:
            while self._fifo.samples < wanted and (frame := next(self._frames, None)) is not None:
                # Samples follow each other; the file's times have gaps, and those of an .mp3 do not begin at 0.
                frame.pts, frame.time_base = None, Fraction(1, frame.sample_rate)
                self._fifo.write(frame)
        except (av.FFmpegError, OSError) as error:
            raise _unreadable(self._path, error) from None
        count = min(wanted, self._fifo.samples)
        read = self._fifo.read(count) if count > 0 else None
        return None if read is None else read.to_ndarray().astype(np.float32, copy=False)

    def close(self) -> None:
        self._container.close()
