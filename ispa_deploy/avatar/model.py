"""The causal S2V model: the causal Wan DiT plus what it hears and whom it shows; parameter names as upstream.

Legend: B batch, A speakers, F frames of the call, T tokens of a frame, M tokens of the condition, C model width, H
heads, D head width. Latents are (B, F, c, H, W) here as everywhere; upstream has channels before frames.

Noisy tokens run through the blocks as in the text-to-video model. The condition, that is the reference frame and the
frames before the stream packed at three scales, runs once, at t = 0: what is left of it are keys and values that the
memory keeps. What does not change within a chunk is computed once and handed in as `Guidance`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ispa_deploy.avatar.audio import LEAD_FRAMES, CausalAudioEncoder
from ispa_deploy.avatar.sizes import PACKINGS
from ispa_deploy.linear import Linear
from ispa_deploy.model import Attend, CausalWanDiT, Conditioning, CrossAttention, Memory, TextKV
from ispa_deploy.regions import region
from ispa_deploy.specs import ModelSpec

_INJECTION_EPS = 1e-5
_NOISY, _REFERENCE, _MOTION = range(3)


class Injection(NamedTuple):
    """What one injector adds to a chunk: shift and scale (A, F, 1, C), keys and values (A * F, n, H, D)."""

    shift: Tensor
    scale: Tensor
    text: tuple[Tensor, Tensor]


class Guidance(NamedTuple):
    """One chunk's audio, an entry for each injector; who speaks where, (A, F, T, 1) or None; pose tokens, (B, F, T, C)
    or (C,)."""

    injections: tuple[Injection, ...]
    mask: Tensor | None
    pose: Tensor


class FramePacker(nn.Module):
    """Frames before the stream at three scales: the newest in full, two by half, the sixteen oldest by a quarter."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        for name, kernel, _ in PACKINGS:
            setattr(self, name, nn.Conv3d(spec.latent_channels, spec.dim, kernel, kernel))

    def forward(self, motion: Tensor) -> Tensor:
        """(B, up to 19 and more, c, H, W), oldest first -> (B, M', C), newest scale first."""
        missing = max(0, LEAD_FRAMES - motion.shape[1])
        motion = F.pad(motion, (0, 0, 0, 0, 0, 0, missing, 0)).transpose(1, 2)
        end, packed = motion.shape[2], []
        for name, _, frames in PACKINGS:
            conv = self.get_submodule(name)
            packed.append(conv(motion[:, :, end - frames : end]).flatten(2).transpose(1, 2))
            end -= frames
        return torch.cat(packed, 1)


class AdaIn(nn.Module):
    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.linear = Linear(spec.dim, 2 * spec.dim)


