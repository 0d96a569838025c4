"""The model's parameters are the checkpoint's: names, shapes and counts of the published models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ispa_deploy.model import CausalWanDiT, sinusoid
from ispa_deploy.specs import SPECS, ModelSpec
from tests.reference import NaiveMemory
from tests.tiny import SPEC, text_rows, tiny_model


def _linear(name: str, out: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, inner)
    yield f"{name}.bias", (out,)


def _block(prefix: str, dim: int, ffn: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.modulation", (1, 6, dim)
    for attention in ("self_attn", "cross_attn"):
        for projection in "qkvo":
            yield from _linear(f"{prefix}.{attention}.{projection}", dim, dim)
        for norm in ("norm_q", "norm_k"):
            yield f"{prefix}.{attention}.{norm}.weight", (dim,)
    yield f"{prefix}.norm3.weight", (dim,)
    yield f"{prefix}.norm3.bias", (dim,)
    yield from _linear(f"{prefix}.ffn.0", ffn, dim)
    yield from _linear(f"{prefix}.ffn.2", dim, ffn)


def _checkpoint(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The published tensors of a Wan T2V checkpoint of this size."""
    dim, channels = spec.dim, spec.latent_channels
    tensors = {
        "patch_embedding.weight": (dim, channels, *spec.patch),
        "patch_embedding.bias": (dim,),
        "head.modulation": (1, 2, dim),
    }
    tensors |= _linear("text_embedding.0", dim, spec.text_dim)
    tensors |= _linear("text_embedding.2", dim, dim)
    tensors |= _linear("time_embedding.0", dim, spec.freq_dim)
    tensors |= _linear("time_embedding.2", dim, dim)
    tensors |= _linear("time_projection.1", 6 * dim, dim)
    tensors |= _linear("head.head", channels * 4, dim)
    for layer in range(spec.layers):
        tensors |= _block(f"blocks.{layer}", dim, spec.ffn_dim)
    return tensors


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("longlive-1.3b", 825, 1_418_996_800),
        ("self-forcing-1.3b", 825, 1_418_996_800),
        ("reward-forcing-1.3b", 825, 1_418_996_800),
        ("krea-14b", 1095, 14_288_491_584),
    ],
)
def test_parameters_are_those_of_the_checkpoint(name: str, tensors: int, parameters: int) -> None:
    with torch.device("meta"):
        state = CausalWanDiT(SPECS[name]).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == _checkpoint(SPECS[name])
    assert len(state) == tensors
    assert sum(value.numel() for value in state.values()) == parameters


def test_time_embedding_puts_cosines_first() -> None:
    t = torch.tensor([[937.5]])
    rates = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    torch.testing.assert_close(sinusoid(t, 16)[0, 0], torch.cat([(937.5 * rates).cos(), (937.5 * rates).sin()]))


@torch.inference_mode()
def test_one_timestep_for_all_frames_is_the_same_timestep_for_each() -> None:
    model, outputs = tiny_model(), []
    x, text = torch.randn(1, 3, *SPEC.latent_shape), model.encode_text(text_rows())
    for t in (torch.full((1, 1), 500.0), torch.full((1, 3), 500.0)):
        memory = NaiveMemory(SPEC)
        memory.begin(0, 3)
        outputs.append(model(x, model.condition(t), text, memory))
    assert outputs[0].shape == x.shape
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_patches_are_the_convolution() -> None:
    model = tiny_model()
    x = torch.randn(2, 3, *SPEC.latent_shape)
    want = model.patch_embedding(x.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)
    torch.testing.assert_close(model._patchify(x), want, rtol=1e-5, atol=1e-5)
