"""The networks around the DiT, found on disk: text encoder with its tokenizer, VAE, or a decoder of the user's own.

Each comes as its project publishes it: a file, or a folder of the base model in upstream's layout or the library's.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from export.bundle import Bundle
from export.checkpoints import read_container, tensors_only
from ispa_deploy.errors import InputError
from ispa_deploy.media.text import (
    PromptCache,
    PromptReader,
    TextEncoder,
    open_tokeniser,
    text_width,
    tokeniser_identity,
    umt5,
)
from ispa_deploy.media.vae import CHANNELS, WanVae, wan_vae
from ispa_deploy.media.weights import fingerprint, hushed
from ispa_deploy.specs import ModelSpec
from ispa_deploy.stream import Decoder

# Folder of a part in the library's layout, and its file in upstream's.
_PARTS = {
    "text encoder": ("text_encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
    "VAE": ("vae", "Wan2.1_VAE.pth"),
}
_TOKENISERS = ("tokenizer", "google/umt5-xxl", "../tokenizer", ".")
_HEADROOM = 1.2  # of an encoder's bytes: activations of 512 tokens beside its weights


def accompany(
    bundle: Bundle,
    *,
    text_encoder: Path | None = None,
    tokenizer: Path | None = None,
    prompt_cache: Path | None = None,
    vae: Path | None = None,
    decoder: str | None = None,
    offload: bool = False,
) -> Bundle:
    """The bundle, reading its prompts with `text_encoder` and decoding with `decoder` or `vae`, where they are given.

    `offload`: the text encoder works on the CPU, and the VAE rests there between chunks. `prompt_cache` None is the
    user's own. With `decoder`, a class path, `vae` is handed to that class instead.
    """
    device = bundle.model.device
    if text_encoder is not None:
        if bundle.prompt_embeds is not None:
            raise InputError("--prompt-embeds and --text-encoder both give the first prompt's rows: leave one out")
        cache = _cache(prompt_cache or default_prompt_cache())
        reads_on = torch.device("cpu") if offload else device
        bundle = replace(bundle, prompts=prompt_reader(text_encoder, tokenizer, bundle.spec, reads_on, cache))
    if decoder is not None:
        return replace(bundle, decoders=decoder_factory(decoder, vae, device))
    if vae is None:
        return bundle
    opened = open_vae(vae, bundle.spec, device, offload=offload)
    return replace(bundle, decoders=opened.decoder, vae=opened)


def prompt_reader(
    path: Path, tokenizer: Path | None, spec: ModelSpec, device: torch.device, cache: PromptCache | None
) -> PromptReader:
    """Prompts read by the UMT5 in a file or folder, as `spec` wants them; the encoder is opened when first needed.

    `tokenizer` None looks beside the encoder. Raises InputError naming the file that is missing or does not fit.
    """
    state, where = _state(path, "text encoder")
    width = text_width(state, where)
    if width != spec.text_dim:
        raise InputError(f"{where} gives rows of {width}: model '{spec.name}' expects {spec.text_dim}; use its encoder")
    folder = tokenizer or _tokenizer_beside(path)
    tokeniser = open_tokeniser(folder)  # now, since a mistake should not show after loading 11 GB

    def open_encoder() -> TextEncoder:
        model = umt5(_state(path, "text encoder")[0], where)
        return TextEncoder(model.to(_room(needed, device)), tokeniser, spec.text_len)

    needed = _HEADROOM * sum(tensor.nbytes for tensor in state.values())
    identity = f"{fingerprint(state)} {tokeniser_identity(folder)}"
    return PromptReader(open_encoder, identity, spec.text_len, spec.text_dim, cache)


def reader_of(path: Path, tokenizer: Path | None, device: torch.device) -> Callable[[ModelSpec], PromptReader]:
    """Makes the `prompt_reader` of a model once that is known, with the user's own cache; files are looked for now."""
    _files(path, "text encoder")
    return lambda spec: prompt_reader(path, tokenizer, spec, device, _cache(default_prompt_cache()))


