"""The demo's stand-in for a VAE: a fixed linear code of each frame, exactly invertible on its own latents.

Each 8x8 block becomes 40 numbers: its lowest DCT frequencies in YCbCr, 24 of luma and 8 of each chroma. They are
divided by the square root of their spread (half-whitened): full whitening would make a model spend itself on the
faintest frequencies, none at all would let the averages drown the rest. Nothing is learnt or fitted at run time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ispa_deploy.demo.scene import SIDE, make_scenes, random_attributes, render
from ispa_deploy.errors import InputError

BLOCK = 8
KEPT = (24, 8, 8)
"""Frequencies kept of Y, Cb and Cr, lowest first."""

CHANNELS = sum(KEPT)
GRID = SIDE // BLOCK

_YCBCR = ((0.299, 0.587, 0.114), (-0.169, -0.331, 0.500), (0.500, -0.419, -0.081))
_GREY = 0.5  # taken off before the transform, so that an average frame codes to about zero

# What `fit` returns for seed 0, to four decimals; a test refits and compares.
# fmt: off
_MEAN = (
    -1.1576, 0.0010, -0.0128, -0.0035, 0.0002, -0.0043, -0.0003, -0.0002, 0.0003, -0.0022,
    -0.0005, 0.0001, 0.0000, 0.0002, 0.0001, -0.0002, 0.0000, -0.0004, 0.0001, 0.0000,
    -0.0006, -0.0001, 0.0000, -0.0001, 0.2072, -0.0001, -0.0007, 0.0011, 0.0002, -0.0001,
    0.0004, 0.0003, 0.0072, 0.0007, 0.0003, -0.0007, -0.0002, 0.0001, -0.0003, -0.0003,
)
_SCALE = (
    0.3531, 0.2447, 0.2464, 0.1769, 0.1955, 0.1753, 0.1075, 0.1384, 0.1378, 0.1086,
    0.0846, 0.0913, 0.1038, 0.0920, 0.0826, 0.0577, 0.0716, 0.0791, 0.0778, 0.0714,
    0.0595, 0.0460, 0.0503, 0.0597, 0.3138, 0.1662, 0.1666, 0.1138, 0.1217, 0.1130,
    0.0782, 0.0927, 0.3371, 0.1658, 0.1656, 0.1121, 0.1202, 0.1124, 0.0766, 0.0917,
)
# fmt: on


class BlockCodec:
    """Pixels to latents and back, in float32 on whatever device the input is."""

    def __init__(self) -> None:
        self.analysis, self.synthesis = _matrices()
        self.mean, self.scale = (torch.tensor(column)[:, None, None] for column in (_MEAN, _SCALE))

    def encode(self, pixels: Tensor) -> Tensor:
        """(..., F, 3, 40, 40) in [0, 1] -> (..., F, 40, 5, 5) float32, about unit variance over the demo world."""
        _expect(pixels, (3, SIDE, SIDE), "pixels")
        return (coefficients(pixels, self.analysis) - self.mean.to(pixels.device)) / self.scale.to(pixels.device)

    def decode(self, latents: Tensor) -> Tensor:
        """(..., F, 40, 5, 5) -> (..., F, 3, 40, 40) float32, clamped to [0, 1]."""
        _expect(latents, (CHANNELS, GRID, GRID), "latents")
        scaled = latents.float() * self.scale.to(latents.device) + self.mean.to(latents.device)
        blocks = _multiply(self.synthesis, scaled)
        return (F.pixel_shuffle(blocks, BLOCK) + _GREY).clamp(0, 1)


def coefficients(pixels: Tensor, analysis: Tensor) -> Tensor:
    """(..., 3, 40, 40), (40, 192) -> (..., 40, 5, 5): the kept frequencies of each block, not yet scaled."""
    return _multiply(analysis, F.pixel_unshuffle(pixels.float() - _GREY, BLOCK))


def fit(generator: torch.Generator, scenes: int = 2048) -> tuple[Tensor, Tensor]:
    """Mean and scale, (40,) each, over random scenes: scale = sqrt(std) * s, where s makes the overall variance one."""
    drawn = make_scenes(random_attributes(scenes, generator), generator)
    rows = coefficients(render(drawn, torch.zeros(scenes, 1)), _matrices()[0]).movedim(2, -1).reshape(-1, CHANNELS)
    centred = rows - rows.mean(0)
    root = centred.std(0).sqrt()
    return rows.mean(0), root * (centred / root).std()


def _matrices() -> tuple[Tensor, Tensor]:
    """Analysis (40, 192) and synthesis (192, 40); columns of a block are ordered (colour, row, column)."""
    index = torch.arange(BLOCK, dtype=torch.float64)
    cosines = math.sqrt(2 / BLOCK) * torch.cos(math.pi / BLOCK * torch.outer(index, index + 0.5))
    cosines[0] /= math.sqrt(2)
    planes = torch.stack([torch.outer(cosines[i], cosines[j]).flatten() for i, j in _zigzag()])  # (64, 64), orthonormal
    to_ycbcr = torch.tensor(_YCBCR, dtype=torch.float64)
    back = torch.linalg.inv(to_ycbcr).T.contiguous()  # row c: how much red, green and blue a unit of plane c is
    analysis, synthesis = (
        torch.cat([torch.kron(colour[c : c + 1], planes[:kept]) for c, kept in enumerate(KEPT)]).float()
        for colour in (to_ycbcr, back)
    )
    return analysis, synthesis.T


def _zigzag() -> list[tuple[int, int]]:
    """Frequencies (row, column) by rising diagonal, alternating direction, as JPEG orders them."""
    pairs = [(i, j) for i in range(BLOCK) for j in range(BLOCK)]
    return sorted(pairs, key=lambda at: (sum(at), at[0] if sum(at) % 2 else at[1]))


def _multiply(matrix: Tensor, blocks: Tensor) -> Tensor:
    """(O, I) times (..., I, 5, 5) -> (..., O, 5, 5), in float32 even where the caller runs under autocast."""
    with torch.autocast(blocks.device.type, enabled=False):
        return torch.einsum("oi,...ihw->...ohw", matrix.to(blocks.device), blocks)


def _expect(x: Tensor, shape: tuple[int, int, int], what: str) -> None:
    if x.ndim < 4 or tuple(x.shape[-3:]) != shape:
        expected = ", ".join(map(str, shape))
        raise InputError(f"demo codec: {what} of shape {tuple(x.shape)}: expected (..., frames, {expected})")
