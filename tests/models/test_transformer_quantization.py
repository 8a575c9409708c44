# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import importlib.util

import pytest
import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig
from peft import LoraConfig
from tiny_transformer import each_backbone, make_inputs, make_model, relative_error
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from torchao.utils import TorchAOBaseTensor

from diffusers_gmem import GMemTransformer2DModel


each_quantization = pytest.mark.parametrize(
    "quantization", [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig], ids=["weights", "activations"]
)


def half_precision_inputs(dtype, device="cpu"):
    inputs = {name: tensor.to(device) for name, tensor in make_inputs().items()}
    return inputs | {"hidden_states": inputs["hidden_states"].to(dtype)}


@torch.no_grad()
@each_backbone
@each_quantization
def test_torchao_int8(options, quantization, tmp_path):
    model = make_model(**options)
    expected = model(**make_inputs()).sample
    model.save_pretrained(tmp_path / "model")
    quantized = GMemTransformer2DModel.from_pretrained(
        tmp_path / "model", quantization_config=TorchAoConfig(quantization()), dtype=torch.bfloat16
    )
    for name, module in quantized.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert isinstance(module.weight, TorchAOBaseTensor) != name.startswith("timestep_embedder"), name
    assert {parameter.dtype for parameter in quantized.timestep_embedder.parameters()} == {torch.float32}
    assert quantized.transformer_blocks[0].attn.to_q.weight.qdata.dtype == torch.int8
    output = quantized(**half_precision_inputs(torch.bfloat16)).sample
    assert output.dtype == torch.bfloat16
    assert relative_error(output, expected) < 5e-2

    quantized.save_pretrained(tmp_path / "quantized")
    loaded = GMemTransformer2DModel.from_pretrained(tmp_path / "quantized", dtype=torch.bfloat16)
    assert isinstance(loaded.transformer_blocks[0].attn.to_q.weight, TorchAOBaseTensor)
    assert torch.equal(loaded(**half_precision_inputs(torch.bfloat16)).sample, output)


def test_torchao_with_adapters(tmp_path):
    make_model().save_pretrained(tmp_path)
    model = GMemTransformer2DModel.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.bfloat16
    )
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with torch.autocast("cpu", torch.bfloat16):
        model(**half_precision_inputs(torch.bfloat16)).sample.float().square().mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert len(trained) == 2 * 2 * 3
    assert all(parameter.grad.any() for parameter in trained)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@torch.no_grad()
@each_backbone
@pytest.mark.parametrize(
    "config, tolerance",
    [
        ({"load_in_8bit": True}, 5e-2),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float16}, 0.3),
    ],
    ids=["8bit", "nf4"],
)
def test_bitsandbytes(options, config, tolerance, tmp_path):
    model = make_model(**options, num_attention_heads=4, attention_head_dim=32)
    expected = model(**make_inputs()).sample
    model.save_pretrained(tmp_path / "model")
    quantized = GMemTransformer2DModel.from_pretrained(
        tmp_path / "model", quantization_config=BitsAndBytesConfig(**config), dtype=torch.float16, device_map="cuda"
    )
    assert quantized.transformer_blocks[0].attn.to_q.weight.dtype in (torch.int8, torch.uint8)
    assert {parameter.dtype for parameter in quantized.timestep_embedder.parameters()} == {torch.float32}
    assert quantized.get_memory_footprint() < model.get_memory_footprint() / 2
    output = quantized(**half_precision_inputs(torch.float16, "cuda")).sample
    assert relative_error(output.cpu(), expected) < tolerance

    quantized.save_pretrained(tmp_path / "quantized")
    loaded = GMemTransformer2DModel.from_pretrained(tmp_path / "quantized", device_map="cuda")
    torch.testing.assert_close(loaded(**half_precision_inputs(torch.float16, "cuda")).sample, output)
