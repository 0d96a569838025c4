"""The planner against reports: rates are recovered, the split follows the geometry, errors of the past are shown."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ispa_deploy.budget import Setup, predict
from ispa_deploy.errors import InputError
from ispa_deploy.planner.devices import BLOCK_SECONDS, DEVICES, REACHED, device_of
from ispa_deploy.planner.plan import grid, plan, sentences
from ispa_deploy.planner.rates import (
    hardware,
    nearest,
    of_device,
    of_report,
    refusal,
    setting_of,
    spec_of,
    times,
    units_of,
)
from ispa_deploy.planner.stored import past_errors, stored_reports
from ispa_deploy.regions import ROWS
from ispa_deploy.specs import SPECS
from tests.pages import undocumented, unreal

ROOT = Path(__file__).resolve().parents[1]
GEOMETRY = ("dim", "ffn_dim", "heads", "layers", "frame_tokens", "text_len")
SECONDS = {"attention.kernel": 3e-12, "attention.cross": 4e-12, "linear.gemm": 2e-12, "overhead.norm": 5e-10}


def synthetic(
    name: str, runs: tuple[str, ...] = ("full", "ispa"), *, dtype: str = "bfloat16", share: float = 0.8
) -> dict[str, Any]:
    """The report of a machine that takes exactly `SECONDS` for each unit of work, and nothing for the rest. `share`: of
    the device's peak, what every row reaches."""
    spec = SPECS[name]
    report: dict[str, Any] = {
        "paper": {},
        "env": {"gpu": None, "cpu": "a processor", "threads": 2},
        "model": {
            "name": name,
            "geometry": {
                **{key: getattr(spec, key) for key in GEOMETRY},
                "latent": list(spec.latent_shape),
            },
            "window": spec.window_frames, "chunk_frames": spec.chunk_frames, "passes": len(spec.steps) + 1,
            "dtype": dtype,
        },
        "runs": [
            {"name": run, "policy": "full" if run == "full" else "absorb", "ratio": 0.0 if run == "full" else 0.5,
             "recent": 0, "scheme": "none",
             "roofline": [{"row": row, "share": share} for row in ("attention.kernel", "linear.gemm")]}
            for run in runs
        ],
    }  # fmt: skip
    for run in report["runs"]:
        units = units_of(spec, setting_of(spec, report, run))
        run["components"] = {row: 1e3 * SECONDS.get(row, 0.0) * units.get(row, 0.0) for row in ROWS}
        run["wall_ms"] = sum(run["components"].values())
    return report


def test_rates_are_recovered_and_predict_another_model() -> None:
    """From the 1.3B model to the 14B one, on a machine where time is proportional to work."""
    small, large = synthetic("longlive-1.3b"), synthetic("krea-14b")
    rates = of_report(small)
    for row, seconds in SECONDS.items():
        assert rates.seconds[False][row] == pytest.approx(seconds)
    for run in large["runs"]:
        predicted = times(spec_of(large), setting_of(spec_of(large), large, run), rates)
        assert predicted["attention.kernel"] == pytest.approx(run["components"]["attention.kernel"])
    errors = past_errors([small, large])
    assert [row["across"] for row in errors] == [False, False, True, True]
    assert all(abs(row["error"]) < 1e-9 for row in errors)


def test_a_wrong_prediction_is_shown_as_such() -> None:
    small, large = synthetic("longlive-1.3b"), synthetic("krea-14b")
    for run in large["runs"]:
        run["components"] = {row: 2 * ms for row, ms in run["components"].items()}
        run["wall_ms"] *= 2
    errors = {row["what"]: row["error"] for row in past_errors([small, large]) if row["across"]}
    assert errors == {"krea-14b (40 layers, bfloat16) from longlive-1.3b (30 layers, bfloat16)": pytest.approx(-0.5)}


@pytest.mark.parametrize(
    ("model", "dtype", "report", "why"),
    [
        ("longlive-1.3b", "bfloat16", synthetic("longlive-1.3b", share=0.1), ""),
        ("krea-14b", "bfloat16", synthetic("longlive-1.3b"), ""),
        ("krea-14b", "bfloat16", synthetic("longlive-1.3b", share=0.4), "40% of the peak there"),
        ("krea-14b", "bfloat16", {**synthetic("longlive-1.3b"), "runs": []}, "0% of the peak there"),
        ("longlive-1.3b", "bfloat16", synthetic("krea-14b"), "width of 5120 is 3.3 times"),
        ("longlive-1.3b", "bfloat16", synthetic("demo", dtype="float32"), "in float32, not in bfloat16"),
        ("demo", "float32", synthetic("demo", dtype="float32", share=0.1), ""),
    ],
)
def test_a_report_serves_only_what_it_can_tell_about(model: str, dtype: str, report: dict[str, Any], why: str) -> None:
    found = refusal(SPECS[model], dtype, report)
    assert bool(found) == bool(why)
    assert why in found
    assert (nearest(SPECS[model], dtype, [report]) is None) == bool(why)


