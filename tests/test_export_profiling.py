"""What `profile` compares: names, options, the count of kernels that ran, and schemes that did not."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import quant
from export.profiling import Compared, _audited, by_pass, configurations, further, profile_geometry
from ispa_deploy.attention_int8 import SIMULATED, kernels
from ispa_deploy.compiled import compile_
from ispa_deploy.errors import InputError, RunError
from ispa_deploy.graphs import PassGraphs
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions
from ispa_deploy.profile import launched
from ispa_deploy.profile.breakdown import LIMITS
from ispa_deploy.profile.compare import Configuration, compare
from ispa_deploy.profile.geometries import GEOMETRIES
from tests.tape import Recorder
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


@pytest.mark.parametrize("layers", [2, 3])
def test_one_pass_stands_for_those_before_the_last_which_has_a_run_of_its_own(layers: int) -> None:
    model = tiny_model(replace(SPEC, layers=layers, steps=(1000,)))
    eight = copy.deepcopy(model)
    quant.quantise_(eight, quant.resolve("w8a8-int8", "cpu")[0])
    runs = by_pass(configurations(model, eight, "w8a8-int8"))
    own = ["ispa+w8a8+last-pass"] if layers == 3 else []
    assert [run.name for run in runs if run.options.last_pass_bits == 16] == own
    eights = by_pass(Compared(last_pass_bits=8).applied(configurations(model, eight, "w8a8-int8")))
    assert not any(run.options.last_pass_bits == 16 or run.name in own for run in eights)
    report = compare([run for run in runs if run.name in ("full", "ispa+w8a8", *own)], rounds=1)
    assert [run["wide_layers"] for run in report["runs"]] == [0, 0, 1][: 2 + len(own)]
    for run in report["runs"]:
        wide = {row["name"] for row in run["audit"] if row["wide_calls"]}
        assert bool(wide) == (run["name"] in own)
        assert all(name.startswith("blocks.2.") for name in wide)


def test_streams_of_several_passes_are_profiled_as_they_run(models: tuple[CausalWanDiT, CausalWanDiT]) -> None:
    runs = configurations(*models, "w8a8-int8")
    assert by_pass(runs) == runs
    assert {run.options.last_pass_bits for run in Compared().applied(runs)} == {16}


def test_further_runs_are_read_from_their_names(models: tuple[CausalWanDiT, CausalWanDiT]) -> None:
    names = ("absorb:1:3+w8a8-int8", "sink-local", "window:6")
    asked, plain, window = further(names, *models, "w8a8-int8")
    assert (asked.options.ratio, asked.options.recent_frames, asked.model) == (1.0, 3, models[1])
    assert (plain.options.policy, plain.scheme, plain.model) == ("sink-local", "none", models[0])
    assert window.options.window == 6
    held, read = further(("absorb+int8-kv", "full+w8a8-int8+int8-attention"), *models, "w8a8-int8")
    made = further(("full+compile", "absorb:1+w8a8-int8+int8-kv+compile"), *models, "w8a8-int8")
    assert [run.opener for run in made] == [launched.compiled] * 2
    assert all(run.traced and not run.starts for run in made)
    assert made[1].options.kv_dtype == "int8"
    (turned,) = further(("absorb:1+compile+int8-kv+w8a8-int8",), *models, "w8a8-int8")
    assert (turned.opener, turned.options, turned.scheme) == (made[1].opener, made[1].options, made[1].scheme)
    assert (held.scheme, held.options.kv_dtype, held.options.attention_dtype) == ("none", "int8", "auto")
    assert (read.scheme, read.options.kv_dtype, read.options.attention_dtype) == ("w8a8-int8", "int8", "int8")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((text, re.escape(f"--also '{text}': expected POLICY[:RATIO")) for text in (
            "absorb:x", "absorb:1:2:3", "absorb:1:y+w8a8", "full+none+int4-kv", "window",
            "window:0.5", "window:6:3",
        )),
        ("nothing", "unknown policy 'nothing': expected one of absorb"),
        ("full+int8-kv+int8-attention", ".*: int8-kv and int8-attention exclude each other"),
        ("full+compile+cuda-graphs", ".*: compile and cuda-graphs exclude each other"),
        ("full+w9", r"unknown scheme in --also full\+w9: 'w9': expected one of .*w8a8"),
    ],
)  # fmt: skip
def test_a_run_that_means_nothing_is_refused_before_any_work(text: str, said: str) -> None:
    with pytest.raises(InputError, match=f"^{said}"):
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


def test_a_report_names_the_kernel_of_8_bit_attention(models: tuple[CausalWanDiT, CausalWanDiT]) -> None:
    asked = further(("full", "full+int8-attention"), *models, "w8a8-int8")
    plain, coded = compare(asked, rounds=1, windows=(), timeline=False)["runs"]
    assert (plain["coded_attention"], plain["complaints"]) == (None, [])
    ran = coded["coded_attention"]
    assert ran["kernel"] in kernels()
    assert ran["calls"] > 0
    assert ["8-bit attention was simulated" in line for line in coded["complaints"]] == (
        [True] if ran["kernel"] == SIMULATED else []
    )


def test_a_scheme_that_did_not_run_is_an_error_unless_allowed() -> None:
    report = {"runs": [{"name": "full+w8a8", "scheme": "w8a8-fp8", "complaints": ["8-bit arithmetic was simulated"]}]}
    with pytest.raises(RunError, match=r"full\+w8a8.*simulated"):
        _audited(report, False)
    assert _audited(report, True) is report


def test_a_shorter_window_keeps_less_of_the_full_cache(models: tuple[CausalWanDiT, CausalWanDiT]) -> None:
    runs = [configurations(*models, "w8a8-int8")[0], *further(("window:6",), *models, "w8a8-int8")]
    full, short = compare(runs, rounds=1, windows=())["runs"]
    assert (full["kv_percent"], short["kv_percent"]) == (100, 50)


def _eagerly(monkeypatch: pytest.MonkeyPatch, backend: Any = "eager") -> None:
    monkeypatch.setattr(launched, "compile_", lambda model: compile_(model, backend=backend))


def test_a_compiled_run_is_recorded_by_its_kernels(
    models: tuple[CausalWanDiT, CausalWanDiT], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows close, its neighbours on the same model stay eager, and the report says what ran."""
    _eagerly(monkeypatch)
    runs = [*configurations(*models, "w8a8-int8")[:2], *further(("absorb+compile",), *models, "w8a8-int8")]
    report = compare(runs, rounds=2, windows=())
    run = report["runs"][-1]
    assert "layers compiled with eager" in run["launch"]
    assert not run["complaints"]
    assert run["start"] is None
    assert run["closing"]["sum_error"] <= LIMITS["sum_error"]
    assert run["closing"]["unattributed_share"] <= LIMITS["unattributed_share"]
    assert all(run["components"][row] > 0 for row in ("attention.kernel", "attention.cross", "linear.gemm"))
    assert [other["launch"] for other in report["runs"][:-1]] == [None, None]
    assert all(block.compiled is None for block in models[0].layers())


