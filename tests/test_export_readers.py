"""The ecosystem's own packages read our files: their weights are our weights, their layers compute what ours compute.

Each part is skipped where its package is not installed (they are in the `dev` extra).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from export import open_bundle
from export.bundle import stand_in_rows
from export.dialects import export_bundle
from export.dialects.names import to_diffusers
from ispa_deploy.model import CausalWanDiT
from ispa_deploy.stream import default_noise
from tests.bundles import ONE_STEP, SHARD, dequantised, first_chunk, tiny_bundle

# Readers round activations to 8 bits in their own way: two such roundings differ by this much of the result.
ROUNDING = 0.02

# CPU kernels that a reader looks for and may not find; it says so on import.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return tiny_bundle(tmp_path_factory.mktemp("readers") / "bundle")


@pytest.fixture(scope="module")
def layers(bundle: Path) -> tuple[str, ...]:
    return open_bundle(bundle).manifest.quantised


def network() -> CausalWanDiT:
    """The floating network that a reader fills."""
    return CausalWanDiT(ONE_STEP).eval().requires_grad_(False)


def same_chunk(model: CausalWanDiT, bundle: Path) -> bool:
    ours = first_chunk(open_bundle(bundle).model)
    return bool((first_chunk(model) - ours).norm() < ROUNDING * ours.norm())


def test_the_measure_tells_a_wrong_scale(bundle: Path, layers: tuple[str, ...]) -> None:
    """Otherwise the forward passes below would prove nothing: one layer's scales off by a tenth must fail."""
    model = network()
    model.load_state_dict(dequantised(bundle))
    assert same_chunk(model, bundle)
    model.get_submodule(layers[3]).weight.mul_(1.1)
    assert not same_chunk(model, bundle)


