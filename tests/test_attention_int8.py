"""Attention over 8-bit keys and values: the kernels against float64, streams against the cache that decodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ispa_deploy import attention_int8
from ispa_deploy.attention import Attended, merge
from ispa_deploy.attention_int8 import SIMULATED, Coded, CodedAttention, Kernel, kernels, plain, probe
from ispa_deploy.cache import KVCache
from ispa_deploy.errors import InputError, RunError
from ispa_deploy.kvstore import PEAKS, Coder
from ispa_deploy.specs import ModelSpec
from tests.reference import attention
from tests.tiny import SPEC, latents_of, text_rows, tiny_model, tiny_stream

CPU = torch.device("cpu")
NATIVE = [name for name in kernels() if name.startswith("cpu-")]
ROUNDED = {"cpu-avx512-vnni": (255, 128), "cpu-avx2": (32767, 256)}
"""The largest weight of a block of keys as an integer, and the keys of a block; others round no weight."""
# Relative L2 error of the output against the definition in float64, by the dtype it is rounded to.
BOUND = {torch.float32: 1e-3, torch.bfloat16: 4e-3}
WEIGHTS = {"cpu-avx512-vnni": 0.011}  # what integers for weights cost beside that, here
EXACT = 0.03  # against attention over what was coded: normal queries, keys and values


def kernel(name: str, dtype: torch.dtype = torch.float32, width: int = 64) -> Kernel:
    if (why := probe(name, CPU, dtype, width)) is not None:
        pytest.skip(why)
    return attention_int8._KERNELS[name]


def coded(x: Tensor) -> Coded:
    return Coded(*Coder(*PEAKS["int8"], CPU).encode(x))


def decoded(x: Coded) -> Tensor:
    return x.codes.double() * x.scale.double()


def part(x: Coded, a: int, b: int | None = None) -> Coded:
    return Coded(x.codes[:, a:b], x.scale[:, a:b])


def defined(q: Tensor, keys: Coded, values: Coded, name: str = SIMULATED) -> tuple[Tensor, Tensor]:
    """In float64: each query rounded to 127 steps on either side of 0, weights as the kernel rounds them."""
    step = (q.float().abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    rounded = (q.float() / step).round().double() * step
    scores = torch.einsum("bqhd,bkhd->bqhk", rounded, decoded(keys)) * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    if name in ROUNDED:
        top, block = ROUNDED[name]
        size = values.scale.double().transpose(1, 3)  # (B, 1, H, K)
        units = [part.amax(-1, keepdim=True).expand_as(part) / top for part in (weights * size).split(block, -1)]
        unit = torch.cat(units, -1)
        weights = (weights * size / unit).round() * unit / size
    return torch.einsum("bqhk,bkhd->bqhd", weights, decoded(values)), lse


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def inputs(dtype: torch.dtype, width: int, keys: int = 331, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that are a view, as those of a model with one product for q, k and v; keys that peak."""
    q = torch.randn(batch, 85, 3 * 3, width).to(dtype)[:, :, 3:6]
    return q, 2 * torch.randn(batch, keys, 3, width), torch.randn(batch, keys, 3, width)


@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("name", [*NATIVE, SIMULATED])
def test_a_kernel_is_its_definition(name: str, dtype: torch.dtype, width: int) -> None:
    run = kernel(name, dtype, width)
    q, k, v = inputs(dtype, width)
    keys, values = coded(k), coded(v)
    for first, last in ((0, None), (5, 6), (7, 71), (40, 300)):
        some = part(keys, first, last), part(values, first, last)
        got, (out, lse) = run(q, *some, None), defined(q, *some, name)
        assert (got.out.dtype, got.lse.dtype, got.out.shape) == (dtype, torch.float32, q.shape)
        assert relative(got.out, out) < BOUND[dtype]
        assert float((got.lse - lse).abs().max()) < 1e-4
        assert relative(got.out, defined(q, *some)[0]) < BOUND[dtype] + WEIGHTS.get(name, 0)
    whole = run(q, keys, values, None)
    exact, exact_lse = attention(q, k, v)
    assert relative(whole.out, exact) < EXACT
    assert float((whole.lse - exact_lse).abs().max()) < 0.1


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("name", [*NATIVE, SIMULATED])
def test_going_on_from_other_keys_is_their_union(name: str, dtype: torch.dtype) -> None:
    run = kernel(name, dtype)
    q, k, v = inputs(dtype, 64)
    keys, values = coded(k), coded(v)
    _, want_lse = defined(q, keys, values)
    for cut in (1, 100, 330):
        for a, b in (((0, cut), (cut, None)), ((cut, None), (0, cut))):
            before = run(q, part(keys, *a), part(values, *a), None)
            got = run(q, part(keys, *b), part(values, *b), before)
            want, _ = merge(*(Attended(*defined(q, part(keys, *x), part(values, *x), name)) for x in (a, b)))
            assert relative(got.out, want) < 2 * BOUND[dtype]
            assert float((got.lse - want_lse).abs().max()) < 1e-4
    nothing = Attended(torch.zeros(q.shape, dtype=dtype), torch.full(q.shape[:3], -torch.inf))
    got, alone = run(q, keys, values, nothing), run(q, keys, values, None)
    torch.testing.assert_close(got.out, alone.out, rtol=1e-5, atol=1e-6)


