# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""What makes the transformer fast or small: compilation, attention backends, offloading, casting, caches."""

import shutil

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_dispatch import attention_backend
from tiny_transformer import count_calls, each_backbone, make_inputs, make_model, relative_error
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_gmem.models.transformer_gmem import GMemAttnProcessor


# torch.compile


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@each_backbone
def test_compile_has_no_graph_break(options, dynamo):
    model = make_model(num_layers=1, alignment_layer=1, **options).train()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch_size in (3, 5, 4, 6):
        inputs = make_inputs(batch_size)
        outputs = []
        for forward in (model, compiled):
            torch.manual_seed(batch_size)  # of the memory dropout
            outputs.append(forward(**inputs, return_alignment=True))
        torch.testing.assert_close(outputs[0].sample, outputs[1].sample)
        torch.testing.assert_close(outputs[0].alignment, outputs[1].alignment)
    assert counter.frame_count == 2  # the first batch size, and then any


def test_compile_in_eval_mode_with_and_without_memory(dynamo):
    model = make_model(num_layers=1, alignment_layer=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for memory in (make_inputs()["memory"], None):
        inputs = make_inputs() | {"memory": memory}
        torch.testing.assert_close(compiled(**inputs).sample, model(**inputs).sample)


def test_compile_under_autocast_and_gradient_checkpointing(dynamo):
    model = make_model(num_layers=1, alignment_layer=1).train()
    model.enable_gradient_checkpointing()
    inputs, mask = make_inputs(), torch.ones(3, 12)
    losses, gradients = [], []
    for forward in (model, torch.compile(model, fullgraph=True, backend="eager")):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            sample = forward(**inputs, memory_dropout_mask=mask).sample
        losses.append(sample.float().square().mean())
        losses[-1].backward()
        gradients.append(model.memory_embedder.weight.grad.clone())
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the inductor backend needs a C++ compiler")
def test_compile_with_inductor(dynamo):
    model = make_model(num_layers=1, alignment_layer=1)
    inputs = make_inputs()
    expected = model(**inputs, return_alignment=True)
    output = torch.compile(model, fullgraph=True)(**inputs, return_alignment=True)
    torch.testing.assert_close(output.sample, expected.sample)
    torch.testing.assert_close(output.alignment, expected.alignment)


def test_compile_repeated_blocks(dynamo):
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs).sample
    counter = CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(model(**inputs).sample, expected)
    assert counter.frame_count == 1  # one graph serves all blocks


@torch.no_grad()
def test_export():
    model, inputs = make_model(num_layers=1, alignment_layer=1), make_inputs()
    exported = torch.export.export(model, args=(), kwargs=inputs).module()
    torch.testing.assert_close(exported(**inputs).sample, model(**inputs).sample)


# Attention


@pytest.fixture
def active_backend_kept():
    """`set_attention_backend` also chooses for the whole process, which `reset_attention_backend` does not take back."""
    with attention_backend("native"):
        yield


@pytest.mark.usefixtures("active_backend_kept")
@each_backbone
def test_attention_backends(options):
    model, inputs = make_model(**options), make_inputs()
    expected = model(**inputs).sample
    for backend in ("native", "_native_math"):
        model.set_attention_backend(backend)
        assert model.transformer_blocks[0].attn.processor._attention_backend == backend
        torch.testing.assert_close(model(**inputs).sample, expected)
    model.reset_attention_backend()
    with pytest.raises(ValueError, match="backend"):
        model.set_attention_backend("no_such_backend")


class RecordOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("active_backend_kept")
def test_the_models_own_backend_wins_over_the_active_one():
    model = make_model()
    names = {}
    for backend in ("native", "_native_math"):
        model.set_attention_backend(backend)
        with torch.no_grad(), attention_backend("native"), RecordOperations() as operations:
            model(**make_inputs())
        names[backend] = operations.names
    model.reset_attention_backend()
    assert any("scaled_dot_product" in name for name in names["native"])
    assert not any("scaled_dot_product" in name for name in names["_native_math"])


