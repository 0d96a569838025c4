"""The causal Wan DiT: one file for every T2V checkpoint, parameter names as upstream.

Legend: B batch, F frames of the call, T tokens of a frame, S = F * T, C model width, H heads, D head width, L text
rows.

The model knows nothing of caches, policies or absorption: it asks `memory.layer(i)` for attention over whatever that
memory holds and passes queries and keys before rotation. What does not change within a stream is computed once and
handed in: `condition(t)` (time embedding and every layer's modulation) and `encode_text` (every layer's text keys and
values). Modulation stays per frame, (B, F, 1, C), and is never expanded to tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ispa_deploy.linear import Linear
from ispa_deploy.passes import Norm, Pending, add, add_norm_into, feed_forward, norm, norm_into, rms_norm, to_be_added
from ispa_deploy.regions import region
from ispa_deploy.specs import ModelSpec

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Modulation = tuple[Tensor, ...]


class Memory(Protocol):
    """What queries attend to: the past and the current chunk, per layer, and the text."""

    def layer(self, index: int) -> Attend:
        """Self-attention of one layer: q, k, v (B, S, H, D) before rotation -> (B, S, H, D)."""
        ...

    def cross(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q (B, S, H, D) over text keys and values (B, L, H, D)."""
        ...

    def store(self, index: int, k: Tensor, v: Tensor) -> None:
        """Keep what one layer of a clean pass stores, k and v (B, S, H, D) before rotation, and attend to nothing."""
        ...


class Conditioning(NamedTuple):
    """One timestep, prepared: per layer the six tensors shift, scale, gate (attention), shift, scale, gate (ffn), each
    (B, F, 1, C) or with 1 in place of B and F; and the head's shift and scale."""

    blocks: tuple[Modulation, ...]
    head: Modulation


class TextKV(NamedTuple):
    """Text keys and values of every layer: (B, L, H, D) each."""

    layers: tuple[tuple[Tensor, Tensor], ...]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width, before heads are split; evaluated in float32, as upstream."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class _Projections(nn.Module):
    """The projections that self- and cross-attention share: q, k, v, o and the norms of q and k."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.heads = spec.heads
        self.q, self.k, self.v, self.o = (Linear(spec.dim, spec.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(spec.dim, spec.eps), RMSNorm(spec.dim, spec.eps)

    def split(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, H, D)."""
        return x.unflatten(-1, (self.heads, -1))


class SelfAttention(_Projections):
    def rows(self, x: Tensor, how: Norm) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, F, T, C), to be normed -> queries, keys and values (B, S, H, D) before rotation."""
        with region("overhead.norm"):
            y = norm_into((self.q, self.k, self.v), x, how)
        q, k, v = self.q(y), self.k(y), self.v(y)
        with region("overhead.norm"):
            q, k = self.norm_q(q), self.norm_k(k)
        return self.split(q), self.split(k), self.split(v)

    def keys(self, x: Tensor, how: Norm) -> tuple[Tensor, Tensor]:
        """x (B, F, T, C), to be normed -> the keys and values of `rows` alone, bit for bit."""
        with region("overhead.norm"):
            y = norm_into((self.k, self.v), x, how)
        k, v = self.k(y), self.v(y)
        with region("overhead.norm"):
            k = self.norm_k(k)
        return self.split(k), self.split(v)


class CrossAttention(_Projections):
    def text(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, C) -> keys and values (B, L, H, D), for the whole stream."""
        return self.split(self.norm_k(self.k(context))), self.split(self.v(context))

    def queries(self, y: Any) -> Tensor:
        """(B, S, C), or what `q` takes in its place -> (B, S, H, D)."""
        q = self.q(y)
        with region("overhead.norm"):
            return self.split(self.norm_q(q))

    def forward(self, y: Tensor, text: tuple[Tensor, Tensor], attention: Attend) -> Tensor:
        """(B, S, C) -> (B, S, C), for what attends beside the layers."""
        return self.o(attention(self.queries(y), *text).flatten(-2))


