"""Laws of the plan: the fastest inside the budget, every layer with its reason, JSON and back, strangers refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ispa_deploy.errors import InputError
from ispa_deploy.linear import Linear
from ispa_deploy.specs import SPECS
from quant import measure
from quant.audit import assert_ran, audit
from quant.convert import empty_quantised_, prepare_, quantise_
from quant.kernels import runs
from quant.linear import QuantisedLinear
from quant.measure import call_rows, make_plan, plan_for, race
from quant.plan import Plan, load_plan
from quant.schemes import SCHEMES, resolve

INT8, STATIC, FP8 = SCHEMES["w8a8-int8"], SCHEMES["w8a8-int8-static"], SCHEMES["w8a8-fp8"]


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q": Linear(64, 64, dtype=dtype), "ffn": Linear(64, 128, dtype=dtype)}) for _ in range(2)
        )
        self.head = Linear(128, 8, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["q"](x)
        return self.head(self.blocks[0]["ffn"](x) + self.blocks[1]["ffn"](x))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def paced(monkeypatch: pytest.MonkeyPatch, **ms: float) -> None:
    """Replace the clock alone: what the measurements are made of stays as it is."""
    names = {"none": "none", "int8": "w8a8-int8", "static": "w8a8-int8-static", "fp8": "w8a8-fp8"}
    table = {names[name]: value for name, value in ms.items()}
    monkeypatch.setattr(measure, "_times", lambda layers, *_: {name: table[name] for name in layers})


def planned(model: nn.Module, *schemes: object, budget: float = 0.05, **more: object) -> Plan:
    return make_plan(model, lambda name: 32, schemes or (INT8,), budget=budget, **more)  # type: ignore[arg-type]


def test_the_fastest_wins_and_says_by_how_much(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    paced(monkeypatch, none=2.0, int8=1.0, static=1.5)
    plan = planned(model, INT8, STATIC)
    assert {row.scheme for row in plan.layers} == {"w8a8-int8"}
    assert plan.layers[0].why.startswith("0.50 of the time in floating point, error ")
    assert [row.name for row in plan.layers] == ["blocks.0.q", "blocks.0.ffn", "blocks.1.q", "blocks.1.ffn"]
    assert [(timing.shape, timing.rows) for timing in plan.timings] == [((64, 64), 32), ((128, 64), 32)]


def test_a_slower_scheme_stays_in_floating_point(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    paced(monkeypatch, none=1.0, int8=1.25)
    assert {(row.scheme, row.why) for row in planned(model).layers} == {("none", "w8a8-int8 takes 1.25 of its time")}


def test_the_budget_binds_layer_by_layer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """One loud channel costs int8 its precision in the layer that gets it, and there alone."""
    paced(monkeypatch, none=2.0, int8=1.0)
    loud = torch.randn(16, 64)
    loud[:, 3] = 300.0
    with torch.no_grad():
        model.blocks[0]["q"].weight[:, 3] = 0  # or the loud channel would drown what is lost
    plan = planned(model, activations={"blocks.0.q": loud})
    chosen = {row.name: row for row in plan.layers}
    assert chosen["blocks.0.q"].scheme == "none"
    assert "has error" in chosen["blocks.0.q"].why
    assert chosen["blocks.0.q"].error["w8a8-int8"] > 0.05
    assert [name for name, row in chosen.items() if row.scheme == "none"] == ["blocks.0.q"]


def test_activations_that_are_not_finite_are_over_any_budget(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    paced(monkeypatch, none=2.0, int8=1.0)
    x = torch.randn(4, 64)
    x[0, 0] = float("inf")
    assert planned(model, activations={"blocks.1.q": x}).layer("blocks.1.q", (64, 64)).scheme == "none"


def test_errors_are_those_of_the_layer_itself(model: Model) -> None:
    x = torch.randn(16, 64)
    plan = planned(model, activations={"blocks.0.q": x}, rounds=1)
    linear = model.blocks[0]["q"]
    want = x.double() @ linear.weight.double().t() + linear.bias.double()
    got = measure.make_layer(linear, INT8, "q")(x).double()
    expected = float((got - want).detach().norm() / want.detach().norm())
    assert plan.layers[0].error["w8a8-int8"] == pytest.approx(expected, rel=1e-6)
    assert all(ms > 0 for timing in plan.timings for ms in timing.ms.values())


def test_schemes_without_a_kernel_here_are_left_out(model: Model) -> None:
    plan = planned(model, INT8, FP8, rounds=1)
    assert ("w8a8-fp8" in plan.timings[0].ms) == runs("fp8", "cpu")


def test_conversion_follows_the_plan_and_the_audit_says_why(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    paced(monkeypatch, none=2.0, int8=1.0)
    plan = planned(model)
    kept = replace(plan.layers[0], scheme="none", why="w8a8-int8 takes 1.10 of its time")
    plan = replace(plan, layers=(kept, *plan.layers[1:]))
    report = quantise_(model, INT8, plan=plan)
    assert report.quantised == ("blocks.0.ffn", "blocks.1.q", "blocks.1.ffn")
    assert report.as_dict()["plan"] == plan.to_dict()
    x = torch.randn(3, 64)
    want = model(x)
    assert assert_ran(model, report.quantised) == []
    reasons = {row.name: row.why for row in report.rows}
    rows = {row["name"]: row for row in audit(model, reasons)}
    assert rows["blocks.0.q"]["why"] == "plan: w8a8-int8 takes 1.10 of its time"
    assert rows["blocks.0.q"]["kernel"] == "float float32"

    with torch.device("meta"):
        other = Model()
    empty_quantised_(other, INT8, report.quantised, plan)
    other.load_state_dict(model.state_dict(), assign=True)
    prepare_(other)
    assert torch.equal(other(x), want)


def test_a_plan_may_mix_schemes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    paced(monkeypatch, none=2.0, int8=1.0)
    plan = planned(model)
    mixed = replace(plan, layers=(replace(plan.layers[0], scheme="w8a8-fp8"), *plan.layers[1:]))
    report = quantise_(model, INT8, plan=mixed)
    dtypes = [m.code_dtype for m in model.modules() if isinstance(m, QuantisedLinear)]
    assert dtypes == [torch.float8_e4m3fn, torch.int8, torch.int8, torch.int8]
    other = Model()
    empty_quantised_(other, INT8, report.quantised, mixed)
    other.load_state_dict(model.state_dict())
    if not runs("fp8", "cpu"):
        with pytest.raises(InputError, match="fp8 linear of 64 x 64 on device 'cpu'"):
            prepare_(other)
    prepare_(other, allow_fallback=True)
    assert bool(other(torch.randn(2, 64)).isfinite().all())


def test_a_plan_that_keeps_everything_is_no_error(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    paced(monkeypatch, none=1.0, int8=2.0)
    report = quantise_(model, INT8, plan=planned(model))
    assert report.quantised == ()
    assert all(row.why for row in report.rows)


def test_plans_go_through_json_and_files(model: Model, tmp_path: Path) -> None:
    plan = planned(model, rounds=1)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    for holder in (plan.to_dict(), {"plan": plan.to_dict()}, {"recipe": {"keep": [], "plan": plan.to_dict()}}):
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(holder))
        assert load_plan(path) == plan
        assert plan_for(str(path), model, SPECS["demo"], [INT8]) == plan
    assert plan_for("none", model, SPECS["demo"], [INT8]) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "plan version None"),
        ('{"version": 2}', "plan version 2"),
        ('{"version": 1}', "is no plan"),
        ('{"version": 1, "device": "cpu", "threads": 1, "dtype": "x", "budget": NaN}', "no time, error or budget"),
    ],
)
def test_damaged_plans_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_plan(path)
    assert "plan.json" in str(caught.value)
    with pytest.raises(InputError, match="expected auto, none or a JSON file"):
        load_plan(tmp_path / "missing.json")


def test_unknown_schemes_and_foreign_plans_are_refused(model: Model) -> None:
    plan = planned(model, rounds=1)
    fields = plan.to_dict()
    fields["layers"][0]["scheme"] = "w4a4"
    with pytest.raises(InputError, match="asks for scheme 'w4a4': expected one of bnb-int8"):
        Plan.from_dict(fields)
    wrong = replace(plan, layers=(replace(plan.layers[0], shape=(64, 65)), *plan.layers[1:]))
    for foreign, message in ((wrong, "64 x 65 there"), (replace(plan, layers=plan.layers[1:]), "no such layer")):
        with pytest.raises(InputError, match=message):
            quantise_(model, INT8, plan=foreign)
    assert not any(isinstance(module, QuantisedLinear) for module in model.modules())
    with pytest.raises(InputError, match="error budget 0"):
        planned(model, budget=0)


def test_static_schemes_need_a_range_for_every_layer(model: Model) -> None:
    names = ["blocks.0.q", "blocks.0.ffn", "blocks.1.q", "blocks.1.ffn"]
    with pytest.raises(InputError, match=r"w8a8-int8-static on 'blocks\.1\.ffn': no calibrated activation range"):
        quantise_(model, STATIC, ranges=dict.fromkeys(names[:-1], 4.0))
    assert not any(isinstance(module, QuantisedLinear) for module in model.modules())
    x = torch.randn(20, 64)
    with torch.no_grad():
        want = model(x)
        quantise_(model, STATIC, ranges=dict.fromkeys(names, 4.0))
        assert float((model(x) - want).norm() / want.norm()) < 5e-2


def test_a_model_without_weights_is_planned_by_its_shapes() -> None:
    with torch.device("meta"):
        model = Model(torch.float16)
    plan = planned(model, rounds=1)
    assert [row.name for row in plan.layers] == ["blocks.0.q", "blocks.0.ffn", "blocks.1.q", "blocks.1.ffn"]
    assert (plan.device, plan.dtype) == ("cpu", "float32")
    assert all(0 < row.error["w8a8-int8"] < 0.03 for row in plan.layers)


def test_the_table_has_a_row_per_shape(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    paced(monkeypatch, none=2.0, int8=1.0)
    header, rows = planned(model).table()
    assert header == ("N x K", "rows", "layers", "float32 ms", "w8a8-int8 ms", "w8a8-int8 worst error", "chosen")
    assert [(*row[:5], row[6]) for row in rows] == [
        ("64 x 64", "32", "2", "2.000", "1.000", "w8a8-int8"), ("128 x 64", "32", "2", "2.000", "1.000", "w8a8-int8"),
    ]  # fmt: skip
    assert "4 w8a8-int8" in planned(model).summary()


def test_rows_of_a_call() -> None:
    spec = SPECS["demo"]
    assert call_rows(spec, "blocks.3.cross_attn.k") == call_rows(spec, "blocks.0.cross_attn.v") == spec.text_len
    for name in ("blocks.0.self_attn.k", "blocks.0.cross_attn.q", "blocks.0.ffn.0"):
        assert call_rows(spec, name) == spec.chunk_frames * spec.frame_tokens


def test_w8a8_is_int8_where_it_runs_and_tells_what_both_take(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, line = resolve("w8a8", "cpu")
    assert scheme is INT8
    assert "w8a8-fp8 does not run here" in line
    monkeypatch.setattr("quant.kernels.runs", lambda family, device: True)
    monkeypatch.setattr(measure, "race", lambda schemes, device: {"w8a8-int8": 2.0, "w8a8-fp8": 1.0})
    scheme, line = resolve("w8a8", "cpu")
    assert scheme is INT8
    assert "w8a8 = w8a8-int8 on cpu (the finer one; measured: w8a8-int8 2.000 ms, w8a8-fp8 1.000 ms)" in line
    monkeypatch.setattr("quant.kernels.runs", lambda family, device: family == "fp8")
    assert resolve("w8a8", "cpu")[0] is FP8


def test_a_race_gives_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_RACE_ROWS", 16)
    times = race([INT8], "cpu", rounds=1)
    assert set(times) == {"w8a8-int8"}
    assert times["w8a8-int8"] > 0