def default_prompt_cache() -> Path:
    """Where encoded prompts are kept unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ispa-deploy" / "prompts"


def open_vae(path: Path, spec: ModelSpec, device: torch.device, *, offload: bool = False) -> WanVae:
    """The Wan VAE in a file or folder: float32 on a CPU, bfloat16 as upstream elsewhere. `offload`: it rests on the CPU
    and visits `device` for each chunk."""
    if spec.latent_channels != CHANNELS:
        raise InputError(
            f"--vae '{path}': model '{spec.name}' has latents of {spec.latent_channels} channels, the Wan VAE "
            f"{CHANNELS}; leave it out"
        )
    model = wan_vae(*_state(path, "VAE"))
    home = torch.device("cpu") if offload else device
    with hushed():  # of a list of modules to keep in float32, which is empty
        model = model.to(home, torch.float32 if device.type == "cpu" else torch.bfloat16)
    return WanVae(model, device if offload else None)


def decoder_factory(name: str, weights: Path | None, device: torch.device) -> Callable[[], Decoder]:
    """Makes decoders of the class `package.module:Class`, one for each stream.

    The class is called with the path of its weights where one is given, else without arguments. Its instances turn
    normalised latents (B, F, C, H, W) float32 of a chunk into pixels (B, F', 3, h, w) in [0, 1] and may keep state.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise InputError(f"--decoder '{name}': expected package.module:Class, for example mycodecs.tiny:Decoder")
    try:
        made = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise InputError(f"--decoder '{name}': {error}; install the module or put its folder in PYTHONPATH") from None
    if not callable(made):
        raise InputError(f"--decoder '{name}': module '{module}' has no class '{attribute}'; check the name")

    def make() -> Decoder:
        try:
            decoder: Decoder = made(weights) if weights is not None else made()
        except TypeError as error:
            how = "with the path that --vae names" if weights is not None else "without arguments, and --vae names none"
            raise InputError(f"--decoder '{name}' cannot be made {how}: {error}") from None
        if isinstance(decoder, nn.Module):
            decoder = decoder.to(device).eval()
        if not callable(decoder):
            raise InputError(f"--decoder '{name}': its instances cannot be called: expected latents in, pixels out")
        return decoder

    return make


def _cache(folder: Path) -> PromptCache:
    """The folder is made now: an encoder of 11 GB is not opened for rows that cannot be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"prompt cache '{folder}' cannot be made ({error.strerror}): name another with --prompt-cache FOLDER"
        ) from None
    return PromptCache(folder)


def _state(path: Path, part: str) -> tuple[dict[str, Tensor], str]:
    """Tensors of a part by name, mapped, and where they are from."""
    state: dict[str, Tensor] = {}
    files = _files(path, part)
    where = f"{part} '{files[0] if len(files) == 1 else files[0].parent}'"
    for file in files:
        found: Mapping[str, Tensor] = tensors_only(read_container(file), f"'{file}'", "a state dict")
        twice = sorted(found.keys() & state.keys())
        if twice:
            raise InputError(f"{where} holds {twice[0]} in two of its {len(files)} files: expected one network")
        state.update(found)
    return state, where


def _files(path: Path, part: str) -> list[Path]:
    """The file itself, or the files of the part in a folder. The folder of a base model holds its DiT as well."""
    folder, file = _PARTS[part]
    if path.is_file():
        return [path]
    for found in (sorted((path / folder).glob("*.safetensors")), [path / file], sorted(path.glob("*.safetensors"))):
        if found and found[0].is_file():
            return found
    raise InputError(
        f"{part} '{path}': expected a file, or a folder with {folder}/*.safetensors, {file} or *.safetensors"
    )


def _tokenizer_beside(path: Path) -> Path:
    base = path if path.is_dir() else path.parent
    for name in _TOKENISERS:
        if (base / name / "tokenizer.json").is_file() or (base / name / "spiece.model").is_file():
            return base / name
    raise InputError(f"no tokenizer beside '{path}': pass --tokenizer FOLDER (google/umt5-xxl of the base model)")


def _room(needed: float, device: torch.device) -> torch.device:
    """`device` where that many bytes fit beside what is there, else the CPU."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < needed:
        return torch.device("cpu")
    return device
