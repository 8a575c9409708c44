# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import logging

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from ldm_autoencoder import original_state_dict, tiny_vae
from reference_cases import assert_matches, case_state_dict, case_tensors, reference_cases

from diffusers_gmem.conversion import convert_autoencoder


CASES = reference_cases("tokenizer")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])


@each_case
@torch.no_grad()
def test_reference(case):
    tensors = case_tensors(case)
    vae = convert_autoencoder(case_state_dict(case))
    posterior = vae.encode(tensors["image"]).latent_dist
    assert_matches(case, "mean", posterior.mean, tensors["mean"])
    assert_matches(case, "logvar", posterior.logvar, tensors["logvar"])
    assert_matches(case, "mean", posterior.mean + posterior.std * tensors["eps"], tensors["sample"])
    assert_matches(case, "logvar", posterior.parameters, tensors["moments"])
    assert_matches(case, "decode_mean", vae.decode(tensors["mean"]).sample, tensors["decode_mean"])
    decoded = vae.decode(tensors["z"]).sample
    assert_matches(case, "decode_z", decoded, tensors["decode_z"])

    images = VaeImageProcessor().postprocess(decoded, output_type="pil")
    images = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    assert_matches(case, "uint8_z", images, tensors["uint8_z"])
    assert (images != tensors["uint8_z"]).float().mean() < 0.005


