"""Run a stream to its end: write what it yields, report on it, and stop cleanly when asked to.

The stream itself knows nothing of files, clocks or signals; all of that is here.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ispa_deploy.advice import memory_errors, out_of_memory
from ispa_deploy.budget import predict
from ispa_deploy.delta import DELTA_MODES, Delta
from ispa_deploy.errors import RunError, known_names
from ispa_deploy.media.ahead import DecodeAhead
from ispa_deploy.media.output import partial_path
from ispa_deploy.media.sheet import Shown, contact_sheet
from ispa_deploy.media.video import VideoWriter
from ispa_deploy.memory import setup_of
from ispa_deploy.stream import Chunk, Decoder, Stream
from ispa_deploy.tally import Outputs, Progress, Tally, keep, progress_of, report_of

__all__ = ["Outputs", "Progress", "out_of_memory", "run_stream", "stop_on_interrupt"]


class _Stopwatch:
    """A decoder in the stream that counts its own time, so that the report can tell generation from decoding."""

    def __init__(self, decoder: Decoder | None, device: torch.device):
        self.decoder, self.device, self.waited = decoder, device, 0.0

    def __call__(self, latents: Tensor) -> Tensor:
        assert self.decoder is not None
        _settle(self.device)
        started = time.perf_counter()
        pixels = self.decoder(latents)
        _settle(self.device)
        self.waited += time.perf_counter() - started
        return pixels

    def push(self, chunk: Chunk) -> list[Chunk]:
        """The chunk, which has its pixels already."""
        return [chunk]

    def finish(self) -> list[Chunk]:
        return []


def _settle(device: torch.device) -> None:
    """Device work is asynchronous: wait before reading a clock, but not for a decoder on a stream of its own."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM asks to stop after the current chunk; a second one interrupts at once."""
    asked = False

    def handle(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        previous = {which: signal.signal(which, handle) for which in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's business
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for which, before in previous.items():
            signal.signal(which, before)


def run_stream(
    stream: Stream,
    outputs: Outputs | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_border: Callable[[int], None] = lambda _: None,
    overlap: bool = False,
) -> dict[str, Any]:
    """Iterate the stream, write the outputs and return the run's report as plain JSON types.

    `overlap` decodes a chunk while the next one is generated; a model that needs the pixels decodes in between.

    `on_border` is called between chunks with the number of the next one, whose prompt it may still change.

    InputError before the first chunk where an output or the delta mode cannot be had. RunError naming the chunk when
    latents are not finite or memory runs out; no output is left then.
    """
    outputs = outputs or Outputs()
    outputs.check(stream.decoder is not None)
    _check_delta_mode(stream)
    spec, device, setup = stream.model.spec, stream.model.device, setup_of(stream)
    tally = Tally(shown=Shown(spec.pixel_frames(stream.frames)) if outputs.sheet else None)
    started = time.perf_counter()
    with ExitStack() as stack:
        decoding = _decoding(stream, overlap, stack)
        video = None
        if outputs.video:
            video = stack.enter_context(
                VideoWriter(outputs.video, fps=spec.fps, scale=outputs.scale, audio=outputs.audio)
            )
        stack.enter_context(memory_errors(stream.cache.spec, lambda: setup, device, lambda: _place(stream, tally)))
        chunks = stack.enter_context(_closing(iter(stream)))
        clock = time.perf_counter()
        for chunk in chunks:
            _settle(device)
            decoded = decoding.push(chunk)
            tally.seconds.append(time.perf_counter() - clock)
            _check_finite(stream, chunk)
            keep(tally, chunk, stream, outputs)
            _show(decoded, video, tally.shown)
            if on_progress:
                on_progress(progress_of(stream, tally, time.perf_counter() - started))
            if stop():
                break
            on_border(chunk.index + 1)
            clock = time.perf_counter()
        clock = time.perf_counter()
        decoded = decoding.finish()
        tally.seconds[-1:] = [last + time.perf_counter() - clock for last in tally.seconds[-1:]]
        _show(decoded, video, tally.shown)
    wall = time.perf_counter() - started
    _write(outputs, tally)
    return report_of(stream, tally, wall, decoding.waited, outputs, predict(stream.cache.spec, setup))


def _decoding(stream: Stream, overlap: bool, stack: ExitStack) -> DecodeAhead | _Stopwatch:
    """What turns the stream's latents into pixels, and counts the seconds that generation is held up by it."""
    decoder, device = stream.decoder, stream.model.device
    if overlap and decoder is not None and stream.context is None:
        stream.decoder = None
        return stack.enter_context(DecodeAhead(decoder, device))
    watch = _Stopwatch(decoder, device)
    stream.decoder = watch if decoder is not None else None
    return watch


def _show(chunks: list[Chunk], video: VideoWriter | None, shown: Shown | None) -> None:
    """Pixels that have come, into the video and, for the contact sheet, aside."""
    for chunk in chunks:
        if chunk.pixels is None:
            continue
        if shown is not None:
            shown.add(chunk.pixels[0])
        if video:
            video.write(chunk.pixels[0])


@contextmanager
def _closing(chunks: Iterator[Chunk]) -> Iterator[Iterator[Chunk]]:
    """Leave the stream's session, which restores the weights, also when the loop ends early."""
    try:
        yield chunks
    finally:
        chunks.close()  # type: ignore[attr-defined]


def _check_delta_mode(stream: Stream) -> None:
    """InputError for a mode that some layer does not offer: now, not at the transition."""
    absorber = stream.absorber
    if absorber.mode not in DELTA_MODES:
        raise known_names("delta mode", absorber.mode, DELTA_MODES)
    if not absorber.policy.absorbs or absorber.mode == "auto":
        return
    for target in {type(target): target for target in absorber.targets}.values():
        weight = target.reference_weight()
        target.set_delta(Delta(torch.zeros_like(weight, dtype=absorber.dtype)), absorber.mode)
        target.set_delta(None)


def _check_finite(stream: Stream, chunk: Chunk) -> None:
    if bool(torch.isfinite(chunk.latents).all()):
        return
    raise RunError(
        f"chunk {chunk.index + 1} of {len(stream.chunks)} (from frame {chunk.start} on, {stream.absorber.describe()}) "
        "holds NaN or Inf: no output was written; try --dtype float32, or --policy full to leave absorption out"
    )


def _place(stream: Stream, tally: Tally) -> str:
    return f"in chunk {len(tally.seconds) + 1} of {len(stream.chunks)} ({stream.absorber.describe()})"


def _write(outputs: Outputs, tally: Tally) -> None:
    if outputs.sheet and tally.shown is not None and tally.shown.numbers:
        rows, scale = [(outputs.label, tally.shown.video())], max(1, outputs.scale // 2)
        contact_sheet(rows, outputs.sheet, scale=scale, numbers=tally.shown.numbers)
    if outputs.latents and tally.latents:
        partial = partial_path(outputs.latents)
        try:
            save_file({"latents": torch.cat(tally.latents, 1)}, partial)
            os.replace(partial, outputs.latents)
        except (OSError, SafetensorError) as error:
            raise RunError(f"latents '{outputs.latents}' could not be written: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
