"""What a speech-to-video stream is given, read from files: an image through the VAE, sound through wav2vec2."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from export.bundle import Bundle
from ispa_deploy.adapt import adapted
from ispa_deploy.avatar.audio import LEAD_FRAMES, LEAD_STEPS
from ispa_deploy.avatar.stream import Scene
from ispa_deploy.errors import InputError
from ispa_deploy.media.audio import open_wav2vec2, read_audio
from ispa_deploy.media.image import read_image
from ispa_deploy.media.vae import STRIDE, WanVae
from ispa_deploy.options import StreamOptions
from ispa_deploy.specs import ModelSpec

WAV2VEC2 = "wav2vec2-large-xlsr-53-english"
"""Its folder in the base model's."""


def read_scene(
    bundle: Bundle, options: StreamOptions, *, image: Path | None, audio: Path | None, audio_encoder: Path | None
) -> Scene | None:
    """The scene for a stream of a bundle, in the stream's own size; None for a model that hears nothing.

    Random weights get random sound and a random image where none are named. InputError naming what is missing.
    """
    spec, frames = adapted(bundle.spec, options), options.frames
    if not spec.audio_blocks:
        if image is not None or audio_encoder is not None:
            raise InputError(f"--image and --audio-encoder with '{spec.name}': expected a speech-to-video model")
        return None
    if image is None and audio is None and bundle.manifest.source.kind == "random":
        return stand_in_scene(spec, frames)
    missing = {"--image": image, "--audio": audio, "--audio-encoder": audio_encoder, "--vae": bundle.vae}
    lacking = ", ".join(flag for flag, given in missing.items() if given is None)
    if image is None or audio is None or audio_encoder is None or bundle.vae is None:
        raise InputError(
            f"model '{spec.name}' speaks what it hears and shows whom it is shown: expected --image, --audio, "
            f"--audio-encoder and --vae; missing: {lacking}"
        )
    pixels = read_image(image, spec.latent_height * STRIDE, spec.latent_width * STRIDE)
    shown = still(bundle.vae, pixels)
    states = heard(audio, audio_encoder, bundle, frames)
    return Scene(states, shown[:, 1:2], shown, moved=lambda latents: followed(bundle.vae, pixels, latents))


def heard(audio: Path, encoder: Path, bundle: Bundle, frames: int) -> Tensor:
    """Hidden states (1, N, K, 4 F) on the CPU; the speech model is let go."""
    spec = bundle.spec
    folder = encoder / WAV2VEC2 if (encoder / WAV2VEC2).is_dir() else encoder
    model = open_wav2vec2(folder, bundle.model.device)
    return model.features(read_audio(audio), fps=spec.fps, frames=frames * spec.temporal_stride).cpu()


def still(vae: WanVae, pixels: Tensor) -> Tensor:
    """Latents (1, 19, c, H, W) of an image (3, h, w) that stands still; the second is the reference, as upstream."""
    return vae.encode(pixels.expand(1, LEAD_STEPS, -1, -1, -1))


def followed(vae: WanVae | None, pixels: Tensor, latents: Tensor) -> Tensor:
    """Latents (1, 19, c, H, W) of the pixel frames up to the end of a clip: the image, then what was generated."""
    assert vae is not None
    shown = vae.decoder()(latents)[0].cpu()
    still_frames = pixels.expand(max(0, LEAD_STEPS - len(shown)), -1, -1, -1)
    return vae.encode(torch.cat([still_frames, shown])[-LEAD_STEPS:][None])


def stand_in_scene(spec: ModelSpec, frames: int) -> Scene:
    """Noise to hear and to look at, for random weights: good for measuring speed, meaningless otherwise."""
    generator = torch.Generator().manual_seed(0)
    steps = frames * spec.temporal_stride
    states = torch.randn(1, spec.audio_states, spec.audio_dim, steps, generator=generator)
    shown = torch.randn(1, 1, *spec.latent_shape, generator=generator)
    return Scene(states, shown, shown.expand(-1, LEAD_FRAMES, -1, -1, -1))
