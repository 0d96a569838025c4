"""What `profile` compares: names, options, the count of kernels that ran, and schemes that did not."""

from __future__ import annotations

import copy

import pytest

import quant
from export.profiling import Compared, _audited, configurations, further
from ispa_deploy.errors import InputError, RunError
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.profile.compare import compare
from tests.tiny import SPEC, tiny_model


@pytest.fixture(scope="module")
def models() -> tuple[CausalWanDiT, CausalWanDiT]:
    model = tiny_model(SPEC)
    eight = copy.deepcopy(model)
    quant.quantise_(eight, quant.resolve("w8a8-int8", "cpu")[0])
    return model, eight


def test_the_compared_runs_are_those_of_the_design(models: tuple[CausalWanDiT, CausalWanDiT]) -> None:
    runs = {run.name: run for run in configurations(*models, "w8a8-int8")}
    assert list(runs) == ["full", "ispa", "full+w8a8", "ispa+w8a8", "local+w8a8"]
    every = runs["local+w8a8"].options
    assert (every.policy, every.ratio, every.recent_frames) == ("absorb", 1.0, SPEC.chunk_frames)
    assert [run.scheme for run in runs.values()] == ["none", "none", *["w8a8-int8"] * 3]


def test_further_runs_are_read_from_their_names(models: tuple[CausalWanDiT, CausalWanDiT]) -> None:
    names = ("absorb:1:3+w8a8-int8", "sink-local", "window:0.25")
    asked, plain, window = further(names, *models, "w8a8-int8")
    assert (asked.options.ratio, asked.options.recent_frames, asked.model) == (1.0, 3, models[1])
    assert (plain.options.policy, plain.scheme, plain.model) == ("sink-local", "none", models[0])
    assert window.options.ratio == 0.25
    held, read = further(("absorb+int8-kv", "full+w8a8-int8+int8-attention"), *models, "w8a8-int8")
    assert (held.scheme, held.options.kv_dtype, held.options.attention_dtype) == ("none", "int8", "auto")
    assert (read.scheme, read.options.kv_dtype, read.options.attention_dtype) == ("w8a8-int8", "int8", "int8")
    assert held.complaints is not None
    assert held.complaints(models[0]) == []
    assert read.complaints is not None
    assert any("8-bit attention was simulated" in line for line in read.complaints(models[1])) == (
        SPEC.head_dim % 32 > 0
    )


@pytest.mark.parametrize("text", ["absorb:x", "absorb:1:2:3", "nothing", "absorb:1:y+w8a8", "full+none+int4-kv"])
def test_a_run_that_means_nothing_is_refused_before_any_work(text: str) -> None:
    with pytest.raises(InputError):
        Compared(also=(text,)).check()


def test_every_run_counts_its_own_kernels(models: tuple[CausalWanDiT, CausalWanDiT]) -> None:
    """Two runs share one model: each has its own passes, and the first layer is in all of them."""
    rounds, passes = 2, len(SPEC.steps) + 1
    runs = [run for run in configurations(*models, "w8a8-int8") if run.name in ("full", "full+w8a8", "ispa+w8a8")]
    report = compare(runs, rounds=rounds, windows=(), timeline=False)
    for run in report["runs"][1:]:
        row = next(row for row in run["audit"] if row["name"] == "blocks.0.self_attn.q")
        if run["name"] == "full+w8a8":
            assert row["calls"] == 2 * rounds * passes
        assert 0 < row["calls"] <= 2 * rounds * passes
        assert not run["complaints"]
    assert all(row["calls"] is None for row in report["runs"][0]["audit"])


def test_a_scheme_that_did_not_run_is_an_error_unless_allowed() -> None:
    report = {"runs": [{"name": "full+w8a8", "scheme": "w8a8-fp8", "complaints": ["8-bit arithmetic was simulated"]}]}
    with pytest.raises(RunError, match=r"full\+w8a8.*simulated"):
        _audited(report, False)
    assert _audited(report, True) is report
