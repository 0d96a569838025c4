"""On a CUDA device: kernels against the float64 reference, and the GPU's stream against the CPU's."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from ispa_deploy.attention import attend, backends, merge, works
from ispa_deploy.cache import KVCache
from ispa_deploy.graphs import PassGraphs
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.profile.compare import Configuration, compare
from ispa_deploy.profile.geometries import GEOMETRIES, random_model
from quant import SCHEMES, quantise_
from quant.linear import Int8Linear
from tests.tiny import SPEC, latents_of, tiny_model, tiny_stream
from tests.tiny_avatar import avatar_model, scene

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", [name for name in backends() if name not in ("reference", "cpu-flash")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_backends_agree_with_the_reference(name: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    """Whole and split keys; sizes that are no multiple of a tile, and a strided view as the cache hands out."""
    if not works(name, CUDA, dtype, 128):
        pytest.skip(f"{name} does not run here with {dtype}")
    q = torch.randn(1, 333, 12, 128, generator=rng).to(CUDA, dtype)
    buffer = torch.randn(2, 1, 900, 12, 128, generator=rng).to(CUDA, dtype)
    k, v = buffer[:, :, 17:800]
    want = attend(q, k, v, backend="reference")
    whole = attend(q, k, v, backend=name)
    split = merge(attend(q, k[:, :100], v[:, :100], backend=name), attend(q, k[:, 100:], v[:, 100:], backend=name))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for got in (whole, split):
        assert torch.allclose(got.out.float(), want.out.float(), atol=tolerance)
        assert torch.allclose(got.lse, want.lse, atol=tolerance)


@pytest.mark.parametrize(("policy", "tolerance"), [("full", 1e-3), ("absorb", 1e-2)])
def test_the_demo_geometry_streams_as_on_the_cpu(policy: str, tolerance: float) -> None:
    """Same noise on both. The ridge solve amplifies rounding; layers are given, since rounding can flip a ranking."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = random_model(GEOMETRIES["demo"])
    text = torch.randn(1, model.spec.text_len, model.spec.text_dim)
    options = StreamOptions(frames=15, policy=policy, layers=(1, 3, 5, 7, 9))

    def latents(device: str) -> torch.Tensor:
        stream = open_stream(copy.deepcopy(model).to(device), text, options)
        stream.sampler = replace(stream.sampler, first=None)
        return torch.cat([chunk.latents.cpu() for chunk in stream], 1)

    here, there = latents("cpu"), latents("cuda")
    assert (here - there).norm() <= tolerance * here.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_linear_agrees_with_integer_arithmetic(dtype: torch.dtype, rng: torch.Generator) -> None:
    from ispa_deploy.linear import Linear

    linear = Linear(1536, 8960)
    layer = Int8Linear.from_float(linear)
    x = torch.randn(1560, 1536, generator=rng).to(dtype)
    scale = x.double().abs().amax(1, keepdim=True) / 127
    codes = (x.double() / scale).round()
    weight = layer.reference_weight().double()
    want = codes * scale @ weight.t() + linear.bias.detach().double()
    layer.to(CUDA)
    got = layer(x.to(CUDA)).double().cpu()
    assert layer.exact
    assert (got - want).norm() <= 5e-3 * want.norm()


