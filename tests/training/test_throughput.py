# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from tiny_transformer import each_backbone, make_inputs, make_model
from torch.utils.flop_counter import FlopCounterMode

from diffusers_gmem.training import model_flops_per_image, peak_flops
from diffusers_gmem.training.throughput import forward_flops_per_image, peak_flops_by_name


@each_backbone
@pytest.mark.parametrize("alignment", [False, True])
def test_the_formula_counts_what_torch_counts(options, alignment):
    model = make_model(**options)
    model.set_attention_backend("_native_math")  # torch does not count the CPU's fused attention
    inputs = make_inputs(batch_size=2)
    with FlopCounterMode(display=False) as counter:
        outputs = model(**inputs, return_alignment=alignment, return_dict=False)
    assert counter.get_total_flops() == 2 * forward_flops_per_image(model.config, alignment)

    with FlopCounterMode(display=False) as counter:
        sum(output.sum() for output in outputs).backward()
    # No gradient goes to the inputs: the latents' patches, the time's sines and the memory
    patch_channels = model.config.patch_size**2 * model.config.in_channels
    num_tokens = (model.config.sample_size // model.config.patch_size) ** 2
    inputs_share = 2 * 16 * (num_tokens * patch_channels + 256 + model.config.memory_dim)
    expected = model_flops_per_image(model.config, alignment) - forward_flops_per_image(model.config, alignment)
    assert counter.get_total_flops() == 2 * (expected - inputs_share)
    model.reset_attention_backend()


def test_xl2_is_that_of_the_paper():
    """DiT-XL/2 has 118.64 Gflops in table 4 of arXiv 2212.09748, where a multiplication and its addition are one."""
    with torch.device("meta"):
        from diffusers_gmem import GMemTransformer2DModel

        model = GMemTransformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            norm_type="layer_norm",
            ffn_type="gelu",
            use_rope=False,
            learn_sigma=True,
        )
    assert forward_flops_per_image(model.config) / 2e9 == pytest.approx(118.64, rel=0.002)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA H20", 148),
        ("Tesla T4", None),
        ("NVIDIA A1000", None),
    ],
)
def test_peak_rates(name, teraflops):
    assert peak_flops_by_name(name) == (None if teraflops is None else teraflops * 1e12)


def test_the_rate_of_a_cpu_is_not_known():
    assert peak_flops("cpu") is None