class AudioInjector(nn.Module):
    """Cross-attention from a frame's tokens to the audio of that frame, behind chosen blocks."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.injector = nn.ModuleList(CrossAttention(spec) for _ in spec.audio_blocks)
        self.injector_adain_layers = nn.ModuleList(AdaIn(spec) for _ in spec.audio_blocks)

    def prepare(self, local: Tensor, heard: Tensor) -> tuple[Injection, ...]:
        """Audio tokens (A, F, n, C) and (A, F, 1, C) -> what each injector needs of them."""
        prepared = []
        for cross, adain in zip(self.injector, self.injector_adain_layers, strict=True):
            assert isinstance(cross, CrossAttention)
            assert isinstance(adain, AdaIn)
            shift, scale = adain.linear(F.silu(heard)).chunk(2, -1)
            prepared.append(Injection(shift, scale, cross.text(local.flatten(0, 1))))
        return tuple(prepared)

    def forward(self, index: int, x: Tensor, guidance: Guidance, attention: Attend) -> Tensor:
        """What injector `index` adds to x (B, F, T, C)."""
        shift, scale, text = guidance.injections[index]
        with region("overhead.norm"):
            normed = F.layer_norm(x, x.shape[-1:], eps=_INJECTION_EPS)
            y = torch.addcmul(shift, normed, 1 + scale)
        heard: Tensor = self.injector[index](y.flatten(0, 1), text, attention).view(y.shape)
        if guidance.mask is None:
            return heard
        with region("overhead.norm"):
            return (heard * guidance.mask).sum(0, keepdim=True)


class CausalS2V(CausalWanDiT):
    """Velocity of a chunk given noisy latents, what is heard, and a memory of the past and of the reference."""

    def __init__(self, spec: ModelSpec):
        super().__init__(spec)
        self.cond_encoder = nn.Conv3d(spec.latent_channels, spec.dim, kernel_size=spec.patch, stride=spec.patch)
        self.trainable_cond_mask = nn.Embedding(3, spec.dim)
        self.frame_packer = FramePacker(spec)
        self.casual_audio_encoder = CausalAudioEncoder(spec)
        self.audio_injector = AudioInjector(spec)
        self._injectors = {block: index for index, block in enumerate(spec.audio_blocks)}

    def guide(self, states: Tensor, mask: Tensor | None = None, pose: Tensor | None = None) -> Guidance:
        """Prepare a chunk: hidden states (A, N, K, 4 F); mask (A, F, T, 1) or None; pose latents (B, F, c, H, W)."""
        with region("overhead.audio"):
            local, heard = (x.to(self.dtype) for x in self.casual_audio_encoder(states.to(self.device)))
            bias = self.cond_encoder.bias
            assert bias is not None
            posed = bias if pose is None else self._embed(self.cond_encoder, pose)
            mask = None if mask is None else mask.to(self.device, self.dtype)
            return Guidance(self.audio_injector.prepare(local, heard), mask, posed)

    def condition_tokens(self, reference: Tensor, motion: Tensor) -> Tensor:
        """Reference (B, 1, c, H, W) and motion latents (B, n, c, H, W), oldest first -> (B, M, C)."""
        rows = self.trainable_cond_mask.weight
        shown = self._embed(self.patch_embedding, reference).flatten(1, 2) + rows[_REFERENCE]
        before = self.frame_packer(motion.to(self.device, self.dtype)) + rows[_MOTION]
        return torch.cat([shown, before], 1)

    def prefill(self, tokens: Tensor, condition: Conditioning, text: TextKV, memory: Memory) -> None:
        """Run the condition's tokens (B, M, C) through the blocks at t = 0; `memory` keeps their keys and values."""
        x = tokens.unsqueeze(1)
        for index, block in enumerate(self.blocks):
            x = block(x, condition.blocks[index], text.layers[index], memory.layer(index), memory.cross)

    def forward(
        self,
        x: Tensor,
        condition: Conditioning,
        text: TextKV,
        memory: Memory,
        stores: int | None = None,
        guidance: Guidance | None = None,
    ) -> Tensor:
        """x (B, F, c, H, W) -> velocity noise - x0 of the same shape, in the model's dtype; `guidance` is needed."""
        assert guidance is not None, "a speech-to-video model hears something in every pass"
        assert stores is None, "a speech-to-video model has no clean pass"
        grid = x.shape[-2] // self.spec.patch[1], x.shape[-1] // self.spec.patch[2]
        x = self._patchify(x.to(self.dtype)) + guidance.pose + self.trainable_cond_mask.weight[_NOISY]
        for index, block in enumerate(self.blocks):
            x = block(x, condition.blocks[index], text.layers[index], memory.layer(index), memory.cross)
            injector = self._injectors.get(index)
            if injector is not None:
                x = x + self.audio_injector(injector, x, guidance, memory.cross)
        return self._velocity(x, condition, grid)

    def _embed(self, conv: nn.Module, latents: Tensor) -> Tensor:
        """(B, F, c, H, W) -> (B, F, T, C)."""
        return conv(latents.to(self.device, self.dtype).transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)
