"""The bench's own parts: the published loop as a run of the report, and the README's table from result files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ispa_deploy.profile.geometries import GEOMETRIES
from tests.bench.chunk import Plan, measure
from tests.bench.readme import END, START, main, reports, table
from tests.tiny import SPEC

ROOT = Path(__file__).resolve().parents[1]


def test_the_published_loop_is_one_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows close like those of ours, it keeps no more than the past, and speed-ups are given against it too."""
    monkeypatch.setitem(GEOMETRIES, "tiny", SPEC)
    report = measure("tiny", Plan(torch.float32, rounds=3, chunks=1, plain=3), "cpu", None, False)
    runs = {run["name"]: run for run in report["runs"]}
    assert list(runs) == ["published", "full", "ispa", "full+w8a8", "ispa+w8a8", "local+w8a8"]
    loop = runs["published"]
    assert loop["speedup_published"] == 1
    assert runs["full"]["speedup_published"] == pytest.approx(1 / loop["speedup"], rel=1e-4)
    assert loop["closing"]["sum_error"] <= 0.01
    assert loop["unattributed_ms"] <= 0.03 * loop["wall_ms"]
    assert loop["start"] is None
    past = (SPEC.window_frames - SPEC.chunk_frames) / SPEC.window_frames
    assert loop["kv_percent"] == pytest.approx(100 * past, rel=1e-4)
    assert loop["chunk_ms"]["n"] == 6
    assert loop["chunk_ms"]["interval"] is not None
    assert all(row["layers"] for run in report["runs"] for row in run["audit"])


def test_the_readme_shows_what_the_result_files_say(tmp_path: Path) -> None:
    """The table between the markers is the one that the stored files give, and running it again changes nothing."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    made = table(ROOT / "docs" / "results")
    assert f"{START}\n{made}\n{END}" in readme
    copy = tmp_path / "README.md"
    copy.write_text(readme, encoding="utf-8")
    assert main([str(copy), "--results", str(ROOT / "docs" / "results")]) == 0
    assert copy.read_text(encoding="utf-8") == readme


def test_the_table_has_every_run_of_every_report() -> None:
    made = table(ROOT / "docs" / "results")
    stored = reports(ROOT / "docs" / "results")
    assert stored
    assert made.count("Made by") == len(stored)
    for _, report in stored:
        for run in report["runs"]:
            assert f"| {run['speedup']:.2f}x |" in made


def test_without_results_the_table_says_so(tmp_path: Path) -> None:
    assert "make bench" in table(tmp_path)
