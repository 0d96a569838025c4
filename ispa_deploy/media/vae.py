"""Latents to pixels and back: the Wan VAE through diffusers, decoded chunk by chunk as if it were one piece.

Every causal convolution of the decoder looks two frames back. Those frames are kept between chunks, so a stream decodes
to the same pixels as the whole video would: the first latent frame gives one pixel frame, each later one four.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ispa_deploy.errors import InputError
from ispa_deploy.media.weights import fill, hushed, library, size_of

WHAT = "the Wan 2.1 VAE"
CHANNELS = 16
STRIDE = 8
"""Pixels of a latent, in both directions."""
TEMPORAL_STRIDE = 4

# fmt: off
MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on

_UPSTREAM = "decoder.middle.0.residual.0.gamma"  # a name that only upstream's file has


def wan_vae(state: Mapping[str, Tensor], where: str) -> Any:
    """`diffusers.AutoencoderKLWan` around the given tensors, under upstream's names or the library's.

    Raises InputError: diffusers is missing, or the tensors are not those of the Wan 2.1 VAE.
    """
    diffusers = library("diffusers", "the VAE")
    if _UPSTREAM in state:
        convert = library("diffusers.loaders.single_file_utils", "the VAE").convert_wan_vae_to_diffusers
        state = convert(dict(state))
    channels = size_of(state, "post_quant_conv.weight", 0, where, WHAT)
    if channels != CHANNELS:
        raise InputError(f"{where} has latents of {channels} channels: expected {CHANNELS}, {WHAT}")
    with hushed(), torch.device("meta"):
        model = diffusers.AutoencoderKLWan(
            base_dim=size_of(state, "encoder.conv_in.weight", 0, where, WHAT), z_dim=channels
        )
    fill(model, state, where, WHAT)
    return model


@dataclass(frozen=True)
class WanVae:
    """The VAE in the units of the DiT: normalised latents (B, F, 16, H, W), pixels (B, F', 3, 8H, 8W) in [0, 1].

    `visits`: the device it works on, where it rests on another (`--offload`); None: it works where it lies.
    """

    model: Any
    visits: torch.device | None = None

    def decoder(self) -> StreamingDecoder:
        """A decoder for one stream, at its beginning; streams share the weights and nothing else."""
        return StreamingDecoder(self.model, self.visits)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 1 + 4 n, 3, h, w) in [0, 1] -> (B, 1 + n, 16, h / 8, w / 8) float32: the mode, nothing is drawn.

        An image is a video of one frame. Raises InputError naming the shape that does not divide.
        """
        frames, colours, height, width = pixels.shape[1:] if pixels.ndim == 5 else (0, 0, 0, 0)
        if colours != 3 or height % STRIDE or width % STRIDE or frames % TEMPORAL_STRIDE != 1:
            raise InputError(
                f"video of shape {tuple(pixels.shape)}: expected (B, 1 + 4 n, 3, h, w) with h and w multiples of "
                f"{STRIDE}; crop it"
            )
        with visiting(self.model, self.visits):
            signed = (pixels.transpose(1, 2) * 2 - 1).to(self.model.quant_conv.weight)
            mode = self.model.encode(signed).latent_dist.mode().transpose(1, 2).float()
            return (mode - _column(MEAN, mode)) / _column(STD, mode)


class StreamingDecoder:
    """Latents of a stream to pixels, chunk after chunk; what the convolutions must remember is kept in between.

    At 480x832 the memory is 1.8 GB in 16 bit, see `nbytes`. With `visits`, weights and memory go to that device for a
    chunk and rest where they were before and after it.
    """

    def __init__(self, model: Any, visits: torch.device | None = None) -> None:
        wan = library("diffusers.models.autoencoders.autoencoder_kl_wan", "the VAE")
        self.model = model
        # The library's own list is emptied by its public methods; this one belongs to the stream.
        self._memory: list[Any] = [None] * sum(
            isinstance(module, wan.WanCausalConv3d) for module in model.decoder.modules()
        )
        self._frames, self._visits = 0, visits

    @property
    def rests(self) -> bool:
        """Whether nothing of it stays on the device between chunks."""
        return self._visits is not None

    def encode(self, pixels: Tensor) -> Tensor:
        """`WanVae.encode`, of which this decoder is the inverse."""
        return WanVae(self.model, self._visits).encode(pixels)

    @property
    def nbytes(self) -> int:
        """Bytes remembered between chunks."""
        return sum(entry.nbytes for entry in self._memory if isinstance(entry, Tensor))

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        """(B, F, 16, H, W) normalised -> (B, F', 3, 8H, 8W) float32 in [0, 1]; F' = 4 F, 3 less for the first chunk."""
        if latents.ndim != 5 or latents.shape[2] != CHANNELS:
            raise InputError(f"VAE: latents of shape {tuple(latents.shape)}: expected (B, F, {CHANNELS}, H, W)")
        with self._visit():
            return self._decode(latents)

    @contextmanager
    def _visit(self) -> Iterator[None]:
        """Everything on the working device, and back again."""
        home = self.model.post_quant_conv.weight.device
        with visiting(self.model, self._visits):
            self._remember_on(self._visits or home)
            try:
                yield
            finally:
                self._remember_on(home)

    def _remember_on(self, device: torch.device) -> None:
        self._memory = [entry.to(device) if isinstance(entry, Tensor) else entry for entry in self._memory]

    def _decode(self, latents: Tensor) -> Tensor:
        raw = latents.float() * _column(STD, latents) + _column(MEAN, latents)
        features = self.model.post_quant_conv(raw.transpose(1, 2).to(self.model.post_quant_conv.weight))
        pieces = [self._frame(frame) for frame in features.split(1, dim=2)]
        return torch.cat(pieces, 2).float().clamp(-1, 1).mul(0.5).add(0.5).transpose(1, 2)

    def _frame(self, features: Tensor) -> Tensor:
        first, self._frames = self._frames == 0, self._frames + 1
        return self.model.decoder(features, feat_cache=self._memory, feat_idx=[0], first_chunk=first)


@contextmanager
def visiting(model: Any, device: torch.device | None) -> Iterator[None]:
    """The model on `device`, and back again; None: it stays where it lies."""
    if device is None:
        yield
        return
    home = model.post_quant_conv.weight.device
    _move(model, device)
    try:
        yield
    finally:
        _move(model, home)


@torch.inference_mode(False)  # weights that were moved must stay ordinary tensors
def _move(model: Any, device: torch.device) -> None:
    model.to(device)


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    """One number per channel of (B, F, C, H, W)."""
    return torch.tensor(values, device=like.device)[:, None, None]
