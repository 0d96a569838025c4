"""Train the embedded model: `python -m ispa_deploy.demo.train --out weights.safetensors`.

Teacher forcing with flow matching on procedurally drawn clips. Every clip is given twice in one pass, once clean and
once noisy; a noisy chunk sees itself and the clean chunks before it, as it will when it streams. The model file is the
one that streams: only its memory is exchanged for `TeacherForcing`.

- Half of the clips keep frame 0 and jump ahead by up to 60 frames, so an old sink is nothing new to the model.
- The clean copy is lightly noised without telling the model: when streaming, history is its own imperfect output.
- Some single first chunks ride along, because nothing before them helps to denoise them.
- Each attribute of the prompt is left open now and then, so short prompts work.

Everything drawn depends on (seed, step) alone, so a run that is resumed from `--state` goes on as if never stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ispa_deploy.demo.codec import BlockCodec
from ispa_deploy.demo.prompts import OPEN, embed
from ispa_deploy.demo.scene import make_scenes, random_attributes, render
from ispa_deploy.model import Attend, CausalWanDiT
from ispa_deploy.rope import Rope
from ispa_deploy.specs import SPECS, ModelSpec

SPEC = SPECS["demo"]
CODEC = BlockCodec()


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights beside the code."""

    steps: int = 5600
    clips: int = 4
    first_chunks: int = 8
    first_chunk_weight: float = 0.25
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    warm_up: int = 60
    ema: float = 0.995
    open_share: float = 0.08
    jump_share: float = 0.5
    longest_jump: int = 60
    history_noise: float = 0.2
    history_noise_share: float = 0.7
    seed: int = 0

    def rate(self, step: int) -> float:
        """Share of the full learning rate: warm-up, constant, linear decay over the second half."""
        return min(1.0, (step + 1) / self.warm_up) * min(1.0, max(0.02, 2 * (1 - step / self.steps)))


@dataclass(frozen=True)
class Batch:
    """Clean and noisy latents (B, F, C, H, W), their times (B, F) in [0, 1], velocity target and its weight (B, F)."""

    clean: Tensor
    noisy: Tensor
    time: Tensor
    target: Tensor
    weight: Tensor
    text: Tensor


