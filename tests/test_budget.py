"""Predicted bytes against allocated ones: per kind, as a whole by the garbage collector's count, at real geometry."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ispa_deploy.absorb.lowrank import Rank
from ispa_deploy.absorb.stats import Statistics
from ispa_deploy.avatar.cache import AvatarCache
from ispa_deploy.avatar.model import CausalS2V
from ispa_deploy.budget import VAE_PARAMETERS, VAE_STATE, Setup, linears, parameters, predict
from ispa_deploy.cache import KVCache
from ispa_deploy.memory import held_bytes, predicted, weight_bytes
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.specs import SPECS, ModelSpec
from ispa_deploy.stream import Stream
from quant import SCHEMES, quantise_
from quant.linear import Int8Linear
from tests.living import living_bytes
from tests.tiny import SPEC, text_rows, tiny_model

WINDOW = replace(SPEC, rope="window")
EMA = replace(SPEC, rope="window", window_frames=9, sink_frames=3, ema_sink=0.999)
FIRST = replace(SPEC, first_chunk_frames=1, chunk_frames=3, window_frames=10)
DEEP = replace(SPEC, dim=64, heads=4, layers=7, latent_height=8, latent_width=10, sink_frames=3)
TOLERANCE = 0.05


def open_one(spec: ModelSpec, scheme: str, dtype: torch.dtype, **options: Any) -> Stream:
    model = tiny_model(spec).to(dtype)
    if scheme != "none":
        quantise_(model, SCHEMES[scheme])
    return open_stream(model, text_rows(spec), StreamOptions(frames=24 + spec.first_chunk_frames, **options))


KREA = replace(SPEC, window_frames=9, rope="window", reencodes=True, steps=(1000, 500, 0))
CASES: list[tuple[ModelSpec, str, torch.dtype, dict[str, Any]]] = [
    (SPEC, "none", torch.float32, {}),
    (SPEC, "w8a8-int8", torch.float32, {}),
    (SPEC, "w8a8-int8", torch.bfloat16, {"delta": "side", "ratio": 0.25}),
    (SPEC, "none", torch.bfloat16, {"preset": "paper", "delta": "side"}),
    (WINDOW, "w8a8-int8", torch.bfloat16, {"recent_frames": 3, "ratio": 1.0}),
    (WINDOW, "none", torch.bfloat16, {"policy": "full"}),
    (EMA, "none", torch.bfloat16, {}),
    (EMA, "w8a8-int8", torch.bfloat16, {"policy": "window", "window": 9}),
    (EMA, "none", torch.float32, {"kv_dtype": "int8"}),
    (SPEC, "w8a8-int8", torch.bfloat16, {"kv_dtype": "int8", "recent_frames": 3}),
    (SPEC, "none", torch.bfloat16, {"kv_dtype": "int8", "attention_dtype": "int8", "recent_frames": 3}),
    (EMA, "none", torch.bfloat16, {"kv_dtype": "int8", "attention_dtype": "int8"}),
    (FIRST, "none", torch.bfloat16, {"warmup": 10, "delta": "fold"}),
    (KREA, "w8a8-int8", torch.bfloat16, {}),
    (KREA, "none", torch.bfloat16, {"kv_frames": 3, "height": 64, "ratio": 1.0}),
    (FIRST, "none", torch.bfloat16, {"warmup": 10, "policy": "no-sink", "ratio": 0.5}),
    (DEEP, "w8a8-int8", torch.bfloat16, {"policy": "sink-local", "ranking": "random"}),
    (SPEC, "none", torch.bfloat16, {"kv_dtype": "int8", "delta": "side", "delta_rank": Rank(count=5)}),
    (WINDOW, "w8a8-int8", torch.bfloat16, {"kv_dtype": "fp8", "recent_frames": 3, "delta_rank": Rank(count=7)}),
    (EMA, "none", torch.float32, {"kv_dtype": "int8"}),
    (DEEP, "w8a8-int8", torch.float32, {"layers": (1, 5), "stats_double": True}),
]


@pytest.mark.parametrize(("spec", "scheme", "dtype", "options"), CASES)
def test_every_kind_is_what_the_stream_allocates(
    spec: ModelSpec, scheme: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    stream = open_one(spec, scheme, dtype, **options)
    budget = predicted(stream)
    held, noise = [], stream.noise

    def watched(*which: int) -> torch.Tensor:
        held.append(held_bytes(stream))  # within the chunk: the last one of the warm-up still has all of it
        return noise(*which)

    stream.noise = watched
    held += [held_bytes(stream) for _ in stream][-1:]
    most = {name: max(chunk[name] for chunk in held) for name in held[0]}
    last = held[-1]
    assert most["weights"] == budget.weights
    assert most["text_kv"] == budget.text_kv
    assert most["kv"] == budget.kv_full
    assert last["kv"] == budget.kv
    assert last["wide_sink"] == budget.wide_sink
    assert most["wide_sink"] == max(budget.wide_sink_full, budget.wide_sink)
    assert most["statistics"] == pytest.approx(budget.statistics, rel=TOLERANCE)
    assert last["statistics"] == 0
    assert last["deltas"] == budget.deltas
    assert most["kv_scratch"] == pytest.approx(budget.kv_scratch, rel=TOLERANCE)


@pytest.mark.filterwarnings("ignore")  # of objects that the collector shows and nobody asked for
def test_the_sum_is_what_the_process_holds() -> None:
    """Independent of our own counting. Wide enough that tables of time and rotation do not matter."""
    spec = replace(SPEC, dim=384, ffn_dim=768, heads=4, layers=3, latent_height=12, latent_width=12, text_dim=64)
    before = living_bytes()
    stream = open_one(spec, "none", torch.bfloat16, delta="fold", ratio=1.0)
    budget = predicted(stream)
    held = []
    for _ in stream:
        for record in stream.absorber.records:
            record.solution = None  # kept for the report and the tests
        held.append(living_bytes() - before)
    assert held[1] == pytest.approx(budget.warmup - budget.activations - budget.kv_scratch, rel=TOLERANCE)
    assert held[-1] == pytest.approx(budget.steady - budget.activations, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "numbers", "cache_gib"),
    [
        ("longlive-1.3b", 1_418_996_800, 3.21),
        ("self-forcing-1.3b", 1_418_996_800, 5.62),
        ("reward-forcing-1.3b", 1_418_996_800, 2.41),
        ("krea-14b", 14_288_491_584, 7.14),
    ],
)
def test_published_geometry(name: str, numbers: int, cache_gib: float) -> None:
    """Against upstream's own counts, and against real tensors without memory."""
    spec = SPECS[name]
    assert parameters(spec) == numbers
    with torch.device("meta"):
        model = CausalWanDiT(spec).to(torch.bfloat16)
    floating, eight = predict(spec, Setup(scheme="none")), predict(spec)
    assert weight_bytes(model) == floating.weights == 2 * numbers
    shapes = {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert shapes == linears(spec)
    cache = KVCache(spec, dtype=torch.bfloat16, device="meta")
    assert cache.persistent_bytes() == floating.kv_full
    assert floating.kv_full / 2**30 == pytest.approx(cache_gib, abs=0.005)
    for layer in range(spec.layers // 2):
        cache.localise(layer, 1, 0)
    assert cache.persistent_bytes() == floating.kv
    one = Statistics(torch.empty(spec.dim, spec.dim, device="meta"))
    assert floating.statistics == pytest.approx(spec.layers * 2 * one.nbytes())
    quantised = {name for name in shapes if name.startswith("blocks.")}
    rest = [p for n, p in model.named_parameters() if n.rpartition(".")[0] not in quantised]
    layers = sum(Int8Linear(k, n, device="meta").nbytes for n, k in (shapes[name] for name in quantised))
    assert eight.weights == layers + sum(p.nbytes for p in rest)
    host = predict(spec, Setup(stats_device="cpu"))
    assert (host.statistics, host.host_statistics) == (0, eight.statistics)


def test_published_geometry_of_speech_to_video() -> None:
    """Upstream's count of numbers; bytes against the network and its cache on the meta device."""
    spec = SPECS["liveavatar-14b"]
    assert parameters(spec) == 16_295_755_609
    with torch.device("meta"):
        model = CausalS2V(spec).to(torch.bfloat16)
    shapes = {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert shapes == linears(spec)
    floating, eight = predict(spec, Setup(scheme="none")), predict(spec)
    assert weight_bytes(model) == floating.weights
    layers = {name: shape for name, shape in shapes.items() if name.startswith("blocks.")}
    rest = [p for n, p in model.named_parameters() if n.rpartition(".")[0] not in layers]
    assert eight.weights == sum(Int8Linear(k, n, device="meta").nbytes for n, k in layers.values()) + sum(
        p.nbytes for p in rest
    )
    cache = AvatarCache(spec, dtype=torch.bfloat16, device="meta")
    assert cache.persistent_bytes() == floating.kv_full
    rings, condition = 4 * 12 * 1056 * 40 * 5120 * 4, 2640 * 40 * 5120 * 4
    assert floating.kv_full == rings + condition
    assert rings / 1e9 == pytest.approx(41.5, abs=0.05), "four steps at 704x384"
    assert floating.kv == rings / 2 + condition, "half of the layers keep the condition alone"
    for layer in range(spec.layers // 2):
        cache.localise(layer, 1, 0)
    assert cache.persistent_bytes() == floating.kv


def test_the_vae_beside_it(rng: torch.Generator) -> None:
    """Its published width, at a size that decodes in a second."""
    diffusers = pytest.importorskip("diffusers")
    from ispa_deploy.media.vae import StreamingDecoder

    with torch.device("meta"):
        assert sum(p.numel() for p in diffusers.AutoencoderKLWan().parameters()) == VAE_PARAMETERS
    model = diffusers.AutoencoderKLWan(base_dim=8, z_dim=16).eval()
    decoder = StreamingDecoder(model)
    decoder(torch.randn(1, 3, 16, 2, 3, generator=rng))
    per_pixel = decoder.nbytes / 4 / 6
    assert (per_pixel - 32) * 12 + 32 == VAE_STATE, "all of it but what conv_in remembers grows with the width"
    spec = SPECS["longlive-1.3b"]
    assert predict(spec, Setup(vae=True)).decoder / 2**30 == pytest.approx(1.76 + 0.236, abs=0.005)
    assert predict(spec, Setup(vae=True, offload=True)).decoder == 0


def test_a_report_holds_both_and_needs_no_torch_to_predict() -> None:
    code = "import ispa_deploy.budget as b, sys; b.predict(b.ModelSpec(**%r)); print('torch' in sys.modules)"
    fields = {"name": "x", "dim": 48, "ffn_dim": 64, "heads": 2, "layers": 4}
    done = subprocess.run(
        [sys.executable, "-c", code % fields], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
