"""Laws of conversion and audit: every linear accounted for, rules hold, states load bit-equal, silence is an error."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from ispa_deploy.delta import Delta
from ispa_deploy.errors import InputError, RunError
from ispa_deploy.linear import Linear
from quant.audit import assert_ran, audit
from quant.convert import empty_quantised_, prepare_, quantise_
from quant.kernels_cpu import SIMULATED
from quant.linear import Int8Linear
from quant.memory import tune_allocator
from quant.schemes import SCHEMES, resolve

INT8 = SCHEMES["w8a8-int8"]
CONVERTED = ("blocks.0.q", "blocks.0.ffn.0", "blocks.1.q", "blocks.1.ffn.0")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = Linear(64, 64)
        self.ffn = nn.Sequential(Linear(64, 512), nn.GELU())
        self.norm = nn.LayerNorm(64)
        self.head_gate = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head_gate(self.norm(self.q(x))) + self.ffn(x)[..., :64]


class Model(nn.Module):
    """The names of the real one, and a plain linear."""

    def __init__(self) -> None:
        super().__init__()
        self.text_embedding = nn.Sequential(Linear(32, 64), nn.GELU(), Linear(64, 64))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(64, 64))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Module()
        self.head.head = Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.time_projection(self.text_embedding(x))
        for block in self.blocks:
            x = block(x)
        return self.head.head(x)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def test_every_linear_is_reported_with_its_reason(model: Model) -> None:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    before = sum(p.nbytes for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters())
    report = quantise_(model, INT8, skip=[r"blocks\.1\.q"])
    assert [row.name for row in report.rows] == linears
    assert report.quantised == ("blocks.0.q", "blocks.0.ffn.0", "blocks.1.ffn.0")
    why = {row.name: row.why for row in report.rows}
    assert why["text_embedding.0"].startswith("w8a8-int8 keeps")
    assert "head" in why["head.head"]
    assert why["blocks.1.q"] == r"asked for blocks\.1\.q"
    assert "plain nn.Linear" in why["blocks.0.head_gate"]
    assert "gain no time" in why["blocks.0.q"]
    assert report.bytes_before == before
    held = sum(m.nbytes for m in model.modules() if isinstance(m, Int8Linear))
    kept = sum(p.nbytes for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters())
    assert report.bytes_after == held + kept
    assert all((row.sqnr_db or 0) > 38 for row in report.rows if row.quantised)
    assert report.summary().startswith("w8a8-int8: 3 of 10 linears quantised")


def test_the_converted_model_is_close(model: Model) -> None:
    x = torch.randn(30, 32)
    with torch.no_grad():
        want = model(x)
        quantise_(model, INT8)
        assert float((model(x) - want).norm() / want.norm()) < 3e-2


def test_a_shared_linear_stays_shared(model: Model) -> None:
    model.blocks[1].q = model.blocks[0].q
    report = quantise_(model, INT8)
    assert model.blocks[1].q is model.blocks[0].q
    assert isinstance(model.blocks[1].q, Int8Linear)
    assert report.quantised == ("blocks.0.q", "blocks.0.ffn.0", "blocks.1.ffn.0")


def test_scheme_none_changes_nothing(model: Model) -> None:
    report = quantise_(model, SCHEMES["none"])
    assert report.quantised == ()
    assert not any(isinstance(module, Int8Linear) for module in model.modules())
    assert report.bytes_before == report.bytes_after


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (["blocks"], "all are kept in floating point"),
        (["block$"], "matches none of the model's 10 linears, for example 'text_embedding.0'"),
        (["("], "not a regular expression"),
    ],
)
def test_bad_requests_leave_the_model_whole(model: Model, skip: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        quantise_(model, INT8, skip=skip)
    assert not any(isinstance(module, Int8Linear) for module in model.modules())


def test_a_bad_weight_is_named_and_leaves_the_model_whole(model: Model) -> None:
    with torch.no_grad():
        model.blocks[1].ffn[0].weight[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"^blocks\.1\.ffn\.0\.weight: 1 of 512 rows"):
        quantise_(model, INT8)
    assert not any(isinstance(module, Int8Linear) for module in model.modules())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_skeleton_loads_the_state_bit_equal(model: Model, device: str) -> None:
    x = torch.randn(9, 32)
    report = quantise_(model, INT8)
    want, state = model(x), model.state_dict()
    with torch.device(device):
        other = Model()
    empty_quantised_(other, INT8, report.quantised)
    other.load_state_dict(state, assign=True)
    prepare_(other)
    assert torch.equal(other(x), want)
    assert all(m.weight is None for m in other.modules() if isinstance(m, Int8Linear))


def test_a_skeleton_refuses_unknown_names(model: Model) -> None:
    with pytest.raises(InputError, match=r"'blocks\.7\.q' of the bundle is no linear"):
        empty_quantised_(model, INT8, ["blocks.7.q"])


def test_audit_tells_what_ran(model: Model) -> None:
    quantise_(model, INT8)
    with pytest.raises(RunError, match=r"never ran in 4 \(blocks\.0\.q, blocks\.0\.ffn\.0, blocks\.1\.q, \.\.\.\)"):
        assert_ran(model)
    model(torch.randn(2, 32))
    assert_ran(model)
    rows = {row["name"]: row for row in audit(model)}
    assert len(rows) == 10
    assert tuple(name for name, row in rows.items() if row["dtype"] == "int8") == CONVERTED
    assert all(rows[name]["calls"] == 1 for name in CONVERTED)
    assert rows["head.head"] == {
        "name": "head.head", "kernel": "float float32", "calls": None, "wide_calls": None, "float_calls": None,
        "dtype": "float32", "delta_mode": None, "why": None,
    }  # fmt: skip
    assert {row["name"]: row["why"] for row in audit(model, {"head.head": "kept"})}["head.head"] == "kept"


def test_simulated_arithmetic_is_an_error_unless_allowed(model: Model) -> None:
    quantise_(model, INT8)
    model.blocks[0].q.prepare(SIMULATED)
    model(torch.randn(2, 32))
    with pytest.raises(RunError, match=r"simulated in 1 \(blocks\.0\.q\)"):
        assert_ran(model)
    (warning,) = assert_ran(model, allow_fallback=True)
    assert "simulated in 1" in warning


def test_a_layer_that_should_be_quantised_and_is_not_is_an_error(model: Model) -> None:
    quantise_(model, INT8, skip=[r"blocks\.1\.q"])
    model(torch.randn(2, 32))
    assert assert_ran(model, ("blocks.0.q",)) == []
    with pytest.raises(RunError, match=r"in floating point in 1 \(blocks\.1\.q\)"):
        assert_ran(model, CONVERTED)


def test_a_folded_delta_is_counted_and_no_complaint(model: Model) -> None:
    quantise_(model, INT8)
    layer = model.blocks[0].q
    layer.set_delta(Delta(torch.zeros(64, 64)), "fold")
    model(torch.randn(2, 32))
    layer.set_delta(None)
    assert assert_ran(model) == []
    row = next(row for row in audit(model) if row["name"] == "blocks.0.q")
    assert (row["calls"], row["float_calls"]) == (0, 1)


@pytest.mark.parametrize("name", [*SCHEMES, "w8a8"])
def test_every_scheme_resolves_to_one_line(name: str) -> None:
    scheme, line = resolve(name, "cpu")
    assert scheme.name == ("w8a8-int8" if name == "w8a8" else name)
    assert "\n" not in line
    assert scheme.name in line
    assert name != "w8a8-fp8" or "compute capability 8.9" in line or torch.cuda.is_available()


def test_unknown_schemes_and_devices_are_refused() -> None:
    known = "bnb-int8, none, w8a16-int8, w8a8, w8a8-fp8, w8a8-int8, w8a8-int8-static"
    with pytest.raises(InputError, match=f"unknown scheme 'w4a4': expected one of {known}"):
        resolve("w4a4", "cpu")
    with pytest.raises(InputError, match="device 'tpu:0': expected one of cpu, cuda"):
        resolve("w8a8", "tpu:0")


def test_the_scheme_table_does_not_import_torch() -> None:
    code = "import sys, quant; quant.SCHEMES; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_allocator_reports_whether_it_took() -> None:
    code = "from quant.memory import tune_allocator; print(tune_allocator())"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert out in ("True", "False")
    assert callable(tune_allocator)
