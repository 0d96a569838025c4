"""Models small enough to run in milliseconds, and streams of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions, open_stream
from ispa_deploy.specs import ModelSpec
from ispa_deploy.stream import Stream

SPEC = ModelSpec(
    name="tiny", dim=48, ffn_dim=64, heads=2, layers=4, freq_dim=16, text_dim=12, text_len=5, latent_channels=4,
    latent_height=6, latent_width=4, chunk_frames=3, window_frames=12, sink_frames=1, steps=(1000, 500),
)  # fmt: skip


def tiny_model(spec: ModelSpec = SPEC, seed: int = 0) -> CausalWanDiT:
    """Random weights, large enough in `o` that attention matters."""
    torch.manual_seed(seed)
    model = CausalWanDiT(spec)
    with torch.no_grad():
        for block in model.blocks:
            block.modulation.normal_(std=0.5)
            for name in ("q", "k", "v", "o"):
                getattr(block.self_attn, name).weight.normal_(std=1.5 * spec.dim**-0.5)
    return model.eval()


def text_rows(spec: ModelSpec = SPEC, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(batch, spec.text_len, spec.text_dim, generator=torch.Generator().manual_seed(seed))


def tiny_stream(model: CausalWanDiT, *, switches: list[tuple[int, Tensor]] | None = None, **options: Any) -> Stream:
    options = {"frames": 21, **options}
    return open_stream(model, text_rows(model.spec), StreamOptions(**options), switches=switches)


def latents_of(stream: Stream) -> Tensor:
    """(B, F, C, H, W) of the whole stream."""
    return torch.cat([chunk.latents for chunk in stream], 1)


def weights_of(model: CausalWanDiT) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_weights(model: CausalWanDiT, before: dict[str, Tensor]) -> bool:
    """Bit for bit, and no correction left anywhere."""
    clean = all(block.self_attn.o.delta is None for block in model.blocks)
    return clean and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
