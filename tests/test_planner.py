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
from ispa_deploy.planner.devices import DEVICES, REACHED
from ispa_deploy.planner.plan import grid, past_errors, plan, sentences, stored_reports
from ispa_deploy.planner.rates import of_report, setting_of, spec_of, times, units_of
from ispa_deploy.regions import ROWS
from ispa_deploy.specs import SPECS

ROOT = Path(__file__).resolve().parents[1]
GEOMETRY = ("dim", "ffn_dim", "heads", "layers", "frame_tokens", "text_len")
SECONDS = {"attention.kernel": 3e-12, "attention.cross": 4e-12, "linear.gemm": 2e-12, "overhead.norm": 5e-10}


def synthetic(name: str, runs: tuple[str, ...] = ("full", "ispa")) -> dict[str, Any]:
    """The report of a machine that takes exactly `SECONDS` for each unit of work, and nothing for the rest."""
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
            "dtype": "bfloat16",
        },
        "runs": [
            {"name": run, "policy": "full" if run == "full" else "absorb", "ratio": 0.0 if run == "full" else 0.5,
             "recent": 0, "scheme": "none"}
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
    assert len(errors) == 2 * (1 + 2)
    assert all(abs(row["error"]) < 1e-9 for row in errors)


def test_a_wrong_prediction_is_shown_as_such() -> None:
    small, large = synthetic("longlive-1.3b"), synthetic("krea-14b")
    for run in large["runs"]:
        run["components"] = {row: 2 * ms for row, ms in run["components"].items()}
        run["wall_ms"] *= 2
    errors = [row["error"] for row in past_errors([small, large]) if row["what"] == "krea-14b from longlive-1.3b"]
    assert errors == pytest.approx([-0.5, -0.5])


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
    """The reports that lie in the repository: the runs with ISPA, from the full-cache runs beside them."""
    rows = [row for row in past_errors(stored_reports(ROOT / "docs" / "results")) if "its own" in row["what"]]
    mid = [row for row in rows if row["what"].startswith("mid")]
    assert mid
    assert all(abs(row["error"]) < 0.15 for row in mid)


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown model"):
        plan("nothing", "H200")
    with pytest.raises(InputError, match="H200, L40S"):
        plan("demo", "nothing")
    with pytest.raises(InputError, match="no stored report"):
        plan("demo", "measured", reports=tmp_path)
    with pytest.raises(InputError, match=r"report\.json"):
        plan("demo", "H200", reports=tmp_path / "missing")
    with pytest.raises(InputError, match="ratio"):
        plan("demo", "H200", ratio=2.0)
    (tmp_path / "broken.json").write_text("{")
    assert not stored_reports(tmp_path)
    empty = copy.deepcopy(synthetic("demo"))
    empty["runs"] = []
    with pytest.raises(InputError, match="found none"):
        of_report(empty)


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from ispa_deploy.planner.plan import plan; plan('krea-14b', 'H100'); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
