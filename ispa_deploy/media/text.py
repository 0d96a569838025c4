"""Prompts to text rows: UMT5 through transformers, each prompt encoded once and kept on disk.

The encoder is the largest object of the whole system (11 GB in 16 bit), so it is opened only for prompts that the cache
does not hold, and let go as soon as they are encoded.
"""

from __future__ import annotations

import hashlib
import html
import importlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ispa_deploy.errors import InputError, RunError
from ispa_deploy.media.weights import fill, hushed, library, size_of

WHAT = "a UMT5 encoder"
ROWS = "prompt_embeds"
"""The tensor's name in a cache file, which `--prompt-embeds` reads too."""

# Upstream's names, as regular expressions, and the library's.
_RENAMED = (
    (r"token_embedding\.", "shared."),
    (r"norm\.", "encoder.final_layer_norm."),
    (r"blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)
_SHARED, _TIED = "shared.weight", "encoder.embed_tokens.weight"
_LAYER = "encoder.block.0.layer."
_TOKENISER_FILES = ("tokenizer.json", "spiece.model")


def clean_prompt(text: str) -> str:
    """The prompt as the models were trained on it: mended encoding (with ftfy), HTML undone twice, single spaces."""
    with suppress(ImportError):
        text = importlib.import_module("ftfy").fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())


def umt5_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The library's names for a state dict with upstream's; one that has them already only gains its tied tensor."""
    named = {}
    for name, tensor in state.items():
        for pattern, replacement in _RENAMED:
            name, hits = re.subn(f"^{pattern}", replacement, name)
            if hits:
                break
        named[name] = tensor
    for given, other in ((_SHARED, _TIED), (_TIED, _SHARED)):
        if given in named:
            named.setdefault(other, named[given])
    return named


def umt5(state: Mapping[str, Tensor], where: str) -> nn.Module:
    """`transformers.UMT5EncoderModel` around the given tensors, its sizes read off their shapes; no weight is copied.

    Raises InputError: transformers is missing, or the tensors are not those of one UMT5 encoder.
    """
    named = umt5_names(state)
    transformers = library("transformers", "the text encoder")

    def size(name: str, axis: int) -> int:
        return size_of(named, name, axis, where, WHAT)

    heads = size(f"{_LAYER}0.SelfAttention.relative_attention_bias.weight", 1)
    with hushed():
        kind = transformers.UMT5Config
    config = kind(
        vocab_size=size(_SHARED, 0),
        d_model=size(_SHARED, 1),
        d_ff=size(f"{_LAYER}1.DenseReluDense.wi_0.weight", 0),
        d_kv=size(f"{_LAYER}0.SelfAttention.q.weight", 0) // heads,
        num_heads=heads,
        num_layers=sum(name.endswith("SelfAttention.q.weight") for name in named),
        relative_attention_num_buckets=size(f"{_LAYER}0.SelfAttention.relative_attention_bias.weight", 0),
        feed_forward_proj="gated-gelu",
    )
    with hushed(), torch.device("meta"):
        model: nn.Module = transformers.UMT5EncoderModel(config)
    fill(model, named, where, WHAT)
    return model


def text_width(state: Mapping[str, Tensor], where: str) -> int:
    """Width of the rows that a set of UMT5 weights gives."""
    return size_of(umt5_names(state), _SHARED, 1, where, WHAT)


def open_tokeniser(folder: Path) -> Any:
    """The tokeniser in a folder, nothing downloaded. InputError: no folder, no tokeniser in it, none that ends text."""
    if not any((folder / name).is_file() for name in _TOKENISER_FILES):
        raise InputError(f"tokenizer '{folder}': expected a folder with {' or '.join(_TOKENISER_FILES)} (umt5-xxl's)")
    transformers = library("transformers", "the tokenizer")
    try:
        with hushed():
            tokeniser = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise InputError(f"tokenizer '{folder}' cannot be read ({_line(error)}): copy the whole folder again") from None
    if tokeniser.pad_token_id is None or tokeniser.eos_token_id is None:
        raise InputError(f"tokenizer '{folder}' has no padding or no end token: expected the one of umt5-xxl")
    return tokeniser


def tokeniser_identity(folder: Path) -> str:
    """sha256 over the files that decide how text is split."""
    files = [folder / name for name in (*_TOKENISER_FILES, "tokenizer_config.json") if (folder / name).is_file()]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


@dataclass(frozen=True)
class TextEncoder:
    """A UMT5 encoder and its tokeniser; prompts become `length` tokens, the end token included."""

    model: nn.Module
    tokeniser: Any
    length: int

    @torch.inference_mode()
    def encode(self, prompt: str) -> Tensor:
        """A clean prompt -> (L, text_dim) in the encoder's dtype on the CPU, L its real length, at most `length`.

        Rows that stand for padding are left out: models want zeros there.
        """
        tokens = self.tokeniser(
            prompt, padding="max_length", truncation=True, max_length=self.length, add_special_tokens=True,
            return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        # Tokenisers that know no template leave the end token out.
        real = int(mask.sum())
        if int(ids[0, real - 1]) != self.tokeniser.eos_token_id:
            real = min(real + 1, self.length)
            ids[0, real - 1], mask[0, real - 1] = self.tokeniser.eos_token_id, 1
        vocabulary = self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        if (largest := int(ids.max())) >= vocabulary:
            raise InputError(
                f"the tokenizer gives token {largest}, the text encoder knows {vocabulary}: use its own tokenizer"
            )
        device = next(self.model.parameters()).device
        # Padding stays in: leaving it out would change the last bits against upstream.
        rows = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        return rows[0, :real].cpu()


@dataclass(frozen=True)
class PromptCache:
    """Encoded prompts in a folder, one safetensors file each, named after the encoder and the prompt."""

    folder: Path

    def path(self, identity: str, prompt: str) -> Path:
        """Where the rows of a clean prompt lie, or would."""
        key = "\0".join((identity, prompt))
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def get(self, identity: str, prompt: str) -> Tensor | None:
        """Rows (L, text_dim), or None where there are none to be trusted."""
        path = self.path(identity, prompt)
        try:
            rows = load_file(path)[ROWS]
        except (OSError, SafetensorError, KeyError):
            return None  # absent or damaged: it will be encoded, and written, again
        return rows if rows.ndim == 2 and bool(rows.isfinite().all()) else None

    def put(self, identity: str, prompt: str, rows: Tensor) -> None:
        """Keep rows. RunError when the disk does not take them."""
        path = self.path(identity, prompt)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A name of its own: two runs may encode the same prompt at once.
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".partial", delete=False) as partial:
                pass
            try:
                save_file({ROWS: rows.contiguous()}, partial.name, metadata={"prompt": prompt})
                os.replace(partial.name, path)
            finally:
                Path(partial.name).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise RunError(f"prompt cache '{self.folder}' cannot be written ({_line(error)}): choose another") from None


@dataclass(frozen=True)
class PromptReader:
    """Text rows of prompts: from the cache where they are there, else from an encoder opened for the occasion.

    `open_encoder` is called at most once for each call of `rows`, and what it returns is let go afterwards. `identity`
    tells encoders apart; it must change whenever the rows would.
    """

    open_encoder: Callable[[], TextEncoder]
    identity: str
    length: int
    width: int
    cache: PromptCache | None = None

    def rows(self, prompts: Sequence[str]) -> list[Tensor]:
        """(1, length, width) float32 for each prompt, zero after its end."""
        clean = [clean_prompt(prompt) for prompt in prompts]
        identity = f"{self.identity} {self.length}"
        known = {text: self._cached(identity, text) for text in clean}
        missing = [text for text, rows in known.items() if rows is None]
        if missing:
            encoder = self.open_encoder()
            for text in missing:
                encoded = known[text] = encoder.encode(text)
                if self.cache:
                    self.cache.put(identity, text, encoded)
            del encoder
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return [self._padded(rows) for text in clean if (rows := known[text]) is not None]

    def _cached(self, identity: str, prompt: str) -> Tensor | None:
        rows = self.cache.get(identity, prompt) if self.cache else None
        return rows if rows is not None and self._fits(rows) else None

    def _fits(self, rows: Tensor) -> bool:
        return len(rows) <= self.length and rows.shape[1] == self.width

    def _padded(self, rows: Tensor) -> Tensor:
        assert self._fits(rows), f"rows of shape {tuple(rows.shape)}"
        return nn.functional.pad(rows.float(), (0, 0, 0, self.length - len(rows)))[None]


def _line(error: Exception) -> str:
    """The first line of an error's message, not too long."""
    return f"{(str(error).splitlines() or [type(error).__name__])[0]:.120}"
