"""Everything that can be asked of a stream, as one value, and the stream built from it.

The CLI's flags, the profiler's configurations and the evaluation's variants are all `StreamOptions`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ispa_deploy.absorb.absorber import Absorber
from ispa_deploy.absorb.lowrank import Rank
from ispa_deploy.absorb.presets import Settings, settings_for
from ispa_deploy.absorb.records import Choice
from ispa_deploy.absorb.solve import Ridge
from ispa_deploy.avatar.cache import AvatarCache
from ispa_deploy.avatar.condition import drawn_distance
from ispa_deploy.avatar.stream import AvatarStream, Scene
from ispa_deploy.cache import KVCache
from ispa_deploy.context import Encoder
from ispa_deploy.errors import InputError, known_names
from ispa_deploy.policies import POLICIES, Policy
from ispa_deploy.sampler import Sampler
from ispa_deploy.specs import ModelSpec
from ispa_deploy.stream import Decoder, Stream, default_noise

if TYPE_CHECKING:
    from ispa_deploy.delta import Delta
    from ispa_deploy.model import CausalWanDiT
    from ispa_deploy.specs import ModelSpec

ROPE_TABLES = ("exact", "fp16")


SINK_DTYPES = ("float32", "model")
POSITIONS = 1024
"""Frames that a published table of absolute positions holds."""


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """Flags of `run`. None means: what the preset says. `delta_dtype` None: the model's own dtype.

    `spread_solve`: chunks after the warm-up over whose passes the solve is spread; 0: at once, as published.

    `full_commit` runs clean passes to their end, as upstream, and not only as far as a layer keeps something of them.
    `sink`, `roll`, `infinity`, `sink_dtype`: see `stream_spec`.
    `kv_dtype`: how frames are held between chunks, `auto` (the model's own dtype), `int8` or `fp8`.
    `delta_rank`: how many directions of each correction are kept; None: all. `quantisation_aware`: see `Settings`.
    Speech to video only: `rope_table`: `exact`, or `fp16` as upstream rounds it; `online_reference`: the first
    generated frame takes the reference's place after the first clip, as upstream's online decoding does.
    """

    frames: int = 21
    seed: int = 0
    policy: str = "absorb"
    preset: str = "tuned"
    ratio: float = 0.5
    layers: tuple[int, ...] | None = None
    warmup: int | None = None
    recent_frames: int = 0
    window: int | None = None
    sink: int | None = None
    sink_dtype: str = "float32"
    roll: bool = False
    infinity: bool = False
    ridge_absolute: float | None = None
    ridge_relative: float | None = None
    ranking: str | None = None
    intercept: bool | None = None
    half_life: float | None = None
    share: float | None = None
    delta: str = "auto"
    delta_dtype: torch.dtype | None = None
    delta_rank: Rank | None = None
    quantisation_aware: bool = False
    stats_double: bool | None = None
    stats_device: str | None = None
    spread_solve: int = 0
    backend: str = "auto"
    full_commit: bool = False
    kv_dtype: str = "auto"
    rope_table: str = "exact"
    online_reference: bool = False

    def settings(self) -> Settings:
        """The preset with the flags that were given."""
        if self.ridge_absolute is not None and self.ridge_relative is not None:
            raise InputError("both --ridge-absolute and --ridge-relative were given: expected one of them")
        ridge = None
        if self.ridge_absolute is not None or self.ridge_relative is not None:
            ridge = Ridge(absolute=self.ridge_absolute or 0.0, relative=self.ridge_relative or 0.0)
        return settings_for(
            self.preset, warmup=self.warmup, ridge=ridge, ranking=self.ranking, intercept=self.intercept,
            half_life=self.half_life, share=self.share, double=self.stats_double,
            quantisation_aware=self.quantisation_aware,
        )  # fmt: skip

    def policy_value(self) -> Policy:
        if self.policy not in POLICIES:
            raise known_names("policy", self.policy, POLICIES)
        return POLICIES[self.policy]


def stream_spec(spec: ModelSpec, options: StreamOptions) -> ModelSpec:
    """The model's own rules of streaming, with those that the options change.

    `sink`: first frames that stay in the window. `roll`: a window that ends the stream when it is full lets its oldest
    frames go instead. `infinity`: keys are rotated at their slot in the window, so that positions never run out.
    `sink_dtype` `model`: an averaging sink is rounded to the cache's dtype after every chunk, as upstream.
    """
    if options.sink_dtype not in SINK_DTYPES:
        raise known_names("sink dtype", options.sink_dtype, SINK_DTYPES)
    if options.sink is not None and options.sink < 0:
        raise InputError(f"--sink {options.sink}: expected 0 or more frames")
    return replace(
        spec,
        sink_frames=spec.sink_frames if options.sink is None else options.sink,
        ema_wide=spec.ema_wide and options.sink_dtype == "float32",
        rolls=spec.rolls or options.roll,
        max_frames=max(spec.max_frames, POSITIONS) if options.roll else spec.max_frames,
        rope="window" if options.infinity else spec.rope,
    )


def _check_length(spec: ModelSpec, frames: int) -> None:
    """InputError where the stream would fail at its end: now, not after minutes of work."""
    if not spec.rolls and frames > spec.window_frames:
        raise InputError(
            f"{frames} frames: '{spec.name}' keeps all of them, {spec.window_frames} at most; ask for fewer --frames, "
            "or let its window roll with --roll --sink 1"
        )
    if spec.rope == "absolute" and frames > spec.max_frames:
        raise InputError(
            f"{frames} frames: '{spec.name}' has {spec.max_frames} absolute positions; ask for fewer --frames, or "
            "rotate keys by their slot in the window with --infinity"
        )


def open_stream(
    model: CausalWanDiT,
    text_rows: Tensor,
    options: StreamOptions,
    *,
    decoder: Decoder | None = None,
    deltas: dict[int, Delta] | None = None,
    switches: list[tuple[int, Tensor]] | None = None,
    initial: Tensor | None = None,
    encoder: Encoder | None = None,
    scene: Scene | None = None,
) -> Stream:
    """A stream of `options.frames` frames for text rows (1, L, text_dim).

    `deltas`: stored corrections, applied from the first chunk on without a warm-up. `switches`: (frame, text rows).
    `scene`: sound and image, for a speech-to-video model and no other.
    """
    spec, policy = stream_spec(model.spec, options), options.policy_value()
    if bool(spec.audio_blocks) != (scene is not None):
        wrong = "it needs sound and an image: give a scene" if scene is None else "it takes no scene: leave it out"
        raise InputError(f"model '{spec.name}': {wrong}")
    if options.window is not None and not policy.own_window:
        raise InputError("--window was given: expected --policy window with it")
    if policy.localises and len(text_rows) != 1:
        raise InputError(f"{len(text_rows)} prompts with policy '{policy.name}': expected one, run a stream for each")
    if policy.own_window:
        spec = replace(spec, window_frames=spec.window_frames if options.window is None else options.window)
    _check_length(spec, options.frames)
    recent = options.recent_frames if policy.localises else 0
    cache = _cache(model, spec, options, batch=len(text_rows), recent=recent, sink=policy.sink)
    absorber = Absorber(
        targets=[block.self_attn.o for block in model.layers()],
        cache=cache,
        policy=policy,
        settings=options.settings(),
        choice=Choice(ratio=options.ratio, layers=options.layers, seed=options.seed),
        mode=options.delta,
        dtype=options.delta_dtype or model.dtype,
        stats_device=options.stats_device,
        spread=options.spread_solve,
        rank=options.delta_rank,
    )
    if deltas is not None:
        absorber.adopt(deltas)
    noise = default_noise(model.spec, options.seed, batch=len(text_rows), device=model.device)
    common = (
        model, cache, absorber, text_rows, options.frames, noise, Sampler.of(spec), decoder, switches or [], initial,
    )  # fmt: skip
    if scene is None:
        return Stream(*common, full_commit=options.full_commit, encoder=encoder)
    scene.check(spec)
    distance = drawn_distance(options.seed)
    return AvatarStream(*common, scene=scene, distance=distance, online=options.online_reference)


def _cache(
    model: CausalWanDiT, spec: ModelSpec, options: StreamOptions, *, batch: int, recent: int, sink: int
) -> KVCache:
    if options.rope_table not in ROPE_TABLES:
        raise known_names("rope table", options.rope_table, ROPE_TABLES)
    if not spec.audio_blocks:
        if options.rope_table != "exact" or options.online_reference:
            flags = "--rope-table and --online-reference"
            raise InputError(f"{flags} with '{spec.name}': expected a speech-to-video model")
        return KVCache(
            spec, batch=batch, dtype=model.dtype, device=model.device, recent=recent, local_sink=sink,
            backend=options.backend, kv_dtype=options.kv_dtype,
        )  # fmt: skip
    if options.infinity or options.sink is not None:
        raise InputError(f"--infinity and --sink with '{spec.name}': its sink is the image, at positions of its own")
    if options.kv_dtype != "auto":
        raise InputError(f"--kv-dtype {options.kv_dtype} with '{spec.name}': expected auto, its rings are not coded")
    return AvatarCache(
        spec, batch=batch, dtype=model.dtype, device=model.device, recent=recent, local_sink=sink,
        backend=options.backend, half_table=options.rope_table == "fp16",
    )  # fmt: skip
