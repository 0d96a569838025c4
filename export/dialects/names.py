"""Wan's tensor names and those of diffusers' WanTransformer3DModel.

The two swap the norms: upstream's `norm3` is diffusers' `norm2`; the other norms have no weights.
"""

from __future__ import annotations

import re

from ispa_deploy.errors import InputError

_ATTENTION = (
    ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"),
)  # fmt: skip
_IN_BLOCK = (
    *((f"self_attn.{ours}", f"attn1.{theirs}") for ours, theirs in _ATTENTION),
    *((f"cross_attn.{ours}", f"attn2.{theirs}") for ours, theirs in _ATTENTION),
    ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("modulation", "scale_shift_table"),
)
_OUTSIDE = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
)
_TO = (dict(_IN_BLOCK), dict(_OUTSIDE))
_BACK = tuple({theirs: ours for ours, theirs in table.items()} for table in _TO)
_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


def to_diffusers(name: str) -> str:
    """Name of a tensor, or of a layer, of upstream -> diffusers'. InputError for a name outside the network."""
    return _renamed(name, _TO, "Wan")


def from_diffusers(name: str) -> str:
    """Inverse of `to_diffusers`."""
    return _renamed(name, _BACK, "WanTransformer3DModel")


def _renamed(name: str, tables: tuple[dict[str, str], ...], whose: str) -> str:
    block = _BLOCK.fullmatch(name)
    prefix, rest = (block[1], block[2]) if block else ("", name)
    table = tables[0 if block else 1]
    parts = rest.split(".")
    for length in range(len(parts), 0, -1):
        head, tail = ".".join(parts[:length]), parts[length:]
        if head in table:
            return prefix + ".".join([table[head], *tail])
    raise InputError(f"tensor '{name}' is none of {whose}'s text-to-video network: remove it, or convert another file")
