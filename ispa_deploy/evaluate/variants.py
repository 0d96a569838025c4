"""What the quality table compares: prompts with seeds, and the variants of a stream as values.

Every ISPA variant has a twin: No-Absorb on the very layers that the ISPA run of the same pair chose, local from the
same pass on. The difference between the two is what absorption is worth; a No-Absorb that chose for itself would
compare layers as well.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ispa_deploy.demo.scene import ATTRIBUTES
from ispa_deploy.options import StreamOptions

FULL = "full"
"""The variant that all others are compared with."""


@dataclass(frozen=True)
class Pair:
    """One video: what is asked for and the noise it is made from."""

    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table. `layers_of`: local layers are taken from that variant's run of the same pair."""

    name: str
    title: str
    options: StreamOptions
    layers_of: str | None = None


def _with_twin(name: str, title: str, options: StreamOptions) -> tuple[Variant, Variant]:
    bare = StreamOptions(policy="sink-local", preset=options.preset, recent_frames=options.recent_frames)
    return (
        Variant(name=name, title=title, options=options),
        Variant(name=twin(name), title="– the same layers, No-Absorb", options=bare, layers_of=name),
    )


def twin(name: str) -> str:
    """Name of the No-Absorb run on the layers of ISPA variant `name`."""
    return f"{name}-no-absorb"


VARIANTS: tuple[Variant, ...] = (
    Variant(name=FULL, title="Full", options=StreamOptions(policy="full")),
    *_with_twin("ispa-0.5-paper", "ISPA-0.5 `paper`", StreamOptions(preset="paper")),
    *_with_twin("ispa-0.5", "ISPA-0.5 `tuned`", StreamOptions()),
    *_with_twin("ispa-0.5-recent3", "ISPA-0.5 `tuned` + 3 recent", StreamOptions(recent_frames=3)),
    *_with_twin("ispa-1.0-recent3", "ISPA-1.0 `tuned` + 3 recent", StreamOptions(ratio=1.0, recent_frames=3)),
    Variant(name="no-sink-0.5", title="No-Sink 0.5 `tuned`", options=StreamOptions(policy="no-sink")),
    Variant(name="random-0.5", title="ISPA-0.5 `tuned`, random layers", options=StreamOptions(ranking="random")),
    Variant(
        name="sink-current",
        title="sink + current, all layers",
        options=StreamOptions(policy="sink-local", ratio=1.0, ranking="random"),
    ),
)

RIVALS: tuple[tuple[str, str], ...] = (
    *((variant.layers_of, variant.name) for variant in VARIANTS if variant.layers_of is not None),
    ("ispa-0.5", "ispa-0.5-paper"),
    ("ispa-0.5", "no-sink-0.5"),
    ("ispa-0.5", "random-0.5"),
)
"""(variant, against): whose errors are set against each other pair by pair."""


def demo_pairs(count: int = 24, seed: int = 0) -> tuple[Pair, ...]:
    """`count` full demo prompts with seeds of their own; words are dealt evenly, so six pairs name them all."""
    dealer = random.Random(seed)
    columns = [_dealt(words, count, dealer) for words in ATTRIBUTES]
    return tuple(
        Pair(f"a {speed} {colour} {shape} over {ground} {pattern}", 1000 * seed + index)
        for index, (speed, colour, shape, ground, pattern) in enumerate(zip(*columns, strict=True))
    )


def _dealt(words: tuple[str, ...], count: int, dealer: random.Random) -> list[str]:
    column = [words[index % len(words)] for index in range(count)]
    dealer.shuffle(column)
    return column
