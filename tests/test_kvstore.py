"""Keys and values in 8 bits: the codes against a table of what they can say, streams against a rounded reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ispa_deploy.cache import KVCache
from ispa_deploy.errors import InputError
from ispa_deploy.kvstore import FLOAT8, PEAKS, WATCHED, Coder, coders, decode
from ispa_deploy.specs import ModelSpec
from tests.reference import NaiveMemory
from tests.tiny import SPEC, latents_of, text_rows, tiny_model, tiny_stream

FORMS = list(PEAKS)
# Every number a code can stand for, by the definition of the form.
SAYABLE = {
    "int8": torch.arange(-127.0, 128.0).double(),
    "fp8": torch.tensor(
        sorted(
            sign * (mantissa / 8 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 7)
            for sign in (-1, 1) for exponent in range(16) for mantissa in range(8) if (exponent, mantissa) != (15, 7)
        )
    ).double(),
}  # fmt: skip
PEAK = {"int8": 127, "fp8": 448}
BOUND = {"int8": 0.012, "fp8": 0.03}  # relative L2 error of normal numbers


def rounded(x: Tensor, form: str) -> Tensor:
    """x (..., D) as 8 bits give it back: the nearest sayable number of each, in float64."""
    amax = x.abs().amax(-1, keepdim=True).float()
    scale = (amax / PEAK[form]).clamp_min(2.0**-16).half().double()
    table = SAYABLE[form]
    index = torch.searchsorted((table[1:] + table[:-1]) / 2, (x.double() / scale).contiguous())
    return table[index] * scale


def coder(form: str) -> Coder:
    return Coder(*PEAKS[form], torch.device("cpu"))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_goes_to_the_nearest_that_can_be_said(form: str, dtype: torch.dtype) -> None:
    x = (torch.randn(2, 30, 3, 16) * torch.logspace(-2, 4, 30)[:, None, None]).to(dtype)
    codes, scale = coder(form).encode(x)
    assert (codes.dtype.itemsize, scale.dtype, scale.shape) == (1, torch.float16, (2, 30, 3, 1))
    got, want = decode(codes, scale).double(), rounded(x, form)
    # The division in float32 may settle a tie the other way: no further from x, to its precision.
    assert torch.all((got - x).abs() <= (want - x).abs() + 1e-6 * x.abs().amax(-1, keepdim=True))
    assert relative(got, x) < BOUND[form]


def test_all_codes_of_e4m3_are_widened_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FLOAT8)
    want = codes.float()
    got = decode(codes, torch.ones(1, dtype=torch.float16))
    assert torch.equal(got[want.isfinite()], want[want.isfinite()])
    assert int(want.isfinite().sum()) == 254


@pytest.mark.parametrize("form", FORMS)
def test_special_values(form: str) -> None:
    x = torch.randn(1, 8, 2, 16)
    clean = decode(*coder(form).encode(x))
    x[0, 1] = 0.0
    x[0, 2, 0, 3], x[0, 3, 1, 5], x[0, 4, 0, 0] = torch.nan, -torch.inf, 1e9
    x[0, 5, 0, 7] = 1e4
    got = decode(*coder(form).encode(x))
    assert not got[0, 1].any()
    for token, head in ((2, 0), (3, 1), (4, 0)):
        assert not got[0, token, head].isfinite().any()
        assert torch.equal(got[0, token, 1 - head], clean[0, token, 1 - head])
    assert got[0, 5, 0, 7] == pytest.approx(1e4, rel=1e-3)
    for token in (0, 6, 7):
        assert torch.equal(got[0, token], clean[0, token])


@pytest.mark.parametrize("form", FORMS)
def test_the_error_told_is_the_error_made(form: str) -> None:
    made, lost, power = coder(form), 0.0, 0.0
    assert made.error() is None
    for _ in range(3):
        x = torch.randn(1, 40, 2, 16)
        got = decode(*made.encode(x))
        lost += float((got - x)[:, ::WATCHED].square().sum())
        power += float(x[:, ::WATCHED].square().sum())
    assert made.error() == pytest.approx((lost / power) ** 0.5, rel=1e-5)


def test_an_unknown_form_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"KV dtype 'int4'.*auto, fp8, int8"):
        coders("int4", torch.device("cpu"))


# -- in a cache


class _Rounded(NaiveMemory):
    """The naive memory, its past as 8 bits would give it back: rotated keys where those are cached."""

    def __init__(self, spec: ModelSpec, form: str):
        super().__init__(spec)
        self.form = form

    def begin(self, start: int, count: int) -> None:
        if self.spec.rope == "window":
            for held in self.held:
                for frame in self.current:
                    k, v = held[frame]
                    held[frame] = rounded(k, self.form), rounded(v, self.form)
        super().begin(start, count)

    def _turn(self, x: Tensor, frame: int) -> Tensor:
        if frame in self.current:
            return super()._turn(x, frame)
        if self.spec.rope == "window":
            return super()._turn(rounded(x, self.form), frame)
        return rounded(super()._turn(x, frame), self.form)

    def _over(self, layer: int, q: Tensor, seen: list[int]) -> Tensor:
        held = self.held[layer]
        exact = {frame: held[frame] for frame in seen}
        held.update({f: (k, rounded(v, self.form)) for f, (k, v) in exact.items() if f not in self.current})
        out = super()._over(layer, q, seen)
        held.update(exact)
        return out


SPECS = {
    "absolute": SPEC,
    "window": replace(SPEC, rope="window"),
    "window-short": replace(SPEC, rope="window", window_frames=9, sink_frames=3),
    "ema": replace(SPEC, rope="window", window_frames=9, sink_frames=3, ema_sink=0.75),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recent", [0, 3])
@pytest.mark.parametrize("name", SPECS)
@torch.inference_mode()
def test_a_stream_is_attention_over_a_rounded_past(name: str, recent: int, form: str) -> None:
    """Full windows, an observer, local layers: the current chunk is seen as it came, all else rounded once."""
    spec = SPECS[name]
    model, text = tiny_model(spec), tiny_model(spec).encode_text(text_rows(spec))
    cache = KVCache(spec, recent=recent, kv_dtype=form)
    memories = cache, _Rounded(spec, form), NaiveMemory(spec)
    apart = []
    for start in range(0, 24, 3):
        cache.observer = (lambda *_: None) if start % 2 else None
        for memory in memories:
            memory.begin(start, 3)
        for t, committing in ((700.0, False), (0.0, True)):
            cache.committing = committing
            x, condition = torch.randn(1, 3, *SPEC.latent_shape), model.condition(torch.tensor([[t]]))
            got, want, exact = (model(x, condition, text, memory) for memory in memories)
            if start:
                apart.append((relative(got, want), relative(got, exact)))
        if start == 12:
            for memory in memories[1:]:
                memory.localise(1, recent)
            cache.localise(1, 1, recent)
    worst, typical = max(a for a, _ in apart), sum(b for _, b in apart) / len(apart)
    assert worst < 0.2 * typical


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_codes_are_moved_and_never_coded_again(form: str) -> None:
    model, cache = tiny_model(), KVCache(SPEC, kv_dtype=form, recent=3)
    text, seen = model.encode_text(text_rows()), {}
    cache.committing = True
    for start in range(0, 30, 3):
        cache.begin(start, 3)
        model(torch.randn(1, 3, *SPEC.latent_shape), model.condition(torch.zeros(1, 1)), text, cache)
        if start == 15:
            cache.localise(2, 1, 3)
        if start == 18:
            cache.globalise(2)
        frames, k, v = cache.temporal(2)
        for index, frame in enumerate(frames):
            first = seen.setdefault(frame, (k[:, index], v[:, index]))
            assert torch.equal(k[:, index], first[0])
            assert torch.equal(v[:, index], first[1])
    assert sorted(seen) == list(range(30))


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_a_past_computed_anew_is_coded_anew(form: str) -> None:
    model, text = tiny_model(), tiny_model().encode_text(text_rows())
    caches = KVCache(SPEC, kv_dtype=form), KVCache(SPEC)
    latents = torch.randn(1, 12, *SPEC.latent_shape)
    for cache in caches:
        for start in range(0, 12, 3):
            cache.begin(start, 3)
            cache.committing = True
            model(latents[:, start : start + 3] * 0.5, model.condition(torch.zeros(1, 1)), text, cache)
        with cache.again(0, 12):
            model(latents, model.condition(torch.zeros(1, 1)), text, cache)
    (frames, k, v), (same, exact_k, exact_v) = (cache.temporal(0) for cache in caches)
    assert frames == same == list(range(12))
    for got, exact in ((k, exact_k), (v, exact_v)):
        assert relative(got, rounded(exact, form)) < 1e-3
        assert relative(got, exact) < BOUND[form]


@pytest.mark.parametrize("form", FORMS)
def test_bytes_at_head_width_128(form: str) -> None:
    """No more than 0.54 of bfloat16, local layers included; what is transient fits in one layer and does not grow."""
    spec = replace(SPEC, dim=256, heads=2, ffn_dim=64)
    model = tiny_model(spec).bfloat16()
    made = {name: tiny_stream(model, frames=27, kv_dtype=name) for name in ("auto", form)}
    for stream in made.values():
        scratch = []
        for _ in stream:
            if stream.absorber.state == "absorbed":
                scratch.append(stream.cache.scratch_bytes())
        assert len(set(scratch[1:])) == 1
    plain, coded = (stream.cache for stream in made.values())
    assert coded.persistent_bytes() == plain.persistent_bytes() * (128 + 2) // 256 <= 0.54 * plain.persistent_bytes()
    assert coded.full_bytes() == plain.full_bytes()
    assert 0 < coded.scratch_bytes() <= coded.full_bytes() / spec.layers
    assert plain.errors() == {}
    assert all(0 < (error or 0) < BOUND[form] for error in coded.errors().values())


@pytest.mark.parametrize("form", FORMS)
def test_absorption_composes_with_eight_bits(form: str) -> None:
    """The same layers become local, and the stream stays near the one whose cache is exact."""
    runs = {name: tiny_stream(tiny_model(), frames=18, kv_dtype=name, layers=(1, 2)) for name in ("auto", form)}
    exact, coded = (latents_of(stream) for stream in runs.values())
    assert torch.equal(exact[:, :3], coded[:, :3])
    assert relative(coded[:, 3:6], exact[:, 3:6]) < 3 * BOUND[form]
    for stream in runs.values():
        assert stream.absorber.local_layers() == [1, 2]
