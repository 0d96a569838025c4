"""The evaluation as a command: runs it, writes the JSON document, and puts the table into a README."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ispa_deploy import __version__
from ispa_deploy.demo.codec import BlockCodec
from ispa_deploy.errors import InputError
from ispa_deploy.evaluate.compare import evaluate
from ispa_deploy.evaluate.table import markdown, replace_section, split_section
from ispa_deploy.evaluate.variants import VARIANTS, Pair, Variant, demo_pairs
from ispa_deploy.media.output import output_path, replace_text
from ispa_deploy.model import CausalWanDiT


def run_evaluation(
    model: CausalWanDiT,
    *,
    count: int = 24,
    frames: int = 24,
    seed: int = 0,
    output: Path | None = None,
    readme: Path | None = None,
    command: str = "",
    variants: Sequence[Variant] = VARIANTS,
    finished: Callable[[Pair, Variant], None] | None = None,
) -> dict[str, Any]:
    """Evaluate the demo model on `count` pairs; the document is returned and, if asked for, written and tabulated.

    `command` is what the document names as its maker. Paths are checked before the work begins.
    """
    if count < 2:
        raise InputError(f"{count} pairs: expected 2 or more, an interval needs several videos")
    if output is not None:
        output = output_path(output, ".json", "evaluation output")
    if readme is not None:
        split_section(readme)
    pairs = demo_pairs(count, seed)
    results = evaluate(model, BlockCodec().decode, pairs, variants, frames=frames, finished=finished)
    document = {
        "kind": "quality",
        "command": command,
        "versions": {"ispa-deploy": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "model": model.spec.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "pairs": [asdict(pair) for pair in pairs],
        "variants": [{"name": item.name, "title": item.title, **_asked(item)} for item in variants],
        **results,
    }
    if output is not None:
        replace_text(output, json.dumps(document, indent=1, allow_nan=False) + "\n")
    if readme is not None:
        replace_section(readme, markdown(document))
    return document


def _asked(variant: Variant) -> dict[str, Any]:
    """The options that a variant names, without those that nobody set."""
    options = {key: value for key, value in asdict(variant.options).items() if value is not None}
    for key in ("frames", "seed"):  # the evaluation's own, the same for all
        del options[key]
    return {"options": options, "layers_of": variant.layers_of}