class Stages(Protocol):
    """What a layer does before, between and after its two attentions, compiled; see `ispa_deploy.compiled`."""

    def takes(self, x: Tensor) -> bool: ...
    def before(self, block: Block, x: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor, Tensor]: ...
    def between(self, block: Block, x: Tensor, y: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor]: ...
    def after(self, block: Block, x: Tensor, y: Tensor, modulation: Modulation) -> Tensor: ...


def _modulation(rows: int, dim: int) -> nn.Parameter:
    """(1, rows, dim), variance 1 / dim. No numbers on `meta`: drawing them loads sympy, dividing the compiler."""
    drawn = torch.empty(1, rows, dim)
    return nn.Parameter(drawn if drawn.is_meta else drawn.normal_() / dim**0.5)


class Block(nn.Module):
    """One transformer layer: modulated self-attention, plain cross-attention, modulated feed-forward.

    The self-attention's `o`, which corrections come and go on, and the attentions, whose keys grow with the window, lie
    between its three stages: what is inside them looks the same in every pass of a stream.
    """

    compiled: Stages | None = None

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.eps = spec.eps
        self.self_attn, self.cross_attn = SelfAttention(spec), CrossAttention(spec)
        self.norm3 = nn.LayerNorm(spec.dim, eps=spec.eps)
        self.ffn = nn.Sequential(
            Linear(spec.dim, spec.ffn_dim), nn.GELU(approximate="tanh"), Linear(spec.ffn_dim, spec.dim)
        )
        self.modulation = _modulation(6, spec.dim)

    def forward(
        self, x: Tensor, modulation: Modulation, text: tuple[Tensor, Tensor], attention: Attend, cross: Attend
    ) -> Tensor:
        """x (B, F, T, C) -> (B, F, T, C)."""
        stages = self.compiled if self.compiled is not None and self.compiled.takes(x) else Block
        q, k, v = stages.before(self, x, modulation)
        y, o = attention(q, k, v).flatten(-2), self.self_attn.o
        added: Any = to_be_added(o, y) if stages is Block else o(y)
        x, q = stages.between(self, x, added, modulation)
        return stages.after(self, x, cross(q, *text), modulation)

    def before(self, x: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, F, T, C) -> queries, keys and values of the self-attention, (B, S, H, D) before rotation."""
        return self.self_attn.rows(x, Norm(modulation[1], modulation[0], self.eps))

    def between(self, x: Tensor, y: Tensor | Pending, modulation: Modulation) -> tuple[Tensor, Tensor]:
        """x (B, F, T, C) and what self-attention adds to it, (B, S, C) -> their sum and its queries to the text."""
        with region("overhead.norm"):
            affine = Norm(self.norm3.weight, self.norm3.bias, self.eps, modulates=False)
            x, normed = add_norm_into((self.cross_attn.q,), x, y, affine, modulation[2])
        return x, self.cross_attn.queries(normed)

    def after(self, x: Tensor, y: Tensor, modulation: Modulation) -> Tensor:
        """x (B, F, T, C) and attention over the text (B, S, H, D) -> the layer's output (B, F, T, C)."""
        up, gelu, down = self.ffn
        attended = to_be_added(self.cross_attn.o, y.flatten(-2))
        with region("overhead.norm"):
            x, normed = add_norm_into((up,), x, attended, Norm(modulation[4], modulation[3], self.eps))
        fed = feed_forward(up, gelu, down, normed)
        with region("overhead.norm"):
            return add(x, fed, modulation[5])

    def keys(self, x: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor]:
        """x (B, F, T, C) -> this layer's keys and values (B, S, H, D), and nothing of what comes after them."""
        return self.self_attn.keys(x, Norm(modulation[1], modulation[0], self.eps))


class Head(nn.Module):
    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.head = Linear(spec.dim, spec.latent_channels * spec.patch[0] * spec.patch[1] * spec.patch[2])
        self.modulation = _modulation(2, spec.dim)


