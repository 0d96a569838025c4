"""The demo's language: 21 words for five attributes, read from free text and handed to the model as one-hot rows."""

from __future__ import annotations

import re
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from ispa_deploy.demo.scene import ATTRIBUTES
from ispa_deploy.errors import InputError

TEXT_LEN = 8
TEXT_DIM = 32
OPEN = -1
"""The id of an attribute that the prompt leaves to the model."""

NAMES = ("speed", "colour", "shape", "ground", "pattern")
VOCABULARY: tuple[str, ...] = tuple(word for words in ATTRIBUTES for word in words)

_FIRST = (0, *accumulate(map(len, ATTRIBUTES)))[:-1]  # vocabulary position of each attribute's first word
_LOOKUP = {word: (row, index) for row, words in enumerate(ATTRIBUTES) for index, word in enumerate(words)}
_SPELLINGS = {"grey": "gray", "disk": "disc"}


def parse_prompt(text: str) -> Tensor:
    """`a red ring over teal` -> (5,) int64: the id within each attribute, -1 where none of its words is named.

    Other words are passed over. InputError if no word is known, or if two different words claim one attribute.
    """
    found: dict[int, str] = {}
    for written in re.findall(r"[a-z]+", text.lower()):
        word = _SPELLINGS.get(written, written)
        if word not in _LOOKUP:
            continue
        row = _LOOKUP[word][0]
        if found.setdefault(row, word) != word:
            raise InputError(f"prompt {text!r} names two {NAMES[row]}s, '{found[row]}' and '{word}': keep one of them")
    if not found:
        raise InputError(f"prompt {text!r} has no word the demo model knows: use some of {', '.join(VOCABULARY)}")
    return torch.tensor([_LOOKUP[found[row]][1] if row in found else OPEN for row in range(len(ATTRIBUTES))])


def prompt_text(attributes: Tensor) -> str:
    """(5,) ids -> `a fast red ring over teal waves`; open attributes are left out, so parsing gives the ids back."""
    words = [ATTRIBUTES[row][index] if index != OPEN else "" for row, index in enumerate(attributes.tolist())]
    sprite, ground = (" ".join(filter(None, part)) for part in (words[:3], words[3:]))
    return f"a {sprite or 'sprite'}" + (f" over {ground}" if ground else "")


def embed(attributes: Tensor) -> Tensor:
    """(B, 5) ids, -1 = open -> (B, TEXT_LEN, TEXT_DIM) float32: row i is the one-hot of attribute i's word.

    Rows of open attributes and those past the fifth are zero, as Wan zeroes the rows after its text.
    """
    count, rows = attributes.shape
    positions = attributes.clamp_min(0) + torch.tensor(_FIRST, device=attributes.device)
    named = (attributes != OPEN).float()[..., None]
    words = torch.zeros(count, rows, TEXT_DIM, device=attributes.device).scatter_(2, positions[..., None], named)
    return F.pad(words, (0, 0, 0, TEXT_LEN - rows))
