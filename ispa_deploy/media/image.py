"""Pictures from files, as the pixels a model starts from."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ispa_deploy.errors import InputError


def read_image(path: str | Path, height: int, width: int) -> Tensor:
    """(3, height, width) float32 in [0, 1]: scaled until it covers that area, cut around its centre.

    InputError when `path` is no readable picture.
    """
    import av

    try:
        with av.open(str(path)) as container:
            frame = next(container.decode(container.streams.video[0]))
            picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    except (av.FFmpegError, OSError, IndexError, StopIteration, UnicodeError) as error:
        reason = str(error).partition("\n")[0] or "it has no picture"
        raise InputError(f"image '{path}' cannot be read ({reason}): expected a picture, for example .png") from None
    pixels = picture.permute(2, 0, 1).float() / 255
    scale = max(height / pixels.shape[1], width / pixels.shape[2])
    size = [max(least, round(side * scale)) for least, side in zip((height, width), pixels.shape[1:], strict=True)]
    large = F.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[:, top : top + height, left : left + width].contiguous()
