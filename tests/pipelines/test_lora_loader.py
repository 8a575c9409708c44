# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_pipeline import MEMORY_DIM, make_pipeline, make_transformer, run, seed

from diffusers_gmem import GMemPipeline


MEMORY = torch.randn(2, MEMORY_DIM, generator=seed(1))
FILE = "pytorch_lora_weights.safetensors"


def make_pipe():
    return make_pipeline(make_transformer(in_channels=3))


def generate(pipe, **arguments):
    return run(pipe, memory=MEMORY, **arguments).images


def add_lora(pipe, name="default", alpha=8):
    """Layers of rank 2 that change something, unlike fresh ones."""
    torch.manual_seed(sum(map(ord, name)))
    targets = ["to_q", "to_v", "to_out.0", "linear_in"]
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name=name)


def save_lora(pipe, folder, name="default", **arguments):
    GMemPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer, adapter_name=name),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config[name].to_dict(),
        **arguments,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with LoRA layers, the images of the pipeline with them, and of the one without."""
    folder = tmp_path_factory.mktemp("lora")
    pipe = make_pipe()
    plain = generate(pipe)
    add_lora(pipe)
    save_lora(pipe, folder)
    return folder, generate(pipe), plain


@pytest.mark.parametrize("source", ["folder", "str", "file", "folder and name", "dict"])
def test_load(saved, source):
    folder, expected, plain = saved
    assert np.abs(expected - plain).max() > 0.05
    pipe = make_pipe()
    arguments = {"weight_name": FILE} if source == "folder and name" else {}
    sources = {"str": str(folder), "file": folder / FILE, "dict": load_file(folder / FILE)}
    pipe.load_lora_weights(sources.get(source, folder), **arguments)
    if source == "dict":  # without the file's metadata, alpha is the rank
        pipe.set_adapters("default_0", 8 / 2)
    np.testing.assert_allclose(generate(pipe), expected, rtol=0, atol=1e-6)


def test_file(saved):
    folder, _, _ = saved
    assert [path.name for path in folder.iterdir()] == [FILE]
    assert all(key.startswith("transformer.transformer_blocks.") for key in load_file(folder / FILE))
    state_dict, metadata = GMemPipeline.lora_state_dict(folder, return_lora_metadata=True)
    assert state_dict.keys() == load_file(folder / FILE).keys() == GMemPipeline.lora_state_dict(folder).keys()
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (2, 8)


def test_loading_leaves_a_given_dict_alone(saved):
    state_dict = load_file(saved[0] / FILE)
    keys = list(state_dict)
    make_pipe().load_lora_weights(state_dict)
    assert list(state_dict) == keys


def test_unload_and_delete(saved):
    folder, expected, plain = saved
    pipe = make_pipe()
    pipe.load_lora_weights(folder, adapter_name="style")
    assert pipe.get_active_adapters() == ["style"] and pipe.get_list_adapters() == {"transformer": ["style"]}
    pipe.disable_lora()
    np.testing.assert_allclose(generate(pipe), plain, rtol=0, atol=1e-6)
    pipe.enable_lora()
    np.testing.assert_allclose(generate(pipe), expected, rtol=0, atol=1e-6)
    pipe.delete_adapters("style")
    assert np.array_equal(generate(pipe), plain)
    pipe.load_lora_weights(folder)
    pipe.unload_lora_weights()
    assert np.array_equal(generate(pipe), plain)
    assert pipe.transformer.state_dict().keys() == make_pipe().transformer.state_dict().keys()


def test_scale(saved):
    folder, expected, plain = saved
    pipe = make_pipe()
    pipe.load_lora_weights(folder, adapter_name="style")
    np.testing.assert_allclose(generate(pipe, attention_kwargs={"scale": 0.0}), plain, rtol=0, atol=1e-6)
    half = generate(pipe, attention_kwargs={"scale": 0.5})
    assert np.abs(half - plain).max() > 0.02 and np.abs(half - expected).max() > 0.02
    np.testing.assert_allclose(generate(pipe), expected, rtol=0, atol=1e-6)  # of that call alone
    pipe.set_adapters("style", 0.5)
    np.testing.assert_allclose(generate(pipe), half, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_fuse(saved, scale):
    folder, _, plain = saved
    pipe = make_pipe()
    pipe.load_lora_weights(folder, adapter_name="style")
    expected = generate(pipe, attention_kwargs={"scale": scale})
    pipe.fuse_lora(lora_scale=scale)
    assert pipe.num_fused_loras == 1
    np.testing.assert_allclose(generate(pipe), expected, rtol=0, atol=1e-5)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    np.testing.assert_allclose(generate(pipe, attention_kwargs={"scale": 0.0}), plain, rtol=0, atol=1e-5)
    np.testing.assert_allclose(generate(pipe, attention_kwargs={"scale": scale}), expected, rtol=0, atol=1e-5)
    # fused layers stay when their adapters are dropped
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    np.testing.assert_allclose(generate(pipe), expected, rtol=0, atol=1e-5)


def test_several_adapters(tmp_path):
    pipe = make_pipe()
    alone = {}
    for name in ("one", "two"):
        add_lora(pipe, name)
        pipe.set_adapters(name)
        alone[name] = generate(pipe)
        save_lora(pipe, tmp_path, name, weight_name=f"{name}.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]
    pipe.set_adapters(["one", "two"], [0.7, 0.3])
    both = generate(pipe)

    loaded = make_pipe()
    for name in ("one", "two"):
        loaded.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
        loaded.set_adapters(name)
        np.testing.assert_allclose(generate(loaded), alone[name], rtol=0, atol=1e-6)
    loaded.set_adapters(["one", "two"], [0.7, 0.3])
    np.testing.assert_allclose(generate(loaded), both, rtol=0, atol=1e-6)
    assert all(np.abs(both - images).max() > 0.01 for images in alone.values())


def test_hotswap(saved, tmp_path):
    folder, expected, _ = saved
    other = make_pipe()
    add_lora(other, "other")
    save_lora(other, tmp_path, "other")
    pipe = make_pipe()
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    np.testing.assert_allclose(generate(pipe), generate(other), rtol=0, atol=1e-6)
    pipe.load_lora_weights(folder, adapter_name="style", hotswap=True)
    np.testing.assert_allclose(generate(pipe), expected, rtol=0, atol=1e-6)


def test_loading_into_an_offloaded_pipeline(saved):
    folder, expected, _ = saved
    pipe = make_pipe()
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    pipe.load_lora_weights(folder)
    np.testing.assert_allclose(generate(pipe), expected, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loading_into_a_pipeline_that_is_offloaded_from_a_gpu(saved):
    folder, expected, _ = saved
    pipe = make_pipe()
    pipe.enable_model_cpu_offload()
    pipe.load_lora_weights(folder)
    np.testing.assert_allclose(generate(pipe), expected, rtol=0, atol=1e-3)


def test_file_of_another_model_warns(saved, warnings):
    pipe = make_pipe()
    state_dict = load_file(saved[0] / FILE)
    pipe.load_lora_weights({key.replace("transformer.", "unet.", 1): tensor for key, tensor in state_dict.items()})
    assert "No LoRA keys associated to GMemTransformer2DModel" in warnings.text
    assert pipe.get_list_adapters() == {}


def test_saving_is_atomic(saved, monkeypatch):
    folder, _, _ = saved
    before = (folder / FILE).read_bytes()
    pipe = make_pipe()
    add_lora(pipe, "other")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_lora(pipe, folder, "other")
    assert (folder / FILE).read_bytes() == before


def test_pickles_are_refused(saved, tmp_path):
    folder, _, _ = saved
    state_dict = load_file(folder / FILE)
    torch.save(state_dict, tmp_path / "pytorch_lora_weights.bin")
    pipe = make_pipe()
    for source, arguments in (
        (tmp_path / "pytorch_lora_weights.bin", {}),
        (tmp_path, {"weight_name": "pytorch_lora_weights.bin"}),
    ):
        with pytest.raises(ValueError, match="read from safetensors files only, got .*pytorch_lora_weights.bin"):
            pipe.load_lora_weights(source, **arguments)
    with pytest.raises(OSError, match="pytorch_lora_weights.safetensors"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="`safe_serialization=False` would write a pickle"):
        GMemPipeline.save_lora_weights(tmp_path, state_dict, safe_serialization=False)
    with pytest.raises(ValueError, match="must end in '.safetensors', got 'lora.bin'"):
        GMemPipeline.save_lora_weights(tmp_path, state_dict, weight_name="lora.bin")


def test_wrong_layers(saved, tmp_path):
    pipe = make_pipe()
    save_file({"transformer.proj_out.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"not LoRA layers .*: \['transformer.proj_out.weight'\]"):
        pipe.load_lora_weights(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no layers"):
        GMemPipeline.save_lora_weights(tmp_path, {})
    with pytest.raises(TypeError, match=r"unknown arguments \['adapter'\]"):
        pipe.load_lora_weights(saved[0], adapter="style")
    pipe.load_lora_weights(saved[0], adapter_name="style")
    with pytest.raises(ValueError, match="style already in use"):
        pipe.load_lora_weights(saved[0], adapter_name="style")
