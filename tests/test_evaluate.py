"""The quality evaluation: aggregates against values worked out by hand, and a whole run on a small random model."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ispa_deploy.demo.codec import BlockCodec
from ispa_deploy.demo.prompts import parse_prompt
from ispa_deploy.demo.scene import ATTRIBUTES
from ispa_deploy.errors import InputError
from ispa_deploy.evaluate.aggregate import (
    aggregate,
    bootstrap,
    compare,
    geometric_ratio,
    mean,
    median_recovery,
    pooled_recovery,
)
from ispa_deploy.evaluate.command import run_evaluation
from ispa_deploy.evaluate.compare import evaluate
from ispa_deploy.evaluate.table import END, START, markdown, replace_section, terminal_table
from ispa_deploy.evaluate.variants import FULL, RIVALS, VARIANTS, demo_pairs, twin
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.specs import spec_for

FRAMES = 18

# Errors of two variants on three pairs, and what follows from them.
OURS, THEIRS = (0.1, 0.2, 0.3), (0.2, 0.8, 0.2)


@pytest.fixture(scope="module")
def model() -> CausalWanDiT:
    """Four narrow layers with random weights everywhere, so that history changes what comes out."""
    torch.manual_seed(3)
    built = CausalWanDiT(spec_for("demo", dim=32, ffn_dim=48, heads=2, layers=4, freq_dim=16, steps=(1000, 500)))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built.eval()


@pytest.fixture(scope="module")
def document(model: CausalWanDiT, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("quality") / "quality.json"
    found = run_evaluation(model, count=2, frames=FRAMES, output=output, command="the command")
    assert json.loads(output.read_text()) == found
    return found


def rows_of(document: dict[str, Any], variant: str) -> list[dict[str, Any]]:
    return [row for row in document["rows"] if row["variant"] == variant]


# -- statistics


def test_statistics_by_hand() -> None:
    sample = np.array([OURS, THEIRS]).T
    assert mean(sample) == pytest.approx(0.2)
    assert geometric_ratio(sample) == pytest.approx((0.5 * 0.25 * 1.5) ** (1 / 3))
    assert pooled_recovery(sample) == pytest.approx(1 - 0.6 / 1.2)
    assert median_recovery(sample) == pytest.approx(0.5)  # of 0.5, 0.75, -0.5


def test_comparison_by_hand() -> None:
    ours, theirs = ([{"error_first": error} for error in errors] for errors in (OURS, THEIRS))
    first = compare(ours, theirs)["error_first"]
    assert (first["pairs"], first["wins"]) == (3, 2)
    assert first["recovery"]["value"] == pytest.approx(0.5)
    assert first["recovery_median"]["value"] == pytest.approx(0.5)
    assert first["ratio"]["value"] == pytest.approx(0.1875 ** (1 / 3))
    assert "error_next" not in compare(ours, theirs)


def test_pairs_without_any_error_are_left_out() -> None:
    none, ours, theirs = ({"error_first": error} for error in (0.0, 0.1, 0.4))
    first = compare([none, ours], [none, theirs])["error_first"]
    assert (first["pairs"], first["ratio"]["value"]) == (1, pytest.approx(0.25))
    assert compare([none], [none]) == {}


def test_aggregate_pairs_each_variant_with_the_reference() -> None:
    rows = [
        {"variant": name, "metrics": {"speed": speed, "error_first": error}}
        for name, speed, error in (("full", 2.0, 0.0), ("a", 1.5, 0.1), ("full", 1.0, 0.0), ("a", 1.5, 0.3))
    ]
    found = aggregate(rows, [("a", "absent")], "full")
    assert found["summary"]["full"]["speed"]["value"] == pytest.approx(1.5)
    assert found["summary"]["a"]["error_first"]["value"] == pytest.approx(0.2)
    change = found["to_reference"]["a"]["speed"]
    assert [change[key] for key in ("value", "low", "high")] == pytest.approx([0, -0.5, 0.5])
    assert list(found["to_reference"]) == ["a"]
    assert found["comparisons"] == []


def test_bootstrap_is_seeded() -> None:
    sample = np.random.default_rng(1).normal(size=30)
    assert bootstrap(sample, mean) == bootstrap(sample, mean)
    assert bootstrap(sample, mean) != bootstrap(sample, mean, seed=1)


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval() -> None:
    """Independent reference: mean ± 1.96 σ / sqrt(n), which also says that it narrows as pairs are added."""
    for count in (50, 800):
        sample = np.random.default_rng(2).normal(5, 2, count)
        half = 1.96 * sample.std() / math.sqrt(count)
        found = bootstrap(sample, mean)
        assert found.value == pytest.approx(sample.mean())
        assert (found.low, found.high) == pytest.approx((sample.mean() - half, sample.mean() + half), abs=0.12 * half)


def test_bootstrap_covers_the_true_mean() -> None:
    draws = np.random.default_rng(3).exponential(1.0, (100, 24))
    covered = sum(found.low <= 1 <= found.high for found in (bootstrap(draw, mean) for draw in draws))
    assert 84 <= covered <= 99  # 95 %, less what a skewed sample of 24 costs


# -- what is compared


def test_twins_are_no_absorb_on_the_layers_of_a_run_before_them() -> None:
    names = [variant.name for variant in VARIANTS]
    assert names[0] == FULL
    assert len(set(names)) == len(names)
    by_name = {variant.name: variant for variant in VARIANTS}
    twins = [variant for variant in VARIANTS if variant.layers_of is not None]
    assert len(twins) == 4
    for variant in twins:
        assert variant.layers_of is not None
        absorbing = by_name[variant.layers_of]
        assert variant.name == twin(absorbing.name)
        assert names.index(absorbing.name) < names.index(variant.name)
        assert (absorbing.options.policy, variant.options.policy) == ("absorb", "sink-local")
        assert absorbing.options.recent_frames == variant.options.recent_frames
    assert all(name in by_name for pair in RIVALS for name in pair)


def test_pairs_name_every_word_evenly_and_have_their_own_seeds() -> None:
    pairs = demo_pairs()
    assert pairs == demo_pairs(24, 0)
    assert pairs != demo_pairs(24, 1)
    assert len({pair.seed for pair in (*pairs, *demo_pairs(24, 1))}) == 48
    attributes = torch.stack([parse_prompt(pair.prompt) for pair in pairs])
    for column, words in zip(attributes.T.tolist(), ATTRIBUTES, strict=True):
        counts = Counter(column)
        assert sorted(counts) == list(range(len(words)))
        assert max(counts.values()) - min(counts.values()) <= 1


# -- a whole run


def test_full_has_no_error_and_all_of_its_cache(document: dict[str, Any]) -> None:
    for row in rows_of(document, FULL):
        metrics = row["metrics"]
        assert metrics["error_first"] == metrics["error_next"] == 0
        assert metrics["psnr_first"] == 100
        assert (metrics["kv_share"], metrics["agreeing_frames"]) == (1, FRAMES - document["warmup"])
        assert "error_later" not in metrics


def test_twins_run_on_the_same_layers_with_the_same_cache(document: dict[str, Any]) -> None:
    for variant in VARIANTS:
        if variant.layers_of is None:
            continue
        for bare, absorbing in zip(rows_of(document, variant.name), rows_of(document, variant.layers_of), strict=True):
            assert (bare["prompt"], bare["seed"]) == (absorbing["prompt"], absorbing["seed"])
            assert sorted(bare["layers"]) == sorted(absorbing["layers"])
            assert len(bare["layers"]) == (4 if "1.0" in variant.name else 2)
            assert bare["metrics"]["kv_share"] == absorbing["metrics"]["kv_share"]
            assert bare["metrics"]["error_first"] != absorbing["metrics"]["error_first"]


def test_kv_share_is_the_formula(document: dict[str, Any]) -> None:
    """1 - x (W - s - r) / W for a share x of local layers with s sink and r recent frames of the window W = 12."""
    for name, share, kept in (("ispa-0.5", 0.5, 1), ("ispa-1.0-recent3", 1, 4), ("no-sink-0.5", 0.5, 0)):
        expected = 1 - share * (12 - kept) / 12
        assert document["summary"][name]["kv_share"]["value"] == pytest.approx(expected), name


def test_evaluation_leaves_the_model_as_it_was_and_repeats(model: CausalWanDiT, document: dict[str, Any]) -> None:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = [variant for variant in VARIANTS if variant.name in (FULL, "ispa-0.5", twin("ispa-0.5"))]
    again = evaluate(model, BlockCodec().decode, demo_pairs(2), chosen, frames=FRAMES)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert rows_of(again, twin("ispa-0.5")) == rows_of(document, twin("ispa-0.5"))


def test_too_short_a_video_and_too_few_pairs_are_refused(model: CausalWanDiT, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="12 frames: expected 15 or more"):
        run_evaluation(model, count=2, frames=12)
    with pytest.raises(InputError, match="1 pairs: expected 2"):
        run_evaluation(model, count=1)
    with pytest.raises(InputError, match="does not exist"):
        run_evaluation(model, readme=tmp_path / "README.md")


# -- tables


def test_markdown_has_a_line_per_variant_and_recovery_only_where_there_is_a_twin(document: dict[str, Any]) -> None:
    lines = [line.strip("| ").split(" | ") for line in markdown(document).splitlines() if line.startswith("|")]
    assert [line[0] for line in lines[2:]] == [variant.title for variant in VARIANTS]
    assert len({len(line) for line in lines[1:]}) == 1
    column = lines[1].index("--:") + [heading.strip() for heading in lines[0]].index("gap recovered, 1st chunk, %")
    with_twin = {variant.layers_of for variant in VARIANTS}
    for line, variant in zip(lines[2:], VARIANTS, strict=True):
        assert (line[column] != "–") == (variant.name in with_twin), line
    tuned = next(item for item in document["comparisons"] if item["against"] == twin("ispa-0.5"))
    shown = lines[2 + [variant.name for variant in VARIANTS].index("ispa-0.5")][column]
    assert shown.startswith(f"{100 * tuned['error_first']['recovery']['value']:.0f} [")


def test_terminal_table_fits_80_columns(document: dict[str, Any]) -> None:
    from rich.console import Console

    table = terminal_table(document)
    assert table.row_count == len(VARIANTS)
    assert Console(width=200).measure(table).maximum <= 80


def test_section_is_replaced_idempotently_and_nothing_else_changes(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    replace_section(readme, "| new |")
    once = readme.read_text()
    assert once == f"before\n{START}\n| new |\n{END}\nafter\n"
    replace_section(readme, "| new |")
    assert readme.read_text() == once
    assert list(tmp_path.iterdir()) == [readme]


@pytest.mark.parametrize("text", ["none", f"{START}\n", f"{END}\n{START}\n", f"{START}{END}{START}{END}"])
def test_a_file_without_its_markers_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(InputError, match="once each"):
        replace_section(readme, "new")
    assert readme.read_text() == text
