"""What can be measured of a demo video because its world is known: the sprite, its path, and the ground behind.

Read `background_psnr` and `flicker` beside `speed`: a video that freezes looks perfectly consistent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ispa_deploy.demo.prompts import OPEN
from ispa_deploy.demo.scene import COLOURS, SHAPES, SIDE, pixel_grid
from ispa_deploy.errors import InputError
from ispa_deploy.evaluate.metrics import decibels, flicker

_FARTHEST_COLOUR = 0.42  # RGB distance within which a pixel may count as sprite, whatever lies behind it
_LEAST_CONTRAST = 0.15  # RGB distance between sprite and ground below which a pixel cannot tell them apart
_HALO = 5  # pixels: the sprite is widened by two on each side before what is left counts as background
_PLAUSIBLE_AREA = (0.5, 1.7)  # of the sprite's area in the warm-up
_SPRITE_PIXELS = (45.0, 135.0)  # the smallest triangle and the largest disc of the world
_SCALES = (0.92, 1.0, 1.08)  # radii tried around the one that the area suggests: edges are soft
_LEAST_IOU = 0.5

_AREA = {"disc": math.pi, "square": 1.7**2, "triangle": 1.871, "ring": math.pi * (1.02**2 - 0.42**2)}
_CENTROID = {"disc": 0.0, "square": 0.0, "triangle": 0.1, "ring": 0.0}  # y, below the origin; both for a radius of 1


@dataclass(frozen=True)
class _Sprite:
    """The prompted colour, frame by frame."""

    mask: Tensor  # (F, 40, 40) bool
    area: Tensor  # (F,) pixels
    centre: Tensor  # (F, 2) x, y; meaningless where the area is 0


def scene_report(pixels: Tensor, attributes: Tensor, reference_pixels: Tensor) -> dict[str, float]:
    """Judge a video (F, 3, 40, 40) in [0, 1] by its prompt (5,) and by its own warm-up (W, 3, 40, 40).

    `background_psnr`: dB of what is not sprite against the warm-up's median background, mean over frames.
    `flicker`: mean |change| of that background between frames, 0 to 255.
    `present`: share of frames with the prompted colour in an area like the warm-up's.
    `shape`: share of frames whose best template is the prompted shape (any shape, if the prompt leaves it open);
    `shape_iou`: that shape's mean overlap with its template.
    `speed`: mean pixels per frame of the sprite's centroid, `path`: their sum; over pairs of frames that both have one.
    InputError for other shapes, an empty video or a prompt without a colour.
    """
    _check(pixels, attributes, reference_pixels)
    pixels, reference = pixels.float().cpu(), reference_pixels.float().cpu()
    colour, shape = torch.tensor(list(COLOURS.values())[int(attributes[1])]), int(attributes[2])
    ground, known = _median_background(reference, colour)
    sprite, before = (_sprite(_coloured(video, colour, ground)) for video in (pixels, reference))

    usual = before.area.median().clamp(*_SPRITE_PIXELS)
    low, high = (share * usual for share in _PLAUSIBLE_AREA)
    present = (sprite.area > low) & (sprite.area < high)
    judged = _background_mask(sprite.mask, known)
    error = ((pixels - ground).square().mean(1) * judged).sum((1, 2)) / judged.sum((1, 2)).clamp_min(1)
    right, overlap = _shape_match(sprite, shape)
    steps = torch.linalg.vector_norm(sprite.centre.diff(dim=0), dim=1)[present[1:] & present[:-1]]
    return {
        "background_psnr": float(decibels(error).mean()),
        "flicker": flicker(pixels, judged),
        "present": float(present.float().mean()),
        "shape": float(right.float().mean()),
        "shape_iou": float(overlap.mean()),
        "speed": float(steps.mean()) if len(steps) else 0.0,
        "path": float(steps.sum()),
    }


def _check(pixels: Tensor, attributes: Tensor, reference_pixels: Tensor) -> None:
    for name, video in (("video", pixels), ("warm-up", reference_pixels)):
        if video.ndim != 4 or video.shape[1:] != (3, SIDE, SIDE) or not len(video):
            raise InputError(f"demo {name} of shape {tuple(video.shape)}: expected (frames, 3, {SIDE}, {SIDE})")
    if attributes.shape != (5,) or attributes[1] == OPEN:
        raise InputError(
            f"attributes {attributes.tolist()}: the report follows the sprite by its colour, name one in the prompt"
        )


def _coloured(video: Tensor, colour: Tensor, ground: Tensor) -> Tensor:
    """(F, 3, 40, 40), (3,), (3, 40, 40) -> (F, 40, 40) bool: pixels near the colour, nearer than the ground is."""
    target = colour[:, None, None]
    contrast = torch.linalg.vector_norm(ground - target, dim=0)
    reach = (0.5 * contrast).clamp_max(_FARTHEST_COLOUR) * (contrast >= _LEAST_CONTRAST)
    near: Tensor = torch.linalg.vector_norm(video - target, dim=1) < reach
    return near


def _sprite(mask: Tensor) -> _Sprite:
    x, y = pixel_grid()
    area = mask.sum((1, 2)).float()
    centre = torch.stack([(mask * axis).sum((1, 2)) for axis in (x, y)], 1) / area.clamp_min(1)[:, None]
    return _Sprite(mask, area, centre)


def _median_background(reference: Tensor, colour: Tensor) -> tuple[Tensor, Tensor]:
    """-> (3, 40, 40) median of the frames in which a pixel is not sprite, (40, 40) bool: whether there was one.

    Where there was none the video's median colour stands in.
    """
    typical = reference.transpose(0, 1).flatten(1).median(1).values[:, None, None].expand(-1, SIDE, SIDE)
    hidden = _widen(_coloured(reference, colour, typical))[:, None]
    median = reference.masked_fill(hidden, float("nan")).nanmedian(0).values
    known = ~median.isnan().any(0)
    return torch.where(known, median, typical), known


def _background_mask(sprite: Tensor, known: Tensor) -> Tensor:
    """(F, 40, 40) bool, (40, 40) bool -> (F, 40, 40) bool: the pixels whose background is judged.

    A frame flooded with the sprite's colour is judged whole: it must not pass for one without errors.
    """
    judged = known & ~_widen(sprite)
    flooded = judged.sum((1, 2)) < 0.25 * known.sum()
    return torch.where(flooded[:, None, None], known, judged)


def _widen(mask: Tensor) -> Tensor:
    return F.max_pool2d(mask.float(), _HALO, stride=1, padding=_HALO // 2) > 0


def _shape_match(sprite: _Sprite, shape: int) -> tuple[Tensor, Tensor]:
    """-> (F,) bool: the prompted shape fits best and well enough; (F,) its overlap with the best of its templates."""
    overlaps = torch.stack([_best_overlap(sprite, name) for name in SHAPES], 1)
    best, index = overlaps.max(1)
    if shape == OPEN:
        return best > _LEAST_IOU, best
    return (index == shape) & (best > _LEAST_IOU), overlaps[:, shape]


def _best_overlap(sprite: _Sprite, name: str) -> Tensor:
    """-> (F,): intersection over union with one shape, put at the centroid with the area that was found."""
    radius = (sprite.area / _AREA[name]).clamp_min(1).sqrt()[:, None, None, None] * torch.tensor(_SCALES)[:, None, None]
    x, y = pixel_grid()
    centre_x, centre_y = sprite.centre[:, :, None, None, None].unbind(1)
    template = SHAPES[name](x - centre_x, y - centre_y + _CENTROID[name] * radius, radius) < 0
    mask = sprite.mask[:, None]
    union = (template | mask).sum((2, 3)).clamp_min(1)
    return ((template & mask).sum((2, 3)) / union).amax(1)
