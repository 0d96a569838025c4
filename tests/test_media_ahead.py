"""Decoding beside generation: the same pixels in the same order, a bounded queue, and no thread left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ispa_deploy.errors import RunError
from ispa_deploy.media.ahead import DecodeAhead, decoding_ahead
from ispa_deploy.media.video import read_video
from ispa_deploy.run import Outputs, run_stream
from ispa_deploy.stream import Chunk, Stream
from tests.tiny import same_weights, tiny_model, tiny_stream, weights_of

CPU = torch.device("cpu")
PATIENCE = 20


class _Decoder:
    """Remembers what it saw, as a causal VAE does: pixels depend on every chunk before."""

    def __init__(self, also: Callable[[int], None] = lambda _: None) -> None:
        self.past, self.count, self.also = torch.zeros(()), 0, also

    def __call__(self, latents: Tensor) -> Tensor:
        self.also(self.count)
        self.count += 1
        self.past = 0.5 * self.past + latents.mean()
        return (latents[:, :, :3] * 0.1 + self.past).clamp(0, 1).repeat(1, 1, 1, 4, 4)


def _stream(decoder: Callable[[Tensor], Tensor], frames: int = 18) -> Stream:
    stream = tiny_stream(tiny_model(), frames=frames)
    stream.decoder = decoder
    return stream


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_pixels_are_those_of_decoding_in_between(depth: int) -> None:
    between = list(_stream(_Decoder()))
    ahead = list(decoding_ahead(_stream(_Decoder()), depth=depth))
    assert [chunk.index for chunk in ahead] == list(range(6))
    for got, want in zip(ahead, between, strict=True):
        assert torch.equal(got.latents, want.latents)
        assert got.pixels is not None
        assert torch.equal(got.pixels, want.pixels)
        assert not got.pixels.requires_grad
    assert _threads() == []


def test_the_next_chunk_is_generated_while_one_is_decoded() -> None:
    """The decoder of chunk n waits until noise for chunk n + 1 was asked for: in between it would wait for ever."""
    asked = [threading.Event() for _ in range(7)]
    asked[6].set()
    stream = _stream(_Decoder(lambda number: _expect(asked[number + 1].wait(PATIENCE))))
    plain = stream.noise

    def noise(chunk: int, count: int, step: int) -> Tensor:
        asked[chunk].set()
        return plain(chunk, count, step)

    stream.noise = noise
    assert len(list(decoding_ahead(stream))) == 6


def _expect(met: bool) -> None:
    assert met, "the next chunk was not begun"


def test_the_queue_is_bounded() -> None:
    """With a decoder that stands still, the third chunk waits for the first one at a depth of two."""
    go, pushed = threading.Event(), []
    chunks = [Chunk(number, 3 * number, torch.rand(1, 3, 4, 6, 4), None) for number in range(5)]

    def feed(ahead: DecodeAhead) -> None:
        for chunk in chunks:
            pushed.append([done.index for done in ahead.push(chunk)])

    with DecodeAhead(_Decoder(lambda _: _expect(go.wait(PATIENCE))), CPU, depth=2) as ahead:
        feeder = threading.Thread(target=feed, args=(ahead,))
        feeder.start()
        feeder.join(0.3)
        assert feeder.is_alive()
        assert pushed == [[], []]
        go.set()
        feeder.join(PATIENCE)
        assert pushed == [[], [], [0], [1], [2]]
        assert [chunk.index for chunk in ahead.finish()] == [3, 4]
        assert ahead.waited > 0.2


def _failing(number: int) -> None:
    if number == 2:
        raise ZeroDivisionError("of the decoder")


def test_what_the_decoder_raises_comes_out_where_its_chunk_would() -> None:
    stream = _stream(_Decoder(_failing))
    before = weights_of(stream.model)
    chunks = decoding_ahead(stream)
    assert [next(chunks).index for _ in range(2)] == [0, 1]
    with pytest.raises(ZeroDivisionError, match="of the decoder"):
        next(chunks)
    assert _threads() == []
    assert same_weights(stream.model, before)


def test_leaving_early_leaves_no_thread() -> None:
    chunks = decoding_ahead(_stream(_Decoder()))
    next(chunks)
    assert _threads()
    chunks.close()  # type: ignore[attr-defined]
    assert _threads() == []


def test_a_run_writes_the_same_files(tmp_path: Path) -> None:
    videos, reports = [], []
    for overlap in (False, True):
        outputs = Outputs(tmp_path / f"{overlap}.mp4", tmp_path / f"{overlap}.png", tmp_path / f"{overlap}.safetensors")
        reports.append(run_stream(_stream(_Decoder()), outputs, overlap=overlap))
        videos.append(read_video(outputs.video)[0])  # type: ignore[arg-type]
    assert (videos[0] == videos[1]).all()
    for suffix in ("png", "safetensors"):
        assert (tmp_path / f"False.{suffix}").read_bytes() == (tmp_path / f"True.{suffix}").read_bytes()
    for report in reports:
        assert report["complete"]
        assert len(report["chunk_ms"]) == report["chunks"] == 6
        assert report["fps"]["wall"] <= report["fps"]["with_vae"] <= report["fps"]["dit"]


def test_a_run_that_is_stopped_keeps_every_chunk_it_generated(tmp_path: Path) -> None:
    done: list[int] = []
    outputs = Outputs(tmp_path / "v.mp4")
    report = run_stream(
        _stream(_Decoder()), outputs, overlap=True, on_progress=lambda at: done.append(at.chunk),
        stop=lambda: len(done) == 4,
    )  # fmt: skip
    assert (report["complete"], report["chunks"]) == (False, 4)
    assert len(read_video(tmp_path / "v.mp4")[0]) == 12


def test_latents_that_are_not_finite_end_an_overlapped_run(tmp_path: Path) -> None:
    stream = _stream(_Decoder())
    plain = stream.noise
    stream.noise = lambda chunk, count, step: plain(chunk, count, step) / (0 if chunk == 3 else 1)
    with pytest.raises(RunError, match="chunk 4 of 6"):
        run_stream(stream, Outputs(tmp_path / "v.mp4"), overlap=True)
    assert list(tmp_path.iterdir()) == []
    assert _threads() == []
