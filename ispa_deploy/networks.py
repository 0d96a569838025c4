"""The network of a spec: text to video, or speech to video where the spec says where audio enters."""

from __future__ import annotations

from ispa_deploy.avatar.model import CausalS2V
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.specs import ModelSpec


def network_of(spec: ModelSpec) -> CausalWanDiT:
    """An initialised network, on whatever device torch builds on now."""
    return CausalS2V(spec) if spec.audio_blocks else CausalWanDiT(spec)
