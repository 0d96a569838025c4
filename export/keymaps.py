"""Names of weights: what the wrappings of training and the diffusers layout call them, and what upstream calls them.

Also which family a set of names and shapes belongs to. Nothing here reads a file or holds a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ispa_deploy.errors import InputError
from ispa_deploy.specs import SPECS, ModelSpec

INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

# Diffusers' `WanTransformer3DModel` -> upstream, as whole dotted parts. Its block norm2 is upstream's norm3, and the
# table of the head has the name that those of the blocks have.
_DIFFUSERS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
        (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
        (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
        (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^proj_out\.", "head.head."),
        (r"^scale_shift_table$", "head.modulation"),
        (r"(?<=\d)\.scale_shift_table$", ".modulation"),
        (r"(?<=\d)\.norm2\.", ".norm3."),
        (r"(?<=\d)\.attn1\.", ".self_attn."),
        (r"(?<=\d)\.attn2\.", ".cross_attn."),
        (r"(?<=attn)\.to_out\.0\.", ".o."),
        (r"(?<=attn)\.to_([qkv])\.", r".\1."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
    )
)

# The three 1.3B projects share every name and shape and differ in what they wrap the weights in.
_FAMILY_OF_LAYOUT = {
    "generator": "longlive-1.3b",
    "generator_ema": "self-forcing-1.3b",
    "flat, with the prefix model.": "reward-forcing-1.3b",
}


@dataclass(frozen=True, slots=True)
class Names:
    """How a container's names were undone: `plain` maps each to upstream's; `prefixed`: they began with `model.`."""

    plain: Mapping[str, str]
    prefixed: bool
    diffusers: bool


def plain_name(name: str) -> str:
    """Without the infixes of the training wrappers and one leading `model.`."""
    for infix in INFIXES:
        name = name.replace(infix, "")
    return name.removeprefix("model.")


def from_diffusers(name: str) -> str:
    """Upstream's name of a tensor of diffusers' Wan transformer; one that has no other name there stays as it is."""
    for pattern, upstream in _DIFFUSERS:
        name = pattern.sub(upstream, name)
    return name


def undone(names: Iterable[str], where: str) -> Names:
    """Every name as upstream's; InputError when two of them then are the same."""
    bare = {name: plain_name(name) for name in names}
    diffusers = any(name.startswith("condition_embedder.") or ".attn1." in name for name in bare.values())
    plain = {name: from_diffusers(part) for name, part in bare.items()} if diffusers else bare
    if len(set(plain.values())) != len(plain):
        raise InputError(f"{where} holds a tensor twice under different wrappings: expected one network")
    prefixed = bool(plain) and all(name.startswith("model.") for name in plain)
    return Names(plain, prefixed, diffusers)


def recognise(shapes: Mapping[str, tuple[int, ...]], layout: str, where: str) -> tuple[ModelSpec, str]:
    """The spec these names and shapes are of, and one line that says what was concluded from what.

    `layout`: what the weights were wrapped in, which decides between families of one geometry. InputError when none or
    several remain.
    """
    blocks = [int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))]
    patch = shapes.get("patch_embedding.weight")
    if not blocks or not patch:
        raise InputError(f"{where} has no blocks or no patch_embedding.weight: expected a causal Wan checkpoint")
    hears = any(name.startswith("audio_injector.") for name in shapes)
    size = patch[0], max(blocks) + 1
    seen = f"width {size[0]} and {size[1]} layers" + (" and hears audio" if hears else "")
    family = {spec.name: spec for spec in SPECS.values() if bool(spec.audio_blocks) == hears}
    fitting = {name: spec for name, spec in family.items() if (spec.dim, spec.layers) == size}
    if len(fitting) == 1:
        (spec,) = fitting.values()
        return spec, f"{where} has {seen}: model {spec.name}"
    usual = _FAMILY_OF_LAYOUT.get(layout)
    if usual in fitting:
        line = f"{where} has {seen}, weights {_wrapped(layout)}: model {usual} assumed; --model says otherwise"
        return fitting[usual], line
    names = ", ".join(fitting) or f"none of {', '.join(SPECS)}"
    raise InputError(f"{where} has {seen}, which fits {names}: say which by --model")


def _wrapped(layout: str) -> str:
    return layout if layout.startswith("flat") else f"under '{layout}' alone"
