"""Bytes of a stream before it runs: weights, caches, statistics and deltas, from a spec and options alone. No torch.

Every term counts what is allocated for it, so that a test can compare the two (tests/test_budget.py). `activations` is
an estimate and says so: it depends on the attention kernel and on the allocator.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

from ispa_deploy.avatar.sizes import audio_linears, audio_parameters, condition_length
from ispa_deploy.policies import POLICIES, Policy
from ispa_deploy.specs import ModelSpec

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
WIDE = 4
"""Bytes of float32: scales, biases of quantised layers, statistics, averaging sinks."""

VAE_PARAMETERS = 126_892_531
VAE_STATE = 151_328
"""Numbers the Wan VAE's decoder remembers between chunks for each pixel of a latent frame."""

Linears = dict[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a stream's memory depends on, named as the flags of `run` and `quantize`.

    `scheme` other than `none`: one byte for each weight of the linears in `quantised` (None: all of the blocks').
    `scored`: layers are ranked by their error, which takes statistics even where nothing is absorbed; `heldout`: in two
    halves. `vae`: the Wan VAE decodes on the device. `offload`: it rests on the CPU while it has nothing to do,
    and so do rings of denoising steps.
    `per_step`: a correction, and its statistics, for each denoising step.
    """

    dtype: str = "bfloat16"
    scheme: str = "w8a8"
    quantised: Collection[str] | None = None
    policy: str = "absorb"
    ratio: float = 0.5
    local_layers: int | None = None
    scored: bool = True
    heldout: bool = True
    warmup: int = 12
    window: int | None = None
    recent_frames: int = 0
    delta: str = "auto"
    delta_bytes: int | None = None
    delta_rank: int | None = None
    intercept: bool = True
    stats_double: bool = False
    stats_device: str | None = None
    batch: int = 1
    kv_dtype: str = "auto"
    attention_dtype: str = "auto"
    vae: bool = False
    offload: bool = False
    per_step: bool = False


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes on the device, but for `host_statistics` and `host_kv`.

    `kv` are persistent keys and values of the stream, `text_kv` those of one prompt, `kv_scratch` transient ones that
    all layers share; `wide_sink` float32 copies of averaging sinks. What ends in `_full` is held until the transition,
    as are statistics; the same without it, and deltas, after it.
    """

    weights: int
    text_kv: int
    kv_full: int
    kv: int
    kv_scratch: int
    wide_sink_full: int
    wide_sink: int
    statistics: int
    host_statistics: int
    host_kv_full: int
    host_kv: int
    deltas: int
    decoder: int
    activations: int

    @property
    def warmup(self) -> int:
        """All that is held at once before the transition."""
        return self._common + self.kv_full + self.wide_sink_full + self.statistics

    @property
    def steady(self) -> int:
        """All that is held at once after it."""
        return self._common + self.kv + self.wide_sink + self.deltas

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.warmup, self.steady)

    @property
    def _common(self) -> int:
        return self.weights + self.text_kv + self.kv_scratch + self.decoder + self.activations

    def to_dict(self) -> dict[str, int]:
        """Plain JSON types, the sums included."""
        return {**asdict(self), "warmup": self.warmup, "steady": self.steady, "peak": self.peak}


def predict(spec: ModelSpec, setup: Setup | None = None) -> Budget:
    """The bytes of one stream of `spec` under `setup`."""
    setup = setup or Setup()
    policy = POLICIES[setup.policy]
    if policy.own_window and setup.window is not None:
        spec = replace(spec, window_frames=setup.window)
    local = _local_layers(spec, setup, policy)
    kept = policy.sink + setup.recent_frames
    layer_full, layer_local = _layer_bytes(spec, setup, policy)
    host_full, host_local = _ring_bytes(spec, setup) if setup.offload else (0, 0)
    layer_full, layer_local = layer_full - host_full, layer_local - host_local
    steps = len(spec.steps) if setup.per_step else 1
    statistics, host = _statistics(spec, setup, policy, local)
    return Budget(
        weights=weight_bytes(spec, setup),
        text_kv=2 * setup.batch * spec.text_len * spec.dim * spec.layers * ITEM_BYTES[setup.dtype],
        kv_full=layer_full * spec.layers,
        kv=layer_full * (spec.layers - local) + layer_local * local,
        kv_scratch=_scratch(spec, setup, kept if local else None),
        wide_sink_full=_wide_sink(spec, setup) * spec.layers if not local or setup.warmup > spec.window_frames else 0,
        wide_sink=_wide_sink(spec, setup) * (spec.layers - local),
        statistics=statistics * steps,
        host_statistics=host * steps,
        host_kv_full=host_full * spec.layers,
        host_kv=host_full * (spec.layers - local) + host_local * local,
        deltas=_deltas(spec, setup) * local * steps if policy.absorbs else 0,
        decoder=_decoder(spec, setup),
        activations=_activations(spec, setup),
    )


def linears(spec: ModelSpec) -> Linears:
    """Every linear layer of the network: name -> (outputs, inputs). Each has a bias."""
    dim, ffn = spec.dim, spec.ffn_dim
    block = {f"{part}.{name}": (dim, dim) for part in ("self_attn", "cross_attn") for name in "qkvo"}
    block |= {"ffn.0": (ffn, dim), "ffn.2": (dim, ffn)}
    return {
        "text_embedding.0": (dim, spec.text_dim),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, spec.freq_dim),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim),
        **{f"blocks.{i}.{name}": shape for i in range(spec.layers) for name, shape in block.items()},
        "head.head": (_patch(spec), dim),
        **audio_linears(spec),
    }


