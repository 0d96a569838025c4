"""What a speech-to-video stream is given, read from files: an image through the VAE, sound through wav2vec2."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from export.bundle import Bundle
from export.initial import read_latents, resampled
from ispa_deploy.adapt import adapted, check_length
from ispa_deploy.avatar.audio import LEAD_STEPS
from ispa_deploy.avatar.stream import Scene, stand_in_scene
from ispa_deploy.errors import InputError
from ispa_deploy.media.audio import open_wav2vec2, read_audio
from ispa_deploy.media.image import covering, read_image
from ispa_deploy.media.vae import STRIDE, WanVae
from ispa_deploy.media.video import read_video
from ispa_deploy.options import StreamOptions
from ispa_deploy.specs import ModelSpec

WAV2VEC2 = "wav2vec2-large-xlsr-53-english"
"""Its folder in the base model's."""


def read_scene(
    bundle: Bundle,
    options: StreamOptions,
    *,
    image: Path | None,
    audio: Sequence[Path],
    audio_encoder: Path | None,
    masks: Sequence[Path] = (),
    pose: Path | None = None,
) -> Scene | None:
    """The scene for a stream of a bundle, in the stream's own size; None for a model that hears nothing.

    `audio`: a file for each speaker, `masks`: a picture for each, white where that one is. `pose`: a video, or latents,
    frame by frame. Random weights get random sound and a random image where none are named. InputError naming what is
    missing.
    """
    spec, frames = adapted(bundle.spec, options), options.frames
    given = {"--image": image, "--audio-encoder": audio_encoder, "--speaker-mask": tuple(masks) or None, "--pose": pose}
    named = [flag for flag, value in given.items() if value is not None]
    if not spec.audio_blocks:
        if named:
            raise InputError(f"{' and '.join(named)} with '{spec.name}': expected a speech-to-video model")
        return None
    if not named and not audio and bundle.manifest.source.kind == "random":
        return stand_in_scene(spec, frames)
    check_length(spec, frames)  # sound as long as that may not fit the memory
    if image is None or not audio or audio_encoder is None or bundle.vae is None:
        missing = {"--image": image, "--audio": audio, "--audio-encoder": audio_encoder, "--vae": bundle.vae}
        lacking = ", ".join(flag for flag, value in missing.items() if not value)
        raise InputError(
            f"model '{spec.name}' speaks what it hears and shows whom it is shown: expected --image, --audio, "
            f"--audio-encoder and --vae; missing: {lacking}"
        )
    if len(masks) != len(audio) and (masks or len(audio) > 1):
        raise InputError(
            f"{len(audio)} of --audio and {len(masks)} of --speaker-mask: expected a mask for each speaker, "
            "a picture that is white where that one is"
        )
    pixels = read_image(image, spec.latent_height * STRIDE, spec.latent_width * STRIDE)
    shown = still(bundle.vae, pixels)
    return Scene(
        heard(audio, audio_encoder, bundle, frames), shown[:, 1:2], shown,
        pose=None if pose is None else posed(pose, bundle.vae, spec, frames),
        mask=torch.stack([speaker_mask(mask, spec) for mask in masks]) if masks else None,
        moved=lambda latents: followed(bundle.vae, pixels, latents),
    )  # fmt: skip


def heard(audio: Sequence[Path], encoder: Path, bundle: Bundle, frames: int) -> Tensor:
    """Hidden states (speakers, N, K, 4 F) on the CPU; the speech model is let go."""
    spec = bundle.spec
    folder = encoder / WAV2VEC2 if (encoder / WAV2VEC2).is_dir() else encoder
    model = open_wav2vec2(folder, bundle.model.device)
    steps = frames * spec.temporal_stride
    return torch.cat([model.features(read_audio(path), fps=spec.fps, frames=steps).cpu() for path in audio])


def speaker_mask(path: Path, spec: ModelSpec) -> Tensor:
    """(rows, columns) of tokens in [0, 1]: how white a picture, cut as the image is, is there. InputError for black."""
    grey = read_image(path, spec.latent_height * STRIDE, spec.latent_width * STRIDE).mean(0, keepdim=True)
    mask = F.adaptive_avg_pool2d(grey, spec.grid)[0]
    if not bool(mask.any()):
        raise InputError(f"--speaker-mask '{path}' is black: expected a picture that is white where the speaker is")
    return mask


def posed(path: Path, vae: WanVae, spec: ModelSpec, frames: int) -> Tensor:
    """Latents (1, F, c, H, W) of a driving video, and of black pictures, as upstream, from where it ends.

    A video is brought to the model's frame rate and cut as the image is. A clip is encoded by itself behind its first
    picture once more, so that each latent frame is of the pictures that are spoken over it. Given latents are followed
    by zeros, which stand for no pose at all.
    """
    if path.suffix == ".safetensors":
        latents = read_latents(path, spec)[:, :frames]
        return F.pad(latents, (0, 0) * 3 + (0, frames - latents.shape[1]))
    if not path.is_file():
        raise InputError(f"--pose '{path}' does not exist: expected a video, or latents (.safetensors)")
    pictures, rate = read_video(path)
    shown = resampled(torch.from_numpy(pictures), rate, spec.fps)
    if len(shown) < spec.temporal_stride:
        raise InputError(f"--pose '{path}' has {len(shown)} pictures: expected at least {spec.temporal_stride}")
    height, width = (side * STRIDE for side in spec.latent_shape[1:])

    @cache
    def black(count: int) -> Tensor:
        return _behind_its_first(torch.zeros(count, 3, height, width), vae)

    clips = []
    for start in range(0, frames, spec.window_frames):
        count = min(spec.window_frames, frames - start) * spec.temporal_stride
        clip = shown[start * spec.temporal_stride :][:count]
        if len(clip):
            pixels = covering(clip.permute(0, 3, 1, 2).float() / 255, height, width)
            clips.append(_behind_its_first(F.pad(pixels, (0, 0) * 3 + (0, count - len(clip))), vae))
        else:
            clips.append(black(count))
    return torch.cat(clips, 1)


def _behind_its_first(pixels: Tensor, vae: WanVae) -> Tensor:
    """Latents (1, n, c, H, W) of pictures (4 n, 3, h, w)."""
    return vae.encode(torch.cat([pixels[:1], pixels])[None])[:, 1:]


def still(vae: WanVae, pixels: Tensor) -> Tensor:
    """Latents (1, 19, c, H, W) of an image (3, h, w) that stands still; the second is the reference, as upstream."""
    return vae.encode(pixels.expand(1, LEAD_STEPS, -1, -1, -1))


def followed(vae: WanVae | None, pixels: Tensor, latents: Tensor) -> Tensor:
    """Latents (1, 19, c, H, W) of the pixel frames up to the end of a clip: the image, then what was generated."""
    assert vae is not None
    shown = vae.decoder()(latents)[0].cpu()
    still_frames = pixels.expand(max(0, LEAD_STEPS - len(shown)), -1, -1, -1)
    return vae.encode(torch.cat([still_frames, shown])[-LEAD_STEPS:][None])
