"""The model table: every geometry and streaming rule as a value; code does not differ between T2V models.

Lengths called `*_frames` count latent frames. A spec holds no tensors and this file does not import torch, so `--help`
and the planner stay instant. Sources and licence notes are reported, never bundled.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ispa_deploy.errors import InputError, known_names

Rope = Literal["absolute", "window"]
Sampling = Literal["renoise", "euler"]
MAX_CONTEXT = 21  # frames that the 14B model was trained to look back over


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Geometry, window and sampling of one causal Wan model.

    `rope`: `absolute` caches rotated keys at their frame index; `window` caches keys before rotation and rotates them
    at their slot in the window on every read (LongLive "infinity", Reward-Forcing), so a stream has no length limit.
    `ema_sink`: the sink takes in evicted frames, sink = a * sink + (1 - a) * evicted (Reward-Forcing); None: frozen.
    `ema_wide`: a 16-bit cache keeps that sink in float32 as well; off: rounded after every chunk, as upstream.
    `rolls`: whether the window evicts; without it a stream ends when the window is full (Self-Forcing).
    `recaches`: a prompt switch computes the window's keys and values anew under the new prompt (LongLive).
    `renews_sink`: what is computed anew then takes the sink's place as well (LongLive's `global_sink: false`).
    `reencodes`: every chunk's past is computed anew from clean latents before it, so there is no clean pass and keys
    are stored rotated, at their slot in the window; the context is `window_frames` - `chunk_frames` frames (Krea).
    `interpolate`: chunks over which a prompt turns into the next, the first of them still the old one; 0: at once.
    `temporal_stride`: pixel frames for each latent frame after the first, which is one; `spatial_stride`: pixels along
    one side of a latent.
    `first_steps`: Euler steps of the first chunk for a model that was not distilled to few steps; None: as any chunk.
    `sampling`: `renoise`: x0 from velocity, then fresh noise; `euler`: as many Euler steps as there are `steps`, on
    diffusers' schedule, which shifts twice (LiveAvatar).
    `audio_blocks`: speech to video: the blocks after which audio enters, in the order of the injectors; their `window`
    is a ring for each denoising step, and reference and motion frames are the sink. Empty: text to video.
    `audio_states`, `audio_dim`: hidden states of the speech model and their width; `audio_tokens` for each frame.
    """

    name: str
    dim: int
    ffn_dim: int
    heads: int
    layers: int
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    latent_channels: int = 16
    latent_height: int = 60
    latent_width: int = 104
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    rope_theta: float = 10000.0
    rope: Rope = "absolute"
    chunk_frames: int = 3
    first_chunk_frames: int = 0
    window_frames: int = 12
    sink_frames: int = 3
    ema_sink: float | None = None
    ema_wide: bool = True
    rolls: bool = True
    recaches: bool = False
    renews_sink: bool = False
    reencodes: bool = False
    interpolate: int = 0
    max_frames: int = 1024
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    first_steps: int | None = None
    sampling: Sampling = "renoise"
    shift: float = 5.0
    context_timestep: float = 0.0
    fps: int = 16
    temporal_stride: int = 4
    spatial_stride: int = 8
    audio_blocks: tuple[int, ...] = ()
    audio_states: int = 25
    audio_dim: int = 1024
    audio_tokens: int = 4
    source: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise InputError(
                f"model '{self.name}': dim {self.dim} does not split into {self.heads} heads of even width"
            )
        if self.latent_height % self.patch[1] or self.latent_width % self.patch[2]:
            raise InputError(
                f"model '{self.name}': latent {self.latent_height}x{self.latent_width} is no multiple of its patch"
            )
        if self.window_frames < self.sink_frames + self.chunk_frames:
            raise InputError(
                f"model '{self.name}': window {self.window_frames} is shorter than sink {self.sink_frames} + chunk "
                f"{self.chunk_frames}"
            )

        if self.reencodes and not (self.context_frames <= MAX_CONTEXT and self.context_frames % self.chunk_frames == 0):
            raise InputError(
                f"model '{self.name}': a context of {self.context_frames} frames: expected whole chunks, "
                f"{self.chunk_frames} to {MAX_CONTEXT // self.chunk_frames * self.chunk_frames} frames in steps of "
                f"{self.chunk_frames}"
            )

    @property
    def context_frames(self) -> int:
        """Frames of the window before the current chunk (Krea's K)."""
        return self.window_frames - self.chunk_frames

    @property
    def rotates_on_read(self) -> bool:
        """Whether keys are cached before rotation: their positions change while they stay."""
        return self.rope == "window" and not self.reencodes

    @property
    def passes(self) -> int:
        """Forward passes of a chunk whose rows are watched: denoising, and the clean pass where there is one."""
        return len(self.steps) + (0 if self.reencodes or self.audio_blocks else 1)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in one latent frame."""
        return self.latent_height // self.patch[1], self.latent_width // self.patch[2]

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame (1560 at 480x832)."""
        return self.grid[0] * self.grid[1]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent frame."""
        return self.latent_channels, self.latent_height, self.latent_width

    def pixel_frames(self, frames: int) -> int:
        """Pixel frames of `frames` latent frames."""
        return 1 + self.temporal_stride * (frames - 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for manifests."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> ModelSpec:
        """Inverse of `to_dict`; an unknown or missing field is refused by name."""
        known = set(ModelSpec.__slots__)
        unknown = sorted(set(fields) - known)
        if unknown:
            raise InputError(
                f"model description has unknown fields {unknown}: written by a newer version? upgrade ispa-deploy"
            )
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        try:
            return ModelSpec(**values)
        except TypeError as error:
            raise InputError(f"model description is incomplete: {error}") from None


_SMALL = {"dim": 1536, "ffn_dim": 8960, "heads": 12, "layers": 30}
_LARGE = {"dim": 5120, "ffn_dim": 13824, "heads": 40, "layers": 40}

_TABLE = (
    ModelSpec(
        name="longlive-1.3b", **_SMALL, recaches=True,  # type: ignore[arg-type]
        source="Efficient-Large-Model/LongLive-1.3B: models/longlive_base.pt + models/lora.pt",
        licence="code Apache-2.0; weights: see the model card (reported cc-by-nc-sa-4.0)",
    ),
    ModelSpec(
        name="self-forcing-1.3b", **_SMALL, window_frames=21, sink_frames=0, rolls=False,  # type: ignore[arg-type]
        source="gdhe17/Self-Forcing: checkpoints/self_forcing_dmd.pt",
        licence="code Apache-2.0; weights cc-by-nc-sa-4.0",
    ),
    ModelSpec(
        name="reward-forcing-1.3b", **_SMALL, window_frames=9, rope="window", ema_sink=0.999,  # type: ignore[arg-type]
        source="JaydenLu666/Reward-Forcing-T2V-1.3B: rewardforcing.pt",
        licence="code Apache-2.0; weights: licence not stated where we looked",
    ),
    ModelSpec(
        name="krea-14b", **_LARGE, window_frames=6, sink_frames=1, rope="window", reencodes=True, interpolate=4,  # type: ignore[arg-type]
        steps=(1000, 750, 500, 250, 0),
        source="krea/krea-realtime-video: krea-realtime-video-14b.safetensors",
        licence="code CC-BY-NC-SA-4.0; weights: see the model card",
    ),
    ModelSpec(
        name="liveavatar-14b", **_LARGE, latent_height=48, latent_width=88, sink_frames=0, max_frames=45_000,  # type: ignore[arg-type]
        sampling="euler", shift=3.0, fps=25, audio_blocks=(0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39),
        source="Wan-AI/Wan2.2-S2V-14B + Quark-Vision/Live-Avatar: liveavatar.safetensors (--lora)",
        licence="see the model cards",
    ),
    # The embedded model: no word of it but its size differs from the ones above (ispa_deploy/demo/MODEL_CARD.md).
    ModelSpec(
        name="demo", dim=128, ffn_dim=256, heads=4, layers=10, freq_dim=256, text_dim=32, text_len=8,
        latent_channels=40, latent_height=5, latent_width=5, patch=(1, 1, 1), rope="window", rope_theta=100.0,
        window_frames=12, sink_frames=1, shift=3.0, first_steps=16, fps=8, temporal_stride=1,
        source="shipped in the package; trained by `python -m ispa_deploy.demo.train`", licence="Apache-2.0",
    ),
)  # fmt: skip

SPECS: dict[str, ModelSpec] = {spec.name: spec for spec in _TABLE}


def spec_for(name: str, **changes: Any) -> ModelSpec:
    """The spec called `name`, with fields replaced; an unknown name lists the known ones."""
    if name not in SPECS:
        raise known_names("model", name, SPECS)
    return replace(SPECS[name], **changes)
