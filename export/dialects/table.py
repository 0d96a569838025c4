"""The dialect table: what each reader calls the codes and scales of an 8-bit layer, and what it wants beside them.

N outputs, K inputs. All dialects hold the same int8 codes (N, K). To add a dialect: one value in the table below.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from export.dialects.names import from_diffusers, to_diffusers
from export.manifest import Manifest
from export.tensors import Entry, Shape
from export.write import compressed_tensors, header
from quant.convert import scheme_of
from quant.plan import Plan
from quant.schemes import SCHEMES, LayerKind

CODE_MAX = 127
COMFY_FORMAT = "int8_tensorwise"
COMFY_KEY = "_quantization_metadata"
TORCHAO_KEY = "tensor_names"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"

# Names of all tensors of a file, and the text entries of its header.
Marks = Callable[[Iterable[str], Mapping[str, str]], bool]
Header = Callable[[Mapping[str, Entry], Manifest], dict[str, str]]


@dataclass(frozen=True, slots=True)
class Extra:
    """A constant tensor beside a layer's codes. `agrees`: whether one that was read means what `make` would write."""

    suffix: str
    make: Callable[[Shape], Tensor]
    agrees: Callable[[Tensor], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One way to store a quantised network.

    `codes`, `scale`: what follows a layer's name. `scale_of` turns scales (N, 1) float32 into the tensor stored, of
    shape `scale_shape(N)`; `scale_back` undoes it elementwise. `rename`, `rename_back`: tensor names.
    `header`: text entries for the entries about to be written. `folder`: the name of the weights' file in a folder
    that also holds `config`; None: a single file.
    """

    name: str
    summary: str
    marks: Marks
    codes: str = ".weight"
    scale: str = ".weight_scale"
    scale_of: Callable[[Tensor], Tensor] = torch.clone
    scale_back: Callable[[Tensor], Tensor] = torch.clone
    scale_shape: Callable[[int], Shape] = lambda outputs: (outputs, 1)
    extras: tuple[Extra, ...] = ()
    rename: Callable[[str], str] = str
    rename_back: Callable[[str], str] = str
    header: Header = lambda entries, manifest: {"format": "pt"}
    folder: str | None = None
    config: Callable[[Manifest], dict[str, Any]] | None = None


def amax_of(scale: Tensor) -> Tensor:
    """(N, 1) float32 scales -> (N,) largest magnitudes a with a / 127 == scale in float32 where there is one.

    Our scales were made by that division, so they come back exactly; of any other the nearest is taken: 1 ulp.
    """
    product = scale.flatten() * CODE_MAX
    above, below = (torch.nextafter(product, torch.full_like(product, limit)) for limit in (torch.inf, 0.0))
    candidates = torch.stack([product, above, below])
    exact = (candidates / CODE_MAX == scale.flatten()).int()
    return candidates.gather(0, exact.argmax(0, keepdim=True))[0]  # argmax takes the first, the product, if none is


def diffusers_config(manifest: Manifest) -> dict[str, Any]:
    """`config.json` of WanTransformer3DModel with compressed-tensors' description of the layers."""
    kinds = {to_diffusers(name): kind for name, kind in kinds_of(manifest).items()}
    return {**_wan_config(manifest), "quantization_config": compressed_tensors(_kept(manifest), kinds)}


def diffusers_torchao_config(manifest: Manifest) -> dict[str, Any]:
    """The same with torchao's, as diffusers' TorchAoConfig writes it."""
    scheme = {
        "act_mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}},
        "reduce_range": False,
        "set_inductor_config": False,
        "weight_only_decode": False,
    }
    described = {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2, "_data": scheme}},
        "modules_to_not_convert": _kept(manifest),
    }
    return {**_wan_config(manifest), "quantization_config": described}


def _kept(manifest: Manifest) -> list[str]:
    return [to_diffusers(layer.name) for layer in manifest.layers if not layer.quantised]


def kinds_of(manifest: Manifest) -> dict[str, LayerKind]:
    """The kind of every 8-bit layer, by name."""
    plan = Plan.from_dict(manifest.plan, "recipe.plan") if manifest.plan is not None else None
    return {name: scheme_of(name, SCHEMES[manifest.scheme], plan).layer for name in manifest.quantised}


def _wan_config(manifest: Manifest) -> dict[str, Any]:
    spec = manifest.spec
    return {
        "_class_name": "WanTransformer3DModel", "patch_size": list(spec.patch), "num_attention_heads": spec.heads,
        "attention_head_dim": spec.dim // spec.heads, "in_channels": spec.latent_channels,
        "out_channels": spec.latent_channels, "text_dim": spec.text_dim, "freq_dim": spec.freq_dim,
        "ffn_dim": spec.ffn_dim, "num_layers": spec.layers, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "eps": spec.eps, "image_dim": None, "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
    }  # fmt: skip


def comfy_prefix_dropped(name: str) -> str:
    """ComfyUI's own checkpoints put the network under this name."""
    return name.removeprefix("model.diffusion_model.")