@pytest.mark.parametrize(("rows", "features", "outputs"), [(1560, 1536, 8960), (1560, 8960, 1536), (5, 1032, 520)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3e-3), (torch.float32, 1e-4)])
def test_a_widened_int8_linear_agrees_with_float64(
    dtype: torch.dtype, bound: float, rows: int, features: int, outputs: int, rng: torch.Generator
) -> None:
    """Row by row against the layer's own weight; a row of NaN stays alone; 8 bits, which err more, come back."""
    layer = Int8Linear.from_float(torch.nn.Linear(features, outputs)).to(CUDA)
    x = (torch.randn(rows, features, generator=rng) * torch.logspace(-2, 2, rows)[:, None]).to(CUDA, dtype)
    x[3, 7] = torch.nan
    want = x.double() @ layer.reference_weight().double().t() + layer.bias.double()
    narrow = layer(x)
    assert layer.exact
    assert layer.set_wide(True)
    y = layer(x)
    assert (y.dtype, layer.calls, layer.wide_calls) == (dtype, 2, 1)
    assert y[3].isnan().all()
    fine = torch.arange(rows, device=CUDA) != 3
    off = [float(((got.double() - want)[fine].norm(dim=1) / want[fine].norm(dim=1)).max()) for got in (y, narrow)]
    assert off[0] <= bound < off[1]
    layer.set_wide(False)
    torch.testing.assert_close(layer(x), narrow, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("options", [{"policy": "full"}, {}, {"delta": "side"}], ids=str)
def test_the_last_pass_has_its_16_bits_in_a_cuda_graph(options: dict[str, Any]) -> None:
    """Replayed passes give the eager bits, and those differ from a stream's whose activations all have 8."""
    model = tiny_model(replace(SPEC, dim=128)).to(CUDA, torch.bfloat16)
    quantise_(model, SCHEMES["w8a8-int8"])
    own = model.layers()[-1].self_attn.modules()  # those of the text run once for each prompt
    last = [layer for layer in own if isinstance(layer, Int8Linear)]
    assert last
    want = latents_of(tiny_stream(model, frames=60, **options))
    assert all(0 < layer.wide_calls < layer.calls for layer in last)
    stream = tiny_stream(model, frames=60, **options)
    stream.graphs = PassGraphs.on(stream.cache)
    assert len(stream.fine) >= len(last)
    assert torch.equal(latents_of(stream), want)
    assert not stream.graphs.failure
    assert stream.graphs.replayed > stream.graphs.recorded > 0
    assert not any(layer.wide for layer in last)
    assert not torch.equal(latents_of(tiny_stream(model, frames=60, last_pass_bits=8, **options)), want)


def test_a_layer_of_the_1_3b_geometry(rng: torch.Generator) -> None:
    """One layer, one pass at 480x832 in bfloat16 against float32."""
    spec = replace(GEOMETRIES["longlive-1.3b"], layers=1)
    model = random_model(spec, torch.bfloat16, "cuda")
    wide = copy.deepcopy(model).float()
    x = torch.randn(1, 3, *spec.latent_shape, generator=rng).to(CUDA)
    rows = torch.randn(1, spec.text_len, spec.text_dim, generator=rng).to(CUDA)

    def velocity(which: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
        cache = KVCache(spec, dtype=dtype, device="cuda")
        cache.begin(0, 3)
        condition = which.condition(torch.full((1, 1), 750.0, device=CUDA))
        return which(x, condition, which.encode_text(rows), cache).float()

    with torch.inference_mode():
        got, want = velocity(model, torch.bfloat16), velocity(wide, torch.float32)
    assert (got - want).norm() <= 3e-2 * want.norm()


def test_the_account_closes_on_the_gpu() -> None:
    """Two layers of the 1.3B geometry, timed by events: rows and wall time come from different clocks."""
    model = random_model(replace(GEOMETRIES["longlive-1.3b"], layers=2), torch.bfloat16, "cuda")
    runs = [
        Configuration(name="full", model=model, options=StreamOptions(policy="full")),
        Configuration(name="ispa", model=model, options=StreamOptions()),
    ]
    report = compare(runs, rounds=5)
    for run in report["runs"]:
        assert run["closing"]["sum_error"] <= 0.01
        assert run["closing"]["unattributed_share"] <= 0.03
    assert report["runs"][1]["memory"]["peak"] > report["runs"][1]["memory"]["weights"]


@pytest.mark.parametrize("policy", ["full", "absorb"])
def test_offloaded_rings_change_no_bit_and_leave_the_device(policy: str) -> None:
    model = avatar_model().to(CUDA)
    kept, latents = {}, {}
    for rests in (False, True):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        text = torch.randn(1, model.spec.text_len, model.spec.text_dim, generator=torch.Generator().manual_seed(1))
        options = StreamOptions(frames=24, policy=policy, offload=rests)
        stream = open_stream(model, text.to(CUDA), options, scene=scene())
        kept[rests] = torch.cuda.memory_allocated() - before
        rings = 4 * 4 * 2 * 12 * model.spec.frame_tokens * model.spec.dim * 4  # layers, steps, k and v, frames
        assert stream.cache.host_bytes() == (rings if rests else 0)
        latents[rests] = torch.cat([chunk.latents.cpu() for chunk in stream], 1)
        del stream
    assert kept[False] - kept[True] > 0.9 * rings
    assert torch.equal(latents[False], latents[True])


def test_an_offloaded_vae_works_on_the_device_and_rests_on_the_host() -> None:
    diffusers = pytest.importorskip("diffusers")
    from ispa_deploy.media.vae import WanVae

    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan(base_dim=8).eval()
    pixels = torch.rand(1, 5, 3, 32, 48)
    here = WanVae(model).encode(pixels)
    shown = WanVae(model).decoder()(here)
    vae = WanVae(model, CUDA)
    there = vae.encode(pixels)
    assert there.device.type == "cuda"
    decoder = vae.decoder()
    again = torch.cat([decoder(there[:, :1]), decoder(there[:, 1:])], 1)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert torch.allclose(there.cpu(), here, atol=1e-2)
    assert torch.allclose(again.cpu(), shown, atol=1e-2)