def test_attention_processors():
    model, inputs = make_model(), make_inputs()
    assert list(model.attn_processors) == [f"transformer_blocks.{i}.attn.processor" for i in range(3)]

    class SelfOnly(GMemAttnProcessor):
        def __call__(self, attn, hidden_states, image_rotary_emb=None):
            return attn.to_out[0](attn.to_v(hidden_states))

    expected = model(**inputs).sample
    model.set_attn_processor(SelfOnly())
    assert not torch.allclose(model(**inputs).sample, expected)
    model.set_attn_processor(GMemAttnProcessor())
    assert torch.equal(model(**inputs).sample, expected)


@each_backbone
def test_fused_projections(options):
    model, inputs = make_model(**options), make_inputs()
    expected = model(**inputs).sample
    separate = count_calls(model.transformer_blocks[0].attn.to_q)
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(**inputs).sample, expected)
    assert not separate
    model.unfuse_qkv_projections()
    assert torch.equal(model(**inputs).sample, expected)
    assert len(separate) == 1


# Memory savers and caches of diffusers


@each_backbone
@pytest.mark.parametrize("storage_dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting(options, storage_dtype):
    model, inputs = make_model(**options), make_inputs()
    expected = model(**inputs).sample
    model.enable_layerwise_casting(storage_dtype=storage_dtype, compute_dtype=torch.float32)
    block = model.transformer_blocks[0]
    assert block.attn.to_q.weight.dtype == block.ff.linear_in.weight.dtype == storage_dtype
    for kept in (model.x_embedder, model.timestep_embedder, model.memory_embedder, block.norm1, block.attn.norm_q):
        assert kept is None or {parameter.dtype for parameter in kept.parameters()} <= {torch.float32}
    error = relative_error(model(**inputs).sample, expected)
    assert 0 < error < (0.2 if storage_dtype == torch.float8_e4m3fn else 0.02)
    assert block.attn.to_q.weight.dtype == storage_dtype


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
def test_group_offload(offload_type, to_disk, tmp_path):
    model, inputs = make_model(), make_inputs()
    with torch.no_grad():
        expected = model(**inputs, return_alignment=True)
        model.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_type=offload_type,
            num_blocks_per_group=1 if offload_type == "block_level" else None,
            offload_to_disk_path=str(tmp_path) if to_disk else None,
        )
        assert (len(list(tmp_path.glob("*.safetensors"))) >= 3) == to_disk
        output = model(**inputs, return_alignment=True)
    assert torch.equal(output.sample, expected.sample)
    assert torch.equal(output.alignment, expected.alignment)


def test_group_offload_with_layerwise_casting():
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs).sample
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert 0 < relative_error(model(**inputs).sample, expected) < 2e-2


CACHES = {
    "pyramid_attention_broadcast": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: 500,
    ),
    "first_block": FirstBlockCacheConfig(threshold=100.0),
    "mag": MagCacheConfig(num_inference_steps=4, retention_ratio=0.0, threshold=100.0, mag_ratios=[1.0] * 4),
    "taylor_seer": TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, max_order=1),
}


@torch.no_grad()
@pytest.mark.parametrize("config", CACHES.values(), ids=CACHES.keys())
def test_caches(config):
    model, inputs = make_model(), make_inputs()
    later = inputs | {"hidden_states": inputs["hidden_states"] + 0.3, "timestep": inputs["timestep"] / 2}
    expected, later_expected = model(**inputs).sample, model(**later).sample
    calls = count_calls(model.transformer_blocks[2].attn.to_q)
    model.enable_cache(config)
    assert model.is_cache_enabled
    with model.cache_context("first"):
        torch.testing.assert_close(model(**inputs).sample, expected)
        assert len(calls) == 1
        cached = model(**later).sample
        assert len(calls) == 1  # the attention of the last block was not computed
    assert cached.isfinite().all() and not torch.allclose(cached, later_expected)
    with model.cache_context("second"):
        torch.testing.assert_close(model(**later).sample, later_expected)

    model.disable_cache()
    torch.testing.assert_close(model(**later).sample, later_expected)


@torch.no_grad()
def test_layers_can_be_skipped():
    model, inputs = make_model(), make_inputs()
    calls = count_calls(model.transformer_blocks[1].attn)
    apply_layer_skip(model, LayerSkipConfig([1], dropout=1.0))
    skipping = model(**inputs).sample
    assert not calls
    without = make_model()
    del without.transformer_blocks[1]
    torch.testing.assert_close(skipping, without(**inputs).sample)