def _comfy_marker(shape: Shape) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps({"format": COMFY_FORMAT}).encode()), dtype=torch.uint8)


def _comfy_agrees(marker: Tensor) -> bool:
    """A marker may say more; a rotated weight would be read without a complaint and be wrong."""
    try:
        fields = json.loads(bytes(marker.flatten().tolist()))
    except ValueError:
        return False
    return isinstance(fields, dict) and fields.get("format") == COMFY_FORMAT and not fields.get("convrot")


def _torchao_header(entries: Mapping[str, Entry], manifest: Manifest) -> dict[str, str]:
    """What torchao 0.18 needs to make its tensors again: per-row int8 weights, activations per token, symmetric."""
    rows: dict[str, str] = {}
    for name in sorted(entries):
        layer, _, kind = name.rpartition(".")
        if kind == "_weight_qdata":
            rows[f"{layer}.weight"] = json.dumps(_torchao_layer(entries[name].shape[1], manifest.dtype))
        elif not kind.startswith("_weight_"):
            rows[name] = json.dumps({"_type": "Tensor"})
    return {"format": "pt", **rows, TORCHAO_KEY: json.dumps(sorted(rows))}


def _torchao_layer(inputs: int, dtype: str) -> dict[str, Any]:
    activations = {
        "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "reduce_range": False,
    }
    return {
        "_type": "Int8Tensor",
        "_data": {
            "act_quant_kwargs": {"_type": "QuantizeTensorToInt8Kwargs", "_data": activations},
            "reduce_range": False,
            "block_size": [1, inputs],
            "dtype": {"_type": "torch.dtype", "_data": dtype},
        },
        "_tensor_data_names": ["zero_point", "qdata", "scale"],
    }


def _ends(suffix: str) -> Marks:
    return lambda names, metadata: any(name.endswith(suffix) for name in names)


def _is_diffusers(names: Iterable[str], metadata: Mapping[str, str]) -> bool:
    return any(name.startswith("condition_embedder.") for name in names)


def _is_comfy(names: Iterable[str], metadata: Mapping[str, str]) -> bool:
    return COMFY_KEY in metadata or any(name.endswith(".comfy_quant") for name in names)


def _all_zero(tensor: Tensor) -> bool:
    return not bool(tensor.any())


_TORCHAO = Dialect(
    name="torchao",
    summary="torchao 0.18: Int8Tensor parts with a JSON description per tensor",
    marks=lambda names, metadata: TORCHAO_KEY in metadata,
    codes="._weight_qdata",
    scale="._weight_scale",
    extras=(Extra("._weight_zero_point", lambda shape: torch.zeros(shape[0], 1, dtype=torch.int8), _all_zero),),
    header=_torchao_header,
)

# In the order in which a file is recognised: the least specific comes last.
_TABLE = (
    replace(
        _TORCHAO,
        name="diffusers-torchao",
        summary="folder that WanTransformer3DModel.from_pretrained of diffusers loads, with torchao's tensors",
        marks=lambda names, metadata: TORCHAO_KEY in metadata and _is_diffusers(names, metadata),
        rename=to_diffusers,
        rename_back=from_diffusers,
        folder=DIFFUSERS_WEIGHTS,
        config=diffusers_torchao_config,
    ),
    _TORCHAO,
    Dialect(
        name="bitsandbytes",
        summary="bitsandbytes Linear8bitLt (LLM.int8): SCB = 127 x scale",
        marks=_ends(".SCB"),
        scale=".SCB",
        scale_of=amax_of,
        scale_back=lambda amax: amax / CODE_MAX,
        scale_shape=lambda outputs: (outputs,),
        extras=(Extra(".weight_format", lambda shape: torch.tensor(0, dtype=torch.uint8), _all_zero),),
    ),
    Dialect(
        name="diffusers",
        summary="folder with WanTransformer3DModel's names, described as compressed-tensors",
        marks=_is_diffusers,
        rename=to_diffusers,
        rename_back=from_diffusers,
        folder=DIFFUSERS_WEIGHTS,
        config=diffusers_config,
    ),
    Dialect(
        name="comfyui",
        summary="ComfyUI of 2026 on: one file, layers marked int8_tensorwise",
        marks=_is_comfy,
        extras=(Extra(".comfy_quant", _comfy_marker, _comfy_agrees),),
        rename_back=comfy_prefix_dropped,
        header=lambda entries, manifest: header(entries),
    ),
    Dialect(
        name="lightx2v",
        summary="LightX2V with dit_quant_scheme int8-vllm: one file, codes and scales only",
        marks=_ends(".weight_scale"),
    ),
)

DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in _TABLE}


def recognise(names: Iterable[str], metadata: Mapping[str, str]) -> Dialect | None:
    """The dialect of a safetensors file, by its tensors' names and its header's text; None: no quantised layers."""
    listed = list(names)
    return next((dialect for dialect in DIALECTS.values() if dialect.marks(listed, metadata)), None)
