# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""The presets in `examples/configs`."""

import json

import pytest
import torch
from tiny_training import EXAMPLES

from diffusers_gmem import GMemTransformer2DModel


# Millions of parameters in table 1 of DiT (arXiv 2212.09748), whose sizes SiT and LightningDiT took over; 1.0B and 1.6B are
# LightningDiT's own (hustvl/LightningDiT, LINs-lab/GMem: models/lightningdit.py), and what they are called.
SIZES = {
    **{"s1": 33, "s2": 33, "b1": 130, "b2": 130, "l2": 458, "xl1": 675, "xl2": 675},
    **{"1p0b1": 1000, "1p6b1": 1600},
}


def build(name):
    config = json.loads((EXAMPLES / "configs" / f"{name}.json").read_text())
    patch_size = config["patch_size"]
    # Patches of 1 are for 16 x 16 latents of 32 channels (VA-VAE), of 2 for 32 x 32 of 4 (SD-VAE)
    latents = {1: {"sample_size": 16, "in_channels": 32}, 2: {"sample_size": 32, "in_channels": 4}}[patch_size]
    with torch.device("meta"):
        return GMemTransformer2DModel(**config, **latents, memory_dim=768, alignment_layer=None)


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("backbone", ["lightningdit", "sit"])
@pytest.mark.parametrize(("size", "millions"), SIZES.items())
def test_a_preset_has_the_size_of_its_name(backbone, size, millions):
    model = build(f"{backbone}_{size}")
    assert count_parameters(model) / 1e6 == pytest.approx(millions, rel=0.03 if millions >= 1000 else 0.01)
    assert model.config.patch_size == int(size[-1])
    assert model.config.ffn_type == {"lightningdit": "swiglu", "sit": "gelu"}[backbone]
    assert model.config.norm_type == {"lightningdit": "rms_norm", "sit": "layer_norm"}[backbone]
    assert model.config.use_rope == (backbone == "lightningdit")
    assert model.config.memory_dropout == 0.4


def test_sit_xl2_has_the_parameters_of_the_public_one():
    """The public SiT-XL/2 prints 675,129,632, with positions, labels for 1000 classes, and variances beside the velocity."""
    positions, labels, variances = 256 * 1152, 1001 * 1152, 16 * (1152 + 1)
    memory = 1152 * (768 + 1)
    assert count_parameters(build("sit_xl2")) == 675_129_632 - positions - labels - variances + memory


def test_lightningdit_xl1_is_the_default_of_the_model():
    with torch.device("meta"):
        default = GMemTransformer2DModel(alignment_layer=None)
    preset = build("lightningdit_xl1")
    assert {name: tensor.shape for name, tensor in preset.state_dict().items()} == {
        name: tensor.shape for name, tensor in default.state_dict().items()
    }


def test_there_is_a_test_for_every_preset():
    names = {path.stem for path in (EXAMPLES / "configs").glob("*.json")} - {"quickstart"}
    assert names == {f"{backbone}_{size}" for backbone in ("lightningdit", "sit") for size in SIZES}
