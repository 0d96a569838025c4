"""Laws of calibration: real streams, unchanged; the ranges that were there; bundles that hold and obey them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from export import convert_checkpoint, open_bundle, quantise_source, read_manifest, write_bundle
from export.calibrate import Activations, calibrate, default_frames, learn, linear_weights
from export.dialects import export_bundle, import_dialect
from export.manifest import Source
from export.onestep import ONE_STEP, one_step
from export.prompts import OWN_PROMPTS, read_prompts, text_rows
from export.sources import load_source
from ispa_deploy.errors import InputError, RunError
from ispa_deploy.evaluate.onestep import Distance, one_step_errors
from ispa_deploy.evaluate.passes import TEXT, Pass, ToldStream
from ispa_deploy.linear import Linear
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.precision import last_pass_linears, widened
from ispa_deploy.specs import SPECS
from quant import SCHEMES, measure, quantise_
from quant.convert import kept, prepare_
from quant.layers import StaticInt8Linear
from quant.measure import plan_for
from quant.ranges import SAMPLE_ROWS, Observer
from quant.smooth import Smoothing, smooth_
from tests.bundles import contents
from tests.tiny import SPEC, latents_of, tiny_model, tiny_stream
from tests.tiny import text_rows as tiny_rows

STATIC, INT8 = SCHEMES["w8a8-int8-static"], SCHEMES["w8a8-int8"]
SHORT = replace(SPEC, layers=2)
FRAMES = 9


def names_of(model: nn.Module) -> list[str]:
    return [name for name, reason in kept(model, STATIC).items() if reason is None]


def the_model() -> CausalWanDiT:
    return tiny_model(SHORT).requires_grad_(False)


# Passes and ranges


def test_a_told_stream_is_the_stream_and_names_every_pass() -> None:
    model, told = the_model(), []
    options = StreamOptions(frames=FRAMES, policy="full")
    plain = latents_of(open_stream(model, tiny_rows(SHORT), options))
    stream = open_stream(model, tiny_rows(SHORT), options)
    got = latents_of(ToldStream.of(stream, lambda one, x: told.append((one, x.shape[1]))))
    assert torch.equal(got, plain)
    assert [(one.chunk, one.step, one.clean) for one, _ in told] == [
        (0, 0, False), (0, 1, False), (0, 2, True), (1, 0, False), (1, 1, False), (1, 2, True), (2, 0, False),
        (2, 1, False),
    ]  # fmt: skip
    assert {frames for _, frames in told} == {SHORT.chunk_frames}
    assert told[0][0].timestep == 1000.0
    assert told[2][0].timestep == SHORT.context_timestep


def test_an_observer_sees_the_largest_magnitudes_and_touches_nothing() -> None:
    model = nn.Sequential(Linear(6, 5), Linear(5, 3))
    x, y = torch.randn(7, 6), torch.randn(2, 4, 6)
    want = model(x)
    with Observer(model, ["0", "1"]) as observer:
        observer.at("a")
        assert torch.equal(model(x), want)
        observer.at("b")
        model(y)
        observer.at("a")
        model(-2 * x)
    model(1000 * x)  # nobody watches any more
    seen = observer.seen()["0"]
    assert seen.moments == ("a", "b")
    assert torch.equal(seen.peaks, torch.stack([2 * x.abs().amax(0), y.abs().amax((0, 1))]))
    assert seen.amax == max(2 * float(x.abs().max()), float(y.abs().max()))
    assert len(seen.sample) <= SAMPLE_ROWS
    assert all(any(torch.equal(row, other) for other in [*x, *y.flatten(0, 1), *(-2 * x)]) for row in seen.sample)
    half = seen.scaled(torch.full((6,), 0.5))
    assert half.amax == seen.amax / 2


def test_ranges_are_those_of_a_real_stream() -> None:
    """Against a stream watched by hand: the same prompts, the same noise, every pass and the text."""
    model = the_model()
    names = names_of(model)
    found = calibrate(model, names, "random", Activations(frames=FRAMES, seed=5))
    rows, digest = text_rows(SHORT, "random", None)
    assert len(rows) == found.prompts == OWN_PROMPTS
    assert found.prompts_sha256 == digest
    peaks: dict[str, float] = dict.fromkeys(names, 0.0)

    def watch(name: str) -> Any:
        return lambda _, args: peaks.update({name: max(peaks[name], float(args[0].abs().max()))})

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    for index, row in enumerate(rows):
        latents_of(open_stream(model, row, StreamOptions(frames=FRAMES, seed=5 + index, policy="full")))
    for hook in hooks:
        hook.remove()
    assert found.ranges() == peaks
    assert found.passes[0] == TEXT
    assert len(found.passes) == 1 + 3 + 3 + 2
    document = found.to_dict()
    text = document["layers"]["blocks.1.cross_attn.k"]["passes"]
    assert text[0] is not None
    assert set(text[1:]) == {None}
    queries = document["layers"]["blocks.0.self_attn.q"]
    assert queries["passes"][0] is None
    assert None not in queries["passes"][1:]
    assert max(queries["passes"][1:]) == pytest.approx(queries["amax"], rel=1e-3)
    json.dumps(document, allow_nan=False)


def test_default_frames_fill_the_window_twice_in_whole_chunks() -> None:
    for spec in SPECS.values():
        frames = default_frames(spec)
        assert frames % spec.chunk_frames == 0
        assert frames == (2 if spec.rolls else 1) * spec.window_frames


def test_activations_that_overflow_are_named() -> None:
    model = the_model()
    with torch.no_grad():
        model.blocks[0].ffn[0].bias.fill_(float("inf"))
    with pytest.raises(RunError, match=r"input of 'blocks\.0\.ffn\.2' is not finite in chunk 0, step 0"):
        calibrate(model, names_of(model), "random", Activations(frames=3))


# Prompts


def test_prompts_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("# for the demo\n\n  a red ring \na blue disc\n", encoding="utf-8")
    assert read_prompts(path) == ["a red ring", "a blue disc"]
    rows, digest = text_rows(SPECS["demo"], "demo", path)
    assert len(rows) == 2
    assert digest != text_rows(SPECS["demo"], "demo", None)[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "expected a text file"), (b"# only\n\n", "holds none"), (b"\xff\xfe\x00", "not UTF-8")],
)
def test_bad_prompt_files_are_refused_before_any_work(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        quantise_source("nosuch.pt", tmp_path / "b", scheme=INT8, activations=Activations(prompts=path))


def test_a_checkpoint_needs_prompts_it_can_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be calibrated without prompts: pass --calibrate"):
        text_rows(SPECS["longlive-1.3b"], "checkpoint", None)
    (tmp_path / "p.txt").write_text("a cat\n")
    with pytest.raises(InputError, match=r"--text-encoder PATH, or pass --calibrate FILE\.safetensors"):
        text_rows(SPECS["longlive-1.3b"], "checkpoint", tmp_path / "p.txt")
    save_file({"prompt_embeds": torch.randn(3, SPEC.text_dim)}, tmp_path / "rows.safetensors")
    rows, _ = text_rows(SPEC, "checkpoint", tmp_path / "rows.safetensors")
    assert rows[0].shape == (1, SPEC.text_len, SPEC.text_dim)


@pytest.mark.parametrize("given", [{"report": True}, {"smooth": "fold"}, {"keep_sensitive": 0.1}])
def test_streams_that_cannot_be_are_refused_before_a_bundle_is_written(tmp_path: Path, given: dict[str, Any]) -> None:
    """No prompts for a checkpoint; no voice and no face for speech to video."""
    save_file(dict(the_model().state_dict()), tmp_path / "a.safetensors")
    hears = replace(SHORT, name="hears", audio_blocks=(0,))
    for source, spec, message in (
        (tmp_path / "a.safetensors", SHORT, "without prompts: pass --calibrate"),
        ("random", hears, "calibration and --report with 'hears': .* a voice and a face .*w8a8-int8"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            quantise_source(source, tmp_path / "b", scheme=INT8, model=spec, activations=Activations(**given))
        assert "\n" not in str(caught.value)
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("scheme", "given", "message"),
    [
        ("w8a8-int8", {"frames": 6}, "--calibrate-frames with nothing to calibrate"),
        ("none", {"smooth": "fold"}, "calibration for the scheme none"),
        ("w8a8-int8", {"smooth": "most"}, "smoothing 'most': expected one of none, fold, all"),
        ("w8a8-int8", {"smooth": "fold", "alpha": 1.5}, "expected alpha from 0"),
    ],
)
def test_flags_that_do_nothing_are_refused(tmp_path: Path, scheme: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantise_source("demo", tmp_path / "b", scheme=SCHEMES[scheme], activations=Activations(**given))


# Bundles


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save({name: tensor.clone() for name, tensor in the_model().state_dict().items()}, tmp_path / "base.pt")
    save_file({"prompt_embeds": tiny_rows(SHORT)[0]}, tmp_path / "rows.safetensors")
    return tmp_path / "base.pt"


@pytest.mark.parametrize("smooth", ["none", "fold", "all"])
@pytest.mark.parametrize("scheme", ["w8a8-int8-static", "w8a8-int8"])
def test_a_checkpoint_is_calibrated_as_the_whole_model_would_be(
    tmp_path: Path, checkpoint: Path, scheme: str, smooth: str
) -> None:
    rows, chosen = tmp_path / "rows.safetensors", SCHEMES[scheme]
    asked = Activations(prompts=rows, frames=FRAMES, smooth=smooth)
    folder, report = quantise_source(checkpoint, tmp_path / "streamed", scheme=chosen, model=SHORT, activations=asked)
    model, source = load_source(checkpoint, model=SHORT)
    found = calibrate(model, names_of(model), "checkpoint", asked)
    smoothing, found = found.smoothed(smooth, linear_weights(model))
    whole = replace(quantise_(model, chosen, ranges=found.ranges(), smoothing=smoothing), calibration=found.to_dict())
    write_bundle(tmp_path / "whole", model, scheme=chosen, report=whole, source=source)
    assert contents(folder) == contents(tmp_path / "whole")
    assert report == whole
    recipe = read_manifest(folder).calibration
    assert recipe is not None
    assert (recipe["smooth"], recipe["frames"], recipe["prompts"]) == (smooth, FRAMES, 1)
    opened = open_bundle(folder).model
    assert torch.equal(first_latents(opened), first_latents(model))
    layer = opened.blocks[0].self_attn.o
    if scheme == "w8a8-int8-static":
        assert isinstance(layer, StaticInt8Linear)
        assert float(layer.input_scale) == pytest.approx(found.ranges()["blocks.0.self_attn.o"] / 127)
    assert layer.pre_quant_scale is None
    assert (opened.blocks[0].ffn[2].pre_quant_scale is not None) == (smooth == "all")


def test_a_checkpoint_is_planned_by_what_it_multiplies(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own weights and calibrated activations, as for a whole model; a loud layer shows. Only the clock is set."""
    monkeypatch.setattr(measure, "_times", lambda layers, *_: {name: 1.0 + (name == "none") for name in layers})
    asked = Activations(prompts=tmp_path / "rows.safetensors", frames=FRAMES)
    folder, report = quantise_source(
        checkpoint, tmp_path / "b", scheme=INT8, model=SHORT, plan="auto", activations=asked
    )  # fmt: skip
    model, source = load_source(checkpoint, model=SHORT)
    known = learn(model, source, INT8, (), asked, lambda _: None)
    assert report.plan == plan_for("auto", model, SHORT, [INT8], activations=known.samples)
    assert report.plan is not None
    assert read_manifest(folder).plan == report.plan.to_dict()
    assert len({row.error["w8a8-int8"] for row in report.plan.layers}) == len(report.plan.layers)
    # Smoothed where it is folded alone, for every layer stays: the same function, and a report that says so.
    monkeypatch.setattr(measure, "_times", lambda layers, *_: {name: 1.0 + (name != "none") for name in layers})
    told: list[str] = []
    everywhere = replace(asked, smooth="all", report=True)
    kept_all, _ = quantise_source(
        checkpoint, tmp_path / "kept", scheme=INT8, model=SHORT, plan="auto", activations=everywhere, say=told.append
    )  # fmt: skip
    assert torch.equal(first_latents(open_bundle(kept_all).model), first_latents(model))
    assert any("relative L2 0.0000, cosine 1.00000; no linear in 8 bits" in line for line in told)
    monkeypatch.undo()
    _, blind = quantise_source(checkpoint, tmp_path / "blind", scheme=INT8, model=SHORT, plan="auto")
    assert blind.plan is not None
    assert blind.plan.layers != report.plan.layers


