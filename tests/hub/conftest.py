# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from diffusers import AutoencoderKL

from diffusers_gmem import GMemFlowMatchScheduler, GMemMemoryBank, GMemPipeline, GMemTransformer2DModel


@pytest.fixture
def bank():
    snippets = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    return GMemMemoryBank(
        snippets,
        labels=[0, 0, 1, 1, 2, 2, 2],
        id2label={0: "cat", 1: "dog", 2: "fish"},
        metadata={"file": [f"{k}.png" for k in range(7)]},
        encoder="facebook/dinov2-base",
        encoder_revision="f9e44c814b77203eaa57a6bdbbd535f21ede1415",
        preprocessing={"resize": 256, "center_crop": 224},
        source_dataset="my_images",
    )


@pytest.fixture
def pipe(bank):
    torch.manual_seed(0)
    transformer = GMemTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        memory_dim=16,
        alignment_layer=None,
    )
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, scaling_factor=0.8)
    pipe = GMemPipeline(transformer, GMemFlowMatchScheduler(), vae=vae, memory_bank=bank)
    pipe.set_progress_bar_config(disable=True)
    return pipe
