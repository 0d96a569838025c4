"""Noise levels, x0 and renoising against recorded tables and plain formulas."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ispa_deploy.sampler import ChunkNoise, Sampler, Schedule, denoise_by_euler, denoise_by_renoising, sigma_table
from ispa_deploy.specs import SPECS
from tests.parity import Fixture

DATA = Path(__file__).parent / "data"
# Fixtures of several scenarios hold each one's timesteps instead, which their replay compares.
RECORDED = sorted(path for path in DATA.glob("*.safetensors") if path.stem not in ("krea_tiny", "liveavatar_tiny"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_table_is_the_recorded_one_bit_for_bit(path: Path) -> None:
    fixture, tensors = Fixture.load(path), load_file(path)
    table = sigma_table(fixture.config["timestep_shift"])
    assert torch.equal(table, tensors["scheduler/sigmas"])
    assert torch.equal(table * 1000, tensors["scheduler/timesteps"])


@pytest.mark.parametrize(
    ("shift", "timesteps"), [(5.0, (1000, 937.5, 833.3333, 625)), (8.0, (1000, 960, 888.8889, 727.2727))]
)
def test_warped_steps(shift: float, timesteps: tuple[float, ...]) -> None:
    schedule = Schedule.few_step((1000, 750, 500, 250), shift)
    assert schedule.timesteps == pytest.approx(timesteps, rel=1e-6)
    assert schedule.sigmas == pytest.approx([t / 1000 for t in timesteps], rel=1e-6)


def test_x0_is_formed_in_float64() -> None:
    x, flow = torch.randn(1, 1, 2, 3, 3) * 1e4, torch.randn(1, 1, 2, 3, 3) * 1e4
    schedule = Schedule((937.5,), (float(torch.tensor(0.9375)),))
    x0 = denoise_by_renoising(lambda _, t: flow, lambda step: x, schedule)
    assert torch.equal(x0, (x.double() - 0.9375 * flow.double()).float())
    assert x0.dtype == torch.float32


def test_each_level_gets_fresh_noise_and_its_own_share() -> None:
    schedule = Schedule.few_step((1000, 500), 5.0)
    draws = [torch.full((1, 1, 1, 1, 1), value) for value in (3.0, 7.0)]
    seen: list[float] = []

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.extend((float(x), t))
        return x - 2.0

    x0 = denoise_by_renoising(velocity, draws.__getitem__, schedule)
    sigma = schedule.sigmas[1]
    second = (1 - sigma) * 2.0 + sigma * 7.0  # x0 of the first level is 3 - 1 * (3 - 2) = 2
    assert seen == pytest.approx([3.0, 1000.0, second, schedule.timesteps[1]])
    assert float(x0) == pytest.approx(second - sigma * (second - 2.0))


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_euler_is_exact_on_a_straight_path(steps: int) -> None:
    noise, x0 = torch.randn(1, 3, 2, 2, 2), torch.randn(1, 3, 2, 2, 2)
    found = denoise_by_euler(lambda x, t: noise - x0, lambda step: noise, Schedule.even(steps, 3.0))
    torch.testing.assert_close(found, x0)


def test_only_the_first_chunk_takes_the_first_schedule() -> None:
    sampler, counts = Sampler.of(SPECS["demo"]), []
    for chunk in (0, 1):
        passes = Counter[float]()

        def velocity(x: torch.Tensor, t: float, passes: Counter[float] = passes) -> torch.Tensor:
            passes[t] += 1
            return x

        sampler.denoise(chunk, velocity, lambda step: torch.zeros(1, 1, 1, 1, 1))
        counts.append(passes.total())
    assert counts == [SPECS["demo"].first_steps, len(SPECS["demo"].steps)]


def test_noise_depends_on_seed_chunk_and_pass_alone() -> None:
    shape = (1, 2, 3, 3)
    draws = {
        key: ChunkNoise(key[0], shape, torch.device("cpu"))(key[1], 3, key[2])
        for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    }
    again = ChunkNoise(0, shape, torch.device("cpu"))(0, 3, 0)
    assert torch.equal(again, draws[0, 0, 0])
    assert len({tuple(draw.flatten().tolist()) for draw in draws.values()}) == 4
    assert again.shape == (1, 3, 2, 3, 3)