def first_latents(model: CausalWanDiT) -> Tensor:
    return latents_of(open_stream(model, tiny_rows(SHORT), StreamOptions(frames=6, policy="full")))


def test_the_demo_calibrates_out_of_the_box(tmp_path: Path) -> None:
    folder, report = quantise_source("demo", tmp_path / "b", scheme=STATIC, activations=Activations(frames=3, seed=1))
    assert len(report.quantised) == 100
    assert report.calibration is not None
    assert report.calibration["prompts"] == OWN_PROMPTS
    opened = open_bundle(folder)
    chunks = list(opened.stream("a fast red ring over teal waves", StreamOptions(frames=3, policy="full")))
    assert all(bool(chunk.latents.isfinite().all()) for chunk in chunks)


def test_a_static_scheme_without_ranges_is_still_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(InputError, match="no calibrated activation range"):
        convert_checkpoint(checkpoint, tmp_path / "b", spec=SHORT, scheme=STATIC)
    assert not (tmp_path / "b").exists()


def test_dialects_carry_the_calibration_and_refuse_smoothing_that_is_not_folded(
    tmp_path: Path, checkpoint: Path
) -> None:
    rows = tmp_path / "rows.safetensors"
    for smooth in ("fold", "all"):
        asked = Activations(prompts=rows, frames=3, smooth=smooth)
        quantise_source(checkpoint, tmp_path / smooth, scheme=INT8, model=SHORT, activations=asked)
    out = export_bundle(tmp_path / "fold", "comfyui", tmp_path / "m.safetensors")
    import_dialect(out, "auto", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "fold")
    with pytest.raises(InputError, match=r"pre_quant_scale: a reader .* made with --smooth fold"):
        export_bundle(tmp_path / "all", "comfyui", tmp_path / "n.safetensors")