class CausalWanDiT(nn.Module):
    """Velocity of a chunk given noisy latents, a prepared timestep, prepared text and a memory of the past."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec
        self.patch_embedding = nn.Conv3d(spec.latent_channels, spec.dim, kernel_size=spec.patch, stride=spec.patch)
        self.text_embedding = nn.Sequential(
            Linear(spec.text_dim, spec.dim), nn.GELU(approximate="tanh"), Linear(spec.dim, spec.dim)
        )
        self.time_embedding = nn.Sequential(Linear(spec.freq_dim, spec.dim), nn.SiLU(), Linear(spec.dim, spec.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(spec.dim, 6 * spec.dim))
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.head = Head(spec)

    def layers(self) -> list[Block]:
        """The transformer layers, first to last."""
        return [block for block in self.blocks if isinstance(block, Block)]

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def condition(self, t: Tensor) -> Conditioning:
        """Timesteps (B, F) float32 in [0, 1000] -> everything that depends on them alone."""
        e = self.time_embedding(sinusoid(t, self.spec.freq_dim).to(self.device, self.dtype))
        e6 = self.time_projection(e).unflatten(-1, (6, -1))
        blocks = tuple(_chunks(block.modulation + e6) for block in self.layers())
        return Conditioning(blocks, _chunks(self.head.modulation + e.unsqueeze(-2)))

    def encode_text(self, rows: Tensor) -> TextKV:
        """Text rows (B, L, text_dim), zero after the prompt's end (and attended to all the same) -> keys and values."""
        with region("overhead.text"):
            context = self.text_embedding(rows.to(self.device, self.dtype))
            return TextKV(tuple(block.cross_attn.text(context) for block in self.layers()))

    def forward(
        self, x: Tensor, condition: Conditioning, text: TextKV, memory: Memory, stores: int | None = None
    ) -> Tensor:
        """x (B, F, C, H, W) -> velocity noise - x0 of the same shape, in the model's dtype.

        `stores`: this pass is for its keys and values alone and the first `stores` layers keep them. What they do not
        need is not computed: the last of them only stores, the layers behind it are left out, the result is empty.
        """
        grid = x.shape[-2] // self.spec.patch[1], x.shape[-1] // self.spec.patch[2]
        x = self._patchify(x.to(self.dtype))
        last = None if stores is None else stores - 1
        for index, block in enumerate(self.layers()):
            if index == last:
                memory.store(index, *block.keys(x, condition.blocks[index]))
                return x.new_empty(0)
            x = block(x, condition.blocks[index], text.layers[index], memory.layer(index), memory.cross)
        return self._velocity(x, condition, grid)

    def _velocity(self, x: Tensor, condition: Conditioning, grid: tuple[int, int]) -> Tensor:
        """The last layer's (B, F, T, C) -> (B, F, c, H, W)."""
        with region("overhead.norm"):
            shift, scale = condition.head
            x = norm(x, Norm(scale, shift, self.spec.eps))
        return self._unpatchify(self.head.head(x), grid)

    def _patchify(self, x: Tensor) -> Tensor:
        """(B, F, C, H, W) -> (B, F, T, C): the convolution as the matrix product it is, since kernel = stride."""
        _, rows, columns = self.spec.patch
        x = x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # (B, F, C, h, ph, w, pw)
        x = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)
        with region("linear.gemm"):
            return F.linear(x, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def _unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, F, T, ph * pw * C), channel fastest -> (B, F, C, H, W)."""
        _, rows, columns = self.spec.patch
        x = x.unflatten(-1, (rows, columns, -1)).unflatten(2, grid)  # (B, F, h, w, ph, pw, C)
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)


def sinusoid(t: Tensor, width: int) -> Tensor:
    """(B, F) -> (B, F, width) float64: cosines first, then sines."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = t.to(torch.float64).unsqueeze(-1) * torch.pow(10000.0, -exponents)
    return torch.cat([angles.cos(), angles.sin()], -1)


def _chunks(table: Tensor) -> Modulation:
    """(B, F, n, C) -> n tensors (B, F, 1, C)."""
    return tuple(table.unsqueeze(-2).unbind(2))
