"""Video files: frames are encoded as they come, sound beside them, and a file gets its name only when it is whole.

H.264 where the encoder library has it, MPEG-4 otherwise; both in yuv420p, which every player reads. That format stores
colour per 2x2 pixels, so an odd width or height gains one repeated column or row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ispa_deploy.errors import InputError, RunError, reason_of
from ispa_deploy.media.audio import AudioTrack
from ispa_deploy.media.output import local_file, output_path, partial_path

if TYPE_CHECKING:
    import av
    from av.audio.stream import AudioStream
    from av.container import OutputContainer
    from av.video.stream import VideoStream

# Encoders by preference, with settings at which the loss is hard to see.
ENCODERS: dict[str, dict[str, str]] = {
    "libx264": {"crf": "16", "preset": "medium"},
    "mpeg4": {"flags": "+qscale", "global_quality": str(2 * 118)},  # quantiser 2 in units of lambda (118)
}

BT601 = 6  # SMPTE 170M, as numbered by ITU-T H.273
LIMITED_RANGE = 1  # luma 16..235


class VideoWriter:
    """Writes one mp4, frame by frame, in a `with` block.

    Leaving the block, `finish()` and Ctrl-C close the video and give it its name; any other exception removes it.
    A file already at `path` stays until then. With no frame written, no file is made.
    """

    def __init__(self, path: str | Path, *, fps: int | float, scale: int = 1, audio: Sequence[Path] = ()) -> None:
        """`fps` frames per second; `scale` repeats each pixel that many times in both directions.

        `audio`: sound files to go with it, mixed, cut where the pictures end.

        InputError: not an `.mp4` name, its folder is missing or not writable, `fps` or `scale` not positive, no sound
        in `audio`.
        """
        if not 0 < fps < float("inf"):
            raise InputError(f"frames per second {fps}: expected a positive number")
        if scale < 1:
            raise InputError(f"video scale {scale}: expected a whole number from 1 on")
        self.path = output_path(path, ".mp4", "video")
        self.frames = 0
        self._partial = partial_path(self.path)
        self._rate = Fraction(fps).limit_denominator(1001)
        self._scale = scale
        self._size: list[int] = []
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None
        self._track = AudioTrack(*audio) if audio else None
        self._sound: AudioStream | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self.finish()
        else:
            self._discard()

    def write(self, pixels: Tensor) -> None:
        """Append (F, 3, H, W) floats in [0, 1] (clamped), any device. RunError when the disk does not take them."""
        import av

        assert not self._closed, "the video is closed"
        _, colours, *size = pixels.shape
        assert (colours, len(size)) == (3, 2), f"expected (F, 3, H, W), got {tuple(pixels.shape)}"
        assert self._size in ([], size), f"frames of {size} in a video of {self._size}"
        if not len(pixels):
            return
        self._size = size
        with self._disk_errors():
            for picture in _pictures(pixels, self._scale):
                self._encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))

    def finish(self) -> Path | None:
        """Close the video and give it its name now; later calls do nothing. None when no frame was written."""
        if not self._closed and self._container is not None:
            assert self._stream is not None
            with self._disk_errors():
                self._container.mux(self._stream.encode(None))
                if self._sound is not None:
                    self._container.mux(self._sound.encode(None))
                self._container.close()
                os.replace(self._partial, self.path)
        self._close()
        return self.path if self.frames else None

    def _encode(self, frame: object) -> None:
        """Encode one VideoFrame; the first one opens the file."""
        import av

        assert isinstance(frame, av.VideoFrame)
        if self._stream is None:
            self._container, self._stream = _open(self._partial, self._rate, frame.width, frame.height)
            if self._track is not None:
                self._sound = self._container.add_stream("aac", rate=self._track.rate, layout=self._track.layout)
        assert self._container is not None
        frame.pts, frame.time_base = self.frames, 1 / self._rate
        self._container.mux(self._stream.encode(frame))
        self.frames += 1
        if self._track is not None and (heard := self._track.until(float(self.frames / self._rate))) is not None:
            assert self._sound is not None
            self._container.mux(self._sound.encode(heard))

    def _discard(self) -> None:
        """Close and remove what is there."""
        import av

        if not self._closed and self._container is not None:
            with suppress(av.FFmpegError):
                self._container.close()
            self._partial.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        if self._track is not None:
            self._track.close()
        self._closed = True

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """A full disk ends in one line, and without half a video."""
        import av

        try:
            yield
        except (av.FFmpegError, OSError) as error:
            self._discard()
            raise RunError(f"video '{self.path}' could not be written: {error.strerror or error}") from error


def read_video(path: str | Path) -> tuple[NDArray[np.uint8], float]:
    """All frames as (F, H, W, 3) uint8, and the frames per second. InputError when `path` is not a readable video."""
    import av

    try:
        with av.open(local_file(path)) as container:
            stream = container.streams.video[0]
            frames = [upright(frame) for frame in container.decode(stream)]
            rate = stream.average_rate
    except (av.FFmpegError, OSError, IndexError) as error:
        reason = reason_of(error, "it has no pictures")
        raise InputError(f"'{path}' cannot be read as a video ({reason}): expected a playable file") from None
    if not frames or rate is None:
        raise InputError(f"'{path}' holds no frames: expected a playable video")
    return np.stack(frames).astype(np.uint8, copy=False), float(rate)


def upright(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """(H, W, 3) as it is meant to be seen: telephones write sideways and say so."""
    pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    return np.ascontiguousarray(np.rot90(pixels, round(getattr(frame, "rotation", 0) / 90)))


def to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """(F, 3, H, W) floats in [0, 1], clamped -> (F, H, W, 3) uint8 on the CPU."""
    scaled = pixels.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.asarray(scaled.permute(0, 2, 3, 1).cpu().numpy(), dtype=np.uint8)


def _pictures(pixels: Tensor, scale: int) -> Iterator[NDArray[np.uint8]]:
    """Frames as contiguous (H, W, 3) uint8 of even size, each pixel `scale` times."""
    for picture in to_uint8(pixels):
        picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
        odd = [(0, length % 2) for length in picture.shape[:2]]
        yield np.ascontiguousarray(np.pad(picture, [*odd, (0, 0)], mode="edge"))


def _encoder() -> str:
    """The first encoder that the installed library has."""
    import av

    for name in ENCODERS:
        with suppress(ValueError):
            return av.Codec(name, "w").name
    raise RunError(f"the installed PyAV has none of the encoders {', '.join(ENCODERS)}: reinstall it with pip")


def _open(path: Path, rate: Fraction, width: int, height: int) -> tuple[OutputContainer, VideoStream]:
    """A new mp4 with one empty video stream."""
    import av
    from av.video.stream import VideoStream

    name = _encoder()
    container = av.open(local_file(path), "w", format="mp4", container_options={"movflags": "+faststart"})
    stream = container.add_stream(name, rate=rate, options=ENCODERS[name])
    assert isinstance(stream, VideoStream)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    # What the conversion from RGB uses, said aloud: players guess otherwise, and differently for large pictures.
    context = stream.codec_context
    context.color_primaries = context.color_trc = context.colorspace = BT601
    context.color_range = LIMITED_RANGE
    return container, stream
