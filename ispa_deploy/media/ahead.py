"""Decoding beside generation: a chunk turns into pixels while the next one is denoised.

One thread of its own, on CUDA with a stream of its own, takes the chunks in order. At most `depth` of them wait, so
latents do not pile up behind a slow decoder. The pixels are those of decoding in between, bit for bit: the same calls
in the same order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ispa_deploy.stream import Chunk, Decoder, Stream


class DecodeAhead:
    """Takes chunks without pixels and gives them back with pixels, in order, at most `depth` later.

    A `with` block: leaving it, also by an exception, waits for the decode under way and drops those that wait.
    `waited`: seconds that the caller was held up by the decoder.
    """

    def __init__(self, decoder: Decoder, device: torch.device, *, depth: int = 1) -> None:
        assert depth > 0, "a queue of nothing never hands out a chunk"
        self.waited = 0.0
        self._decoder, self._depth = decoder, depth
        self._pending: deque[tuple[Chunk, Future[Tensor]]] = deque()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    def push(self, chunk: Chunk) -> list[Chunk]:
        """Hand over a chunk; what has to leave the queue for it. Raises what the decoder raised on an earlier one."""
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append((chunk, self._worker.submit(self._decode, chunk.latents, ready)))
        return self._take(self._depth)

    def finish(self) -> list[Chunk]:
        """The chunks that are still in the queue, decoded."""
        return self._take(0)

    def _take(self, keep: int) -> list[Chunk]:
        started, done = time.perf_counter(), []
        while len(self._pending) > keep:
            chunk, pixels = self._pending.popleft()
            done.append(replace(chunk, pixels=self._received(pixels.result())))
        self.waited += time.perf_counter() - started
        return done

    @torch.inference_mode()
    def _decode(self, latents: Tensor, ready: torch.cuda.Event | None) -> Tensor:
        if self._stream is None or ready is None:
            return self._decoder(latents)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            latents.record_stream(self._stream)
            pixels = self._decoder(latents)
            self._stream.synchronize()  # this thread's work alone: the chunk under way goes on
            return pixels

    def _received(self, pixels: Tensor) -> Tensor:
        """Pixels that are freed only when the caller's stream is done with them, too."""
        if pixels.is_cuda:
            pixels.record_stream(torch.cuda.current_stream(pixels.device))
        return pixels


def decoding_ahead(stream: Stream, *, depth: int = 1) -> Iterator[Chunk]:
    """The chunks of a stream with pixels, each handed out when the `depth` chunks after it are generated.

    The stream is then ahead of its chunks: what is asked of it, a recalibration or another prompt, comes as much later.
    """
    decoder, stream.decoder = stream.decoder, None
    assert decoder is not None, "a stream without a decoder has nothing to decode"
    with DecodeAhead(decoder, stream.model.device, depth=depth) as ahead:
        for chunk in stream:
            yield from ahead.push(chunk)
        yield from ahead.finish()