def parameters(spec: ModelSpec) -> int:
    """Numbers in the state dict of the floating-point network."""
    products = sum(outputs * (inputs + 1) for outputs, inputs in linears(spec).values())
    patch_embedding = spec.dim * (_patch(spec) + 1)
    modulation_and_norms = spec.dim * (spec.layers * (6 + 4 + 2) + 2)
    return products + patch_embedding + modulation_and_norms + audio_parameters(spec)


def weight_bytes(spec: ModelSpec, setup: Setup) -> int:
    """The model as it runs: codes, float32 scales and biases of quantised layers, everything else in the dtype."""
    item, total = ITEM_BYTES[setup.dtype], parameters(spec) * ITEM_BYTES[setup.dtype]
    for outputs, inputs in _quantised(spec, setup).values():
        total += outputs * inputs + 2 * WIDE * outputs - item * outputs * (inputs + 1)
    return total


def kv_frame_bytes(spec: ModelSpec, setup: Setup) -> int:
    """Keys and values of one frame in one layer; in 8 bits with a scale of two bytes for each token and head."""
    numbers = 2 * setup.batch * spec.frame_tokens * spec.dim
    if setup.kv_dtype == "auto":
        return numbers * ITEM_BYTES[setup.dtype]
    return numbers + 2 * numbers // spec.head_dim


def _layer_bytes(spec: ModelSpec, setup: Setup, policy: Policy) -> tuple[int, int]:
    """Persistent keys and values of an F-layer and of an L-layer. A model that hears has its condition for a sink, and
    the frames of each denoising step."""
    frame = kv_frame_bytes(spec, setup)
    if not spec.audio_blocks:
        return frame * spec.window_frames, frame * (policy.sink + setup.recent_frames)
    full, local = _ring_bytes(spec, setup)
    sink = frame * condition_length(spec, spec.grid) // spec.frame_tokens
    return full + sink, local + sink * policy.sink


def _ring_bytes(spec: ModelSpec, setup: Setup) -> tuple[int, int]:
    """Frames of each denoising step in an F-layer and in an L-layer; only a model that hears has them."""
    rings = kv_frame_bytes(spec, setup) * len(spec.steps) if spec.audio_blocks else 0
    return rings * spec.window_frames, rings * setup.recent_frames


def _patch(spec: ModelSpec) -> int:
    return spec.latent_channels * spec.patch[0] * spec.patch[1] * spec.patch[2]


