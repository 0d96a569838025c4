"""The demo world: a sprite that bounces over a static background, analytic in time, so any frame can be drawn alone.

Backgrounds carry three blobs that no prompt names: landmarks that a model can only know from its own history, which is
what makes forgetting visible. Positions and lengths are pixels, times are frames; (x, y) with y pointing down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 40
"""Height and width of a frame in pixels."""

_BLOBS = 3
_BLOB_OPACITY = 0.7
_SPRITE_SHARPNESS, _BLOB_SHARPNESS = 2.2, 1.5  # edges about a pixel wide: what the codec can still carry
_WALL_GAP = 0.5

Colour = tuple[float, float, float]
Distance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(dx, dy, radius) -> signed distance to the outline in pixels, negative inside; all broadcast."""


def _disc(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    return _length(dx, dy) - radius


def _square(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(dx.abs(), dy.abs()) - 0.85 * radius


def _triangle(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(dy - 0.7 * radius, 0.866 * dx.abs() - 0.5 * dy - 0.55 * radius)


def _ring(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    return (_length(dx, dy) - 0.72 * radius).abs() - 0.3 * radius


def _length(dx: Tensor, dy: Tensor) -> Tensor:
    return (dx.square() + dy.square() + 1e-6).sqrt()


@dataclass(frozen=True)
class _Waves:
    """What a pattern is drawn from: rotated coordinates in pixels, wave number, two phases and u at the centre."""

    u: Tensor
    w: Tensor
    k: Tensor
    first: Tensor
    second: Tensor
    centre: Tensor


def _gradient(at: _Waves) -> Tensor:
    return (at.u - at.centre) / (0.7 * SIDE)


def _stripes(at: _Waves) -> Tensor:
    return torch.tanh(2.0 * torch.sin(at.k * at.u + at.first))


def _checks(at: _Waves) -> Tensor:
    return torch.tanh(3.0 * torch.sin(at.k * at.u + at.first) * torch.sin(at.k * at.w + at.second))


def _wavy(at: _Waves) -> Tensor:
    return torch.sin(at.k * at.u + at.first + 1.5 * torch.sin(0.5 * at.k * at.w + at.second))


SPEEDS: dict[str, tuple[float, float]] = {"slow": (0.9, 1.3), "fast": (2.0, 2.6)}
"""Lowest and highest pixels per frame."""

COLOURS: dict[str, Colour] = {
    "red": (0.95, 0.15, 0.12),
    "green": (0.15, 0.85, 0.20),
    "blue": (0.15, 0.30, 0.98),
    "yellow": (0.98, 0.90, 0.15),
    "magenta": (0.95, 0.20, 0.90),
    "white": (0.97, 0.97, 0.97),
}
SHAPES: dict[str, Distance] = {"disc": _disc, "square": _square, "triangle": _triangle, "ring": _ring}
GROUNDS: dict[str, Colour] = {
    "gray": (0.45, 0.45, 0.45),
    "brown": (0.50, 0.33, 0.20),
    "navy": (0.16, 0.20, 0.45),
    "teal": (0.12, 0.42, 0.42),
    "plum": (0.42, 0.20, 0.42),
}
PATTERNS: dict[str, Callable[[_Waves], Tensor]] = {
    "gradient": _gradient,
    "stripes": _stripes,
    "checks": _checks,
    "waves": _wavy,
}

ATTRIBUTES: tuple[tuple[str, ...], ...] = tuple(tuple(table) for table in (SPEEDS, COLOURS, SHAPES, GROUNDS, PATTERNS))
"""The words of each attribute, in the order of an attribute row: speed, colour, shape, ground, pattern."""


@dataclass(frozen=True)
class Scene:
    """B scenes. What the prompt says is in `attributes`; the rest is drawn at random and named by no word."""

    attributes: Tensor  # (B, 5) int64, ids within each attribute
    radius: Tensor  # (B,)
    velocity: Tensor  # (B, 2) pixels per frame
    start: Tensor  # (B, 2) in [0, 1): share of the way between the walls at time 0
    phase: Tensor  # (B, 2) radians
    angle: Tensor  # (B,) radians
    period: Tensor  # (B,)
    amplitude: Tensor  # (B,)
    blob_centre: Tensor  # (B, 3, 2)
    blob_radius: Tensor  # (B, 3)
    blob_colour: Tensor  # (B, 3, 3) in [0, 1)


def random_attributes(count: int, generator: torch.Generator) -> Tensor:
    """-> (count, 5) int64, each word of an attribute equally likely."""
    return torch.stack([torch.randint(len(words), (count,), generator=generator) for words in ATTRIBUTES], 1)


def make_scenes(attributes: Tensor, generator: torch.Generator) -> Scene:
    """(B, 5) int64 attribute ids, none open -> B scenes, on the CPU, fixed by the generator's state."""
    assert attributes.ndim == 2, attributes.shape
    count = len(attributes)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    slowest, fastest = torch.tensor(list(SPEEDS.values()))[attributes[:, 0]].unbind(1)
    speed = slowest + (fastest - slowest) * uniform(0, 1)
    heading = uniform(0, 2 * math.pi)
    return Scene(
        attributes=attributes,
        radius=uniform(5.0, 6.5),
        velocity=speed[:, None] * torch.stack([heading.cos(), heading.sin()], 1),
        start=uniform(0, 1, 2),
        phase=uniform(0, 2 * math.pi, 2),
        angle=uniform(0, math.pi),
        period=uniform(11, 17),
        amplitude=uniform(0.10, 0.18),
        blob_centre=uniform(0, SIDE, _BLOBS, 2),
        blob_radius=uniform(3, 6, _BLOBS),
        blob_colour=uniform(0, 1, _BLOBS, 3),
    )


def render(scene: Scene, times: Tensor) -> Tensor:
    """(B, F) frame times, whole or not -> (B, F, 3, 40, 40) float32 in [0, 1]."""
    assert times.shape[:1] == scene.radius.shape, (times.shape, scene.radius.shape)
    mask = sprite_mask(scene, times)[:, :, None]
    colour = torch.tensor(list(COLOURS.values()))[scene.attributes[:, 1]][:, None, :, None, None]
    return torch.lerp(background(scene)[:, None], colour, mask)


def background(scene: Scene) -> Tensor:
    """-> (B, 3, 40, 40) float32 in [0, 1]: the scene without its sprite."""
    ground = torch.tensor(list(GROUNDS.values()))[scene.attributes[:, 3]][:, :, None, None]
    image = ground + (scene.amplitude[:, None, None] * _pattern(scene))[:, None]
    x, y = pixel_grid()
    for blob in range(_BLOBS):
        centre_x, centre_y = scene.blob_centre[:, blob, :, None, None].unbind(1)
        inside = scene.blob_radius[:, blob, None, None] - _length(x - centre_x, y - centre_y)
        opacity = _BLOB_OPACITY * torch.sigmoid(_BLOB_SHARPNESS * inside)
        image = torch.lerp(image, 0.15 + 0.6 * scene.blob_colour[:, blob, :, None, None], opacity[:, None])
    return image.clamp(0, 1)


def centres(scene: Scene, times: Tensor) -> Tensor:
    """(B, F) -> (B, F, 2): sprite centres; each axis is a triangle wave between the walls."""
    low = scene.radius[:, None, None] + _WALL_GAP
    span = SIDE - 2 * low
    travelled = scene.start[:, None] * span + scene.velocity[:, None] * times[..., None].float()
    folded = torch.remainder(travelled, 2 * span)
    return low + torch.minimum(folded, 2 * span - folded)


def sprite_mask(scene: Scene, times: Tensor) -> Tensor:
    """(B, F) -> (B, F, 40, 40) in (0, 1): the sprite's opacity."""
    x, y = pixel_grid()
    centre_x, centre_y = centres(scene, times)[..., None, None].unbind(2)
    dx, dy = x - centre_x, y - centre_y
    distance = torch.empty(*times.shape, SIDE, SIDE)
    for index, shape in enumerate(SHAPES.values()):
        chosen = (scene.attributes[:, 2] == index).nonzero()[:, 0]
        distance[chosen] = shape(dx[chosen], dy[chosen], scene.radius[chosen, None, None, None])
    return torch.sigmoid(-_SPRITE_SHARPNESS * distance)


def pixel_grid() -> tuple[Tensor, Tensor]:
    """x and y of the pixel centres, (1, 40) and (40, 1): broadcast, never materialised."""
    centre = torch.arange(SIDE) + 0.5
    return centre[None, :], centre[:, None]


def _pattern(scene: Scene) -> Tensor:
    """-> (B, 40, 40), about -1 to 1."""
    x, y = pixel_grid()
    cos, sin = (f(scene.angle)[:, None, None] for f in (torch.cos, torch.sin))
    first, second = scene.phase[..., None, None].unbind(1)
    at = _Waves(
        u=cos * x + sin * y,
        w=cos * y - sin * x,
        k=(2 * math.pi / scene.period)[:, None, None],
        first=first,
        second=second,
        centre=0.5 * SIDE * (cos + sin),
    )
    drawn = torch.stack([pattern(at) for pattern in PATTERNS.values()], 1)
    return drawn[torch.arange(len(drawn)), scene.attributes[:, 4]]
