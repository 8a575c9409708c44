# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from reference_cases import assert_matches, case_tensors, reference_cases
from tiny_training import make_autoencoder

from diffusers_gmem.data import encode_images
from diffusers_gmem.models.latent_normalization import (
    decode_latents,
    denormalize_latents,
    normalization_config,
    normalize_latents,
    spatial_compression_ratio,
)


def random_latents(dtype=torch.float32):
    return torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)


def tiny_vae(**config):
    return AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2, **config)


@pytest.mark.parametrize("case", reference_cases("latent_normalisation"), ids=lambda case: case["id"])
def test_reference(case):
    tensors = case_tensors(case)
    config = tiny_vae(
        latents_mean=tensors["mean"].flatten().tolist(),
        latents_std=tensors["std"].flatten().tolist(),
        scaling_factor=case["options"]["multiplier"],
    ).config
    assert_matches(case, "normalised", normalize_latents(tensors["raw"], config), tensors["normalised"])
    assert_matches(case, "restored", denormalize_latents(tensors["normalised"], config), tensors["restored"])


def test_without_statistics_the_scaling_factor_acts_alone():
    latents = random_latents()
    config = tiny_vae(scaling_factor=0.25).config
    assert torch.equal(normalize_latents(latents, config), latents * 0.25)
    assert torch.equal(denormalize_latents(latents, config), latents * 4)


def test_shift_factor_is_the_mean_where_there_are_no_statistics():
    latents = random_latents()
    config = tiny_vae(scaling_factor=0.5, shift_factor=0.75).config
    torch.testing.assert_close(normalize_latents(latents, config), (latents - 0.75) * 0.5)
    torch.testing.assert_close(denormalize_latents(latents, config), latents / 0.5 + 0.75)


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.3},
        {"scaling_factor": 0.3, "shift_factor": -2.0},
        {"scaling_factor": 0.3, "latents_mean": [0.0, 1.0, 2.0, -5.0], "latents_std": [0.1, 1.0, 3.0, 20.0]},
    ],
    ids=["scaling", "shift", "statistics"],
)
def test_denormalize_is_the_inverse(config):
    latents = random_latents(torch.float64)
    config = FrozenDict(config)
    assert not torch.allclose(normalize_latents(latents, config), latents)
    torch.testing.assert_close(denormalize_latents(normalize_latents(latents, config), config), latents)


def test_statistics_are_per_channel():
    config = FrozenDict(scaling_factor=1.0, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[1.0, 10.0, 100.0, 1000.0])
    restored = denormalize_latents(torch.ones(2, 4, 3, 5), config)
    for channel, value in enumerate([2.0, 12.0, 103.0, 1004.0]):
        assert (restored[:, channel] == value).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype):
    config = FrozenDict(scaling_factor=0.5, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    assert normalize_latents(random_latents(dtype), config).dtype == dtype
    assert denormalize_latents(random_latents(dtype), config).dtype == dtype


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
def test_one_statistic_alone_is_refused(name):
    config = FrozenDict({"scaling_factor": 1.0, name: [1.0] * 4})
    for function in (normalize_latents, denormalize_latents):
        with pytest.raises(ValueError, match="both `latents_mean` and `latents_std`, or neither"):
            function(random_latents(), config)


def test_statistics_survive_saving_the_vae(tmp_path):
    vae = tiny_vae(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.5, 2.5, 3.5, 4.5], scaling_factor=0.7)
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert torch.equal(
        normalize_latents(random_latents(), loaded.config), normalize_latents(random_latents(), vae.config)
    )


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderDC", "AutoencoderRAE", "AutoencoderTiny"])
def test_decoding_undoes_what_encoding_and_normalising_did(kind):
    # RAE's own statistics act within it, once
    statistics = {}
    if kind != "AutoencoderDC":  # whose constructor takes none
        channels = {"AutoencoderKL": 2, "AutoencoderRAE": 64, "AutoencoderTiny": 4}[kind]
        shape = (channels, 1, 1) if kind == "AutoencoderRAE" else (channels,)
        statistics = {"latents_mean": torch.full(shape, 0.3).tolist(), "latents_std": torch.full(shape, 2.0).tolist()}
    if kind == "AutoencoderTiny":
        vae = make_autoencoder(kind)
        vae.register_to_config(**statistics)
    else:
        vae = make_autoencoder(kind, **statistics)
    vae.eval()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoded = encode_images(vae, images)[0]
    with torch.no_grad():
        found = decode_latents(vae, normalize_latents(encoded, normalization_config(vae)))
        expected = vae.decode(encoded).sample
    if kind == "AutoencoderRAE":  # decodes to [0, 1]
        expected = expected * 2 - 1
        assert torch.equal(normalize_latents(encoded, normalization_config(vae)), encoded)
    torch.testing.assert_close(found, expected)
    assert found.shape[2:] == (encoded.shape[2] * spatial_compression_ratio(vae),) * 2
