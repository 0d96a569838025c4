"""The geometries that are measured, and models of random weights in them: latency does not depend on the weights."""

from __future__ import annotations

import torch

from ispa_deploy.model import CausalWanDiT
from ispa_deploy.specs import SPECS, ModelSpec

# Between the demo, whose matrices are too small for 8 bits to gain anything, and the 1.3B model, too slow for a CPU.
# One denoising pass and the clean one, and a CPU has the time for more chunks: all passes cost the same but a chunk's
# last one, whose 16-bit activations are measured in a run of their own.
MID = ModelSpec(
    name="mid", dim=768, ffn_dim=4480, heads=12, layers=12, latent_height=30, latent_width=52, sink_frames=1,
    steps=(1000,), source="no checkpoint: a geometry for measurements",
)  # fmt: skip

GEOMETRIES: dict[str, ModelSpec] = {
    "demo": SPECS["demo"],
    "mid": MID,
    "longlive-1.3b": SPECS["longlive-1.3b"],
    "krea-14b": SPECS["krea-14b"],
}


def random_model(
    spec: ModelSpec, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", *, seed: int = 0
) -> CausalWanDiT:
    """A model of this geometry whose activations keep their size from layer to layer; in evaluation mode."""
    with torch.device("meta"):
        model = CausalWanDiT(spec)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
    return model
