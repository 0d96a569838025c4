"""From the text of a flag to the value it means; InputError where it means none. Does not import torch by itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ispa_deploy.errors import InputError

if TYPE_CHECKING:
    import torch

    from ispa_deploy.absorb.lowrank import Rank
    from ispa_deploy.stream import Stream


def check_deltas_to_come(stream: Stream) -> None:
    """InputError for --save-deltas on a stream that will have none: now, not after minutes of work."""
    absorber, warmup = stream.absorber, stream.absorber.settings.warmup
    # A prompt that comes chunk by chunk begins the warm-up anew with each.
    settling = max(0, stream.spec.interpolate - 1) * stream.spec.chunk_frames
    since = max([0, *(frame + settling for frame, _ in stream.switches)])
    if not absorber.policy.absorbs:
        raise InputError(f"--save-deltas with --policy {absorber.policy.name}: expected a policy that absorbs")
    if not absorber.storable:
        raise InputError("--save-deltas with --per-step: a file holds one correction for each layer; leave one out")
    if not absorber.deltas and stream.frames - since < warmup:
        raise InputError(
            f"--save-deltas: the stream ends {stream.frames - since} frames into a warm-up of {warmup}; give more "
            "--frames"
        )


def switch_of(text: str, frames: int, where: str = "--at") -> tuple[int, str]:
    """FRAME:PROMPT -> (frame, prompt). InputError that begins with `where` and the text."""
    frame, colon, prompt = text.partition(":")
    if not colon or not frame.strip().isdecimal():
        raise InputError(f"{where} '{text}': expected FRAME:PROMPT, for example 24:a blue square")
    if int(frame) >= frames:
        raise InputError(f"{where} '{text}': expected a frame before the stream's end, --frames {frames}")
    return int(frame), prompt.strip()


def ridge_of(kind: str, value: float | None) -> float | None:
    if value is not None and not 0 <= value < math.inf:
        raise InputError(f"--ridge-{kind} {value}: expected a finite number of 0 or more")
    return value


def rank_of(text: str | None) -> Rank | None:
    """`16` or `auto:0.99`."""
    from ispa_deploy.absorb.lowrank import Rank

    if text is None:
        return None
    share = text.removeprefix("auto:")
    try:
        given = int(text) if share == text else float(share)
    except ValueError:
        raise InputError(f"--delta-rank '{text}': expected a number of directions, or auto:0.99") from None
    return Rank(count=given) if isinstance(given, int) else Rank(share=given)


def make_folder(path: Path) -> None:
    """Make a folder for outputs; InputError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder '{path}' cannot be made ({error.strerror}): choose another") from None


def integers_of(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--layers '{text}': expected numbers with commas, for example 0,3,7") from None


def device_of(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device '{name}': expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device '{name}': this torch sees no GPU; use --device cpu or install a CUDA build of torch")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device '{name}': this machine has {torch.cuda.device_count()} GPUs; count from cuda:0")
    return device


def dtype_of(name: str) -> torch.dtype | None:
    """None for auto: the bundle decides."""
    import torch

    known = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise InputError(f"dtype '{name}': expected one of {', '.join(known)}")
    return known[name]
