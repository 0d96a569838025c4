"""Video measures against values known by construction and a direct evaluation of their definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ispa_deploy.errors import InputError
from ispa_deploy.evaluate.metrics import (
    CEILING_DB,
    flicker,
    latent_cosine,
    latent_relative_error,
    psnr,
    ssim,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_constant_error() -> None:
    a = 0.5 * noise(4, 3, 16, 16)
    assert psnr(a, a + 0.1) == pytest.approx(20, abs=1e-4)
    assert psnr(a, a) == CEILING_DB


def test_psnr_pools_frames_before_the_logarithm() -> None:
    a = torch.zeros(4, 3, 8, 8)
    b = a.clone()
    b[3] = 0.2  # a quarter of the pixels off by 0.2: mse 0.01
    assert psnr(a, b) == pytest.approx(20, abs=1e-4)


def test_ssim_of_a_video_with_itself_is_one() -> None:
    a = noise(3, 3, 24, 20)
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)


def test_ssim_of_flat_frames_is_its_luminance_term() -> None:
    a, b = torch.full((2, 3, 16, 16), 0.25), torch.full((2, 3, 16, 16), 0.75)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ssim(a, b) == pytest.approx(expected, abs=1e-6)


def test_ssim_agrees_with_its_definition_window_by_window() -> None:
    a, b = noise(2, 3, 12, 10, seed=1).double(), noise(2, 3, 12, 10, seed=2).double()
    side, sigma = 7, 1.5
    line = [math.exp(-((i - 3) ** 2) / (2 * sigma**2)) for i in range(side)]
    weight = torch.tensor([[p * q for q in line] for p in line], dtype=torch.float64)
    weight /= weight.sum()
    found = []
    for top in range(12 - side + 1):
        for left in range(10 - side + 1):
            x, y = (v[:, :, top : top + side, left : left + side] for v in (a, b))
            mx, my = ((weight * v).sum((2, 3), keepdim=True) for v in (x, y))
            vx, vy = (weight * (x - mx) ** 2).sum((2, 3)), (weight * (y - my) ** 2).sum((2, 3))
            both = (weight * (x - mx) * (y - my)).sum((2, 3))
            mx, my = mx[..., 0, 0], my[..., 0, 0]
            luminance = (2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4)
            found.append(luminance * (2 * both + 9e-4) / (vx + vy + 9e-4))
    assert ssim(a, b, window=side, sigma=sigma) == pytest.approx(float(torch.stack(found).mean()), abs=1e-9)


def test_ssim_falls_as_noise_grows() -> None:
    a = torch.linspace(0, 1, 32).expand(2, 3, 32, 32)
    scores = [ssim(a, a + level * (noise(2, 3, 32, 32) - 0.5)) for level in (0, 0.05, 0.2, 1)]
    assert scores == sorted(scores, reverse=True)


def test_ssim_refuses_frames_smaller_than_its_window() -> None:
    with pytest.raises(InputError, match="11 or more"):
        ssim(noise(1, 3, 8, 40), noise(1, 3, 8, 40))


def test_relative_error_and_cosine_of_known_vectors() -> None:
    reference = noise(3, 40, 5, 5) - 0.5
    assert latent_relative_error(reference, reference) == 0
    assert latent_relative_error(1.1 * reference, reference) == pytest.approx(0.01, rel=1e-5)
    assert latent_relative_error(torch.zeros_like(reference), reference) == pytest.approx(1)
    assert latent_cosine(3 * reference, reference) == pytest.approx(1)
    assert latent_cosine(-reference, reference) == pytest.approx(-1)
    assert latent_cosine(torch.tensor([1.0, 0]), torch.tensor([1.0, 1])) == pytest.approx(2**-0.5)


def test_relative_error_of_zeros() -> None:
    zero = torch.zeros(4)
    assert latent_relative_error(zero, zero) == 0
    assert latent_relative_error(zero + 1, zero) == math.inf
    assert latent_cosine(zero + 1, zero) == 0


def test_flicker_of_a_ramp_in_grey_levels() -> None:
    video = torch.arange(5.0)[:, None, None, None].expand(5, 3, 8, 8) * 2 / 255
    assert flicker(video) == pytest.approx(2, rel=1e-5)
    assert flicker(video[:1]) == 0


def test_flicker_counts_only_pixels_masked_in_both_frames() -> None:
    video = torch.zeros(3, 3, 4, 4)
    video[1, :, 0, 0] = 1  # changes twice, in one pixel
    assert flicker(video) == pytest.approx(255 / 16)
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    mask[1, 0, 0] = False
    assert flicker(video, mask) == 0
    corner = torch.zeros(4, 4, dtype=torch.bool)
    corner[0, 0] = True
    assert flicker(video, corner) == pytest.approx(255)
    assert flicker(video, ~corner & corner) == 0


@pytest.mark.parametrize("measure", [psnr, ssim, latent_relative_error, latent_cosine])
def test_shapes_that_differ_are_refused(measure) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="expected two alike"):
        measure(noise(2, 3, 16, 16), noise(3, 3, 16, 16))
    with pytest.raises(InputError, match="not empty"):
        measure(noise(0, 3, 16, 16), noise(0, 3, 16, 16))