@pytest.mark.parametrize("wide", [(), ("blocks.0.ffn.2", "blocks.0.self_attn.o")], ids=["8 bits", "16-bit activations"])
def test_compressed_tensors_reads_the_bundle_itself(
    wide: tuple[str, ...], layers: tuple[str, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    bundle = tiny_bundle(tmp_path / "bundle", wide=wide)
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = QuantizationConfig.model_validate(json.loads((bundle / "config.json").read_text())["quantization_config"])
    model = network()
    apply_quantization_config(model, config)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    stored = load_file(bundle / SHARD)
    assert {name: (t.dtype, t.shape) for name, t in model.state_dict().items()} == {
        name: (t.dtype, t.shape) for name, t in stored.items()
    }
    model.load_state_dict(stored)
    compressor.decompress_model(model)
    expected = dequantised(bundle)
    assert all(torch.equal(model.get_submodule(name).weight, expected[f"{name}.weight"]) for name in layers)
    assert all(hasattr(model.get_submodule(name), "quantization_scheme") for name in layers)
    assert not hasattr(model.head.head, "quantization_scheme"), "what the bundle kept is ignored"
    for name in layers:
        read = model.get_submodule(name).quantization_scheme.input_activations
        assert read.num_bits == (16 if name in wide else 8)
    assert same_chunk(model, bundle)


def test_comfy_kitchen_reads_the_file(bundle: Path, layers: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("comfy_kitchen")
    from comfy_kitchen.tensor import QuantizedTensor, TensorWiseINT8Layout

    path = export_bundle(bundle, "comfyui", tmp_path / "comfy.safetensors")
    stored, expected, model = load_file(path), dequantised(bundle), network()
    with safe_open(path, "pt") as file:
        marked = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    assert set(marked) == set(layers)
    model.load_state_dict(expected)
    for name in layers:
        marker = json.loads(bytes(stored[f"{name}.comfy_quant"].tolist()))
        assert marker == marked[name] == {"format": "int8_tensorwise"}
        codes = stored[f"{name}.weight"]
        parameters = TensorWiseINT8Layout.Params(
            scale=stored[f"{name}.weight_scale"], orig_dtype=torch.float32, orig_shape=tuple(codes.shape)
        )
        weight = QuantizedTensor(codes, "TensorWiseINT8Layout", parameters)
        assert torch.equal(weight.dequantize(), expected[f"{name}.weight"])
        model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    assert same_chunk(model, bundle)


def test_torchao_reads_the_file_and_would_write_the_same(bundle: Path, layers: tuple[str, ...], tmp_path: Path) -> None:
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    path = export_bundle(bundle, "torchao", tmp_path / "torchao.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    stored, expected, model = load_file(path), dequantised(bundle), network()
    state, left = support.unflatten_tensor_state_dict(stored, metadata)
    assert not left
    model.load_state_dict(state, assign=True)
    assert all(
        torch.equal(model.get_submodule(name).weight.dequantize(), expected[f"{name}.weight"]) for name in layers
    )
    assert same_chunk(model, bundle)
    tensors, text = support.flatten_tensor_state_dict(model.state_dict())
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        name: tensor.tolist() for name, tensor in stored.items()
    }
    assert sorted(json.loads(text.pop("tensor_names"))) == sorted(json.loads(metadata["tensor_names"]))
    assert {name: json.loads(value) for name, value in text.items()} == {
        name: json.loads(metadata[name]) for name in text
    }


def test_torchao_quantises_to_the_description_that_we_write(
    bundle: Path, layers: tuple[str, ...], tmp_path: Path
) -> None:
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    with safe_open(export_bundle(bundle, "torchao", tmp_path / "torchao.safetensors"), "pt") as file:
        ours = file.metadata()
    model = network()
    chosen = [model.get_submodule(name) for name in layers]
    config = Int8DynamicActivationInt8WeightConfig(version=2, set_inductor_config=False)
    quantize_(model, config, filter_fn=lambda module, name: any(module is one for one in chosen))
    _, theirs = support.flatten_tensor_state_dict(model.state_dict())
    assert {name: json.loads(ours[name]) for name in theirs if name != "tensor_names"} == {
        name: json.loads(text) for name, text in theirs.items() if name != "tensor_names"
    }


def test_bitsandbytes_loads_the_layers(bundle: Path, layers: tuple[str, ...], tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    stored = load_file(export_bundle(bundle, "bitsandbytes", tmp_path / "bnb.safetensors"))
    expected, ours, model = dequantised(bundle), open_bundle(bundle).model, network()
    for name in layers:
        parent, _, child = name.rpartition(".")
        plain: Any = model.get_submodule(name)
        layer = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, has_fp16_weights=False, threshold=0.0)
        # A fresh module takes codes only after it was quantised once on its device.
        setattr(model.get_submodule(parent), child, layer.to("cpu"))
    model.load_state_dict(stored)
    for name in layers:
        layer = model.get_submodule(name)
        weight = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        # It multiplies by a rounded 1 / 127.
        torch.testing.assert_close(weight, expected[f"{name}.weight"], rtol=3e-7, atol=0)
        x = torch.randn(7, layer.in_features)
        y, exact = layer(x), nn.functional.linear(x, expected[f"{name}.weight"], expected[f"{name}.bias"])
        assert (y - exact).norm() < ROUNDING * exact.norm()
        assert (y - ours.get_submodule(name)(x)).norm() < ROUNDING * exact.norm()


def test_diffusers_network_takes_the_names_and_computes_the_same(
    bundle: Path, layers: tuple[str, ...], tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = export_bundle(bundle, "diffusers", tmp_path / "diffusers")
    config = json.loads((folder / "config.json").read_text())
    ignored = config.pop("quantization_config")["ignore"]
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    plain: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if not name.endswith("weight_scale"):
            plain[name] = tensor * stored[f"{name}_scale"] if tensor.dtype == torch.int8 else tensor
    theirs = diffusers.WanTransformer3DModel.from_config(config).eval()
    theirs.load_state_dict(plain)
    linears = {name for name, module in theirs.named_modules() if isinstance(module, nn.Linear)}
    int8 = {name.removesuffix(".weight") for name, tensor in stored.items() if tensor.dtype == torch.int8}
    assert (set(ignored), len(int8)) == (linears - int8, len(layers))
    ours = network()
    ours.load_state_dict(dequantised(bundle))
    noise = default_noise(ONE_STEP, 0)(0, ONE_STEP.chunk_frames, 0)
    with torch.no_grad():
        flow = theirs(noise.transpose(1, 2), torch.tensor([1000.0]), stand_in_rows("x", ONE_STEP)).sample
    torch.testing.assert_close(noise - flow.transpose(1, 2), first_chunk(ours), rtol=1e-4, atol=1e-4)


def test_diffusers_loads_the_folder_with_torchao_s_tensors(
    bundle: Path, layers: tuple[str, ...], tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("accelerate")
    folder = export_bundle(bundle, "diffusers-torchao", tmp_path / "diffusers")
    theirs = diffusers.WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32)
    expected = dequantised(bundle)
    assert all(
        torch.equal(theirs.get_submodule(to_diffusers(name)).weight.dequantize(), expected[f"{name}.weight"])
        for name in layers
    )
    noise = default_noise(ONE_STEP, 0)(0, ONE_STEP.chunk_frames, 0)
    with torch.no_grad():
        flow = theirs(noise.transpose(1, 2), torch.tensor([1000.0]), stand_in_rows("x", ONE_STEP)).sample
    ours = first_chunk(open_bundle(bundle).model)
    assert (noise - flow.transpose(1, 2) - ours).norm() < ROUNDING * ours.norm()
