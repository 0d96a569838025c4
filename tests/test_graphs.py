"""Passes recorded and replayed give the eager numbers, whatever happens to the stream; recorded by tests/tape.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ispa_deploy.errors import InputError
from ispa_deploy.graphs import PassGraphs, cuda_recorder
from ispa_deploy.native import elementwise
from ispa_deploy.regions import recording
from ispa_deploy.specs import ModelSpec
from ispa_deploy.stream import Stream
from quant import SCHEMES, kernels_cpu, quantise_
from tests.tape import Recorder
from tests.test_compiled import _Rows
from tests.tiny import SPEC, latents_of, text_rows, tiny_model, tiny_stream

PASSES = len(SPEC.steps)


def _replaying(stream: Stream) -> tuple[Stream, Recorder]:
    recorder = Recorder()
    stream.graphs = PassGraphs(recorder)
    return stream, recorder


def _counts(stream: Stream) -> tuple[int, int]:
    assert stream.graphs is not None
    assert not stream.graphs.failure
    return stream.graphs.recorded, stream.graphs.replayed


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "full"},
        {},
        {"recent_frames": 3},
        {"ratio": 1.0, "spread_solve": 1},
        {"kv_dtype": "int8"},
        {"kv_dtype": "int8", "attention_dtype": "int8"},
        {"full_commit": True, "delta": "side"},
    ],
    ids=str,
)
def test_a_replayed_stream_has_the_eager_bits(options: dict[str, Any]) -> None:
    model = tiny_model()
    want = latents_of(tiny_stream(model, frames=36, **options))
    stream, recorder = _replaying(tiny_stream(model, frames=36, **options))
    assert torch.equal(latents_of(stream), want)
    made, again = _counts(stream)
    assert made == len(recorder.tapes) > 0
    assert again > 2 * made


def test_both_forms_of_the_window_are_recorded_once() -> None:
    """A filling window is not recorded; a full one is, the clean pass as well; and so is what is left of it."""
    stream, _ = _replaying(tiny_stream(tiny_model(), frames=60))
    seen = []
    for chunk in stream:
        seen.append((chunk.start, stream.absorber.state, *_counts(stream)))
    every = PASSES + 1
    absorbed = {start: counts for start, state, *counts in seen if state == "absorbed"}
    first = min(absorbed)
    assert first == 12, "its first pass ends the warm-up"
    assert absorbed[first] == [0, 0], "watched, or of a new form, eagerly"
    assert absorbed[15] == [1, 1], "in 12 the second pass made the scratch that local layers share; the clean pass came"
    assert absorbed[18] == [every, every + 1]
    assert absorbed[54] == [every, 13 * every + 1]
    full, _ = _replaying(tiny_stream(tiny_model(), frames=60, policy="full"))
    latents_of(full)
    assert _counts(full)[0] == every


def test_recent_frames_alternate_between_two_places_and_are_kept_eagerly() -> None:
    """Two bays of the chunk are two forms of each pass; the clean pass decides what a local layer keeps."""
    stream, _ = _replaying(tiny_stream(tiny_model(), frames=48, recent_frames=3))
    latents_of(stream)
    assert _counts(stream)[0] == 2 * PASSES


def _switched(model: Any, **options: Any) -> Stream:
    return tiny_stream(model, frames=75, switches=[(30, text_rows(seed=7)), (54, text_rows(seed=8))], **options)


@pytest.mark.parametrize("scheme", ["none", "w8a8-int8"])
@pytest.mark.parametrize("policy", ["full", "absorb"])
def test_prompt_switches_and_recalibration(policy: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is copied over the old text's buffers: with a full cache nothing is recorded again."""
    # A tape sees torch's operations alone.
    monkeypatch.setattr(elementwise, "library", lambda: None)
    monkeypatch.setattr(kernels_cpu, "KERNELS", (kernels_cpu.INT_MM,))
    model = tiny_model(replace(SPEC, recaches=True))
    if scheme != "none":
        quantise_(model, SCHEMES[scheme])
    want = latents_of(_switched(model, policy=policy))
    stream, _ = _replaying(_switched(model, policy=policy))
    assert torch.equal(latents_of(stream), want)
    every = PASSES + 1
    assert _counts(stream)[0] == (every if policy == "full" else 3 * every)
    assert not torch.equal(want[:, 30:33], latents_of(tiny_stream(model, frames=75, policy=policy))[:, 30:33])


def test_a_sink_that_a_switch_renews() -> None:
    model = tiny_model(replace(SPEC, recaches=True, renews_sink=True))
    want = latents_of(_switched(model))
    stream, _ = _replaying(_switched(model))
    assert torch.equal(latents_of(stream), want)
    assert _counts(stream)[1] > 0


def test_a_requested_recalibration_drops_what_was_recorded() -> None:
    model = tiny_model()

    def asked(stream: Stream) -> Tensor:
        latents = []
        for chunk in stream:
            latents.append(chunk.latents)
            if chunk.index == 8:
                stream.request_recalibration()
        return torch.cat(latents, 1)

    want = asked(tiny_stream(model, frames=60))
    stream, _ = _replaying(tiny_stream(model, frames=60))
    assert torch.equal(asked(stream), want)
    assert _counts(stream)[0] == 2 * (PASSES + 1)


def test_a_past_encoded_anew_before_every_chunk() -> None:
    spec = replace(SPEC, reencodes=True, rope="window", interpolate=3)
    model = tiny_model(spec)
    options: dict[str, Any] = {"frames": 48, "kv_bias": 0.5, "switches": [(24, text_rows(spec, seed=7))]}
    want = latents_of(tiny_stream(model, **options))
    stream, _ = _replaying(tiny_stream(model, **options))
    assert torch.equal(latents_of(stream), want)
    assert _counts(stream)[1] > 0


def _failing(_: Callable[[], Tensor]) -> Callable[[], Tensor]:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    model = tiny_model()
    stream = tiny_stream(model, frames=30)
    stream.graphs = PassGraphs(_failing)
    assert torch.equal(latents_of(stream), latents_of(tiny_stream(model, frames=30)))
    assert stream.graphs.describe().endswith("(operation not permitted when stream is capturing)")


def test_under_a_recorder_of_time_passes_run_as_they_are() -> None:
    stream, recorder = _replaying(tiny_stream(tiny_model(), frames=30))
    with recording(_Rows()):
        latents_of(stream)
    assert not recorder.tapes


def test_without_cuda_it_is_one_line() -> None:
    with pytest.raises(InputError, match="--cuda-graphs on cpu: expected a CUDA device"):
        cuda_recorder(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"policy": "full"}, {}, {"recent_frames": 3}, {"kv_dtype": "int8"}], ids=str)
def test_cuda_graphs_have_the_eager_bits(options: dict[str, Any]) -> None:
    spec: ModelSpec = replace(SPEC, dim=128, recaches=True)
    model = tiny_model(spec).to("cuda", torch.bfloat16)
    switches = [(24, text_rows(seed=7))]
    want = latents_of(tiny_stream(model, frames=60, switches=switches, **options))
    stream = tiny_stream(model, frames=60, switches=switches, **options)
    stream.graphs = PassGraphs.on(stream.cache)
    assert torch.equal(latents_of(stream), want)
    assert _counts(stream)[1] > 0
