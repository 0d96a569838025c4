"""Opens a bundle: every byte, name, shape, dtype and number is checked before the model is handed out.

The network is built on the meta device, so no random weights are drawn and none are held beside the real ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from export.deltas import StoredDeltas
from export.manifest import Manifest, file_digest, read_manifest
from export.tensors import (
    CODES,
    FLOATS,
    Shape,
    aligned,
    check_finite,
    check_names,
    check_shapes,
    listing,
    named_tensor,
    reading,
)
from export.write import write_bundle
from ispa_deploy.adapt import adapted
from ispa_deploy.advice import memory_errors
from ispa_deploy.avatar.stream import Scene
from ispa_deploy.budget import Setup
from ispa_deploy.errors import InputError, known_names
from ispa_deploy.media.text import PromptReader
from ispa_deploy.media.vae import WanVae
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.networks import network_of
from ispa_deploy.options import StreamOptions, check_options, open_stream
from ispa_deploy.specs import ModelSpec
from ispa_deploy.stream import Decoder, Stream
from quant.convert import empty_quantised_, prepare_, scheme_of
from quant.layers import LAYERS
from quant.plan import Plan
from quant.schemes import SCHEMES

__all__ = ["Bundle", "open_bundle", "read_prompt_embeds", "stand_in_rows", "write_bundle"]

DEMO = "demo"
EMBEDS = "prompt_embeds"
_SCALES = ("weight", "input", "pre_quant")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: the model in eval mode, its kernels prepared, and what the manifest says of it.

    `prompt_embeds`: the text encoder's output for the first prompt, where the model cannot read prompts. `prompts`
    reads them with a text encoder, `decoders` makes a decoder for each stream and `vae` encodes images
    (`export.companions`): none is part of the bundle.
    """

    model: CausalWanDiT
    manifest: Manifest
    folder: Path
    prompt_embeds: Path | None = None
    prompts: PromptReader | None = None
    decoders: Callable[[], Decoder] | None = None
    vae: WanVae | None = None

    @property
    def spec(self) -> ModelSpec:
        """Geometry and streaming rules."""
        return self.manifest.spec

    @property
    def pixel_scale(self) -> int:
        """How many times a pixel is repeated for the eye: the demo's frames are 40 x 40."""
        return 8 if self.spec.name == DEMO else 1

    @property
    def base_sha256(self) -> str:
        """Identity of the weights; deltas and stream states are bound to it."""
        return self.manifest.base_sha256

    def text_rows(self, prompt: str, prompt_embeds: str | Path | None = None) -> Tensor:
        """(1, L, text_dim) float32 rows for a prompt, zero after its end.

        The demo reads the prompt itself. Random weights get random rows that depend on the prompt alone: good for
        measuring speed, meaningless otherwise. Real checkpoints need `prompts`, or `prompt_embeds`, a safetensors file
        with the text encoder's output under `prompt_embeds`, (L, text_dim) or (1, L, text_dim).
        """
        if prompt_embeds is not None:
            return read_prompt_embeds(Path(prompt_embeds), self.spec)
        if self.prompts is not None:
            return self.prompts.rows([prompt])[0]
        return built_in_rows(prompt, self.spec, self.manifest.source.kind)

    def decoder(self) -> Decoder | None:
        """Latents to pixels, for one stream: what `decoders` makes, else the demo's codec; None for other models."""
        if self.decoders is not None:
            return self.decoders()
        if self.spec.name != DEMO:
            return None
        from ispa_deploy.demo.codec import BlockCodec

        return BlockCodec().decode

    def stream(
        self,
        prompt: str,
        options: StreamOptions,
        *,
        switches: Sequence[tuple[int, str]] = (),
        deltas: StoredDeltas | None = None,
        initial: Tensor | None = None,
        scene: Scene | None = None,
        decode: bool = True,
    ) -> Stream:
        """A stream of this bundle. `switches`: (frame, prompt). `deltas` must have been fitted under these options.

        `scene`: sound and image of a speech-to-video model (`export.scenes`).
        """
        if deltas is not None:
            options = deltas.options(options)
            deltas.check(adapted(self.spec, options), options.kv_bias)
        check_options(self.spec, options)
        first, *later = self._texts([prompt, *(text for _, text in switches)])
        decoder = self.decoder() if decode else None
        return open_stream(
            self.model, first, options,
            decoder=decoder,
            deltas=deltas.to(self.model.device) if deltas is not None else None,
            switches=[(frame, rows) for (frame, _), rows in zip(switches, later, strict=True)],
            initial=initial,
            scene=scene,
            encoder=getattr(decoder, "encode", None),
        )  # fmt: skip

    def _texts(self, prompts: Sequence[str]) -> list[Tensor]:
        """Rows of a stream's prompts on the model's device; a text encoder is opened once for all of them."""
        given = [] if self.prompt_embeds is None else [self.text_rows(prompts[0], self.prompt_embeds)]
        rest = prompts[len(given) :]
        rows = self.prompts.rows(rest) if self.prompts is not None else [self.text_rows(prompt) for prompt in rest]
        return [row.to(self.model.device) for row in (*given, *rows)]