def test_a_damaged_pre_quant_scale_is_refused(tmp_path: Path) -> None:
    model = the_model()
    name = "blocks.0.ffn.0"
    smoothing = Smoothing.of({name: torch.zeros(SHORT.dim)}, {})
    smoothing = replace(smoothing, tensors={})
    report = quantise_(model, INT8, smoothing=smoothing)
    folder = write_bundle(tmp_path / "b", model, scheme=INT8, report=report, source=Source("random", "x"))
    with pytest.raises(InputError, match=r"blocks\.0\.ffn\.0\.pre_quant_scale holds a scale of 0 or less"):
        open_bundle(folder)


# One-step errors


def test_distances_are_cosines_and_relative_errors() -> None:
    a, b = torch.randn(3, 40), torch.randn(3, 40)
    parts, whole = Distance(), Distance()
    for x, y in zip(a, b, strict=True):
        parts.add(x, y)
    whole.add(a, b)
    assert parts.cosine == pytest.approx(float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)), rel=1e-5)
    assert parts.relative_l2 == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-5)
    assert parts.relative_l2 == pytest.approx(whole.relative_l2, rel=1e-12)
    assert Distance().to_dict() == {"cosine": 1.0, "relative_l2": 0.0, "sqnr_db": 200.0}


def test_a_model_is_at_no_distance_from_itself_and_the_stream_stays_its_own() -> None:
    model, twin = the_model(), the_model()
    for block in twin.blocks:  # another type, the same numbers
        block.ffn[0].__class__ = type("Same", (Linear,), {})
    document = one_step_errors(model, twin, [tiny_rows(SHORT)], frames=FRAMES)
    assert document["model"]["pooled"]["relative_l2"] == 0
    assert [row["name"] for row in document["layers"]] == ["blocks.0.ffn.0", "blocks.1.ffn.0"]
    assert document["layers"][0]["pooled"]["relative_l2"] == 0