def test_what_cannot_serve_is_named_and_predicts_nothing(tmp_path: Path) -> None:
    """A small float32 report beside: it is not used, it is said why, and no error is made up from it."""
    small, other = synthetic("longlive-1.3b"), synthetic("demo", dtype="float32", share=0.1)
    for number, report in enumerate((small, other)):
        (tmp_path / f"{number}.json").write_text(json.dumps(report))
    document = plan("krea-14b", "measured", reports=tmp_path)
    assert document["rates"].startswith("measured: longlive-1.3b")
    assert [row["why"] for row in document["unfit"]] == ["it ran in float32, not in bfloat16"]
    text = "\n".join(sentences(document))
    assert "Not used: demo (10 layers, float32)" in text
    assert "No stored report allows a check of how far rates carry" in text
    assert not any(row["across"] for row in document["past"])
    with pytest.raises(InputError, match=r"nothing stored.*demo \(10 layers, float32\).*in float32"):
        plan("krea-14b", "measured", reports=tmp_path / "1.json")
    assert "data sheet" in plan("krea-14b", "H200", reports=tmp_path)["rates"]


def test_runs_whose_work_a_report_does_not_tell_give_no_rates() -> None:
    """A shorter window, another kernel, other launches, two products for one: each takes half of the time here."""
    report = synthetic("longlive-1.3b")
    before, errors = of_report(report), past_errors([report])
    apart: list[dict[str, Any]] = [
        {"policy": "window"}, {"policy": "published"}, {"kv_dtype": "int8"}, {"launch": "compiled"},
        {"scheme": "w8a16-int8"},
    ]  # fmt: skip
    for number, changes in enumerate(apart):
        run = {**copy.deepcopy(report["runs"][0]), "name": f"other {number}", **changes}
        run["components"] = {row: ms / 2 for row, ms in run["components"].items()}
        report["runs"].append(run)
    assert of_report(report) == before
    assert past_errors([report]) == errors


def test_speech_to_video_says_nothing_about_other_models() -> None:
    """Its queries see a condition beside the window and every pass denoises: a report does not tell its work."""
    avatar = synthetic("liveavatar-14b")
    assert "speech to video" in refusal(SPECS["krea-14b"], "bfloat16", avatar)
    assert nearest(SPECS["krea-14b"], "bfloat16", [avatar]) is None
    assert refusal(SPECS["liveavatar-14b"], "bfloat16", avatar) == ""
    assert past_errors([avatar]) == []


def test_processors_of_one_name_with_other_vector_units_are_other_hardware() -> None:
    wide, narrow = synthetic("longlive-1.3b"), synthetic("krea-14b")
    wide["env"]["cpu_capability"], narrow["env"]["cpu_capability"] = "AVX512", "AVX2"
    assert hardware(wide) != hardware(narrow)
    assert not any(row["across"] for row in past_errors([wide, narrow]))


def test_a_gpus_report_judges_its_data_sheet() -> None:
    report = synthetic("longlive-1.3b")
    report["env"]["gpu"] = "NVIDIA H200"
    rates = of_device(DEVICES["H200"])
    rows = [row for row in past_errors([report]) if row["across"]]
    assert [row["run"] for row in rows] == ["full", "ispa"]
    spec = spec_of(report)
    for row, run in zip(rows, report["runs"], strict=True):
        assert row["predicted_ms"] == pytest.approx(sum(times(spec, setting_of(spec, report, run), rates).values()))
        assert row["what"].endswith("from the data sheet")


@pytest.mark.parametrize(
    ("gpu", "device"),
    [
        ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GH200 480GB", None), ("NVIDIA L40", None), (None, None),
    ],
)  # fmt: skip
def test_a_data_sheet_is_that_of_the_gpu_itself(gpu: str | None, device: str | None) -> None:
    found = device_of({"env": {"gpu": gpu}})
    assert (found.name if found else None) == device


def test_a_model_too_small_for_a_gpu_waits_for_its_launches(tmp_path: Path) -> None:
    """The demo's arithmetic takes microseconds there: a chunk takes what Python needs to ask for it, in any scheme."""
    document = plan("demo", "H200", reports=tmp_path)
    spec = SPECS["demo"]
    for run in document["runs"]:
        assert run["chunk_ms"] == pytest.approx(1e3 * BLOCK_SECONDS * (len(spec.steps) + 1) * spec.layers)
    assert plan("longlive-1.3b", "H200", reports=tmp_path)["runs"][0]["components"]["overhead.python"] == 0


def test_speech_to_video_has_its_memory_predicted_alone(tmp_path: Path) -> None:
    document = plan("liveavatar-14b", "H200", reports=tmp_path)
    assert document["amdahl"] is None
    assert all("chunk_ms" not in run and run["memory"]["peak"] > 0 for run in document["runs"])
    assert not any("ms" in line[0] for line in grid(document))
    assert sentences(document) == [
        "Latency is not predicted for speech to video: its rings, condition and audio layers are not counted."
    ]


