# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""A tiny transformer with random weights in each of the published backbones' styles, and inputs for it."""

import pytest
import torch

from diffusers_gmem import GMemTransformer2DModel


BACKBONES = {
    "lightning_dit": {},
    "sit": {"norm_type": "layer_norm", "ffn_type": "gelu", "use_rope": False, "patch_size": 2, "learn_sigma": True},
    "qk_norm": {"qk_norm": True, "adaln_shift": False},
}
each_backbone = pytest.mark.parametrize("options", BACKBONES.values(), ids=BACKBONES.keys())


def make_model(**options):
    """A tiny LightningDiT with random weights everywhere, so that no zero or one hides a mistake."""
    config = {
        "sample_size": 4,
        "in_channels": 3,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "memory_dim": 12,
        "alignment_layer": 2,
        "alignment_dim": 5,
        "alignment_hidden_dim": 7,
        "patch_size": 1,
        **options,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GMemTransformer2DModel(**config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def make_inputs(batch_size=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch_size, 3, 4, 4, generator=generator),
        "timestep": torch.rand(batch_size, generator=generator),
        "memory": torch.randn(batch_size, 12, generator=generator),
    }


def relative_error(actual, expected):
    return ((actual.float() - expected).norm() / expected.norm()).item()


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *args: calls.append(args))
    return calls