def test_one_step_errors_are_teacher_forced() -> None:
    """Against the definition: the other model's velocity on the original's latents and the original's cache, with the
    activations that a stream gives it in that pass."""
    model, eight = the_model(), the_model()
    quantise_(eight, INT8)
    document = one_step_errors(model, eight, [tiny_rows(SHORT)], frames=6)
    want: dict[Pass, tuple[Tensor, Tensor]] = {}
    rows, options = tiny_rows(SHORT), StreamOptions(frames=6, policy="full")
    recorded: dict[Pass, Tensor] = {}
    for _ in ToldStream.of(open_stream(model, rows, options), lambda one, x: recorded.update({one: x.clone()})):
        pass
    for one in (key for key in recorded if not key.clean):
        velocities = []
        for runner in (model, eight):
            # A fresh stream of the original up to this very pass, then one pass of the runner.
            stream, stop = open_stream(model, rows, options), StopIteration()

            def here(now: Pass, x: Tensor, target: Pass = one, stop: Exception = stop) -> None:
                if now == target:
                    raise RuntimeError from stop

            told = ToldStream.of(stream, here)
            with pytest.raises(RuntimeError):
                for _ in told:
                    pass
            fine = last_pass_linears(runner) if one.step == len(SHORT.steps) - 1 else ()
            with torch.inference_mode():
                t, text = runner.condition(torch.full((1, 1), one.timestep)), runner.encode_text(rows)
                with widened(fine):
                    velocities.append(runner(recorded[one], t, text, stream.cache))
        want[one] = (velocities[0], velocities[1])
    where = [(row["chunk"], row["step"]) for row in document["passes"]]
    errors = dict(zip(where, document["model"]["relative_l2"], strict=True))
    for one, (mine, theirs) in want.items():
        expected = float((mine - theirs).double().norm() / mine.double().norm())
        assert errors[one.chunk, one.step] == pytest.approx(expected, rel=1e-4)
    assert errors[0, 2] is None, "the clean pass has no velocity"