def test_the_definition_in_float64() -> None:
    q, k, v = inputs(torch.float64, 16)
    keys, values = coded(k), coded(v)
    step = q.abs().amax(-1, keepdim=True) / 127
    want, want_lse = attention((q / step).round() * step, decoded(keys), decoded(values))
    got = plain(q, keys, values, None)
    assert relative(got.out, want) < 1e-12
    assert float((got.lse - want_lse).abs().max()) < 1e-12


@pytest.mark.parametrize("name", [*NATIVE, SIMULATED])
def test_special_values(name: str) -> None:
    """Zeros count as such; what is not finite spoils what it touches, and nothing else."""
    run = kernel(name)
    q, k, v = inputs(torch.float32, 64, batch=1)
    clean = run(q, coded(k), coded(v), None)
    mean = defined(torch.zeros_like(q[:, :1]), coded(k), coded(v), name)[0][0, 0].float()
    q = q.clone()
    q[0, 3], q[0, 4, 0, 5], q[0, 5, 1, 0], q[0, 6, 2] = 0, torch.nan, torch.inf, 1e-38
    got = run(q, coded(k), coded(v), None)
    for row in (3, 6):
        torch.testing.assert_close(got.out[0, row, 2], mean[2], rtol=1e-3, atol=1e-4)
    assert not got.out[0, 4, 0].isfinite().any()
    assert not got.out[0, 5, 1].isfinite().any()
    assert torch.equal(got.out[0, 4, 1:], clean.out[0, 4, 1:])
    assert torch.equal(got.out[:, 7:], clean.out[:, 7:])
    k[0, 50, 1, 3], v[0, 60, 2, 4] = torch.nan, torch.inf
    got = run(q[:, 7:], coded(k), coded(v), None)
    assert torch.equal(got.out[:, :, 0], clean.out[:, 7:, 0])
    assert not got.out[:, :, 1:].isfinite().any()
    assert got.lse[:, :, 2].isfinite().all()
    zero = coded(torch.zeros_like(v))
    assert not run(q[:, 7:], zero, zero, None).out.any()


@pytest.mark.parametrize("name", NATIVE)
def test_one_key_above_all_others_and_loud_values(name: str) -> None:
    run = kernel(name)
    q, k, v = inputs(torch.float32, 64, keys=700)
    k[:, 650] = 30 * q[:, 0]
    v[:, ::50] *= 40
    keys, values = coded(k), coded(v)
    got, (out, lse) = run(q, keys, values, None), defined(q, keys, values, name)
    assert relative(got.out, out) < BOUND[torch.float32]
    assert float((got.lse - lse).abs().max()) < 1e-3
    assert relative(got.out, defined(q, keys, values)[0]) < BOUND[torch.float32] + WEIGHTS.get(name, 0)


# -- in a cache


def _exact_queries(q: Tensor) -> tuple[Tensor, Tensor]:
    return q, torch.ones_like(q[..., :1])


SPECS = {
    "absolute": SPEC,
    "sinkless": replace(SPEC, sink_frames=0),
    "recaching": replace(SPEC, recaches=True),
    "window": replace(SPEC, rope="window"),
    "ema": replace(SPEC, rope="window", window_frames=9, sink_frames=3, ema_sink=0.75),
    "krea": replace(SPEC, rope="window", window_frames=6, reencodes=True, steps=(1000, 0)),
}
AGAIN = 0.01  # keys that are rotated on every read are coded a second time


