"""Compiled stages: the eager numbers, three graphs for a whole stream, and an eager model where nothing compiles."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._inductor.runtime.cache_dir_utils import cache_dir

from ispa_deploy.compiled import CACHE, compile_, eager_
from ispa_deploy.regions import recording
from quant import SCHEMES, quantise_
from tests.tiny import SPEC, latents_of, text_rows, tiny_model, tiny_stream


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """No graph of another test; a second compilation of anything is an error."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def _graphs() -> int:
    assert not torch._dynamo.utils.counters["graph_break"]
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _switched(model: Any, frames: int = 30, **options: Any) -> Any:
    return tiny_stream(model, frames=frames, switches=[(15, text_rows(seed=7))], **options)


def test_graphs_of_the_first_chunk_serve_the_stream() -> None:
    """Window fill, warm-up, transition, prompt switch with the window computed anew, and a second transition."""
    model = tiny_model(replace(SPEC, recaches=True))
    want = latents_of(_switched(model))
    stages = compile_(model, backend="eager")
    chunks = iter(_switched(model))
    first = next(chunks)
    assert _graphs() == 3
    assert torch.equal(torch.cat([first.latents, *(chunk.latents for chunk in chunks)], 1), want)
    assert _graphs() == 3
    assert not stages.failure
    assert stages.cold_start > 0
    assert "first calls" in stages.describe()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["none", "w8a8-int8"])
@pytest.mark.parametrize("rope", ["absolute", "window"])
def test_nothing_is_compiled_twice_in_200_chunks(rope: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs = tiny_model(replace(SPEC, rope=rope, recaches=True)), 3
    if scheme != "none":  # the last layers' linears have another form in the last pass of a chunk: a graph of its own
        quantise_(model, SCHEMES[scheme])
        graphs = 6
        monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", False)
    stages = compile_(model, backend="aot_eager")
    switches = [(frame, text_rows(seed=frame)) for frame in (150, 300)]
    states, stream = Counter[str](), tiny_stream(model, frames=600, spread_solve=1, switches=switches)
    for chunk in stream:
        states[stream.absorber.state] += 1
        assert _graphs() == graphs
        if chunk.index in (80, 150):
            stream.request_recalibration()
    assert not stages.failure
    assert states["absorbed"] > 160, "five warm-ups of four chunks and a solve of one"
    assert chunk.index == 199


def test_compiled_code_is_kept_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where PyTorch then looks for it; a folder that the user named stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(CACHE, str(tmp_path / "own"))
    compile_(tiny_model(), backend="eager")
    assert cache_dir() == str(tmp_path / "own")
    monkeypatch.delenv(CACHE)
    compile_(tiny_model(), backend="eager")
    assert cache_dir() == str(tmp_path / "ispa-deploy" / "inductor")


def _broken(*_: object) -> None:
    raise RuntimeError("no compiler here")


def test_without_a_compiler_the_layers_run_eagerly() -> None:
    model = tiny_model()
    want = latents_of(tiny_stream(model, frames=15))
    stages = compile_(model, backend=_broken)  # type: ignore[arg-type]
    assert torch.equal(latents_of(tiny_stream(model, frames=15)), want)
    assert "run eagerly" in stages.describe()
    assert "no compiler here" in stages.describe()
    assert len(stages.describe().splitlines()) == 1


class _Rows:
    def __init__(self) -> None:
        self.seen: set[str] = set()

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        self.seen.add(name)
        yield


def test_under_a_recorder_the_layers_run_eagerly() -> None:
    model, rows = tiny_model(), _Rows()
    compile_(model, backend="eager")
    with recording(rows):
        latents_of(tiny_stream(model, frames=6))
    assert "linear.gemm" in rows.seen
    assert _graphs() == 0


def test_a_model_can_be_eager_again() -> None:
    model = tiny_model()
    compile_(model, backend="eager")
    eager_(model)
    latents_of(tiny_stream(model, frames=6))
    assert _graphs() == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_inductor_agrees_with_eager() -> None:
    model = tiny_model()
    want = latents_of(_switched(model, policy="full"))
    stages = compile_(model)
    torch.testing.assert_close(latents_of(_switched(model, policy="full")), want, rtol=1e-3, atol=1e-3)
    assert not stages.failure
    assert _graphs() == 3
