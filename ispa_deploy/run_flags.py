"""The flags of `run`, in groups. Does not import torch by itself.

A field of `StreamFlags` is named as the field of `StreamOptions` it sets.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ispa_deploy.flag_groups import DeviceOpt, DtypeOpt, LastPassOpt, SeedOpt, ThreadsOpt, TuneOpt
from ispa_deploy.flags import device_of, integers_of, rank_of, ridge_of

if TYPE_CHECKING:
    from ispa_deploy.options import StreamOptions

FallbackOpt = Annotated[
    bool, typer.Option("--allow-fallback", help="Warn where 8-bit layers are simulated or idle; do not fail.")
]


@dataclass(frozen=True)
class PromptFlags:
    """What the video shows."""

    prompt: Annotated[str, typer.Option(help="What to show.")] = "a fast red ring over teal waves"
    prompt_embeds: Annotated[
        Path | None, typer.Option(help="Text rows from a safetensors file, for models without a text encoder here.")
    ] = None
    at: Annotated[list[str] | None, typer.Option(help="FRAME:PROMPT, a later prompt; repeatable.")] = None
    prompts: Annotated[
        Path | None, typer.Option(help="Text file of prompts, `FRAME: prompt` on each line; frame 0 replaces --prompt.")
    ] = None
    live: Annotated[
        bool, typer.Option("--live", help="Each line of stdin is the prompt from the next chunk on, until it ends.")
    ] = False
    initial: Annotated[
        Path | None, typer.Option(help="Start with these latents (.safetensors) or, with --vae, this video.")
    ] = None


@dataclass(frozen=True)
class NetworkFlags:
    """Networks around the model."""

    text_encoder: Annotated[
        Path | None, typer.Option(help="UMT5-XXL: upstream's .pth, an HF folder, or the base model's folder.")
    ] = None
    tokenizer: Annotated[Path | None, typer.Option(help="Its tokenizer's folder; default: beside it.")] = None
    prompt_cache: Annotated[
        Path | None, typer.Option(help="Folder of encoded prompts; default: ~/.cache/ispa-deploy/prompts.")
    ] = None
    vae: Annotated[Path | None, typer.Option(help="Wan2.1_VAE.pth, an HF folder, or the base model's folder.")] = None
    decoder: Annotated[
        str | None, typer.Option(help="Your own decoder, package.module:Class; --vae is then its weights.")
    ] = None


@dataclass(frozen=True)
class VideoFlags:
    """Length and size."""

    frames: Annotated[int, typer.Option(min=1, help="Latent frames, a multiple of the chunk.")] = 21
    seed: SeedOpt = 0
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; default: the model's own.")] = None
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; default: the model's own.")] = None
    interpolate: Annotated[
        int | None, typer.Option(min=0, help="Chunks from one prompt to the next; 0: at once. Krea: 4.")
    ] = None


@dataclass(frozen=True)
class AbsorptionFlags:
    """Absorption."""

    policy: Annotated[str, typer.Option(help="absorb, full, window, sink-local (no absorb), no-sink.")] = "absorb"
    preset: Annotated[str, typer.Option(help="tuned or paper.")] = "tuned"
    ratio: Annotated[float, typer.Option(help="Share of layers that become local.")] = 0.5
    layers: Annotated[str | None, typer.Option(help="Exactly these layers become local, e.g. 0,3,7.")] = None
    warmup: Annotated[int | None, typer.Option(help="Warm-up in frames (T_warm).")] = None
    ahead: Annotated[
        int | None, typer.Option(min=0, help="Passes after the warm-up that are watched too (tuned: 1, paper: 0).")
    ] = None
    recent_frames: Annotated[int, typer.Option(help="Recent frames that local layers also keep.")] = 0
    ridge_absolute: Annotated[float | None, typer.Option(help="λ itself (the paper's 0.001).")] = None
    ridge_relative: Annotated[float | None, typer.Option(help="ρ in λ = ρ · tr(G) / D.")] = None
    ranking: Annotated[str | None, typer.Option(help="epsilon, heldout or random.")] = None
    share: Annotated[float | None, typer.Option(min=0, max=1, help="How much of the solution is applied.")] = None
    delta: Annotated[str, typer.Option(help="auto, side, requant or fold.")] = "auto"
    delta_rank: Annotated[str | None, typer.Option(help="Keep R directions of each correction, or auto:SHARE.")] = None
    quantisation_aware: Annotated[
        bool, typer.Option("--quantisation-aware", help="Fit corrections to activations as 8-bit layers see them.")
    ] = False
    stats_device: Annotated[str | None, typer.Option(help="Where statistics are summed; `cpu` saves GPU memory.")] = (
        None
    )
    spread_solve: Annotated[
        int, typer.Option(min=0, help="Solve over the passes of this many chunks, then switch; 0: at once.")
    ] = 0


@dataclass(frozen=True)
class CacheFlags:
    """Cache and attention."""

    window: Annotated[int | None, typer.Option(help="Window in frames, with --policy window.")] = None
    sink: Annotated[int | None, typer.Option(help="First frames that stay in the window; default: the model's.")] = None
    renew_sink: Annotated[
        bool, typer.Option("--renew-sink", help="LongLive: a prompt switch also replaces the window's first frames.")
    ] = False
    sink_dtype: Annotated[
        str, typer.Option(help="Of an averaging sink: float32, or model (rounded every chunk, as upstream).")
    ] = "float32"
    roll: Annotated[
        bool, typer.Option("--roll", help="Let a window roll that would end the stream when full (Self-Forcing).")
    ] = False
    infinity: Annotated[
        bool, typer.Option("--infinity", help="Rotate keys by their slot in the window: streams without an end.")
    ] = False
    kv_dtype: Annotated[
        str, typer.Option(help="How cached keys and values are held: auto (the model's own dtype), int8 or fp8.")
    ] = "auto"
    attention_dtype: Annotated[
        str, typer.Option(help="int8: full layers attend to an int8 cache without decoding it; auto: decode it.")
    ] = "auto"
    backend: Annotated[str, typer.Option("--attention", help="Attention backend; auto is the best that runs here.")] = (
        "auto"
    )


@dataclass(frozen=True)
class LastPassFlags:
    """8-bit linears."""

    last_pass_bits: LastPassOpt = 16


@dataclass(frozen=True)
class KreaFlags:
    """Krea."""

    kv_frames: Annotated[int | None, typer.Option(help="Frames of context, 3 to 21 in steps of 3.")] = None
    kv_bias: Annotated[
        float, typer.Option(help="Weight of the past between the first frame and the chunk, at most 1 (off).")
    ] = 1.0
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising passes of a chunk, the last at 0.")] = None
    strength: Annotated[
        float | None, typer.Option(help="Repaint --initial; 1 forgets it, small numbers stay close.")
    ] = None
    first_frame: Annotated[
        str, typer.Option(help="A sliding context's first frame, reencode (with --vae), keep or auto.")
    ] = "auto"


@dataclass(frozen=True)
class SpeechFlags:
    """Speech to video."""

    rope_table: Annotated[str, typer.Option(help="Exact rotations, or fp16, rounded as upstream does.")] = "exact"
    per_step: Annotated[bool, typer.Option("--per-step", help="A correction of its own for each denoising step.")] = (
        False
    )
    online_reference: Annotated[
        bool, typer.Option("--online-reference", help="After a clip, refer to the first frame made.")
    ] = False


@dataclass(frozen=True)
class StreamFlags(SpeechFlags, KreaFlags, LastPassFlags, CacheFlags, AbsorptionFlags, VideoFlags):
    """How the model streams; the last base's flags come first. Each field is one of `StreamOptions`."""

    def options(self) -> StreamOptions:
        """The stream's options; InputError for text that means none."""
        from ispa_deploy.options import StreamOptions

        read = {
            "layers": integers_of(self.layers),
            "ridge_absolute": ridge_of("absolute", self.ridge_absolute),
            "ridge_relative": ridge_of("relative", self.ridge_relative),
            "delta_rank": rank_of(self.delta_rank),
            "stats_device": None if self.stats_device is None else str(device_of(self.stats_device)),
        }
        return StreamOptions(**{**asdict(self), **read})


