"""Contact sheets: a few videos as rows of small pictures in one PNG, for the eye to compare."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ispa_deploy.errors import InputError, RunError
from ispa_deploy.media.output import output_path, partial_path
from ispa_deploy.media.video import to_uint8

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

GAP = 2  # pixels between pictures
MARGIN = 12  # pixels around the sheet, and between rows
MAX_TILE = 320  # pixels; wider pictures are shrunk, or a sheet of 480p video would be 10,000 pixels wide
COLUMNS = 12  # frames of a row
INK, FAINT, GROUND = "#222222", "#888888", "#ffffff"


@dataclass(frozen=True)
class _Row:
    """One video on the sheet: its label, the frames shown, and their pictures."""

    label: str
    numbers: tuple[int, ...]
    tiles: tuple[Image, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the pictures side by side."""
        width, height = self.tiles[0].size
        return len(self.tiles) * (width + GAP) - GAP, height


@dataclass
class Shown:
    """The frames of a video of `frames` that a contact sheet shows, taken as they come: no others are held.

    Of a video that ends early they are those up to there, and its last one.
    """

    frames: int
    columns: int = COLUMNS
    _kept: dict[int, Tensor] = field(default_factory=dict)
    _seen: int = 0

    def add(self, pixels: Tensor) -> None:
        """The next frames of the video, (F, 3, H, W) on any device."""
        if not len(pixels):
            return
        wanted = {*_spaced(self.frames, self.columns), self._seen + len(pixels) - 1}
        if self._seen - 1 not in wanted:
            self._kept.pop(self._seen - 1, None)  # the last one so far
        for index in range(len(pixels)):
            if self._seen + index in wanted:
                self._kept[self._seen + index] = pixels[index].to("cpu", copy=True)
        self._seen += len(pixels)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Which frames they are."""
        return tuple(self._kept)

    def video(self) -> Tensor:
        """(F, 3, H, W), those frames."""
        return torch.stack(list(self._kept.values()))


def contact_sheet(
    rows: Sequence[tuple[str, Tensor]],
    path: str | Path,
    *,
    columns: int = COLUMNS,
    scale: int = 2,
    numbers: Sequence[int] | None = None,
) -> Path:
    """Write a PNG with one row per (label, video) and return its path.

    A video is (F, 3, H, W) floats in [0, 1]; `columns` frames of it are shown, evenly spaced, the first and the last
    included, each with its number, which `numbers` tells of videos that are not whole. Pixels are repeated `scale`
    times; wider than 320 pixels, a picture is shrunk.
    InputError: not a `.png` name, its folder is missing or not writable. RunError: the disk does not take the file.
    """
    if columns < 1 or scale < 1:
        raise InputError(f"contact sheet of {columns} columns at scale {scale}: expected whole numbers from 1 on")
    target = output_path(path, ".png", "contact sheet")
    assert rows, "a contact sheet needs a row"
    partial = partial_path(target)
    try:
        _sheet([_row(label, video, columns, scale, numbers) for label, video in rows]).save(partial, format="PNG")
        os.replace(partial, target)
    except OSError as error:
        raise RunError(f"contact sheet '{target}' could not be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return target


def _spaced(frames: int, columns: int) -> tuple[int, ...]:
    """Numbers of at most `columns` frames, evenly spaced."""
    return tuple(int(n) for n in np.linspace(0, frames - 1, min(columns, frames)).round())


def _row(label: str, video: Tensor, columns: int, scale: int, known_as: Sequence[int] | None) -> _Row:
    """Pick the frames and make their pictures."""
    from PIL import Image

    frames, colours, *size = video.shape
    assert frames, "a row of the contact sheet needs a frame"
    assert (colours, len(size)) == (3, 2), f"expected (F, 3, H, W), got {tuple(video.shape)}"
    numbers = _spaced(frames, columns)
    height, width = size[0] * scale, size[1] * scale
    small = (MAX_TILE, max(1, round(height * MAX_TILE / width)))
    tiles = []
    for picture in to_uint8(video[list(numbers)]):
        tile = Image.fromarray(picture.repeat(scale, axis=0).repeat(scale, axis=1))
        tiles.append(tile.resize(small, Image.Resampling.LANCZOS) if width > MAX_TILE else tile)
    return _Row(label, numbers if known_as is None else tuple(known_as[n] for n in numbers), tuple(tiles))


def _sheet(rows: Sequence[_Row]) -> Image:
    """Lay the rows out: label, pictures, frame numbers."""
    from PIL import Image, ImageDraw, ImageFont

    label_font, number_font = ImageFont.load_default(13), ImageFont.load_default(10)
    label_height, number_height = 20, 14
    width = max(row.size[0] for row in rows)
    height = sum(label_height + row.size[1] + number_height + MARGIN for row in rows)
    sheet = Image.new("RGB", (width + 2 * MARGIN, height + MARGIN), GROUND)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row in rows:
        draw.text((MARGIN, top), _shortened(row.label, draw, label_font, width), fill=INK, font=label_font)
        top += label_height
        tile_width, tile_height = row.tiles[0].size
        for index, (number, tile) in enumerate(zip(row.numbers, row.tiles, strict=True)):
            left = MARGIN + index * (tile_width + GAP)
            sheet.paste(tile, (left, top))
            below = (left + tile_width / 2, top + tile_height + GAP)
            draw.text(below, str(number), fill=FAINT, font=number_font, anchor="ma")
        top += tile_height + number_height + MARGIN
    return sheet


def _shortened(label: str, draw: ImageDraw, font: FreeTypeFont | ImageFont, width: int) -> str:
    """`label` on one line, with an ellipsis where it is wider than the sheet."""
    label = " ".join(label.split())
    if draw.textlength(label, font=font) <= width:
        return label
    while label and draw.textlength(label + "…", font=font) > width:
        label = label[:-1]
    return label.rstrip() + "…"
