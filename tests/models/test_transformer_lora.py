# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import json

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from tiny_transformer import each_backbone, make_inputs, make_model, relative_error
from torch._dynamo.testing import CompileCounter


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
WEIGHTS = "pytorch_lora_weights.safetensors"


def lora(rank=2, **options):
    options = {"r": rank, "lora_alpha": 3, "target_modules": TARGETS, "init_lora_weights": False} | options
    return LoraConfig(**options)


def saved_adapter(folder, seed=0, num_layers=3, **options):
    """Saves an adapter with random weights; returns how to load it and what the transformer makes with it."""
    model = make_model(num_layers=num_layers, alignment_layer=None)
    torch.manual_seed(seed)
    model.add_adapter(lora(**options))
    model.save_lora_adapter(folder)
    with torch.no_grad():
        sample = model(**make_inputs()).sample
    # Without `use_safetensors` diffusers reads a file without its metadata, so without alpha
    return {"pretrained_model_name_or_path_or_dict": folder, "use_safetensors": True, "prefix": None}, sample


@torch.no_grad()
@each_backbone
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_dora": True},
        {"lora_bias": True},
        {"rank_pattern": {"transformer_blocks.1.attn.to_k": 4}, "alpha_pattern": {"to_v": 7}},
        {"target_modules": ["x_embedder", "memory_embedder", "adaln_linear", "linear_in", "linear_out", "proj_out"]},
    ],
    ids=["lora", "dora", "bias", "patterns", "other_layers"],
)
def test_save_and_load(options, config, tmp_path):
    model, inputs = make_model(**options), make_inputs()
    plain = model(**inputs).sample
    torch.manual_seed(0)
    model.add_adapter(lora(**config))
    expected = model(**inputs).sample
    assert not torch.allclose(expected, plain)
    model.save_lora_adapter(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["r"], metadata["lora_alpha"]) == (2, 3)

    other = make_model(**options)
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(other(**inputs).sample, expected)
    if "use_dora" not in config:  # which has no scale
        torch.testing.assert_close(other(**inputs, attention_kwargs={"scale": 0.0}).sample, plain)
    other.disable_adapters()
    torch.testing.assert_close(other(**inputs).sample, plain)
    other.enable_adapters()
    other.fuse_lora()
    torch.testing.assert_close(other(**inputs).sample, expected)
    other.unfuse_lora()
    torch.testing.assert_close(other(**inputs).sample, expected)
    other.unload_lora()
    torch.testing.assert_close(other(**inputs).sample, plain)


@torch.no_grad()
def test_dropout_of_a_loaded_adapter_acts_in_train_mode_only(tmp_path):
    model, inputs = make_model(memory_dropout=0.0), make_inputs()
    model.add_adapter(lora(lora_dropout=0.5))
    model.save_lora_adapter(tmp_path)
    expected = model.eval()(**inputs).sample

    other = make_model(memory_dropout=0.0)
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(other(**inputs).sample, expected)
    assert not torch.allclose(other.train()(**inputs).sample, expected)


@torch.no_grad()
def test_several_adapters(tmp_path):
    first_adapter, first = saved_adapter(tmp_path / "first", seed=1)
    second_adapter, second = saved_adapter(tmp_path / "second", seed=2, rank=3)
    model, inputs = make_model(alignment_layer=None), make_inputs()
    plain = model(**inputs).sample
    model.load_lora_adapter(**first_adapter, adapter_name="first")
    model.load_lora_adapter(**second_adapter, adapter_name="second")
    for names, weights, expected in (
        ("first", 1.0, first),
        ("second", 1.0, second),
        (["first", "second"], 0.0, plain),
    ):
        model.set_adapters(names, weights)
        torch.testing.assert_close(model(**inputs).sample, expected)
    model.set_adapters(["first", "second"], [0.5, 0.5])
    mixed = model(**inputs).sample
    assert not torch.allclose(mixed, first) and not torch.allclose(mixed, second)
    model.fuse_lora(adapter_names=["first", "second"])
    model.unload_lora()
    torch.testing.assert_close(model(**inputs).sample, mixed)


@torch.no_grad()
def test_hotswap_does_not_recompile(tmp_path):
    first_adapter, first = saved_adapter(tmp_path / "first", seed=1, num_layers=1, rank=2)
    second_adapter, second = saved_adapter(tmp_path / "second", seed=2, num_layers=1, rank=5)
    torch._dynamo.reset()
    model, inputs = make_model(num_layers=1, alignment_layer=None), make_inputs()
    model.enable_lora_hotswap(target_rank=5)
    model.load_lora_adapter(**first_adapter, adapter_name="swapped")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).sample, first)
    model.load_lora_adapter(**second_adapter, adapter_name="swapped", hotswap=True)
    torch.testing.assert_close(compiled(**inputs).sample, second)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_layerwise_casting_leaves_adapters_alone(tmp_path):
    adapter, expected = saved_adapter(tmp_path)
    model = make_model(alignment_layer=None)
    model.load_lora_adapter(**adapter)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    layer = model.transformer_blocks[0].attn.to_q
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert layer.lora_A["default_0"].weight.dtype == torch.float32
    assert relative_error(model(**make_inputs()).sample, expected) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_only_adapters_train(dtype, checkpointing):
    model = make_model().to(dtype).train()
    model.requires_grad_(False)
    model.add_adapter(lora())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpointing:
        model.enable_gradient_checkpointing()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(**make_inputs()).sample.float().square().mean().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(trained) == 2 * len(TARGETS) * 3
    for name, parameter in trained.items():
        assert "lora_" in name and parameter.grad.dtype == torch.float32 and parameter.grad.any(), name
