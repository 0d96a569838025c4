"""From a speech model's hidden states to the tokens that a frame hears; names as upstream.

Legend: A speakers, N hidden states (25), K their width, P audio steps (one for each pixel frame, 25 a second), F latent
frames, C model width. Two causal convolutions halve the rate twice, so a latent frame hears four steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ispa_deploy.specs import ModelSpec

LEAD_STEPS = 73
"""Copies of the first step that stand in front, one for each pixel frame of the motion before a chunk."""
LEAD_FRAMES = 19
_EPS = 1e-6


class CausalConv(nn.Module):
    """A convolution over time that sees two steps back and none ahead; the first step stands for what was before."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv1d(inputs, outputs, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, P) float32 -> (B, outputs, ceil(P / stride)) float32, whatever dtype the weights have."""
        bias = self.conv.bias.float() if self.conv.bias is not None else None
        return F.conv1d(F.pad(x, (2, 0), mode="replicate"), self.conv.weight.float(), bias, self.stride)


class _MotionEncoder(nn.Module):
    """Speech features to local tokens and one global token for each latent frame."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        width = spec.dim // 4
        self.tokens = spec.audio_tokens
        self.conv1_local = CausalConv(spec.audio_dim, width * spec.audio_tokens)
        self.conv1_global = CausalConv(spec.audio_dim, width)
        self.conv2 = CausalConv(width, 2 * width, stride=2)
        self.conv3 = CausalConv(2 * width, spec.dim, stride=2)
        self.final_linear = nn.Linear(spec.dim, spec.dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, spec.dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(A, K, P) float32 -> local (A, F, tokens + 1, C) and global (A, F, 1, C), float32."""
        local = self.conv1_local(x).unflatten(1, (self.tokens, -1)).flatten(0, 1)
        local = self._trunk(local).unflatten(0, (-1, self.tokens)).transpose(1, 2)
        padding = self.padding_tokens.float().expand(*local.shape[:2], 1, -1)
        heard = self._trunk(self.conv1_global(x))
        weight, bias = self.final_linear.weight.float(), self.final_linear.bias.float()
        return torch.cat([local, padding], 2), F.linear(heard, weight, bias).unsqueeze(2)

    def _trunk(self, x: Tensor) -> Tensor:
        """What both branches share: (B, c, P) -> (B, F, C)."""
        for conv in (self.conv2, self.conv3):
            x = conv(_normed(x))
        return _normed(x).transpose(1, 2)


def _normed(x: Tensor) -> Tensor:
    """Layer norm over channels and SiLU of (B, c, P)."""
    return F.silu(F.layer_norm(x.transpose(1, 2), x.shape[1:2], eps=_EPS)).transpose(1, 2)


class CausalAudioEncoder(nn.Module):
    """A learned mixture of the hidden states, then the encoder; float32 throughout, as upstream."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(1, spec.audio_states, 1, 1))
        self.encoder = _MotionEncoder(spec)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (A, N, K, P) of one chunk -> local (A, F, tokens + 1, C), global (A, F, 1, C), float32.

        A chunk hears itself only: what came before is its first step, repeated.
        """
        lead = states[..., :1].expand(*states.shape[:-1], LEAD_STEPS)
        share = F.silu(self.weights.float())
        mixed = (torch.cat([lead, states], -1).float() * share).sum(1) / share.sum(1)
        local, heard = self.encoder(mixed)
        return local[:, LEAD_FRAMES:], heard[:, LEAD_FRAMES:]
