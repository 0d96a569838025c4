"""How a cache holds its frames: as they come, or in 8 bits with one scale per token and head.

Legend: B batch, F frames, T tokens of a frame, H heads, D head width.

A store holds the keys or the values of some frames of one layer. In 8 bits a code q with scale s stands for q * s; s is
float16, so at a head width of 128 a cache takes 0.508 of its bytes in bfloat16. No frame is kept in two forms: queries
see the past decoded into one layer's worth of scratch that all layers share, and the current chunk as it came.

Zeros stay zeros. Where a head of a token holds NaN or Inf, or so much that its scale leaves float16 (8e6 in int8), it
is decoded to NaN: nothing is clipped silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ispa_deploy.errors import known_names

Places = tuple[tuple[int, int], ...]
"""(index in the chunk, slot in the store) of every frame that is written."""

FLOAT8 = torch.float8_e4m3fn
PEAKS: dict[str, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "fp8": (FLOAT8, 448.0)}
"""Name of a form of 8 bits -> its dtype and its largest code."""
KV_DTYPES = ("auto", *PEAKS)
SCALE_FLOOR = 2.0**-16  # float16 still has 8 bits there: rounding the scale clips a quarter of a step at most
WATCHED = 4  # the error is measured on one token in so many


@dataclass(frozen=True)
class Layout:
    """Shape of one frame's keys in one layer, and where they live."""

    batch: int
    tokens: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def buffer(self, frames: int, *, width: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """(B, F, T, H, D) of zeros."""
        shape = (self.batch, frames, self.tokens, self.heads, self.width if width is None else width)
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def store(self, frames: int, coder: Coder | None) -> Store:
        """Room for the keys or the values of `frames` frames."""
        return Store(self, frames) if coder is None else CodedStore(self, frames, coder)

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame's keys and values in one layer, in `dtype`."""
        return 2 * self.batch * self.tokens * self.heads * self.width * self.dtype.itemsize


class Coder:
    """8 bits for the keys, or for the values, of one stream; keeps count of what is lost by it."""

    def __init__(self, dtype: torch.dtype, peak: float, device: torch.device):
        self.dtype, self._peak = dtype, peak
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, H, D) of any float dtype -> codes of that shape and float16 scales (B, T, H, 1)."""
        values = x.float()
        codes, scale = self.code(values)
        self._watch(*(tensor[:, ::WATCHED] for tensor in (values, codes, scale)))
        return codes, scale

    def code(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The same of float32, not counted."""
        amax = values.abs().amax(-1, keepdim=True)
        scale = (torch.where(amax.isfinite(), amax, torch.nan) / self._peak).clamp_min(SCALE_FLOOR).half()
        codes = values / scale.float()
        if self.dtype == torch.int8:
            codes = codes.round_()
        return codes.clamp_(-self._peak, self._peak).to(self.dtype), scale

    def _watch(self, values: Tensor, codes: Tensor, scale: Tensor) -> None:
        lost = (values - decode(codes, scale)).square().sum(dtype=torch.float64)
        self._sums += torch.stack([lost, values.square().sum(dtype=torch.float64)])

    def error(self) -> float | None:
        """Relative L2 error of all that was encoded; None before anything was."""
        lost, power = self._sums.tolist()
        return float((lost / power) ** 0.5) if power else None


def coders(name: str, device: torch.device) -> tuple[Coder | None, Coder | None]:
    """Coders of a stream's keys and values for `auto` (none: the model's own dtype), `int8` or `fp8`."""
    if name not in KV_DTYPES:
        raise known_names("KV dtype", name, KV_DTYPES)
    if name == "auto":
        return None, None
    return Coder(*PEAKS[name], device), Coder(*PEAKS[name], device)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (..., D) and float16 scales (..., 1) -> float32 (..., D), exact products."""
    if codes.dtype == FLOAT8 and codes.device.type == "cpu":
        # Torch widens e4m3 one number at a time there. Its bits, moved, are those of a float16 that is 2^8 smaller.
        bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080)
        return bits.view(torch.float16).float().mul_(scale.float() * 256)
    return codes.float().mul_(scale.float())


class Store:
    """Keys or values of up to F frames of one layer, in the model's dtype."""

    def __init__(self, layout: Layout, frames: int):
        self.parts: tuple[Tensor, ...] = (layout.buffer(frames),)

    @property
    def exact(self) -> bool:
        """Whether float32 comes back as it went in."""
        return self.parts[0].dtype == torch.float32

    def put(self, slot: int, x: Tensor) -> None:
        """Hold one frame (B, T, H, D)."""
        self.parts[0][:, slot] = x

    def frame(self, slot: int) -> Tensor:
        """One frame (B, T, H, D)."""
        return self.parts[0][:, slot]

    def window(self, held: int, places: Places, x: Tensor, keep: bool, scratch: Callable[[], Tensor]) -> Tensor:
        """Frames of x (B, F, T, H, D) enter their places, for good if `keep`; (B, held, T, H, D) for queries to see.

        `scratch` gives that much room to a store that cannot show what it holds as it lies.
        """
        for index, slot in places:
            self.put(slot, x[:, index])
        return self.parts[0][:, :held]

    def move(self, source: int, target: int) -> None:
        for part in self.parts:
            part[:, target].copy_(part[:, source])

    def take(self, other: Store, slots: list[int]) -> None:
        """The frames in `slots` of another store of the same form, bit for bit, into the first slots."""
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            for target, source in enumerate(slots):
                mine[:, target].copy_(theirs[:, source])

    def nbytes(self) -> int:
        """Bytes allocated."""
        return int(sum(part.untyped_storage().nbytes() for part in self.parts))


class CodedStore(Store):
    """The same in 8 bits: codes (B, F, T, H, D) and float16 scales (B, F, T, H, 1)."""

    exact = False

    def __init__(self, layout: Layout, frames: int, coder: Coder):
        self.coder = coder
        self.parts = (layout.buffer(frames, dtype=coder.dtype), layout.buffer(frames, width=1, dtype=torch.float16))

    def put(self, slot: int, x: Tensor) -> None:
        for part, value in zip(self.parts, self.coder.encode(x), strict=True):
            part[:, slot] = value

    def frame(self, slot: int) -> Tensor:
        """One frame (B, T, H, D) in float32."""
        codes, scale = self.parts
        return decode(codes[:, slot], scale[:, slot])

    def window(self, held: int, places: Places, x: Tensor, keep: bool, scratch: Callable[[], Tensor]) -> Tensor:
        seen, fresh = scratch(), {slot: index for index, slot in places}
        for slot in range(held):  # a frame at a time stays in the processor's cache
            seen[:, slot] = x[:, fresh[slot]] if slot in fresh else self.frame(slot)
        if keep:
            for index, slot in places:
                self.put(slot, x[:, index])
        return seen