@each_case
def test_configuration_follows_from_the_tensors(case):
    options = case["options"]
    config = convert_autoencoder(case_state_dict(case)).config
    assert config.block_out_channels == [options["ch"] * multiplier for multiplier in options["ch_mult"]]
    assert config.layers_per_block == options["num_res_blocks"]
    assert (config.latent_channels, config.in_channels) == (options["z_channels"], options["in_channels"])
    sizes = [options["resolution"] // 2**level for level in range(len(options["ch_mult"]))]
    attention = [size in options["attn_resolutions"] for size in sizes]
    assert [name.startswith("Attn") for name in config.down_block_types] == attention
    assert [name.startswith("Attn") for name in config.up_block_types] == attention[::-1]
    assert (config.scaling_factor, config.latents_mean, config.latents_std) == (1.0, None, None)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"layers_per_block": 2, "block_out_channels": (64, 32, 96), "in_channels": 1, "out_channels": 2},
        # attention in the encoder only, as in the MAR autoencoder
        {"up_block_types": ("UpDecoderBlock2D",) * 3},
        {"down_block_types": ("AttnDownEncoderBlock2D",) * 3, "up_block_types": ("AttnUpDecoderBlock2D",) * 3},
        {
            "block_out_channels": (32,),
            "down_block_types": ("DownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",),
        },
    ],
)
@torch.no_grad()
def test_any_architecture_round_trip(config, tmp_path):
    vae = tiny_vae(**config)
    converted = convert_autoencoder(original_state_dict(vae))
    images = torch.randn(2, vae.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = vae.encode(images).latent_dist.mean
    assert torch.equal(converted.encode(images).latent_dist.mean, latents)
    assert torch.equal(converted.decode(latents).sample, vae.decode(latents).sample)
    assert not converted.training

    converted.save_pretrained(tmp_path)
    again = AutoencoderKL.from_pretrained(tmp_path)
    assert torch.equal(again.decode(latents).sample, vae.decode(latents).sample)


def test_statistics_and_factor_are_written_to_the_config(tmp_path):
    mean, std = torch.randn(1, 5, 1, 1), torch.rand(1, 5, 1, 1) + 0.1
    state_dict = original_state_dict(tiny_vae())
    vae = convert_autoencoder(state_dict, latents_mean=mean, latents_std=std, scaling_factor=0.7, sample_size=64)
    vae.save_pretrained(tmp_path)
    config = AutoencoderKL.from_pretrained(tmp_path).config
    assert torch.equal(torch.tensor(config.latents_mean), mean.flatten())
    assert torch.equal(torch.tensor(config.latents_std), std.flatten())
    assert (config.scaling_factor, config.sample_size) == (0.7, 64)
    assert (
        convert_autoencoder(state_dict, latents_mean=[0.0] * 5, latents_std=[1.0] * 5).config.latents_std == [1.0] * 5
    )


def test_wrong_statistics():
    state_dict = original_state_dict(tiny_vae())
    with pytest.raises(ValueError, match="must both be given, or neither"):
        convert_autoencoder(state_dict, latents_mean=[0.0] * 5)
    with pytest.raises(ValueError, match=r"`latents_std` must be 5 finite numbers, .* got shape \(4,\)"):
        convert_autoencoder(state_dict, latents_mean=[0.0] * 5, latents_std=[1.0] * 4)
    with pytest.raises(ValueError, match="`latents_mean` must be 5 finite numbers"):
        convert_autoencoder(state_dict, latents_mean=[float("nan")] * 5, latents_std=[1.0] * 5)
    with pytest.raises(ValueError, match="`latents_std` must be positive"):
        convert_autoencoder(state_dict, latents_mean=[0.0] * 5, latents_std=[1.0, 1.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize("entry", ["state_dict", "model"])
def test_what_only_training_needs_is_left_out_and_named(entry, caplog):
    caplog.set_level(logging.INFO)
    state_dict = original_state_dict(tiny_vae())
    extra = (
        "loss.discriminator.main.0.weight",
        "loss.logvar",
        "foundation_model.model.cls_token",
        "linear_proj.weight",
    )
    vae = convert_autoencoder({entry: state_dict | dict.fromkeys(extra, torch.zeros(1)), "epoch": 3})
    assert len(vae.state_dict()) == len(state_dict)
    assert all(name in caplog.text for name in extra)


def test_missing_unexpected_and_misshapen_tensors_are_all_named():
    state_dict = original_state_dict(tiny_vae())
    state_dict.pop("decoder.up.1.attn.1.q.weight")
    state_dict.pop("encoder.mid.block_2.norm1.bias")
    state_dict["model_ema.decay"] = torch.zeros(1)
    state_dict["quant_conv.weight"] = torch.zeros(5, 10, 1, 1)
    with pytest.raises(ValueError) as error:
        convert_autoencoder(state_dict)
    for problem in (
        "missing decoder.up.1.attn.1.q.weight",
        "missing encoder.mid.block_2.norm1.bias",
        "unexpected model_ema.decay",
        "quant_conv.weight has shape (5, 10, 1, 1) instead of (10, 10, 1, 1)",
    ):
        assert problem in str(error.value)


def test_every_missing_tensor_is_named():
    complete = original_state_dict(tiny_vae())
    for name in complete:
        if name.startswith(("encoder.down.1.", "encoder.mid.block_1.", "decoder.up.1.block.0.", "encoder.conv_in")):
            with pytest.raises(ValueError, match="missing|it has no") as error:
                convert_autoencoder({other: tensor for other, tensor in complete.items() if other != name})
            assert name in str(error.value)


def test_a_first_level_wider_than_the_first_convolution_is_refused():
    state_dict = original_state_dict(tiny_vae(block_out_channels=(64, 32, 32)))
    state_dict["encoder.conv_in.weight"] = torch.zeros(32, 3, 3, 3)
    with pytest.raises(ValueError, match="first of `ch_mult` must be 1 .* it has 32 channels and the level 64"):
        convert_autoencoder(state_dict)


@pytest.mark.parametrize("state_dict", [{}, {"pos_embed": torch.zeros(1)}, {"state_dict": {}}])
def test_other_files_are_refused(state_dict):
    with pytest.raises(ValueError, match="Not the state dict of an LDM-style KL autoencoder: it has no encoder"):
        convert_autoencoder(state_dict)


def test_a_tensor_is_refused():
    with pytest.raises(TypeError, match="`state_dict` must be a dict of tensors, got <class 'torch.Tensor'>"):
        convert_autoencoder(torch.zeros(2, 2))
