"""Measures of any video or latent, paired with a reference or of the video alone.

Frames are (F, 3, H, W) in [0, 1]. Every function returns one Python float and computes in float32 or better, whatever
the dtype it is given.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ispa_deploy.errors import InputError

CEILING_DB = 100.0
"""PSNR of identical frames: finite, so that means and JSON stay numbers."""


def decibels(mse: Tensor) -> Tensor:
    """Mean square error of values in [0, 1] -> PSNR in dB, at most `CEILING_DB`; element by element."""
    return -10 * torch.log10(mse.clamp_min(10 ** (-CEILING_DB / 10)))


def psnr(a: Tensor, b: Tensor) -> float:
    """Two videos (F, 3, H, W) -> dB of their pooled error (a mean of dB would let one perfect frame hide the rest)."""
    _same_shape(a, b)
    return float(decibels((a.double() - b.double()).square().mean()))


def ssim(a: Tensor, b: Tensor, window: int = 11, sigma: float = 1.5) -> float:
    """Structural similarity (Wang et al., 2004) of two videos (F, 3, H, W): per channel, mean over frames and pixels.

    Only windows that lie wholly inside the frame count, so both sides must be at least `window` pixels.
    """
    _same_shape(a, b)
    if a.ndim != 4 or min(a.shape[-2:]) < window:
        raise InputError(f"ssim of frames of shape {tuple(a.shape)}: expected (F, C, H, W), sides {window} or more")
    x, y = (video.double().flatten(0, 1)[:, None] for video in (a, b))  # moments cancel badly in float32
    kernel = _gaussian(window, sigma, x)

    def local_mean(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, kernel[None, None, :, None]), kernel[None, None, None, :])

    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mean_x.square(), local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))).mean())


def latent_relative_error(x: Tensor, reference: Tensor) -> float:
    """||x - reference||^2 / ||reference||^2 over all elements; 0 for two zeros, inf for a zero reference alone."""
    _same_shape(x, reference)
    error = float((x.double() - reference.double()).square().sum())
    size = float(reference.double().square().sum())
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return error / size


def latent_cosine(x: Tensor, reference: Tensor) -> float:
    """Cosine of the angle between two tensors taken as vectors; 0 if either is zero."""
    _same_shape(x, reference)
    return float(F.cosine_similarity(x.double().flatten(), reference.double().flatten(), dim=0))


def flicker(frames: Tensor, mask: Tensor | None = None) -> float:
    """Mean absolute change between consecutive frames (F, 3, H, W), on the scale 0 to 255; 0 where nothing is compared.

    `mask`: bool, (F, H, W) or (H, W); a pixel counts between two frames if it is in the mask of both.
    """
    change = (frames[1:].float() - frames[:-1].float()).abs().mean(1)
    if mask is None:
        mask = torch.ones_like(frames[:, 0], dtype=torch.bool)
    mask = mask.expand(frames.shape[0], *frames.shape[2:])
    counted = change[mask[1:] & mask[:-1]]
    return 255 * float(counted.mean()) if counted.numel() else 0.0


def _gaussian(window: int, sigma: float, like: Tensor) -> Tensor:
    offset = torch.arange(window, dtype=like.dtype, device=like.device) - (window - 1) / 2
    weight = torch.exp(-offset.square() / (2 * sigma**2))
    return weight / weight.sum()


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or not a.numel():
        raise InputError(f"cannot compare shapes {tuple(a.shape)} and {tuple(b.shape)}: expected two alike, not empty")
