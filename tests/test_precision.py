"""Laws of 16-bit activations in the last denoising pass: where they run, what they change, and what stays as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ispa_deploy.errors import InputError
from ispa_deploy.evaluate.onestep import Distance
from ispa_deploy.graphs import PassGraphs
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions, check_options, open_stream
from ispa_deploy.precision import last_pass_layers, last_pass_linears, widened
from quant import SCHEMES, quantise_
from quant.audit import audit
from quant.linear import QuantisedLinear
from tests.tiny import SPEC, latents_of, text_rows, tiny_model

DEEP = replace(SPEC, layers=4)
CHUNKS = 2
FULL = StreamOptions(frames=CHUNKS * SPEC.chunk_frames, policy="full")


def eight_bits(scheme: str = "w8a8-int8") -> CausalWanDiT:
    model = tiny_model(DEEP).requires_grad_(False)
    quantise_(model, SCHEMES[scheme], ranges={name: 8.0 for name, _ in model.named_modules()})
    return model


def stream_of(model: CausalWanDiT, **changes: object) -> Tensor:
    return latents_of(open_stream(model, text_rows(DEEP), replace(FULL, **changes)))  # type: ignore[arg-type]


def linears(model: CausalWanDiT) -> dict[str, QuantisedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


@pytest.mark.parametrize(("layers", "last"), [(1, [0]), (2, [1]), (3, [2]), (4, [2, 3]), (10, [6, 7, 8, 9])])
def test_a_third_of_the_layers_is_counted_from_the_last_and_rounded_up(layers: int, last: list[int]) -> None:
    assert list(last_pass_layers(layers)) == last


@pytest.mark.parametrize("scheme", ["w8a8-int8", "w8a8-int8-static"])
def test_the_last_pass_of_every_chunk_is_wide_in_the_last_layers_and_nothing_else(scheme: str) -> None:
    model = eight_bits(scheme)
    stream_of(model)
    for name, layer in linears(model).items():
        runs = name.startswith(("blocks.2.", "blocks.3.")) and not name.endswith(("cross_attn.k", "cross_attn.v"))
        assert layer.wide_calls == (CHUNKS if runs else 0), name
        assert not layer.wide
    rows = {row["name"]: row["wide_calls"] for row in audit(model)}
    assert rows["blocks.3.ffn.2"] == CHUNKS
    assert rows["head.head"] is None


def test_the_pass_before_the_last_is_as_with_eight_bits() -> None:
    """What differs is one pass of each chunk, by the layers behind the first two thirds."""
    model = eight_bits()
    flows: dict[int, list[Tensor]] = {}
    for bits in (16, 8):
        stream = open_stream(model, text_rows(DEEP), replace(FULL, frames=SPEC.chunk_frames, last_pass_bits=bits))
        seen, velocity = flows.setdefault(bits, []), stream._velocity

        def listen(x: Tensor, timestep: float, seen: list[Tensor] = seen, velocity=velocity) -> Tensor:  # type: ignore[no-untyped-def]
            seen.append(velocity(x, timestep).clone())
            return seen[-1]

        stream._velocity = listen  # type: ignore[method-assign]
        latents_of(stream)
    *before, last = [torch.equal(*pair) for pair in zip(flows[16], flows[8], strict=True)]
    assert all(before)
    assert not last


def test_it_brings_the_last_pass_closer_to_the_weights_own_result() -> None:
    """Against the floating-point model that the 8-bit weights stand for, all layers widened and a third of them."""
    model, exact = eight_bits(), tiny_model(DEEP).requires_grad_(False)
    for name, layer in linears(model).items():
        exact.get_submodule(name).weight.copy_(layer.reference_weight())
    latents = torch.randn(1, SPEC.chunk_frames, *SPEC.latent_shape)
    errors = {}
    for bits, fine in (("8", []), ("third", last_pass_linears(model)), ("all", list(linears(model).values()))):
        velocities = []
        for one in (exact, model):
            stream = open_stream(one, text_rows(DEEP), FULL)
            stream.cache.begin(0, SPEC.chunk_frames)
            t = one.condition(torch.full((1, 1), 500.0))
            with torch.inference_mode(), widened(fine if one is model else []):
                velocities.append(one(latents, t, stream.text, stream.cache))
        distance = Distance()
        distance.add(*velocities)
        errors[bits] = distance.relative_l2
    assert errors["all"] < 0.35 * errors["8"], "what is left are the text's keys and values"
    assert errors["all"] < errors["third"] < errors["8"]


def test_models_without_8_bit_codes_stream_as_before() -> None:
    floating, e4m3 = tiny_model(DEEP), tiny_model(DEEP).requires_grad_(False)
    quantise_(e4m3, SCHEMES["w8a8-fp8"])
    for layer in linears(e4m3).values():
        layer.allow_fallback = True
    for model in (floating, e4m3):
        assert last_pass_linears(model) == []
        assert torch.equal(stream_of(model), stream_of(model, last_pass_bits=8))
    assert last_pass_linears(eight_bits(), 8) == []


def test_a_stream_that_fails_leaves_eight_bits_behind() -> None:
    model = eight_bits()
    stream = open_stream(model, text_rows(DEEP), FULL)

    def fails(x: Tensor, timestep: float) -> Tensor:
        raise RuntimeError("a pass")

    stream.sampler = replace(stream.sampler, schedule=replace(stream.sampler.schedule, timesteps=(1000.0,)))
    stream._velocity = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a pass"):
        next(iter(stream))
    assert not any(layer.wide for layer in linears(model).values())


def test_an_absorbed_stream_is_wide_on_corrected_weights_too() -> None:
    """`o` of a local layer carries its correction as codes of their own, which are multiplied twice like any other."""
    model = eight_bits()
    changes = {"frames": 6 * SPEC.chunk_frames, "policy": "absorb", "preset": "paper", "warmup": 2 * SPEC.chunk_frames}
    stream = open_stream(model, text_rows(DEEP), replace(FULL, ratio=1.0, **changes))  # type: ignore[arg-type]
    calls = {}
    for chunk in stream:
        calls[chunk.index] = model.blocks[3].self_attn.o.wide_calls
    assert calls == {index: index + 1 for index in range(6)}


def test_a_recorded_pass_is_another_one_where_it_is_fine() -> None:
    recorded = []

    def record(run):  # type: ignore[no-untyped-def]
        recorded.append(run)
        return run

    class Cache:
        generation = 0

        @staticmethod
        def form() -> tuple[int, ...]:
            return (0,)

    graphs, x = PassGraphs(record), torch.zeros(1)

    def model(x: Tensor, *_: object) -> Tensor:
        return x

    for fine in (False, True, False, True):
        graphs.run(model, x, 0.0, None, None, Cache, None, fine)  # type: ignore[arg-type]
    assert (graphs.recorded, graphs.replayed) == (2, 2)


def test_other_bits_are_refused() -> None:
    with pytest.raises(InputError, match="--last-pass-bits 12: expected 16, or 8"):
        check_options(DEEP, replace(FULL, last_pass_bits=12))
