"""Everything that can be asked of a stream, as one value, and the stream built from it.

The CLI's flags, the profiler's configurations and the evaluation's variants are all `StreamOptions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ispa_deploy.absorb.absorber import Absorber
from ispa_deploy.absorb.lowrank import Rank
from ispa_deploy.absorb.presets import Settings, settings_for
from ispa_deploy.absorb.records import Choice
from ispa_deploy.absorb.solve import Ridge
from ispa_deploy.adapt import adapted, check_length
from ispa_deploy.advice import memory_errors
from ispa_deploy.avatar.absorb import PerStepAbsorber
from ispa_deploy.avatar.cache import AvatarCache
from ispa_deploy.avatar.condition import drawn_distance
from ispa_deploy.avatar.stream import AvatarStream, Scene
from ispa_deploy.cache import KVCache
from ispa_deploy.context import Encoder
from ispa_deploy.errors import InputError, known_names
from ispa_deploy.memory import setup_for
from ispa_deploy.policies import POLICIES, Policy
from ispa_deploy.precision import check_bits, last_pass_linears
from ispa_deploy.sampler import LEVELS, Sampler
from ispa_deploy.stream import Decoder, NoiseSource, Stream, default_noise, plan_chunks

if TYPE_CHECKING:
    from ispa_deploy.delta import Delta, DeltaTarget
    from ispa_deploy.model import CausalWanDiT
    from ispa_deploy.specs import ModelSpec

ROPE_TABLES = ("exact", "fp16")


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """Flags of `run`. None means: what the preset says. `delta_dtype` None: the model's own dtype.

    `spread_solve`: chunks after the warm-up over whose passes the solve is spread; 0: at once, as published.

    `full_commit` runs clean passes to their end, as upstream, and not only as far as a layer keeps something of them.
    `sink`: first frames that stay in the window. `roll`: a window that ends the stream when it is full lets its oldest
    frames go instead. `infinity`: keys are rotated at their slot in the window, so that positions never run out.
    `renew_sink`: a prompt switch that computes the window anew makes its first frames the sink, as LongLive's
    `global_sink: false`; off: the old prompt's stay.
    `sink_dtype` `model`: an averaging sink is rounded to the cache's dtype after every chunk, as upstream.
    `kv_dtype`: how frames are held between chunks, `auto` (the model's own dtype), `int8` or `fp8`.
    `attention_dtype`: `int8` lets F-layers read an int8 cache as it lies, with int8 queries; `auto` decodes it.
    `delta_rank`: how many directions of each correction are kept; None: all. `quantisation_aware`: see `Settings`.
    Speech to video only: `rope_table`: `exact`, or `fp16` as upstream rounds it; `online_reference`: the first
    generated frame takes the reference's place after the first clip, as upstream's online decoding does; `per_step`:
    a correction for each denoising step, and not one for all of them.
    `last_pass_bits` 16: in the last denoising pass of a chunk the 8-bit linears of the last third of the layers take
    activations of 16 bits; see `ispa_deploy.precision`.
    `offload`: caches that are idle, its rings of other denoising steps, lie in host memory.
    `height` and `width` in pixels; `interpolate`: chunks from one prompt to the next. Of a model that encodes its past
    anew before every chunk: `kv_frames` (its context), `kv_bias` in (0, 1] (the weight of keys between the context's
    first frame and the chunk; 1: off), `steps` (denoising passes, the last at timestep 0), `strength` in (0, 1] (how
    much of given latents is noised away), `first_frame` (of a sliding context: `reencode` from pixels, `keep`, or
    `auto`: reencode where there is an encoder).
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
    renew_sink: bool = False
    first_chunk: int | None = None
    sink_dtype: str = "float32"
    roll: bool = False
    infinity: bool = False
    ridge_absolute: float | None = None
    ridge_relative: float | None = None
    ranking: str | None = None
    intercept: bool | None = None
    half_life: float | None = None
    ahead: int | None = None
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
    attention_dtype: str = "auto"
    rope_table: str = "exact"
    online_reference: bool = False
    per_step: bool = False
    height: int | None = None
    width: int | None = None
    interpolate: int | None = None
    kv_frames: int | None = None
    kv_bias: float = 1.0
    steps: int | None = None
    strength: float | None = None
    first_frame: str = "auto"
    offload: bool = False
    last_pass_bits: int = 16

    def settings(self) -> Settings:
        """The preset with the flags that were given."""
        if self.ridge_absolute is not None and self.ridge_relative is not None:
            raise InputError("both --ridge-absolute and --ridge-relative were given: expected one of them")
        ridge = None
        if self.ridge_absolute is not None or self.ridge_relative is not None:
            ridge = Ridge(absolute=self.ridge_absolute or 0.0, relative=self.ridge_relative or 0.0)
        return settings_for(
            self.preset, warmup=self.warmup, ridge=ridge, ranking=self.ranking, intercept=self.intercept,
            half_life=self.half_life, ahead=self.ahead, share=self.share, double=self.stats_double,
            quantisation_aware=self.quantisation_aware,
        )  # fmt: skip

    def policy_value(self) -> Policy:
        if self.policy not in POLICIES:
            raise known_names("policy", self.policy, POLICIES)
        return POLICIES[self.policy]


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
    `initial` latents (1, F, C, H, W) are handed out and remembered before generation starts; with a `strength` they are
    what every chunk starts from, noised. `scene`: sound and image, for a speech-to-video model and no other.
    """
    if bool(model.spec.audio_blocks) != (scene is not None):
        wrong = "it needs sound and an image: give a scene" if scene is None else "it takes no scene: leave it out"
        raise InputError(f"model '{model.spec.name}': {wrong}")
    spec, policy = adapted(model.spec, options), options.policy_value()
    if policy.localises and len(text_rows) != 1:
        raise InputError(f"{len(text_rows)} prompts with policy '{policy.name}': expected one, run a stream for each")
    with memory_errors(
        spec, lambda: setup_for(model, model.dtype, options), model.device, lambda: "while the caches are allocated"
    ):
        check_options(model.spec, options)
        cache = _cache(spec, options, model.device, model.dtype, batch=len(text_rows))
    if options.per_step and deltas is not None:
        raise InputError("--per-step with --deltas: they hold one correction for all steps; leave one of them out")
    absorber = _absorber([block.self_attn.o for block in model.layers()], cache, options, model.dtype)
    if deltas is not None:
        absorber.adopt(deltas)
    noise: NoiseSource = default_noise(spec, options.seed, batch=len(text_rows), device=model.device)
    sampler = Sampler.of(spec)
    if initial is not None and tuple(initial.shape[2:]) != spec.latent_shape:
        raise InputError(f"initial latents of shape {tuple(initial.shape[2:])}: expected {spec.latent_shape}")
    if options.strength is not None:
        noise, initial = noised_start(noise, initial, sampler, spec, options.frames), None
    fine = last_pass_linears(model, options.last_pass_bits)
    common = (model, cache, absorber, text_rows, options.frames, noise, sampler, decoder, switches or [], initial)
    if scene is None:
        encoder = _first_frame_encoder(options, decoder, encoder)
        return Stream(*common, full_commit=options.full_commit, encoder=encoder, fine=fine)
    scene.check(spec)
    distance = drawn_distance(options.seed)
    return AvatarStream(*common, scene=scene, distance=distance, online=options.online_reference, fine=fine)


def check_options(spec: ModelSpec, options: StreamOptions) -> ModelSpec:
    """The spec that a model's stream runs under; InputError for all that options alone tell to be wrong.

    Nothing is allocated, so a slip is told before weights are loaded, and before text or sound is encoded.
    """
    if options.window is not None and not options.policy_value().own_window:
        raise InputError("--window was given: expected --policy window with it")
    if options.per_step and not spec.audio_blocks:
        raise InputError(f"--per-step with '{spec.name}': expected a speech-to-video model; leave it out")
    check_bits(options.last_pass_bits)
    spec = adapted(spec, options)
    check_length(spec, options.frames)
    plan_chunks(spec, options.frames)
    targets: list[Any] = [None] * spec.layers  # counted, not asked
    cache = _cache(spec, replace(options, offload=False), torch.device("meta"), torch.bfloat16, batch=1)
    _absorber(targets, cache, options, torch.bfloat16)
    return spec


def _absorber(targets: Sequence[DeltaTarget], cache: KVCache, options: StreamOptions, dtype: torch.dtype) -> Absorber:
    """The stream's absorption: one correction for each layer, or one for each of its denoising steps."""
    return (PerStepAbsorber if options.per_step else Absorber)(
        targets=targets,
        cache=cache,
        policy=options.policy_value(),
        settings=options.settings(),
        choice=Choice(ratio=options.ratio, layers=options.layers, seed=options.seed),
        mode=options.delta,
        dtype=options.delta_dtype or dtype,
        stats_device=options.stats_device,
        spread=options.spread_solve,
        rank=options.delta_rank,
    )


def _cache(spec: ModelSpec, options: StreamOptions, device: torch.device, dtype: torch.dtype, *, batch: int) -> KVCache:
    """Keys and values of a stream, where `recent_frames` means something to its policy."""
    policy = options.policy_value()
    recent = options.recent_frames if policy.localises else 0
    if options.rope_table not in ROPE_TABLES:
        raise known_names("rope table", options.rope_table, ROPE_TABLES)
    if not spec.audio_blocks:
        if options.rope_table != "exact" or options.online_reference:
            flags = "--rope-table and --online-reference"
            raise InputError(f"{flags} with '{spec.name}': expected a speech-to-video model")
        return KVCache(
            spec, batch=batch, dtype=dtype, device=device, recent=recent, local_sink=policy.sink,
            backend=options.backend, kv_dtype=options.kv_dtype, attention_dtype=options.attention_dtype,
            past_bias=options.kv_bias,
        )  # fmt: skip
    if options.infinity or options.sink is not None:
        raise InputError(f"--infinity and --sink with '{spec.name}': its sink is the image, at positions of its own")
    if options.kv_dtype != "auto":
        raise InputError(f"--kv-dtype {options.kv_dtype} with '{spec.name}': expected auto, its rings are not coded")
    if options.attention_dtype != "auto":
        raise InputError(f"--attention-dtype {options.attention_dtype} with '{spec.name}': its rings are not coded")
    return AvatarCache(
        spec, batch=batch, dtype=dtype, device=device, recent=recent, local_sink=policy.sink,
        backend=options.backend, half_table=options.rope_table == "fp16", offload=options.offload,
    )  # fmt: skip


def noised_start(
    noise: NoiseSource, given: Tensor | None, sampler: Sampler, spec: ModelSpec, frames: int
) -> NoiseSource:
    """Noise whose first pass of a chunk is that chunk of the given latents, noised to the first timestep."""
    if given is None:
        raise InputError("--strength without --initial: expected the video to start from; name it by --initial FILE")
    if given.shape[1] < frames:
        raise InputError(f"{given.shape[1]} initial frames for a stream of {frames}: give at most as many --frames")
    starts, share = [start for start, _ in plan_chunks(spec, frames)], sampler.schedule.timesteps[0] / LEVELS

    def start_or_noise(chunk: int, count: int, step: int) -> Tensor:
        fresh = noise(chunk, count, step)
        if step:
            return fresh
        return (1 - share) * given[:, starts[chunk] : starts[chunk] + count].to(fresh) + share * fresh

    return start_or_noise


def _first_frame_encoder(options: StreamOptions, decoder: Decoder | None, encoder: Encoder | None) -> Encoder | None:
    able = decoder is not None and encoder is not None
    if options.first_frame == "reencode" and not able:
        raise InputError("--first-frame reencode: expected a VAE that decodes and encodes; name it by --vae PATH")
    return encoder if able and options.first_frame != "keep" else None