def open_bundle(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
    prompt_embeds: Path | None = None,
    allow_fallback: bool = False,
) -> Bundle:
    """Read a bundle. `dtype` casts what stayed floating point; None keeps it, but for float16 on a CPU.

    CPUs are slow in float16, and float32 holds the same numbers.

    `verify` compares every file with its digest; names, sizes, shapes, dtypes and finite numbers are always checked.
    `allow_fallback` lets simulated arithmetic stand in for 8-bit kernels that do not run on `device`.

    Raises InputError naming the file, or the tensor, that cannot be used, or the scheme that `device` cannot run.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if dtype is None and manifest.dtype == "float16" and torch.device(device).type == "cpu":
        dtype = torch.float32
    _check_files(folder, manifest, verify)
    _check_scheme(manifest, folder)
    shards = [folder / name for name in sorted(manifest.files) if name.endswith(".safetensors")]
    found = _contents(shards)
    if manifest.spec.layers > len(found):
        # Before the network is built: a hostile number of layers would take for ever.
        raise InputError(f"bundle '{folder}' has {len(found)} tensors: too few for {manifest.spec.layers} layers")
    model = _skeleton(manifest, found)
    expected = model.state_dict()
    where = f"bundle '{folder}'"
    check_names(found, expected, where, manifest.spec.name)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    check_shapes({name: shape for name, (_, shape) in found.items()}, shapes, where, manifest.spec.name)
    casts = _casts(manifest, found, dtype, where)
    held = str(dtype).removeprefix("torch.") if dtype is not None else manifest.dtype
    setup = Setup(dtype=held, scheme=manifest.scheme, quantised=manifest.quantised)
    with memory_errors(manifest.spec, lambda: setup, torch.device(device), lambda: "while the weights are loaded"):
        model.load_state_dict(_state(shards, casts, device, coded=bool(manifest.quantised)), assign=True)
        prepare_(model, allow_fallback=allow_fallback)
    return Bundle(model.eval().requires_grad_(False), manifest, folder, prompt_embeds)


def _state(
    shards: Sequence[Path], casts: Mapping[str, torch.dtype | None], device: torch.device | str, *, coded: bool
) -> dict[str, Tensor]:
    """Every tensor, checked and cast. Nobody else holds them: preparing a layer frees its plain codes."""
    state: dict[str, Tensor] = {}
    for path in shards:
        with reading(path, device) as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensor = _tensor(file.get_tensor(name), name, casts[name], str(path))
                # A view would keep the whole file mapped, and with it the codes that lie packed elsewhere by then.
                view = coded and tensor.is_floating_point() and tensor.device.type == "cpu"
                state[name] = tensor.clone() if view and tensor.dtype != torch.float8_e4m3fn else tensor
    return state


def read_prompt_embeds(path: Path, spec: ModelSpec) -> Tensor:
    """(1, text_len, text_dim) float32 from a safetensors file, padded with zeros; InputError naming what is wrong."""
    rows = named_tensor(path, EMBEDS)
    rows = rows[None] if rows.ndim == 2 else rows
    if rows.ndim != 3 or len(rows) != 1 or rows.shape[1] > spec.text_len or rows.shape[2] != spec.text_dim:
        raise InputError(
            f"'{path}': '{EMBEDS}' of shape {tuple(rows.shape)}: expected (1, up to {spec.text_len}, {spec.text_dim})"
        )
    return torch.nn.functional.pad(rows, (0, 0, 0, spec.text_len - rows.shape[1]))


def built_in_rows(prompt: str, spec: ModelSpec, kind: str) -> Tensor:
    """Rows for a prompt without a text encoder; `kind` as `Source.kind`. InputError where the model needs one."""
    if spec.name == DEMO:
        from ispa_deploy.demo.prompts import embed, parse_prompt

        return embed(parse_prompt(prompt)[None])
    if kind == "random":
        return stand_in_rows(prompt, spec)
    raise InputError(
        f"model '{spec.name}' has no text encoder in its bundle: name one with --text-encoder PATH, or "
        f"pass --prompt-embeds FILE.safetensors with '{EMBEDS}' of shape (L, {spec.text_dim})"
    )


def stand_in_rows(prompt: str, spec: ModelSpec) -> Tensor:
    """(1, text_len, text_dim) random rows, the same for the same prompt on every machine."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "little")
    return torch.randn(1, spec.text_len, spec.text_dim, generator=torch.Generator().manual_seed(seed))


