"""Floating-point operations and bytes that a steady chunk needs, row by row, from the geometry alone; no torch.

A product of (m, k) and (k, n) is 2 m k n operations. Bytes are the least that must move: every operand read once, every
result written once, nothing kept between kernels. A row that reaches neither peak spends its time on something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ispa_deploy.specs import ModelSpec

# Tensors of the chunk's size that norms, modulation and residuals of one block read or write: two modulations (2 each),
# one plain norm (2), three residuals (3 each), the norms of q, k and the cross-attention's q (2 each).
_NORM_TENSORS = 2 * 2 + 2 + 3 * 3 + 3 * 2
_EIGHT_BIT = 1


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one row."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides the work of a chunk beside the geometry.

    `keys`: frames that the queries of each layer see; `width`: bytes of an activation; `weight_width`: bytes of a
    linear's weight, 1 for 8 bits; `stores`: leading layers that the clean pass runs, the last of them for its keys and
    values alone; None: it runs to its end; `wide`: layers whose linears take activations of 16 bits, in two products,
    in the last denoising pass.
    """

    keys: Sequence[float]
    width: int
    weight_width: int
    stores: int | None = None
    wide: int = 0

    @property
    def eight_bit(self) -> bool:
        return self.weight_width == _EIGHT_BIT


def keys_of(spec: ModelSpec, local: Iterable[int], near: float) -> list[float]:
    """Frames seen by each layer when the layers `local` see only `near` frames, the others the whole window."""
    return [near if layer in set(local) else spec.window_frames for layer in range(spec.layers)]


def block_linears(spec: ModelSpec) -> list[tuple[int, int]]:
    """(in, out) of every linear that a pass runs in one block: self q, k, v, o; cross q, o; the feed-forward."""
    return [(spec.dim, spec.dim)] * 6 + [(spec.dim, spec.ffn_dim), (spec.ffn_dim, spec.dim)]


def chunk_work(spec: ModelSpec, setting: Setting) -> dict[str, Work]:
    """Work of a steady chunk by the rows of the breakdown that it can be counted for."""
    denoising = _pass_work(spec, setting, spec.layers, head=True)
    clean = _clean_work(spec, setting)
    rows = {row: work * len(spec.steps) + clean.get(row, Work()) for row, work in denoising.items()}
    rows["linear.gemm"] += _linears(block_linears(spec), spec.chunk_frames * spec.frame_tokens, setting) * setting.wide
    return rows


def _clean_work(spec: ModelSpec, setting: Setting) -> dict[str, Work]:
    """The clean pass, or a context pass: whole, or as far as layers keep something of it."""
    if spec.reencodes:
        return _context_work(spec, setting)
    if setting.stores is None:
        return _pass_work(spec, setting, spec.layers, head=True)
    if setting.stores == 0:
        return {}
    rows = _pass_work(spec, setting, setting.stores - 1, head=False)
    queries = spec.chunk_frames * spec.frame_tokens
    rows["linear.gemm"] += _linears([(spec.dim, spec.dim)] * 2, queries, setting)
    return rows


def _context_work(spec: ModelSpec, setting: Setting) -> dict[str, Work]:
    """The context pass: every layer keeps something of it, and each chunk of it sees itself and the ones before."""
    context, whole = spec.context_frames, setting.stores is None
    # Whole chunks see half of the context and half a chunk on average.
    seen = replace(setting, keys=[(context + spec.chunk_frames) / 2] * spec.layers)
    spec = replace(spec, chunk_frames=context, window_frames=2 * context)
    rows = _pass_work(spec, seen, spec.layers - (0 if whole else 1), head=whole)
    if not whole:
        rows["linear.gemm"] += _linears([(spec.dim, spec.dim)] * 2, context * spec.frame_tokens, setting)
    return rows


def _pass_work(spec: ModelSpec, setting: Setting, layers: int, *, head: bool) -> dict[str, Work]:
    """One pass through the first `layers` blocks."""
    queries, width = spec.chunk_frames * spec.frame_tokens, setting.width
    linears = block_linears(spec)
    inputs, outputs = (sum(pair[side] for pair in linears) for side in (0, 1))
    one = queries * spec.dim * width
    rows = {
        "attention.kernel": _sum(
            _attention(spec, queries, frames * spec.frame_tokens, width) for frames in setting.keys[:layers]
        ),
        "attention.cross": _attention(spec, queries, spec.text_len, width) * layers,
        "attention.cache": Work(0, 4 * one) * layers,
        "linear.gemm": _linears(linears, queries, setting) * layers + _ends(spec, queries, width, head=head),
        "overhead.norm": Work(0, _NORM_TENSORS * one + 2 * spec.ffn_dim * queries * width) * layers,
        "overhead.rope": Work(0, 4 * one) * layers,
    }
    if spec.audio_blocks and head:  # queries of each frame see its audio tokens; these linears stay as they are
        count = len(spec.audio_blocks)
        rows["attention.cross"] += _attention(spec, queries, spec.audio_tokens + 1, width) * count
        plain = Setting(keys=(), width=width, weight_width=width)
        rows["linear.gemm"] += _linears([(spec.dim, spec.dim)] * 2, queries, plain) * count
        rows["overhead.norm"] += Work(0, 7 * one) * count
    if setting.eight_bit:
        rows["linear.quantise"] = Work(0, queries * inputs * (width + _EIGHT_BIT)) * layers
        rows["linear.dequantise"] = Work(0, 2 * queries * outputs * width) * layers
    return rows


def _attention(spec: ModelSpec, queries: int, keys: float, width: int) -> Work:
    """Two products; q and the output, k and v."""
    return Work(4 * queries * keys * spec.dim, 2 * (queries + keys) * spec.dim * width)


def _linears(shapes: Sequence[tuple[int, int]], rows: int, setting: Setting) -> Work:
    return _sum(
        Work(2 * rows * i * o, i * o * setting.weight_width + rows * (i * setting.weight_width + o * setting.width))
        for i, o in shapes
    )


def _ends(spec: ModelSpec, rows: int, width: int, *, head: bool) -> Work:
    """Patch embedding, and head where it runs."""
    pixels = spec.latent_channels * spec.patch[0] * spec.patch[1] * spec.patch[2]
    shapes = [(pixels, spec.dim), (spec.dim, pixels)][: 2 if head else 1]
    return _linears(shapes, rows, Setting(keys=(), width=width, weight_width=width))


def _sum(parts: Iterable[Work]) -> Work:
    return sum(parts, Work())
