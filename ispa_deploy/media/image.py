"""Pictures from files, as the pixels a model starts from."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ispa_deploy.errors import InputError, reason_of
from ispa_deploy.media.output import local_file
from ispa_deploy.media.video import upright


def read_image(path: str | Path, height: int, width: int) -> Tensor:
    """(3, height, width) float32 in [0, 1]: scaled until it covers that area, cut around its centre.

    InputError when `path` is no readable picture.
    """
    import av

    try:
        with av.open(local_file(path)) as container:
            picture = torch.from_numpy(upright(next(container.decode(container.streams.video[0]))))
    except (av.FFmpegError, OSError, IndexError, StopIteration, UnicodeError) as error:
        reason = reason_of(error, "it has no picture")
        raise InputError(f"image '{path}' cannot be read ({reason}): expected a picture, for example .png") from None
    return covering(picture.permute(2, 0, 1)[None].float() / 255, height, width)[0]


def covering(pictures: Tensor, height: int, width: int) -> Tensor:
    """Pictures (F, 3, h, w) in [0, 1] as (F, 3, height, width): scaled until they cover it, cut around the centre."""
    sides = pictures.shape[2:]
    scale = max(height / sides[0], width / sides[1])
    size = [max(least, round(side * scale)) for least, side in zip((height, width), sides, strict=True)]
    large = F.interpolate(pictures, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[:, :, top : top + height, left : left + width].contiguous()
