"""Laws of what stays in floating point for its error: measured as defined, within the share, told in the bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from export import open_bundle, quantise_source, read_manifest
from export.calibrate import Activations
from export.onestep import one_step
from export.sensitivity import most_sensitive, sensitivity
from ispa_deploy.errors import InputError
from ispa_deploy.evaluate.onestep import one_step_errors
from ispa_deploy.linear import Linear
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions, open_stream
from quant import SCHEMES, quantise_
from quant.convert import kept
from tests.tiny import SPEC, latents_of, text_rows, tiny_model

INT8, STATIC = SCHEMES["w8a8-int8"], SCHEMES["w8a8-int8-static"]
SHORT = replace(SPEC, layers=2)
FRAMES = 6
LOUD = "blocks.0.ffn.2"


def the_model() -> CausalWanDiT:
    """Its linear `LOUD` gets rows with an outlying channel, so that 8 bits round the other channels coarsely."""
    model = tiny_model(SHORT).requires_grad_(False)
    model.blocks[0].ffn[0].bias[0] = 40.0
    return model


def stream_of(model: CausalWanDiT) -> torch.Tensor:
    return latents_of(open_stream(model, text_rows(SHORT), StreamOptions(frames=FRAMES, policy="full")))


def test_a_linears_error_is_the_one_step_error_of_the_model_with_it_alone_in_8_bits() -> None:
    model = the_model()
    names = [name for name, reason in kept(model, INT8).items() if reason is None]
    before = stream_of(model)
    found = sensitivity(model, INT8, dict.fromkeys(names, 1.0), [text_rows(SHORT)], share=0.1, frames=FRAMES, seed=3)
    assert torch.equal(stream_of(model), before), "the model is left as it was"
    assert set(names) - set(found.errors) == {f"blocks.{block}.cross_attn.{leaf}" for block in (0, 1) for leaf in "kv"}
    for name in (LOUD, "blocks.0.self_attn.v", "blocks.1.self_attn.o"):
        alone = the_model()
        quantise_(alone, INT8, skip=[rf"^(?!{name}$)"])
        document = one_step_errors(model, alone, [text_rows(SHORT)], frames=FRAMES, seed=3)
        last = max(
            (place["chunk"], place["step"], error)
            for place, error in zip(document["passes"], document["model"]["relative_l2"], strict=True)
            if error is not None
        )
        assert found.errors[name] ** 0.5 == pytest.approx(last[2], rel=1e-5)
    assert max(found.errors, key=lambda name: found.errors[name]) == LOUD
    assert found.chosen[0] == LOUD
    assert found.to_dict()["kept"] == list(found.chosen)


def test_the_share_goes_to_the_most_error_per_weight() -> None:
    errors = {"a": 8.0, "b": 3.0, "c": 2.5, "d": 0.0}
    sizes = {"a": 40, "b": 10, "c": 10, "d": 10, "text": 30}
    assert most_sensitive(errors, sizes, 0.0) == ()
    assert most_sensitive(errors, sizes, 0.1) == ("b",)
    assert most_sensitive(errors, sizes, 0.2) == ("b", "c")
    assert most_sensitive(errors, sizes, 0.55) == ("b", "c"), "a does not fit, d has no error"
    assert most_sensitive(errors, sizes, 0.6) == ("b", "c", "a")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save({name: tensor.clone() for name, tensor in the_model().state_dict().items()}, tmp_path / "base.pt")
    save_file({"prompt_embeds": text_rows(SHORT)[0]}, tmp_path / "rows.safetensors")
    return tmp_path / "base.pt"


def asked_for(checkpoint: Path, share: float, report: bool = False) -> Activations:
    rows = checkpoint.with_name("rows.safetensors")
    return Activations(prompts=rows, frames=FRAMES, keep_sensitive=share, report=report)


def test_a_checkpoint_keeps_its_most_sensitive_linears(checkpoint: Path) -> None:
    folder, report = quantise_source(
        checkpoint, checkpoint.with_name("b"), scheme=STATIC, model=SHORT, activations=asked_for(checkpoint, 0.2)
    )
    manifest = read_manifest(folder)
    assert manifest.calibration is not None
    found = manifest.calibration["sensitivity"]
    assert LOUD in found["kept"]
    assert set(found["kept"]).isdisjoint(report.quantised)
    assert len(manifest.skip) == len(found["kept"])
    sizes = {row.name: row.shape[0] * row.shape[1] for row in report.rows if row.name in manifest.calibration["layers"]}
    assert sum(sizes[name] for name in found["kept"]) <= 0.2 * sum(sizes.values())
    assert type(open_bundle(folder).model.get_submodule(LOUD)) is Linear


def test_what_is_kept_takes_its_error_out_of_a_step(checkpoint: Path) -> None:
    errors = []
    for share in (0.0, 0.2):
        folder, _ = quantise_source(
            checkpoint, checkpoint.with_name(str(share)), scheme=INT8, model=SHORT,
            activations=asked_for(checkpoint, share, report=True),
        )  # fmt: skip
        summary = one_step(folder)
        assert summary is not None
        errors.append(summary["model"]["pooled"]["relative_l2"])
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize(
    ("scheme", "share", "message"),
    [("w8a8-int8", 1.0, "--keep-sensitive 1.0: expected a share"), ("w8a8-int8", float("nan"), "expected a share"),
     ("none", 0.1, "calibration for the scheme none")],
)  # fmt: skip
def test_shares_that_mean_nothing_are_refused(tmp_path: Path, scheme: str, share: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantise_source(
            "demo", tmp_path / "b", scheme=SCHEMES[scheme], activations=Activations(keep_sensitive=share)
        )  # fmt: skip