def test_a_compiler_that_fails_is_an_error_unless_allowed(
    models: tuple[CausalWanDiT, CausalWanDiT], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler here")

    _eagerly(monkeypatch, broken)
    runs = [*configurations(*models, "w8a8-int8")[:1], *further(("full+compile",), *models, "w8a8-int8")]
    report = compare(runs, rounds=1, windows=())
    with pytest.raises(RunError, match=r"full\+compile.*not compiled.*no compiler here"):
        _audited(report, False)


def test_replayed_passes_are_what_is_timed(
    models: tuple[CausalWanDiT, CausalWanDiT], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU a tape stands for the graphs: every pass of a timed chunk replays it, and its kernels are seen."""
    monkeypatch.setattr(PassGraphs, "on", staticmethod(lambda cache: PassGraphs(Recorder())))
    runs = [
        *configurations(*models, "w8a8-int8")[:1],
        Configuration(
            name="graphs", model=models[0], options=StreamOptions(), opener=launched.graphed, starts=False, traced=True
        ),
    ]
    run = compare(runs, rounds=2, windows=())["runs"][-1]
    passes = len(SPEC.steps) + 1
    assert f"{passes} passes recorded" in run["launch"]
    assert not run["complaints"]
    assert run["components"]["linear.gemm"] > 0


def test_graphs_without_a_gpu_are_refused_before_any_work(models: tuple[CausalWanDiT, CausalWanDiT]) -> None:
    with pytest.raises(InputError, match="need a CUDA device, this is cpu"):
        further(("full+cuda-graphs",), *models, "w8a8-int8")


@pytest.mark.parametrize(("layers", "ceiling"), [(4, 1.5), (None, 23 / (12 * 4 / 12 + 11))])
def test_a_few_layers_stand_for_all(layers: int | None, ceiling: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the whole clean pass a local layer saves two thirds of its keys, however few layers there are."""
    spec = replace(SPEC, layers=8, steps=(1000, 500))
    monkeypatch.setitem(GEOMETRIES, "tiny", spec)
    report = profile_geometry("tiny", torch.device("cpu"), Compared(rounds=1), layers=layers)
    assert {run["stores"] for run in report["runs"]} == {None if layers else 8}
    assert report["amdahl"]["attention_ceiling"] == pytest.approx(ceiling, rel=1e-5)
