"""A speech-to-video model small enough to run in milliseconds, and what it is shown and told."""

from __future__ import annotations

import torch

from ispa_deploy.avatar.model import CausalS2V
from ispa_deploy.avatar.stream import Scene
from ispa_deploy.specs import ModelSpec

AVATAR = ModelSpec(
    name="tiny-avatar", dim=48, ffn_dim=64, heads=2, layers=4, freq_dim=16, text_dim=12, text_len=5, latent_channels=4,
    latent_height=8, latent_width=12, window_frames=12, sink_frames=0, sampling="euler", shift=3.0, fps=25,
    max_frames=45_000, audio_blocks=(0, 1, 3), audio_states=3, audio_dim=8,
)  # fmt: skip


def avatar_model(spec: ModelSpec = AVATAR, seed: int = 0) -> CausalS2V:
    """Random weights, large enough in `o` that attention matters, and none that are zero."""
    torch.manual_seed(seed)
    model = CausalS2V(spec)
    with torch.no_grad():
        model.casual_audio_encoder.encoder.padding_tokens.normal_()
        model.casual_audio_encoder.weights.add_(torch.randn_like(model.casual_audio_encoder.weights) / 4)
        for block in model.layers():
            block.modulation.normal_(std=0.5)
            for name in ("q", "k", "v", "o"):
                getattr(block.self_attn, name).weight.normal_(std=1.5 * spec.dim**-0.5)
    return model.eval()


def scene(spec: ModelSpec = AVATAR, frames: int = 36, seed: int = 2) -> Scene:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, spec.audio_states, spec.audio_dim, 4 * frames, generator=generator)
    return Scene(states, torch.randn(1, 1, *spec.latent_shape, generator=generator))
