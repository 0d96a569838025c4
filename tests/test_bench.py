"""The bench's own parts: the published loop as a run of the report, and the README's table from result files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from ispa_deploy.profile.environment import slug
from ispa_deploy.profile.geometries import GEOMETRIES
from tests.bench import long_w8a8
from tests.bench.__main__ import command
from tests.bench.chunk import Plan, measure
from tests.bench.readme import END, HEADLINE, PARTS, START, headline, main, parts, reports, table
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
    """What stands between the markers is what the stored files give, and running it again changes nothing."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = ROOT / "docs" / "results"
    for made, (start, end) in ((headline(results), HEADLINE), (table(results), (START, END)), (parts(results), PARTS)):
        assert f"{start}\n{made}\n{end}" in readme
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


def test_processors_of_one_name_and_other_vector_units_have_folders_of_their_own() -> None:
    known = {"gpu": None, "cpu": "AMD EPYC", "cores": 2}
    assert slug(known) == slug({**known, "cpu_capability": "AVX512"}) == "cpu-amd-epyc-2c"
    assert slug({**known, "cpu_capability": "AVX2"}) == "cpu-amd-epyc-2c-avx2"
    assert slug({**known, "gpu": "NVIDIA H200", "cpu_capability": "AVX2"}) == "nvidia-h200"


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_a_narrow_processor_measures_fewer_layers(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    asked = argparse.Namespace(suite="cpu", rounds=None, shared=False)
    for part in ("mid", "ladder"):
        assert ("--layers" in command(part, Path("out.json"), asked)) == (capability == "AVX2")
    line = command("merge", Path("out.json"), asked)
    assert line[-1] == ("3" if capability == "AVX2" else "5")
    assert "--layers" not in command("demo", Path("out.json"), asked)


def test_without_results_the_table_says_so(tmp_path: Path) -> None:
    assert "make bench" in table(tmp_path)
    assert "make bench" in parts(tmp_path)
    assert headline(tmp_path) == "No GPU has been measured yet."


def test_every_result_says_how_and_on_what_it_was_measured() -> None:
    """But for the quality table, which no hardware changes, and what no machine at hand can measure again."""
    old = {"cpu-amd-epyc-2c-avx2/int8_linear.json"}
    for file in (ROOT / "docs" / "results").glob("*/*.json"):
        document = json.loads(file.read_text(encoding="utf-8"))
        if f"{file.parent.name}/{file.name}" not in old:
            assert document["command"].startswith("python -m tests.bench."), file
            assert {"cpu", "torch", "threads"} <= set(document["env"]), file
            assert file.parent.name.startswith(slug(document["env"])), file


def test_a_long_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the metrics it kept, and only where they were made as asked for."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    folder, out = tmp_path / "parts", tmp_path / "out.json"
    flags = ["--pairs", "2", "--batch", "1", "--parts", str(folder), "--json", str(out)]
    assert long_w8a8.main(["--chunks", "5", *flags, "--stop-after", "0.001"]) == 3
    assert [path.name for path in folder.iterdir()] == ["float32-5-00000.json"]
    assert long_w8a8.main(["--chunks", "5", *flags]) in (0, 1)
    assert len(list(folder.iterdir())) == 4
    made = json.loads(out.read_text())["metrics"]["flicker"]
    kept = json.loads((folder / "float32-5-00001.json").read_text())
    kept["rows"][0]["flicker"] += 1.0
    (folder / "float32-5-00001.json").write_text(json.dumps(kept))
    long_w8a8.main(["--chunks", "5", *flags])
    assert json.loads(out.read_text())["metrics"]["flicker"]["full"] == pytest.approx(made["full"] + 0.5)
    with pytest.raises(SystemExit, match="made with"):
        long_w8a8.main(["--chunks", "6", *flags])
