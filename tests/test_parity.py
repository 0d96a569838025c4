"""Recorded upstream runs, replayed: the shipped ones always, the full set where `ISPA_PARITY_DIR` points to it."""

from __future__ import annotations

import copy
import json
import operator
import os
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ispa_deploy.cache import KVCache
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.specs import ModelSpec
from tests.parity import TOLERANCE, Fixture, main, open_recorded, replay_file
from tests.tiny import SPEC, text_rows, tiny_model

DATA = Path(__file__).parent / "data"
AVATAR = "liveavatar_tiny"
SHIPPED = sorted(path.stem for path in DATA.glob("*.safetensors") if path.stem != AVATAR)
FULL = (
    "longlive_tiny",
    "longlive_infinity_tiny",
    "longlive_lora_tiny",
    "self_forcing_tiny",
    "self_forcing_global_tiny",
    "self_forcing_extend_tiny",
    "self_forcing_i2v_tiny",
    "reward_forcing_tiny",
    "reward_forcing_alpha_tiny",
    "krea_tiny",
)
SOURCE = os.environ.get("ISPA_PARITY_DIR")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_run_is_reproduced(name: str) -> None:
    worst = replay_file(DATA / f"{name}.safetensors")
    assert {"free-running output", "flow" if name == "krea_tiny" else "cache norm"} <= set(worst.by_kind)
    assert worst.ok, worst.by_kind


@pytest.mark.skipif(SOURCE is None, reason="ISPA_PARITY_DIR does not name a folder of recorded runs")
@pytest.mark.parametrize("name", FULL)
def test_full_run_is_reproduced(name: str) -> None:
    assert SOURCE is not None
    worst = replay_file(Path(SOURCE) / f"{name}.safetensors")
    assert {"flow", "x0", "free-running output", "free-running flow"} <= set(worst.by_kind)
    assert worst.ok, worst.by_kind


@pytest.mark.skipif(SOURCE is None, reason="ISPA_PARITY_DIR does not name a folder of recorded runs")
@pytest.mark.parametrize("name", sorted(set(FULL) - {"krea_tiny"}))
def test_other_settings_move_the_video_as_far_as_upstream_recorded(name: str) -> None:
    """Upstream ran every fixture again with another window, sink, weight, shift or adapter, and noted the distance."""
    path = Path(SOURCE or "") / f"{name}.safetensors"
    released, notes = Fixture.load(path), json.loads(path.with_suffix(".json").read_text())["numerics"]
    given = 0 if released.initial is None else released.initial.shape[1]
    for setting, changes in released.config["sensitivity"].items():
        if "switch_frame_indices" in changes:
            continue  # where prompts switch is read off the recorded calls
        changed = replace(released, config=_with(released.config, changes))
        with torch.inference_mode():
            latents = torch.cat([chunk.latents for chunk in open_recorded(changed, changed.model())], 1)
        away = (latents - released.tensors["output/latents"])[:, given:].abs()
        recorded = notes["changed_setting_vs_recorded"][setting]
        assert float(away.max()) == pytest.approx(recorded["max_abs"], abs=2 * TOLERANCE), setting
        assert float(away.mean()) == pytest.approx(recorded["mean_abs"], abs=TOLERANCE), setting


