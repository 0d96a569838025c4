"""Sampling of distilled few-step flow models: x0 from velocity, then fresh noise down to the next level.

σ is the noise share of x = (1 - σ) x0 + σ n; a timestep is 1000 σ. The table is upstream's: 1000 levels in float32,
shifted by s σ / (1 + (s - 1) σ); steps are counted down from 1000 into it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ispa_deploy.regions import region
from ispa_deploy.specs import ModelSpec

LEVELS = 1000

Velocity = Callable[[Tensor, float], Tensor]
"""x (B, F, C, H, W) float32 and a timestep -> velocity of the same shape."""
Noise = Callable[[int], Tensor]
"""Number of the pass within the chunk -> standard normal noise (B, F, C, H, W) float32."""


def sigma_table(shift: float) -> Tensor:
    """(1000,) float32, from 1 downwards."""
    sigma = torch.linspace(1.0, 0.0, LEVELS + 1, dtype=torch.float32)[:-1]
    return shift * sigma / (1 + (shift - 1) * sigma)


def even_steps(count: int, strength: float = 1.0) -> tuple[int, ...]:
    """`count` steps from 1000 * `strength` down to 0, as Krea's server spaces them: float32, cut to integers."""
    return tuple(torch.linspace(strength * LEVELS, 0, count, dtype=torch.float32).long().tolist())


@dataclass(frozen=True)
class Schedule:
    """Timesteps of a chunk's denoising passes, float32 values, and their noise levels: what the model's velocity is
    taken at, and, where upstream mixes fresh noise in by another table, that one's."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    mixed: tuple[float, ...] | None = None

    @staticmethod
    def few_step(steps: tuple[int, ...], shift: float) -> Schedule:
        """Distilled steps such as (1000, 750, 500, 250). Step 0 is timestep 0 at the table's last, smallest level."""
        table = sigma_table(shift)
        sigmas = table[[min(LEVELS - step, LEVELS - 1) for step in steps]]
        times = torch.where(torch.tensor(steps) > 0, sigmas * LEVELS, 0.0)
        return Schedule(tuple(times.tolist()), tuple(sigmas.tolist()))

    @staticmethod
    def even(count: int, shift: float) -> Schedule:
        """`count` evenly spaced steps before the shift, for Euler integration."""
        sigma = 1 - torch.arange(count, dtype=torch.float32) / count
        sigmas = shift * sigma / (1 + (shift - 1) * sigma)
        return Schedule(tuple((sigmas * LEVELS).tolist()), tuple(sigmas.tolist()))

    @staticmethod
    def twice_shifted(count: int, shift: float) -> Schedule:
        """diffusers' `FlowMatchEulerDiscreteScheduler(1000, shift).set_timesteps(count)`: it shifts its table, spreads
        the steps evenly over what that leaves, and shifts them again."""
        least = float(sigma_table(shift)[-1])
        even = torch.linspace(LEVELS, LEVELS * least, count, dtype=torch.float64) / LEVELS
        sigmas = (shift * even / (1 + (shift - 1) * even)).float()
        return Schedule(tuple((sigmas * LEVELS).tolist()), tuple(sigmas.tolist()))


def denoise_by_renoising(velocity: Velocity, noise: Noise, schedule: Schedule) -> Tensor:
    """x0 of a chunk: at each level predict x0 in float64, then mix in fresh noise of the next level."""
    x = noise(0)
    mixed = schedule.mixed or schedule.sigmas
    for index, (timestep, sigma) in enumerate(zip(schedule.timesteps, schedule.sigmas, strict=True)):
        flow = velocity(x, timestep)
        with region("overhead.sampler"):
            x0 = (x.double() - sigma * flow.double()).to(x.dtype)
            if index + 1 < len(mixed):
                x = (1 - mixed[index + 1]) * x0 + mixed[index + 1] * noise(index + 1)
    return x0


def denoise_by_euler(velocity: Velocity, noise: Noise, schedule: Schedule) -> Tensor:
    """x0 of a chunk by Euler steps along the velocity, for models that were not distilled to few steps."""
    x = noise(0)
    for timestep, sigma, following in zip(
        schedule.timesteps, schedule.sigmas, (*schedule.sigmas[1:], 0.0), strict=True
    ):
        flow = velocity(x, timestep)
        with region("overhead.sampler"):
            x = x + (following - sigma) * flow.float()
    return x


@dataclass(frozen=True)
class ChunkNoise:
    """Noise keyed by (seed, chunk, pass): drawn on the CPU, so every device sees the same, and a longer stream keeps
    its early frames."""

    seed: int
    shape: tuple[int, ...]
    device: torch.device

    def __call__(self, chunk: int, frames: int, step: int) -> Tensor:
        """(B, F, C, H, W) float32 for pass `step` of chunk number `chunk`."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + chunk) * 1009 + step)
        batch, *rest = self.shape
        with region("overhead.sampler"):
            return torch.randn(batch, frames, *rest, generator=generator).to(self.device)


@dataclass(frozen=True)
class Sampler:
    """How a model's chunks are denoised, by renoising or in `euler` steps: the first one may take its own way."""

    schedule: Schedule
    first: Schedule | None = None
    euler: bool = False

    @staticmethod
    def of(spec: ModelSpec) -> Sampler:
        if spec.sampling == "euler":
            return Sampler(Schedule.twice_shifted(len(spec.steps), spec.shift), euler=True)
        first = Schedule.even(spec.first_steps, spec.shift) if spec.first_steps else None
        return Sampler(Schedule.few_step(spec.steps, spec.shift), first)

    def passes(self, chunk: int) -> int:
        """How many passes denoise that chunk."""
        schedule = self.first if chunk == 0 and self.first is not None else self.schedule
        return len(schedule.timesteps)

    def denoise(self, chunk: int, velocity: Velocity, noise: Noise) -> Tensor:
        if chunk == 0 and self.first is not None:
            return denoise_by_euler(velocity, noise, self.first)
        if self.euler:
            return denoise_by_euler(velocity, noise, self.schedule)
        return denoise_by_renoising(velocity, noise, self.schedule)