def _quantised(spec: ModelSpec, setup: Setup) -> Linears:
    if setup.scheme == "none":
        return {}
    chosen = setup.quantised
    return {
        name: shape
        for name, shape in linears(spec).items()
        if (name.startswith("blocks.") if chosen is None else name in chosen)
    }


def _local_layers(spec: ModelSpec, setup: Setup, policy: Policy) -> int:
    if not policy.localises:
        return 0
    return int(setup.ratio * spec.layers + 0.5) if setup.local_layers is None else setup.local_layers


def _scratch(spec: ModelSpec, setup: Setup, kept: int | None) -> int:
    """Shared by all layers and in the dtype: a window rotated or decoded, an L-layer's frames beside the chunk's.
    8-bit attention decodes no window, and codes the keys again that it rotates."""
    one = setup.batch * spec.frame_tokens * spec.dim * ITEM_BYTES[setup.dtype]
    if spec.audio_blocks:
        visiting = 2 * one * spec.window_frames if setup.offload else 0
        sink = POLICIES[setup.policy].sink * condition_length(spec, spec.grid) * one // spec.frame_tokens
        joined = 0 if kept is None else 2 * (sink + one * (setup.recent_frames + spec.chunk_frames))
        return visiting + joined
    local = 0 if kept is None else kept + max(spec.chunk_frames, spec.first_chunk_frames)
    if setup.attention_dtype != "auto":
        return 2 * one * local + (spec.window_frames * kv_frame_bytes(spec, setup) // 2 if spec.rotates_on_read else 0)
    decoded = 0 if setup.kv_dtype == "auto" else spec.window_frames
    rotated = spec.window_frames if spec.rotates_on_read else 0
    return one * (max(decoded, rotated, local) + max(decoded, local))


def _wide_sink(spec: ModelSpec, setup: Setup) -> int:
    """One layer's, from the first eviction on."""
    if spec.ema_sink is None or not spec.ema_wide or (setup.dtype, setup.kv_dtype) == ("float32", "auto"):
        return 0
    return 2 * WIDE * setup.batch * spec.frame_tokens * spec.dim * spec.sink_frames


def _statistics(spec: ModelSpec, setup: Setup, policy: Policy, local: int) -> tuple[int, int]:
    """Device and host: G, H, two sums and an energy, once or early and late."""
    if not local or not (policy.absorbs or setup.scored):
        return 0, 0
    kind, halves = (2 * WIDE if setup.stats_double else WIDE), (2 if setup.heldout else 1)
    totals = halves * 2 * kind * (spec.dim**2 + spec.dim) * spec.layers
    return (0, totals) if setup.stats_device == "cpu" else (totals, 0)


def _deltas(spec: ModelSpec, setup: Setup) -> int:
    """One layer's correction and the second weight that carries it."""
    item = ITEM_BYTES[setup.dtype]
    square, quantised = spec.dim**2, bool(_quantised(spec, setup))
    mode = setup.delta if setup.delta != "auto" else ("requant" if quantised else "fold")
    second = {"side": 0, "fold": (setup.delta_bytes or item) * square, "requant": square + WIDE * spec.dim}[mode]
    numbers = square if setup.delta_rank is None else 2 * setup.delta_rank * spec.dim
    bias = (WIDE + (WIDE if quantised else item)) * spec.dim if setup.intercept else 0
    return (setup.delta_bytes or item) * numbers + second + bias


def _decoder(spec: ModelSpec, setup: Setup) -> int:
    """The Wan VAE's weights and what its decoder remembers between chunks."""
    if not setup.vae or setup.offload:
        return 0
    return ITEM_BYTES[setup.dtype] * (VAE_PARAMETERS + VAE_STATE * spec.latent_height * spec.latent_width)


def _activations(spec: ModelSpec, setup: Setup) -> int:
    """Estimate: the widest moment of a pass, the feed-forward's: residual, norm, hidden before and after its GELU."""
    chunk = max(spec.chunk_frames, spec.first_chunk_frames, spec.context_frames if spec.reencodes else 0)
    rows = setup.batch * spec.frame_tokens * chunk
    return rows * (4 * spec.dim + 2 * spec.ffn_dim) * ITEM_BYTES[setup.dtype]
