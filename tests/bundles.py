"""Small bundles for tests of what is made from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from export import Source, write_bundle
from export.bundle import stand_in_rows
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.options import StreamOptions, open_stream
from quant.convert import quantise_
from quant.plan import Plan, PlannedLayer
from quant.schemes import SCHEMES
from tests.tiny import SPEC, tiny_model

# One step from noise: a chunk's latents are the noise minus the model's output.
ONE_STEP = replace(SPEC, layers=2, steps=(1000,))
SHARD = "model-00001-of-00001.safetensors"


def tiny_bundle(
    folder: Path, scheme: str = "w8a8-int8", dtype: torch.dtype = torch.float32, wide: tuple[str, ...] = ()
) -> Path:
    """A bundle of random weights whose biases are not zero; the linears in `wide` with 16-bit activations."""
    model = tiny_model(ONE_STEP).requires_grad_(False)
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            tensor.normal_(0, 0.1)
    model.to(dtype)
    report = quantise_(model, SCHEMES[scheme], plan=_widening(model, scheme, wide) if wide else None)
    source = Source("random", "tiny, seed 0")
    return write_bundle(folder, model, scheme=SCHEMES[scheme], report=report, source=source)


def _widening(model: CausalWanDiT, scheme: str, wide: tuple[str, ...]) -> Plan:
    """`scheme` for all linears of the blocks but those in `wide`."""
    layers = []
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, nn.Linear):
            chosen = "w8a16-int8" if name in wide else scheme
            layers.append(PlannedLayer(name, (module.out_features, module.in_features), 0, chosen, {}, "asked for"))
    return Plan(device="", threads=0, dtype="", budget=0.0, timings=(), layers=tuple(layers))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def dequantised(folder: Path) -> dict[str, Tensor]:
    """What a bundle's weights stand for, in float32: codes times scales, the rest as it is."""
    stored = load_file(folder / SHARD)
    plain = {name: tensor.float() for name, tensor in stored.items() if not name.endswith("weight_scale")}
    for name in plain:
        if stored[name].dtype == torch.int8:
            plain[name] = plain[name] * stored[f"{name}_scale"]
    return plain


def first_chunk(model: CausalWanDiT) -> Tensor:
    """Latents of one chunk, (1, F, C, H, W): one forward pass of every layer from noise, and one that commits it."""
    options = StreamOptions(frames=model.spec.chunk_frames, policy="full")
    stream = open_stream(model, stand_in_rows("x", model.spec), options)
    return next(iter(stream)).latents
