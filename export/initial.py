"""What a stream starts from: latents of another run, or a video encoded by the bundle's VAE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from export.bundle import Bundle
from export.sources import Say, quiet
from export.tensors import named_tensor
from ispa_deploy.adapt import adapted
from ispa_deploy.errors import InputError
from ispa_deploy.media.image import read_image
from ispa_deploy.media.video import read_video
from ispa_deploy.options import StreamOptions
from ispa_deploy.specs import ModelSpec

LATENTS = "latents"


def read_initial(path: Path, bundle: Bundle, options: StreamOptions, say: Say = quiet) -> Tensor:
    """Latents (1, F, C, H, W) float32 on the model's device, of the stream's own resolution, in whole chunks.

    A `.safetensors` file as `run --latents` writes it, whose resolution must be the stream's; any other file is a
    video, brought to the model's frame rate, resized and encoded, 1 + 4 n frames of it. InputError names what is wrong.
    """
    spec = adapted(bundle.spec, options)
    latents = read_latents(path, spec) if path.suffix == ".safetensors" else _encoded(path, bundle, spec)
    frames = latents.shape[1] // spec.chunk_frames * spec.chunk_frames
    if not frames:
        raise InputError(f"'{path}' is {latents.shape[1]} latent frames: expected at least {spec.chunk_frames}")
    if frames < latents.shape[1]:
        say(f"note: '{path}' is {latents.shape[1]} latent frames: the first {frames} are taken, whole chunks of "
            f"{spec.chunk_frames}")  # fmt: skip
    return latents[:, :frames].to(bundle.model.device)


def read_start(
    initial: Path | None, image: Path | None, bundle: Bundle, options: StreamOptions, say: Say = quiet
) -> Tensor | None:
    """What `--initial` or `--image` names; None where neither is given."""
    if image is not None and initial is not None:
        raise InputError("--image and --initial both say how the stream begins: leave one out")
    if image is not None:
        return read_still(image, bundle, options)
    return None if initial is None else read_initial(initial, bundle, options, say)


def with_still(options: StreamOptions) -> StreamOptions:
    """Options of a stream that begins with a still image: a chunk of one frame, then chunks of the model's length.

    The warm-up is that of the preset, counted from behind that frame.
    """
    warmup = options.settings().warmup + 1 if options.warmup is None else options.warmup
    return replace(options, first_chunk=1, warmup=warmup)


def read_still(path: Path, bundle: Bundle, options: StreamOptions) -> Tensor:
    """An image as the stream's first latent frame: (1, 1, C, H, W) float32 on the model's device."""
    spec = adapted(bundle.spec, options)
    if bundle.vae is None:
        raise InputError(f"--image '{path}': expected --vae PATH with it, to encode the image")
    pixels = read_image(path, spec.latent_height * spec.spatial_stride, spec.latent_width * spec.spatial_stride)
    return bundle.vae.encode(pixels[None, None]).to(bundle.model.device)


def read_latents(path: Path, spec: ModelSpec) -> Tensor:
    """(1, F, C, H, W) float32 from a safetensors file."""
    latents = named_tensor(path, LATENTS)
    if latents.ndim != 5 or len(latents) != 1 or tuple(latents.shape[2:]) != spec.latent_shape:
        wanted = ", ".join(map(str, spec.latent_shape))
        raise InputError(
            f"'{path}': latents of shape {tuple(latents.shape)}: expected (1, F, {wanted}); --height and --width set "
            "the resolution"
        )
    return latents


def _encoded(path: Path, bundle: Bundle, spec: ModelSpec) -> Tensor:
    encode = getattr(bundle.decoder(), "encode", None)
    if encode is None:
        raise InputError(f"--initial '{path}' is no .safetensors file: expected --vae PATH with a video, to encode it")
    if not path.is_file():
        raise InputError(f"--initial '{path}' does not exist: expected latents or a video")
    pictures, rate = read_video(path)
    size = (spec.latent_height * spec.spatial_stride, spec.latent_width * spec.spatial_stride)
    pixels = resampled(torch.from_numpy(pictures), rate, spec.fps)
    usable = 1 + (len(pixels) - 1) // spec.temporal_stride * spec.temporal_stride
    scaled = F.interpolate(pixels[:usable].permute(0, 3, 1, 2).float() / 255, size, mode="bicubic").clamp(0, 1)
    latents: Tensor = encode(scaled[None].to(bundle.model.device))
    return latents


def resampled(pictures: Tensor, rate: float, wanted: float) -> Tensor:
    """Pictures (F, H, W, 3) shown at `rate`, as they are seen at `wanted` frames per second."""
    count = max(1, int(len(pictures) / rate * wanted))
    return pictures[torch.arange(count).mul(rate / wanted).long().clamp_max(len(pictures) - 1)]