def _with(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a configuration with values replaced, named by dotted paths."""
    copied = copy.deepcopy(config)
    for path, value in changes.items():
        *outer, last = path.split(".")
        reduce(operator.getitem, outer, copied)[last] = value
    return copied


def test_shipped_avatar_is_reproduced_with_either_table() -> None:
    worst = replay_file(DATA / f"{AVATAR}.safetensors")
    assert {f"{table} free-running output" for table in ("fp16 table", "exact table")} <= set(worst.by_kind)
    assert worst.ok, worst.by_kind


@pytest.mark.skipif(SOURCE is None, reason="ISPA_PARITY_DIR does not name a folder of recorded runs")
def test_full_avatar_is_reproduced() -> None:
    assert SOURCE is not None
    worst = replay_file(Path(SOURCE) / f"{AVATAR}.safetensors")
    kinds = ("out", "key", "value", "trace", "audio", "timestep", "free-running output")
    assert {f"{table} {kind}" for table in ("fp16 table", "exact table") for kind in kinds} == set(worst.by_kind)
    assert worst.ok, worst.by_kind


def test_a_moved_reference_is_noticed(tmp_path: Path) -> None:
    fields = json.loads((DATA / f"{AVATAR}.json").read_text())
    for call in fields["calls"]:
        call["reference_distance"] = 4
    (tmp_path / "run.json").write_text(json.dumps(fields))
    (tmp_path / "run.safetensors").write_bytes((DATA / f"{AVATAR}.safetensors").read_bytes())
    assert not replay_file(tmp_path / "run.safetensors").ok


def _damaged(tmp_path: Path, **changes: object) -> Path:
    fixture = DATA / "longlive_tiny.json"
    fields = json.loads(fixture.read_text())
    fields["config"] |= changes
    (tmp_path / "run.json").write_text(json.dumps(fields))
    (tmp_path / "run.safetensors").write_bytes(fixture.with_suffix(".safetensors").read_bytes())
    return tmp_path / "run.safetensors"


def test_wrong_window_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = json.loads((DATA / "longlive_tiny.json").read_text())["config"]["model"]
    assert main([str(_damaged(tmp_path, model=model | {"sink_size": 1}))]) == 1
    assert "ABOVE" in capsys.readouterr().out


def test_json_names_every_fixture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(DATA / "longlive_tiny.safetensors"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tolerance"] == TOLERANCE
    assert [(entry["fixture"], entry["ok"]) for entry in document["fixtures"]] == [("longlive_tiny", True)]


@pytest.mark.parametrize(
    ("changes", "said"), [({"upstream": "krea"}, "krea"), ({"lora": {"alpha": 8}}, "LoRA"), (None, "no such file")]
)
def test_a_run_of_another_kind_is_refused_in_one_line(
    changes: dict[str, object] | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "missing.safetensors" if changes is None else _damaged(tmp_path, **changes)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def _two_prompts(spec: ModelSpec, model: CausalWanDiT) -> tuple[torch.Tensor, list[torch.Tensor]]:
    noise = torch.randn(2, 15, *spec.latent_shape)
    rows = text_rows(spec, batch=2)
    runs = []
    for samples in (slice(0, 2), slice(0, 1), slice(1, 2)):
        cache, chunks = KVCache(spec, batch=len(noise[samples])), []
        text = model.encode_text(rows[samples])
        for start in range(0, 15, 3):
            cache.begin(start, 3)
            for t in (900.0, 0.0):
                condition = model.condition(torch.tensor([[t]]))
                chunks.append(model(noise[samples, start : start + 3], condition, text, cache))
        runs.append(torch.cat(chunks, 1))
    return runs[0], runs[1:]


@pytest.mark.parametrize(
    "changes",
    [
        {"rope": "absolute"},
        {"rope": "absolute", "sink_frames": 3, "window_frames": 9},
        {"rope": "window"},
        {"rope": "window", "sink_frames": 3, "window_frames": 9, "ema_sink": 0.75},
        {"rope": "absolute", "sink_frames": 0, "window_frames": 6},
    ],
    ids=["absolute", "absolute-sink3", "window", "ema", "no-sink"],
)
@torch.inference_mode()
def test_a_batch_of_two_is_two_batches_of_one(changes: dict[str, object]) -> None:
    spec = replace(SPEC, **changes)
    together, apart = _two_prompts(spec, tiny_model(spec))
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_a_prompt_for_each_sample_is_taken_in_order(tmp_path: Path) -> None:
    path = _damaged(tmp_path)
    fixture = Fixture.load(path)
    tensors = dict(fixture.tensors)
    tensors["input/noise"] = tensors["input/noise"].repeat(2, 1, 1, 1, 1)
    tensors["input/prompt1"] = tensors["input/prompt0"] + 1
    save_file(tensors, path)
    rows = Fixture.load(path).text_rows("prompt0")
    assert torch.equal(rows[0], tensors["input/prompt0"])
    assert torch.equal(rows[1], tensors["input/prompt1"])


@pytest.mark.parametrize(
    "change", [{"timestep_shift": 3.0}, {"kv_cache_num_frames": 6}, {"x0_scheduler_shift": 8.0}], ids=str
)
def test_kreas_wrong_rules_are_noticed(change: dict[str, float], tmp_path: Path) -> None:
    fields = json.loads((DATA / "krea_tiny.json").read_text())
    for scenario in fields["scenarios"]:
        scenario.update(change)
    (tmp_path / "run.json").write_text(json.dumps(fields))
    (tmp_path / "run.safetensors").write_bytes((DATA / "krea_tiny.safetensors").read_bytes())
    assert main([str(tmp_path / "run.safetensors")]) == 1