@pytest.mark.parametrize(
    ("name", "recent"), [("absolute", 3), ("sinkless", 0), ("recaching", 0), ("window", 0), ("ema", 3), ("krea", 0)]
)
def test_a_stream_is_the_one_that_decodes(monkeypatch: pytest.MonkeyPatch, name: str, recent: int) -> None:
    """Warm-up, transition, a prompt switch and a second warm-up; queries are not rounded here, so nothing differs."""
    monkeypatch.setattr(attention_int8, "quantise_queries", _exact_queries)
    spec = SPECS[name]
    common: dict[str, Any] = {"frames": 27, "recent_frames": recent, "kv_dtype": "int8", "warmup": 9, "layers": (1, 2)}
    switches = [(15, text_rows(spec, seed=2))]
    want = tiny_stream(tiny_model(spec), switches=switches, **common)
    got = tiny_stream(tiny_model(spec), switches=switches, attention_dtype="int8", **common)
    chunks = list(zip(want, got, strict=True))
    assert got.cache.coded_attention is not None
    assert got.cache.coded_attention.calls > 100
    if spec.rotates_on_read:  # streams part after a while: the first chunk that sees a coded past
        assert relative(chunks[1][1].latents, chunks[1][0].latents) < AGAIN
    else:
        assert max(relative(b.latents, a.latents) for a, b in chunks) < 1e-3
    assert got.absorber.local_layers() == want.absorber.local_layers() == [1, 2]
    assert got.cache.errors().keys() == want.cache.errors().keys()


def _wide(**changes: Any) -> ModelSpec:
    return replace(SPEC, dim=64, ffn_dim=64, **changes)  # heads of 32, the least that a kernel takes


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
def test_rounding_queries_costs_as_much_as_rounding_keys(dtype: torch.dtype) -> None:
    """Of the first chunk that sees a coded past, whichever kernel runs."""
    model = tiny_model(_wide()).to(dtype)
    runs = {
        (kv, attended): latents_of(tiny_stream(model, frames=6, kv_dtype=kv, attention_dtype=attended))[:, 3:]
        for kv, attended in (("auto", "auto"), ("int8", "auto"), ("int8", "int8"))
    }
    exact, decodes, coded_too = runs.values()
    assert 0 < relative(coded_too, exact) < 2 * relative(decodes, exact) + 2 * torch.finfo(dtype).eps


def test_scratch_holds_no_window() -> None:
    for spec in (_wide(), _wide(rope="window")):
        made = [
            tiny_stream(tiny_model(spec), frames=12, policy="full", kv_dtype="int8", attention_dtype=name)
            for name in ("auto", "int8")
        ]
        for stream in made:
            latents_of(stream)
        decodes, reads = (stream.cache for stream in made)
        assert reads.persistent_bytes() == decodes.persistent_bytes()
        tokens = spec.window_frames * spec.frame_tokens
        assert reads.scratch_bytes() == (tokens * (spec.dim + 2 * spec.heads) if spec.rotates_on_read else 0)
        assert decodes.scratch_bytes() == 2 * 4 * tokens * spec.dim


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attention_dtype": "int8"}, r"--attention-dtype int8 with --kv-dtype auto: expected --kv-dtype int8"),
        ({"attention_dtype": "int8", "kv_dtype": "fp8"}, r"with --kv-dtype fp8: expected --kv-dtype int8"),
        ({"attention_dtype": "int4"}, r"unknown attention dtype 'int4'.*auto, int8"),
    ],
)
def test_what_cannot_be_served_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        tiny_stream(tiny_model(), **options)


def test_a_weighed_past_is_refused() -> None:
    with pytest.raises(InputError, match="--attention-dtype int8 with --kv-bias"):
        KVCache(SPEC, kv_dtype="int8", attention_dtype="int8", past_bias=0.5)


def test_simulated_arithmetic_is_an_error_unless_allowed() -> None:
    odd = CodedAttention(CPU, torch.float32, 24)
    assert odd.report() == {"dtype": "int8", "kernel": SIMULATED, "calls": 0}
    with pytest.raises(RunError, match=r"no kernel runs on cpu .* heads of 24 .*--attention-dtype"):
        odd.assert_will_run()
    assert odd.complaints()[0].startswith("8-bit attention never ran"), "nothing is said to have run before it did"
    read(odd)
    with pytest.raises(RunError, match=r"8-bit attention was simulated: .* heads of 24 .*--attention-dtype"):
        odd.assert_ran()
    assert odd.assert_ran(allow_fallback=True) == odd.complaints()
    if any(probe(name, CPU, torch.float32, 64) is None for name in NATIVE):
        even = CodedAttention(CPU, torch.float32, 64)
        even.assert_will_run()
        with pytest.raises(RunError, match="8-bit attention never ran"):
            even.assert_ran()
        read(even)
        assert even.assert_ran() == []


def read(attention: CodedAttention) -> None:
    """One call, with heads of the width it was made for."""
    width = 24 if attention.kernel == SIMULATED else 64
    codes = torch.ones(1, 5, 2, width, dtype=torch.int8)
    coded = Coded(codes, torch.ones(1, 5, 2, 1).half())
    attention(torch.randn(1, 3, 2, width), coded, coded, None)