def test_the_spec_of_a_report_is_the_models_own() -> None:
    for name in ("longlive-1.3b", "krea-14b", "demo"):
        spec, made = SPECS[name], spec_of(synthetic(name))
        assert (made.frame_tokens, made.head_dim, made.latent_shape) == (
            spec.frame_tokens,
            spec.head_dim,
            spec.latent_shape,
        )


def test_a_data_sheet_gives_its_own_arithmetic(tmp_path: Path) -> None:
    """Attention of the full 1.3B model by hand: 4 q k d operations, 30 layers; the clean pass leaves out the last."""
    document = plan("longlive-1.3b", "h200", reports=tmp_path)
    full = document["runs"][0]
    flops = 4 * (3 * 1560) * (12 * 1560) * 1536 * (4 * 30 + 29)
    rate = DEVICES["H200"].flops * REACHED["attention"]
    assert full["components"]["attention.kernel"] == pytest.approx(1e3 * flops / rate)
    assert full["memory"] == predict(SPECS["longlive-1.3b"], Setup(scheme="none", policy="full")).to_dict()
    assert all(run["fits"] for run in document["runs"])
    assert document["runs"][1]["speedup"] <= document["amdahl"]["ceiling"] * 1.01
    assert "No stored report" in sentences(document)[-1]
    assert {len(line) for line in grid(document)} == {len(document["runs"]) + 1}


def test_stored_reports_of_the_gpu_take_the_place_of_its_data_sheet(tmp_path: Path) -> None:
    report = synthetic("longlive-1.3b")
    report["env"]["gpu"] = "NVIDIA H200"
    (tmp_path / "h200.json").write_text(json.dumps(report))
    document = plan("longlive-1.3b", "H200", reports=tmp_path)
    assert document["rates"].startswith("measured: longlive-1.3b")
    assert document["runs"][0]["chunk_ms"] == pytest.approx(report["runs"][0]["wall_ms"])
    other = plan("longlive-1.3b", "A100", reports=tmp_path)
    assert "data sheet" in other["rates"]
    assert plan("longlive-1.3b", "measured", reports=tmp_path)["device"] == "NVIDIA H200"


def test_a_longer_window_takes_more_and_gains_more(tmp_path: Path) -> None:
    short, long = (plan("longlive-1.3b", "H100", reports=tmp_path, window=window) for window in (12, 72))
    assert long["runs"][0]["chunk_ms"] > 2 * short["runs"][0]["chunk_ms"]
    assert long["runs"][1]["speedup"] > short["runs"][1]["speedup"]
    assert long["runs"][0]["memory"]["kv"] == 6 * short["runs"][0]["memory"]["kv"]


def test_what_is_stored_predicts_its_own_ispa_runs() -> None:
    """The reports that lie in the repository: the runs with ISPA, from the full-cache runs beside them. And whatever
    one of them is trusted to say about another is of the right order."""
    rows = past_errors(stored_reports(ROOT / "docs" / "results"))
    mid = [row for row in rows if not row["across"] and row["what"].startswith("mid")]
    assert mid
    assert all(abs(row["error"]) < 0.15 for row in mid)
    assert all(abs(row["error"]) < 0.5 for row in rows)


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown model"):
        plan("nothing", "H200")
    with pytest.raises(InputError, match="H200, L40S"):
        plan("demo", "nothing")
    with pytest.raises(InputError, match="no stored report was found"):
        plan("demo", "measured", reports=tmp_path)
    with pytest.raises(InputError, match=r"report\.json"):
        plan("demo", "H200", reports=tmp_path / "missing")
    with pytest.raises(InputError, match="ratio"):
        plan("demo", "H200", ratio=2.0)
    for model in ("demo", "liveavatar-14b"):
        for recent in (-3, 1, 12):  # as a stream refuses them
            with pytest.raises(InputError, match=f"{recent} recent|recent frames {recent}"):
                plan(model, "H200", recent=recent)
    (tmp_path / "broken.json").write_text("{")
    assert not stored_reports(tmp_path)
    empty = copy.deepcopy(synthetic("demo"))
    empty["runs"] = []
    with pytest.raises(InputError, match="found none"):
        of_report(empty)


@pytest.mark.parametrize(
    ("model", "gpu"), [("longlive-1.3b", "measured"), ("krea-14b", "H100"), ("liveavatar-14b", "A100")]
)
def test_every_field_of_a_plan_is_documented_and_real(model: str, gpu: str) -> None:
    document = plan(model, gpu, reports=ROOT / "docs" / "results")
    assert not undocumented(document, "`plan --json`")
    empty = {name for name in ("amdahl", "unfit") if not document[name]}
    assert {name.split(".")[0].removesuffix("[]") for name in unreal(document, "`plan --json`")} == empty


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from ispa_deploy.planner.plan import plan; plan('krea-14b', 'H100'); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