def _check_files(folder: Path, manifest: Manifest, verify: bool) -> None:
    for name, digest in sorted(manifest.files.items()):
        path = folder / name
        if not path.is_file():
            raise InputError(f"'{path}' is missing: the bundle lists it; copy it again")
        size = path.stat().st_size
        if size != digest.bytes:
            raise InputError(f"'{path}' has {size} bytes: expected {digest.bytes}; copy it again")
        if verify and (found := file_digest(path).sha256) != digest.sha256:
            raise InputError(f"'{path}' has sha256 {found[:12]}: expected {digest.sha256[:12]}; copy it again")


def _check_scheme(manifest: Manifest, folder: Path) -> None:
    if manifest.scheme not in SCHEMES:
        raise known_names("scheme", manifest.scheme, SCHEMES)
    if SCHEMES[manifest.scheme].layer == "float" and manifest.quantised:
        raise InputError(f"bundle '{folder}' lists quantised layers under scheme '{manifest.scheme}': write it again")


def _contents(shards: Sequence[Path]) -> dict[str, tuple[str, Shape]]:
    found: dict[str, tuple[str, Shape]] = {}
    for path in shards:
        with reading(path) as file:
            part = listing(file)
        twice = sorted(set(part) & set(found))
        if twice:
            raise InputError(f"'{path}' repeats tensor '{twice[0]}' of another shard: write the bundle again")
        found.update(part)
    return found


def _skeleton(manifest: Manifest, found: Collection[str]) -> CausalWanDiT:
    """The network without storage, with empty quantised layers where the manifest says so."""
    with torch.device("meta"):
        model = network_of(manifest.spec)
    smoothed = [name for name in manifest.quantised if f"{name}.pre_quant_scale" in found]
    empty_quantised_(model, SCHEMES[manifest.scheme], manifest.quantised, _plan(manifest), smoothed)
    return model


def _plan(manifest: Manifest) -> Plan | None:
    return Plan.from_dict(manifest.plan, "recipe.plan") if manifest.plan is not None else None


def _casts(
    manifest: Manifest, found: Mapping[str, tuple[str, Shape]], dtype: torch.dtype | None, where: str
) -> dict[str, torch.dtype | None]:
    """What each tensor becomes; None: as stored. InputError where the stored dtype is not the layer's."""
    casts: dict[str, torch.dtype | None] = dict.fromkeys(found, dtype)
    codes: dict[str, tuple[str, ...]] = dict.fromkeys(found, FLOATS)
    plan = _plan(manifest)
    for name in manifest.quantised:
        layer = scheme_of(name, SCHEMES[manifest.scheme], plan).layer
        assert layer != "float", "refused when the network was made"
        # Scales belong to the codes, and the kernels add the bias in float32.
        scales = [f"{name}.{which}_scale" for which in _SCALES if f"{name}.{which}_scale" in found]
        codes.update({f"{name}.weight": (CODES[LAYERS[layer].code_dtype],), **dict.fromkeys(scales, ("F32",))})
        casts.update({f"{name}.weight": None, **dict.fromkeys(scales), f"{name}.bias": torch.float32})
    wrong = [f"{name} {found[name][0]}" for name in sorted(found) if found[name][0] not in codes[name]]
    if wrong:
        expected = " or ".join(codes[wrong[0].split(" ")[0]])
        raise InputError(f"{where}: {wrong[0]}: expected {expected}; the manifest and the tensors do not fit together")
    return casts


def _tensor(tensor: Tensor, name: str, dtype: torch.dtype | None, where: str) -> Tensor:
    if not tensor.is_floating_point():
        return aligned(tensor)
    if tensor.dtype == torch.float8_e4m3fn:
        check_finite(tensor.to(torch.bfloat16), name, f"'{where}'")
        return aligned(tensor)
    check_finite(tensor, name, f"'{where}'")
    if name.endswith(tuple(f".{which}_scale" for which in _SCALES)) and not bool((tensor > 0).all()):
        raise InputError(f"'{where}': {name} holds a scale of 0 or less: expected positive scales; the file is damaged")
    return aligned(tensor if dtype is None else check_finite(tensor.to(dtype), f"{name} in {dtype}", f"'{where}'"))
