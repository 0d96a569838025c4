"""Lists of prompts, for calibration and for reports: from a file, or our own where the model needs no text encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from export.bundle import DEMO, EMBEDS, built_in_rows, read_prompt_embeds
from ispa_deploy.errors import InputError
from ispa_deploy.evaluate.variants import demo_pairs
from ispa_deploy.media.text import PromptReader
from ispa_deploy.specs import ModelSpec

# Of the demo and of random weights, which need no file of prompts.
OWN_PROMPTS = 4
# Far above any real list; keeps a wrong file from being read as one.
_MAX_BYTES = 16 << 20


def text_rows(
    spec: ModelSpec, kind: str, path: Path | None, reader: Callable[[ModelSpec], PromptReader] | None = None
) -> tuple[list[Tensor], str]:
    """Rows (1, text_len, text_dim) of each prompt, and the sha256 of what they were made from.

    `path`: a text file of prompts, or safetensors with `prompt_embeds`; None: our own, for the demo and random weights
    (`kind` as `Source.kind`). `reader`: a text encoder, for models that need one.
    """
    check_texts(spec, kind, path, reader)
    if path is not None and path.suffix == ".safetensors":
        return [read_prompt_embeds(path, spec)], hashlib.sha256(path.read_bytes()).hexdigest()
    prompts = read_prompts(path) if path is not None else [pair.prompt for pair in demo_pairs(OWN_PROMPTS)]
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    if reader is not None:
        return reader(spec).rows(prompts), digest
    return [built_in_rows(prompt, spec, kind) for prompt in prompts], digest


def check_texts(spec: ModelSpec, kind: str, path: Path | None, reader: object | None) -> None:
    """InputError where a model cannot stream what `text_rows` is asked for: before minutes of work, not after them."""
    if spec.audio_blocks:
        raise InputError(
            f"calibration and --report with '{spec.name}': they stream prompts, and this model needs a voice and a "
            "face as well; leave them out and take a scheme without calibration (w8a8-int8, w8a8-fp8)"
        )
    if path is not None and path.suffix == ".safetensors":
        read_prompt_embeds(path, spec)
    elif spec.name != DEMO and kind != "random" and path is None:
        raise InputError(
            f"model '{spec.name}' cannot be calibrated without prompts: pass --calibrate PROMPTS.txt, one per line"
        )
    elif spec.name != DEMO and kind != "random" and reader is None:
        raise InputError(
            f"model '{spec.name}' does not read prompts: add --text-encoder PATH, or pass --calibrate "
            f"FILE.safetensors with '{EMBEDS}' of shape (L, {spec.text_dim})"
        )


def read_prompts(path: Path) -> list[str]:
    """Prompts of a UTF-8 text file, one per line; empty lines and those that start with # are passed over."""
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        raise InputError(f"prompts '{path}': expected a text file with one prompt per line, at most 16 MiB")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise InputError(f"prompts '{path}': not UTF-8 text; expected one prompt per line") from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise InputError(f"prompts '{path}' holds none: expected one prompt per line")
    return prompts