@dataclass(frozen=True)
class SceneFlags:
    """Pictures and speech."""

    image: Annotated[
        Path | None, typer.Option(help="First frame (with --vae); speech to video: whom to bring to life.")
    ] = None
    audio_encoder: Annotated[Path | None, typer.Option(help="wav2vec2's HF folder, or the base model's folder.")] = None
    speaker_mask: Annotated[
        list[Path] | None, typer.Option(help="Picture, white where a speaker is; one for each --audio, in its order.")
    ] = None
    pose: Annotated[
        Path | None, typer.Option(help="Video of poses to follow, or its latents (.safetensors), one for each frame.")
    ] = None


@dataclass(frozen=True)
class FileFlags:
    """Files."""

    save_deltas: Annotated[Path | None, typer.Option(help="Write the stream's deltas here (.safetensors).")] = None
    deltas: Annotated[Path | None, typer.Option(help="Start with stored deltas, without a warm-up.")] = None
    out: Annotated[Path | None, typer.Option(help="Video (.mp4).")] = None
    audio: Annotated[
        list[Path] | None,
        typer.Option(help="Sound of the video, cut where it ends (.wav or another); of several speakers: repeatable."),
    ] = None
    sheet: Annotated[Path | None, typer.Option(help="Contact sheet (.png); default: beside the video.")] = None
    latents: Annotated[Path | None, typer.Option(help="Latents (.safetensors).")] = None


@dataclass(frozen=True)
class MachineFlags:
    """Machine."""

    allow_fallback: FallbackOpt = False
    offload: Annotated[
        bool, typer.Option("--offload", help="Text encoder, VAE, statistics and idle caches rest on the CPU.")
    ] = False
    device: DeviceOpt = "auto"
    dtype: DtypeOpt = "auto"
    threads: ThreadsOpt = None
    tune_allocator: TuneOpt = True
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile the layers; where no compiler works they run eagerly.")
    ] = False
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Record each pass of a full window once and replay it (CUDA only).")
    ] = False
    overlap_decode: Annotated[
        bool, typer.Option("--overlap-decode", help="Decode a chunk while the next one is generated; same pixels.")
    ] = False
