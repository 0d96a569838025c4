"""A: the published streaming loop in plain PyTorch, the yardstick beside our own baseline.

Written from what the published projects do (LongLive, Self-Forcing): every pass embeds its timestep anew and adds it
to each layer's modulation; norms, modulation, gates and residuals are elementwise operations of their own; rotation is
done in complex128; keys and values of a pass are the past and the current chunk concatenated; attention is
`scaled_dot_product_attention`; the window moves along after the clean pass. Keys are cached rotated (`rope =
absolute`), nothing is compiled and nothing fused. It reads our model's parameters and computes the same numbers
(tests/test_published.py), so a ratio of times compares implementations and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ispa_deploy.model import Block, CausalWanDiT, _Projections, sinusoid
from ispa_deploy.regions import region
from ispa_deploy.rope import axis_widths
from ispa_deploy.sampler import Schedule

Pairs = list[tuple[Tensor, Tensor]]
Noise = Callable[[int, int, int], Tensor]


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    with region("linear.gemm"):
        return F.linear(x, layer.weight, layer.bias)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    with region("overhead.norm"):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    """(B, S, H, D) by complex128 (S, 1, D / 2)."""
    with region("overhead.rope"):
        pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mark: str) -> Tensor:
    with region(mark):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2).flatten(2)


class Published:
    """The loop over one stream: `chunk` denoises and commits, as `Stream` does for the policy `full`.

    `rows` (B, L, text_dim): the prompt. The text's keys and values are computed once.
    """

    def __init__(self, model: CausalWanDiT, rows: Tensor):
        self.model, self.spec = model, model.spec
        assert self.spec.rope == "absolute", "the published loop here caches rotated keys"
        self.schedule = Schedule.few_step(self.spec.steps, self.spec.shift)
        layers = model.layers()
        with torch.inference_mode():
            context = self._mlp(model.text_embedding, rows.to(model.device, model.dtype))
            self.text = [self._text(block.cross_attn, context) for block in layers]
        empty = context.new_zeros(len(rows), 0, self.spec.heads, self.spec.head_dim)
        self.past: Pairs = [(empty, empty) for _ in layers]
        self._new: Pairs = list(self.past)
        self._turns = {axis: self._table(axis) for axis in range(3)}

    def _table(self, axis: int) -> Tensor:
        """(positions, width / 2) complex128 of one axis."""
        width = axis_widths(self.spec.head_dim)[axis]
        length = (self.spec.max_frames, *self.spec.grid)[axis]
        rates = self.spec.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.outer(torch.arange(length, dtype=torch.float64), rates)
        return torch.polar(torch.ones_like(angles), angles).to(self.model.device)

    def _turn(self, start: int, count: int) -> Tensor:
        """(S, 1, D / 2) complex128 of `count` frames from frame `start`."""
        rows, columns = self.spec.grid
        parts = (
            self._turns[0][start : start + count].view(count, 1, 1, -1).expand(-1, rows, columns, -1),
            self._turns[1].view(1, rows, 1, -1).expand(count, -1, columns, -1),
            self._turns[2].view(1, 1, columns, -1).expand(count, rows, -1, -1),
        )
        return torch.cat(parts, -1).reshape(count * rows * columns, 1, -1)

    def _mlp(self, layers: nn.Module, x: Tensor) -> Tensor:
        for layer in layers.children():
            x = _linear(layer, x) if isinstance(layer, nn.Linear) else layer(x)
        return x

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.spec.heads, -1))

    def _text(self, cross: _Projections, context: Tensor) -> tuple[Tensor, Tensor]:
        k = _rms(_linear(cross.k, context), cross.norm_k.weight, self.spec.eps)
        return self._heads(k), self._heads(_linear(cross.v, context))

    @torch.inference_mode()
    def chunk(self, index: int, start: int, count: int, noise: Noise) -> Tensor:
        """Clean latents (B, F, C, H, W) float32 of one chunk; its keys and values join the window."""
        levels = list(zip(self.schedule.timesteps, self.schedule.sigmas, strict=True))
        x = noise(index, count, 0)
        for step, (timestep, sigma) in enumerate(levels):
            flow = self._pass(x, timestep, start)
            with region("overhead.sampler"):
                x0 = (x.double() - sigma * flow.double()).to(x.dtype)
                if step + 1 < len(levels):
                    sigma = levels[step + 1][1]
                    x = (1 - sigma) * x0 + sigma * noise(index, count, step + 1)
        self._pass(x0, self.spec.context_timestep, start)
        with region("attention.cache"):
            self.past = [self._rolled(*pair, count) for pair in self._new]
        return x0

    def _rolled(self, k: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """What the next chunk of `count` frames finds: the sink and the newest of the rest, copied together."""
        tokens, sink = self.spec.frame_tokens, self.spec.sink_frames * self.spec.frame_tokens
        drop = max(0, k.shape[1] - (self.spec.window_frames - count) * tokens)
        if not drop:
            return k, v
        return torch.cat([k[:, :sink], k[:, sink + drop :]], 1), torch.cat([v[:, :sink], v[:, sink + drop :]], 1)

    def _pass(self, x: Tensor, timestep: float, start: int) -> Tensor:
        """(B, F, C, H, W) -> velocity of the same shape."""
        model, frames = self.model, x.shape[1]
        t = torch.full((len(x), frames), timestep, dtype=torch.float32, device=model.device)
        e = self._mlp(model.time_embedding, sinusoid(t, self.spec.freq_dim).to(model.dtype))
        e6 = self._mlp(model.time_projection, e).unflatten(-1, (6, self.spec.dim))
        with region("linear.gemm"):
            h = model.patch_embedding(x.to(model.dtype).transpose(1, 2)).flatten(3).permute(0, 2, 3, 1).flatten(1, 2)
        turn = self._turn(start, frames)
        for layer, block in enumerate(model.layers()):
            h = self._block(layer, block, h, e6, turn)
        with region("overhead.norm"):
            shift, scale = (model.head.modulation.unsqueeze(1) + e.unsqueeze(2)).unsqueeze(3).unbind(2)
            y = self._modulate(h, shift, scale)
        return model._unpatchify(_linear(model.head.head, y).unflatten(1, (frames, -1)), self.spec.grid)

    def _modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed = F.layer_norm(x, (self.spec.dim,), eps=self.spec.eps)
        return (normed.unflatten(1, (shift.shape[1], -1)) * (1 + scale) + shift).flatten(1, 2)

    def _gated(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return x + (y.unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)

    def _block(self, layer: int, block: Block, x: Tensor, e6: Tensor, turn: Tensor) -> Tensor:
        with region("overhead.norm"):
            table = block.modulation.unsqueeze(1) + e6  # (B, F, 6, C), every pass and every layer
            shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = table.unsqueeze(3).unbind(2)
            y = self._modulate(x, shift_a, scale_a)
        y = self._self_attention(layer, block.self_attn, y, turn)
        with region("overhead.norm"):
            x = self._gated(x, y, gate_a)
            y = block.norm3(x)
        cross = block.cross_attn
        q = self._heads(_rms(_linear(cross.q, y), cross.norm_q.weight, self.spec.eps))
        y = _linear(cross.o, _sdpa(q, *self.text[layer], "attention.cross"))
        with region("overhead.norm"):
            x = x + y
            y = self._modulate(x, shift_f, scale_f)
        y = _linear(block.ffn[0], y)
        with region("overhead.norm"):
            y = F.gelu(y, approximate="tanh")
        y = _linear(block.ffn[2], y)
        with region("overhead.norm"):
            return self._gated(x, y, gate_f)

    def _self_attention(self, layer: int, block: _Projections, y: Tensor, turn: Tensor) -> Tensor:
        eps = self.spec.eps
        q, k, v = _linear(block.q, y), _linear(block.k, y), self._heads(_linear(block.v, y))
        q, k = self._heads(_rms(q, block.norm_q.weight, eps)), self._heads(_rms(k, block.norm_k.weight, eps))
        q, k = _rotate(q, turn), _rotate(k, turn)
        with region("attention.cache"):
            past_k, past_v = self.past[layer]
            keys, values = torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)
            self._new[layer] = keys, values
        return _linear(block.o, _sdpa(q, keys, values, "attention.kernel"))


class SteadyPublished:
    """A stream of the published loop with a full window: `step()` generates the next chunk, as `SteadyStream` does."""

    def __init__(self, model: CausalWanDiT, *, seed: int = 0):
        spec, generator = model.spec, torch.Generator(model.device).manual_seed(seed)
        rows = torch.randn(1, spec.text_len, spec.text_dim, generator=generator, device=model.device)
        self.loop = Published(model, rows)
        self._frame, self._index = spec.window_frames, 0
        self._shape, self._generator = (1, spec.chunk_frames, *spec.latent_shape), generator
        past = (1, (spec.window_frames - spec.chunk_frames) * spec.frame_tokens, spec.heads, spec.head_dim)
        self.loop.past = [
            (self._random(past).to(model.dtype), self._random(past).to(model.dtype)) for _ in range(spec.layers)
        ]

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.loop.model.device)

    def step(self) -> Tensor:
        """Latents of the next chunk: denoising passes and the clean pass."""
        count = self.loop.spec.chunk_frames
        latents = self.loop.chunk(self._index, self._frame, count, lambda *_: self._random(self._shape))
        self._frame, self._index = self._frame + count, self._index + 1
        return latents