class TeacherForcing:
    """The memory of a training pass over S = (clean + noisy) frames: chunk-causal attention without a cache."""

    def __init__(self, spec: ModelSpec, frames: int, *, history: bool):
        turn = (
            Rope(spec.head_dim, spec.grid, theta=spec.rope_theta)
            .frames(range(frames))
            .repeat(2 if history else 1, 1, 1)
        )
        self.cos, self.sin = turn.real.contiguous(), turn.imag.contiguous()
        self.span, self.history = spec.chunk_frames * spec.frame_tokens, history

    def layer(self, index: int) -> Attend:
        return self.attend

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (self._rotate(x).transpose(1, 2).to(v.dtype) for x in (q, k))
        v = v.transpose(1, 2)
        if not self.history:
            return _softmax_attention(q, k, v).transpose(1, 2)
        half, span = q.shape[2] // 2, self.span
        out: list[Tensor] = []
        for offset in (0, half):
            for first in range(0, half, span):
                own = slice(offset + first, offset + first + span)
                keys, values = (torch.cat([x[:, :, :first], x[:, :, own]], 2) for x in (k, v))
                out.append(_softmax_attention(q[:, :, own], keys, values))
        return torch.cat(out, 2).transpose(1, 2)

    def cross(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q.to(v.dtype), k.to(v.dtype), v))
        return _softmax_attention(q, k, v).transpose(1, 2)

    def _rotate(self, x: Tensor) -> Tensor:
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * self.cos - odd * self.sin, even * self.sin + odd * self.cos], -1).flatten(-2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Explicit products: the fused CPU kernel's backward is several times slower at a few dozen queries."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1).to(v.dtype) @ v


def draw(recipe: Recipe, count: int, frames: int, generator: torch.Generator) -> Batch:
    """One batch of clips with independent noise levels per chunk."""
    chunk = SPEC.chunk_frames
    attributes = random_attributes(count, generator)
    jumped = torch.rand(count, 1, generator=generator) < recipe.jump_share * (frames > chunk)
    jump = torch.randint(0, recipe.longest_jump, (count, 1), generator=generator) * jumped
    times = torch.arange(frames).expand(count, -1) + jump * (torch.arange(frames) > 0)
    clean = CODEC.encode(render(make_scenes(attributes, generator), times.float()))
    level = torch.sigmoid(1.2 * torch.randn(count, frames // chunk, generator=generator)).repeat_interleave(chunk, 1)
    t = SPEC.shift * level / (1 + (SPEC.shift - 1) * level)
    noise = torch.randn(clean.shape, generator=generator)
    blurred = torch.rand(count, 1, generator=generator) < recipe.history_noise_share
    blur = recipe.history_noise * torch.rand(count, frames, generator=generator) * blurred
    weight = torch.ones(count, frames)
    weight[:, :chunk] = (~jumped).float()  # a first chunk that jumps is no first chunk
    opened = torch.rand(attributes.shape, generator=generator) < recipe.open_share
    return Batch(
        clean=_mix(clean, torch.randn(clean.shape, generator=generator), blur),
        noisy=_mix(clean, noise, t),
        time=t,
        target=noise - clean,
        weight=weight,
        text=embed(attributes.masked_fill(opened, OPEN)),
    )


def _mix(clean: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    share = share[..., None, None, None]
    return (1 - share) * clean + share * noise


def loss_of(model: CausalWanDiT, batch: Batch, memory: TeacherForcing) -> Tensor:
    """Mean squared velocity error per frame, (B, F)."""
    x, t = batch.noisy, batch.time
    if memory.history:
        x, t = torch.cat([batch.clean, x], 1), torch.cat([torch.zeros_like(t), t], 1)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(x, model.condition(1000 * t), model.encode_text(batch.text), memory)
    velocity = velocity[:, -batch.target.shape[1] :]
    return (velocity.float() - batch.target).square().mean((2, 3, 4))


class Trainer:
    """Model, its moving average and both optimisers; Muon for the layers' matrices, AdamW for the rest."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(recipe.seed)
        self.recipe, self.step = recipe, 0
        self.model = initialise(CausalWanDiT(SPEC))
        matrices = [p for name, p in self.model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
        rest = [p for name, p in self.model.named_parameters() if not (name.startswith("blocks.") and p.ndim == 2)]
        self.optimisers = (
            torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=0.01, momentum=0.95),
            torch.optim.AdamW(rest, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.average = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.clip_memory = TeacherForcing(SPEC, SPEC.window_frames, history=True)
        self.first_memory = TeacherForcing(SPEC, SPEC.chunk_frames, history=False)

    def advance(self) -> tuple[float, float, float]:
        """One step; returns the mean loss of first chunks, of first chunks within clips, and of the later frames."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        for optimiser, rate in zip(self.optimisers, (recipe.muon_rate, recipe.adam_rate), strict=True):
            optimiser.param_groups[0]["lr"] = rate * recipe.rate(self.step)
        clips = draw(recipe, recipe.clips, SPEC.window_frames, generator)
        per_frame = loss_of(self.model, clips, self.clip_memory)
        (per_frame * clips.weight).mean().backward()
        first = draw(recipe, recipe.first_chunks, SPEC.chunk_frames, generator)
        first_loss = loss_of(self.model, first, self.first_memory).mean()
        (recipe.first_chunk_weight * first_loss).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()  # type: ignore[no-untyped-call]
            optimiser.zero_grad()
        decay = min(recipe.ema, (self.step + 1) / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.model.state_dict().values()), 1 - decay)
        self.step += 1
        chunk = SPEC.chunk_frames
        return first_loss.item(), per_frame[:, :chunk].mean().item(), per_frame[:, chunk:].mean().item()

    def save_state(self, path: Path) -> None:
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        _replace(path, lambda target: torch.save(state, target))

    def load_state(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)

    def save_weights(self, path: Path) -> None:
        """The moving average in float16, with what it was trained by in the header."""
        half = {key: value.to(torch.float16).contiguous() for key, value in self.average.items()}
        about = {"format": "pt", "model": "demo", "step": str(self.step), "recipe": repr(self.recipe)}
        _replace(path, lambda target: save_file(half, target, metadata=about))


def initialise(model: CausalWanDiT) -> CausalWanDiT:
    """The network starts as the identity of its residual stream, with an output of zero."""
    zeroed = ("head.head.weight", "head.head.bias", "time_projection.1.weight", "time_projection.1.bias")
    for name, parameter in model.named_parameters():
        if name in zeroed or name.endswith(("self_attn.o.bias", "ffn.2.bias")):
            nn.init.zeros_(parameter)
    return model


def _replace(path: Path, write: object) -> None:
    partial = path.with_name(f".{path.name}.partial")
    write(partial)  # type: ignore[operator]
    os.replace(partial, path)


def compile_blocks(model: CausalWanDiT) -> bool:
    """Compile one layer for all of them; False without a C++ compiler, where training is eager and slower."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return False
    for block in model.blocks:
        block.compile(dynamic=False)
    return True


def _progress(trainer: Trainer, every: int) -> Iterator[str]:
    averages, since, started = [0.0] * 3, 0, time.monotonic()
    while trainer.step < trainer.recipe.steps:
        losses = trainer.advance()
        since += 1
        averages = [a + (b - a) / min(since, 50) for a, b in zip(averages, losses, strict=True)]
        if trainer.step % every == 0 or since == 3:
            names = ("first", "first in clip", "later")
            text = "  ".join(f"{name} {value:.4f}" for name, value in zip(names, averages, strict=True))
            yield f"step {trainer.step}  {(time.monotonic() - started) / since:.2f} s/step  {text}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ispa_deploy.demo.train", description="Train the embedded model.")
    parser.add_argument("--out", type=Path, default=Path("demo.safetensors"), help="where the weights go")
    parser.add_argument("--state", type=Path, help="resumable training state (default: beside --out, suffix .state)")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    trainer = Trainer(Recipe(steps=options.steps, seed=options.seed))
    state = options.state or options.out.with_suffix(".state")
    if state.exists():
        trainer.load_state(state)
    compiled = not options.eager and compile_blocks(trainer.model)
    size = sum(p.numel() for p in trainer.model.parameters())
    print(f"{size / 1e6:.2f} M parameters, step {trainer.step} of {options.steps}, compiled: {compiled}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        for line in _progress(trainer, 50):
            print(line, flush=True)
            if trainer.step % options.save_every == 0:
                trainer.save_state(state)
                trainer.save_weights(options.out)
    trainer.save_state(state)
    trainer.save_weights(options.out)
    assert math.isfinite(sum(float(value.sum()) for value in trainer.average.values()))


if __name__ == "__main__":
    main()