def test_layer_errors_are_on_the_originals_inputs() -> None:
    model, eight = the_model(), the_model()
    quantise_(eight, INT8)
    inputs: list[Tensor] = []
    name = "blocks.0.ffn.0"  # of no last layer, so its activations have 8 bits in every pass
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    latents_of(open_stream(model, tiny_rows(SHORT), StreamOptions(frames=6, policy="full")))
    hook.remove()
    error = power = 0.0
    for x in inputs:
        want = model.get_submodule(name)(x).double()
        error += float((eight.get_submodule(name)(x) - want).square().sum())
        power += float(want.square().sum())
    document = one_step_errors(model, eight, [tiny_rows(SHORT)], frames=6)
    got = {row["name"]: row for row in document["layers"]}
    assert len(got) == 20
    assert got[name]["pooled"]["relative_l2"] == pytest.approx((error / power) ** 0.5, rel=1e-4)
    assert document["layers"][0]["pooled"]["sqnr_db"] == min(row["pooled"]["sqnr_db"] for row in document["layers"])


@pytest.fixture
def one_prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("a fast red ring over teal waves\n")
    return path


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in ("none", "bnb-int8")])
def test_the_demo_in_eight_bits_is_close_in_chunk_one(tmp_path: Path, one_prompt: Path, scheme: str) -> None:
    """Cosine at least 0.995, relative L2 at most 0.08 against bfloat16."""
    asked = Activations(prompts=one_prompt, frames=6, report=True)
    folder, _ = quantise_source("demo", tmp_path / "b", scheme=SCHEMES[scheme], dtype=torch.bfloat16, activations=asked)
    summary = one_step(folder)
    assert summary is not None
    assert summary["dtype"] == "bfloat16"
    chunk = summary["model"]["chunks"][1]
    assert chunk["chunk"] == 1
    assert chunk["cosine"] >= 0.995
    assert chunk["relative_l2"] <= 0.08
    assert len(summary["layers"]) == 100
    full = json.loads((folder / ONE_STEP).read_text())
    assert all(len(row["relative_l2"]) == len(full["passes"]) for row in (full["model"], *full["layers"]))
    identity = read_manifest(folder).base_sha256
    (folder / ONE_STEP).unlink()
    assert open_bundle(folder, allow_fallback=True).base_sha256 == identity


def test_a_smoothed_bundle_is_measured_against_the_same_function(tmp_path: Path, checkpoint: Path) -> None:
    """The fold changes what the cache holds: unless the original is folded too, the error would be large."""
    asked = Activations(prompts=tmp_path / "rows.safetensors", frames=6, report=True, smooth="fold")
    folder, _ = quantise_source(checkpoint, tmp_path / "b", scheme=INT8, model=SHORT, activations=asked)
    summary = one_step(folder)
    assert summary is not None
    assert summary["smooth"] == "fold"
    assert summary["model"]["pooled"]["relative_l2"] < 0.03


# Smoothing with absorption


def test_absorption_works_on_the_smoothed_input() -> None:
    """The fold multiplies the input of `o`; statistics, solve and delta live in that basis and give the same video."""
    model = the_model()
    found = calibrate(model, names_of(model), "random", Activations(frames=FRAMES))
    smoothing, _ = found.smoothed("fold", linear_weights(model), 1.0)
    folded = the_model()
    smooth_(folded, smoothing.folded())
    want, got = (
        latents_of(tiny_stream(one, frames=21, ridge_absolute=0.0, ridge_relative=None)) for one in (model, folded)
    )
    prepare_(folded)
    # Without a ridge the solution does not depend on the basis; what is left is rounding.
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
