"""Laws of stored deltas: the same bits as in the stream that wrote them, on the same base, or a refusal by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import export.deltas
from export import StoredDeltas, load_deltas, save_deltas, save_deltas_of
from export.bundle import stand_in_rows
from export.sources import initialise_
from ispa_deploy.absorb.lowrank import Rank
from ispa_deploy.absorb.records import LayerRecord
from ispa_deploy.absorb.solve import Ridge
from ispa_deploy.delta import DELTA_MODES, Delta
from ispa_deploy.errors import InputError, RunError
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.specs import ModelSpec
from ispa_deploy.stream import Stream
from quant.convert import prepare_, quantise_
from quant.schemes import SCHEMES

TINY = ModelSpec(
    name="tiny", dim=32, ffn_dim=48, heads=2, layers=4, freq_dim=16, text_dim=24, text_len=6, latent_channels=4,
    latent_height=4, latent_width=4, patch=(1, 1, 1), window_frames=12, sink_frames=1, steps=(1000, 500),
)  # fmt: skip
BASE = "ab" * 32
OPTIONS = StreamOptions(frames=15, ratio=0.5)


def tiny(scheme: str) -> CausalWanDiT:
    """Where no kernel of the scheme runs here, with simulated ones."""
    model = initialise_(CausalWanDiT(TINY).requires_grad_(False).eval())
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quantise_(model, SCHEMES[scheme], ranges=dict.fromkeys(names, 4.0) if "static" in scheme else None)
    prepare_(model, allow_fallback=True)
    return model


def absorbed(model: CausalWanDiT, options: StreamOptions = OPTIONS) -> Stream:
    """A stream that has run past its transition."""
    stream = open_stream(model, stand_in_rows("x", TINY), options)
    for _ in stream:
        pass
    assert stream.absorber.state == "absorbed"
    assert len(stream.absorber.deltas) == 2
    return stream


def save(path: Path, deltas: dict[int, Delta], **changes: Any) -> Path:
    fields: dict[str, Any] = {
        "base_sha256": BASE, "mode": "auto", "policy": "absorb", "recent_frames": 0, "ratio": 0.5,
        "ranking": "heldout", "ridge": Ridge(relative=1e-2), "records": [],
    }  # fmt: skip
    return save_deltas(path, deltas, **{**fields, **changes})


def load(path: Path, base: str = BASE, spec: ModelSpec = TINY) -> StoredDeltas:
    return load_deltas(path, base_sha256=base, spec=spec)


def planted() -> dict[int, Delta]:
    return {3: Delta(torch.randn(32, 32), torch.randn(32)), 1: Delta(torch.randn(32, 32).bfloat16())}


@pytest.mark.parametrize("how", [{}, {"delta_rank": Rank(count=5)}, {"quantisation_aware": True}], ids=str)
@pytest.mark.parametrize("mode", DELTA_MODES)
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_the_corrected_layers_compute_the_same_bits(
    tmp_path: Path, scheme: str, mode: str, how: dict[str, Any]
) -> None:
    if (scheme, mode) == ("none", "requant"):
        pytest.skip("a floating-point layer has no codes")
    model = tiny(scheme)
    absorber = absorbed(model, StreamOptions(frames=15, ratio=0.5, delta=mode, **how)).absorber
    assert {delta.shape for delta in absorber.deltas.values()} == {(32, 32)}
    assert {delta.down is not None for delta in absorber.deltas.values()} == {"delta_rank" in how}
    path = save_deltas_of(tmp_path / "d.safetensors", absorber, base_sha256=BASE)
    x = torch.randn(7, 32)
    wanted = {}
    for layer, delta in absorber.deltas.items():
        model.blocks[layer].self_attn.o.set_delta(delta, absorber.mode)
        wanted[layer] = model.blocks[layer].self_attn.o(x)
        model.blocks[layer].self_attn.o.set_delta(None)
    plain = {layer: model.blocks[layer].self_attn.o(x) for layer in wanted}
    stored = load(path)
    stream = open_stream(tiny(scheme), stand_in_rows("x", TINY), stored.options(OPTIONS), deltas=stored.to("cpu"))
    assert stream.absorber.local_layers() == sorted(wanted)
    with stream.absorber.session():
        got = {layer: stream.absorber.targets[layer](x) for layer in wanted}  # type: ignore[operator]
    for layer, want in wanted.items():
        assert torch.equal(got[layer], want)
        assert not torch.equal(want, plain[layer]), "the delta must do something for this to mean anything"


def test_a_stream_with_stored_deltas_is_the_stream_with_those_in_memory(tmp_path: Path) -> None:
    model = tiny("w8a8-int8")
    absorber = absorbed(model).absorber
    stored = load(save(tmp_path / "d.safetensors", absorber.deltas))
    runs = [
        torch.cat([c.latents for c in open_stream(model, stand_in_rows("x", TINY), OPTIONS, deltas=deltas)], 1)
        for deltas in (absorber.deltas, stored.to("cpu"))
    ]
    assert torch.equal(*runs)


def test_the_header_tells_how_they_came_about(tmp_path: Path) -> None:
    absorber = absorbed(tiny("none")).absorber
    path = save_deltas_of(tmp_path / "d.safetensors", absorber, base_sha256=BASE)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["ispa_deltas"])
    assert header == load(path).header
    assert (header["mode"], header["policy"], header["recent_frames"], header["ratio"]) == ("auto", "absorb", 0, 0.5)
    assert header["layers"] == absorber.local_layers()
    assert header["ridge"] == {"absolute": 0.0, "relative": 1e-2}
    assert (header["format_version"], header["base_sha256"]) == (1, BASE)
    assert [record["score"] for record in header["records"]] == [record.score for record in absorber.records]
    assert all(record["ridge"] > 0 for record in header["records"])


def test_writing_twice_is_byte_equal_whatever_the_order(tmp_path: Path) -> None:
    deltas = planted()
    first = save(tmp_path / "a.safetensors", deltas).read_bytes()
    assert save(tmp_path / "b.safetensors", dict(sorted(deltas.items()))).read_bytes() == first
    again = load(tmp_path / "a.safetensors").deltas
    assert save(tmp_path / "c.safetensors", again).read_bytes() == first
    assert again[1].bias is None
    assert again[1].weight.dtype == torch.bfloat16


def test_infinite_figures_do_not_break_the_header(tmp_path: Path) -> None:
    record = LayerRecord(score=float("inf"))
    header = load(save(tmp_path / "a.safetensors", planted(), records=[record])).header
    assert header["records"][0]["score"] is None


def test_another_base_is_refused_with_both_names(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", planted())
    with pytest.raises(
        InputError, match=r"a\.safetensors' was fitted on base abababababab, this bundle is cdcdcdcdcdcd"
    ):
        load(path, base="cd" * 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "full"}, "deltas fitted with --policy absorb on a stream with full: pass --policy absorb"),
        ({"recent_frames": 3}, "deltas fitted with --recent-frames 0 on a stream with 3: pass --recent-frames 0"),
    ],
)
def test_options_under_which_the_fit_does_not_hold(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    stored = load(save(tmp_path / "a.safetensors", planted(), mode="side"))
    with pytest.raises(InputError, match=message):
        stored.options(StreamOptions(**options))
    assert stored.options(StreamOptions()).delta == "side"
    assert stored.options(StreamOptions(delta="fold")).delta == "fold"


def test_the_window_they_were_fitted_on_is_told_and_asked_for(tmp_path: Path) -> None:
    absorber = absorbed(tiny("none"), replace(OPTIONS, infinity=True, sink=3)).absorber
    stored = load(save_deltas_of(tmp_path / "d.safetensors", absorber, base_sha256=BASE))
    assert stored.header["stream"] == {
        "window_frames": 12, "sink_frames": 3, "rope": "window", "height": 32, "width": 32, "kv_bias": 1.0,
    }  # fmt: skip
    same = replace(TINY, rope="window", sink_frames=3)
    stored.check(same)
    for changes, message in (
        ({"rope": "absolute"}, "fitted with rope window on a stream with absolute: pass --infinity to both"),
        ({"sink_frames": 1}, "fitted with sink frames 3 on a stream with 1: pass --sink 3"),
        ({"window_frames": 9}, r"fitted with window frames 12 on a stream with 9: .*--kv-frames"),
        ({"latent_height": 8}, "fitted with height 32 on a stream with 64: pass --height 32"),
        ({"latent_width": 6}, "fitted with width 32 on a stream with 48: pass --width 32"),
    ):
        with pytest.raises(InputError, match=message):
            stored.check(replace(same, **changes))
    with pytest.raises(InputError, match=r"fitted with kv bias 1.0 on a stream with 0.3: pass --kv-bias 1.0"):
        stored.check(same, kv_bias=0.3)


def test_files_from_before_that_was_told_still_apply(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", planted())
    rewrite(path, lambda tensors, header: header.pop("stream"))
    load(path).check(replace(TINY, window_frames=9))


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["ispa_deltas"])
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, path, metadata={"ispa_deltas": json.dumps(header)})


UP, DOWN = "blocks.1.self_attn.o.delta_up", "blocks.1.self_attn.o.delta_down"
O1, O3 = "blocks.1.self_attn.o.delta_weight", "blocks.3.self_attn.o.delta_weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], object], str]] = {
    "version": (lambda t, h: h.update(format_version=9), "format_version 9: this version reads 1"),
    "field": (lambda t, h: h.pop("ridge"), r"lacks \['ridge'\]"),
    "mode": (lambda t, h: h.update(mode="magic"), "delta mode 'magic'"),
    "layer out of range": (lambda t, h: h.update(layers=[1, 4]), r"lists layers \[4\]: expected distinct .* 0 to 3"),
    "layer twice": (lambda t, h: h.update(layers=[1, 1, 3]), r"lists layers \[1, 1, 3\]"),
    "missing": (lambda t, h: t.pop(O3), r"1 tensors missing \(blocks\.3\.self_attn\.o\.delta_weight\)"),
    "unexpected": (lambda t, h: h.update(layers=[1]), r"2 unexpected \(blocks\.3\.self_attn\.o\.delta_bias, "),
    "shape": (lambda t, h: t.update({O1: torch.ones(3, 3)}), r"delta_weight is F32 \(3, 3\): expected .* \(32, 32\)"),
    "dtype": (lambda t, h: t.update({O1: torch.ones(32, 32).char()}), "delta_weight is I8"),
    "half a product": (lambda t, h: t.update({DOWN: torch.ones(4, 32)}), r"1 tensors missing \(blocks.*delta_up"),
    "factors that do not meet": (
        lambda t, h: t.update({DOWN: torch.ones(4, 32), UP: torch.ones(32, 5)} if t.pop(O1) is not None else {}),
        r"delta_up is F32 \(32, 5\): expected .* \(32, 4\)",
    ),
    "NaN": (lambda t, h: t[O3].fill_(float("nan")), r"delta_weight holds 1024 NaN or Inf"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "a.safetensors", planted())
    rewrite(path, DAMAGE[kind][0])
    with pytest.raises(InputError, match=DAMAGE[kind][1]) as caught:
        load(path)
    assert "a.safetensors" in str(caught.value)


def test_other_files_are_no_deltas(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(InputError, match="holds no deltas: expected a file written by --save-deltas"):
        load(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load(path)
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "b.safetensors")


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.safetensors", planted())
    before = path.read_bytes()

    def full(target: Path, *_: Any) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.deltas, "write_tensors", full)
    with pytest.raises(RunError, match="No space left on device"):
        save(path, planted())
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == before
    with pytest.raises(InputError, match="the stream has none"):
        save(path, {})
