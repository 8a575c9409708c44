# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import logging
import re

import pytest
import torch
from ldm_autoencoder import original_state_dict, tiny_vae
from reference_cases import REFERENCE_DIR, case_state_dict, case_tensors, reference_cases

from diffusers_gmem import GMemMemoryBank, GMemTransformer2DModel
from diffusers_gmem.conversion import convert_pipeline, export_transformer, load_checkpoint, select_weights
from diffusers_gmem.conversion.pipeline import _size_and_patch


CASE = reference_cases("checkpoint")[0]
OPTIONS = CASE["options"]
# Tells nothing but the width by its tensors
PLAIN_CASE = next(
    case
    for case in reference_cases("model_forward")
    if not case["options"]["use_rope"] and not case["options"]["use_qknorm"]
)


def checkpoint_parts():
    checkpoint = load_checkpoint(REFERENCE_DIR / CASE["checkpoint"])
    return select_weights(checkpoint), checkpoint["config"]


def autoencoder_state_dict(channels=OPTIONS["in_channels"]):
    """Of five levels: a factor of 16."""
    return original_state_dict(
        tiny_vae(
            block_out_channels=(32,) * 5,
            down_block_types=("DownEncoderBlock2D",) * 5,
            up_block_types=("UpDecoderBlock2D",) * 5,
            latent_channels=channels,
        )
    )


def statistics(channels=OPTIONS["in_channels"]):
    return {"mean": torch.randn(1, channels, 1, 1), "std": torch.rand(1, channels, 1, 1) + 0.5}


def changed(config, section, **entries):
    return config | {section: config[section] | entries}


def test_parts_of_the_pipeline(caplog):
    caplog.set_level(logging.INFO)
    state_dict, config = checkpoint_parts()
    bank, stats = GMemMemoryBank(torch.randn(5, OPTIONS["memory_dim"])), statistics()
    pipe = convert_pipeline(
        state_dict, config, memory_bank=bank, autoencoder=autoencoder_state_dict(), latents_stats=stats
    )
    assert pipe.memory_bank is bank
    assert pipe.transformer.config.sample_size == CASE["options"]["input_size"]
    assert (pipe.scheduler.config.solver, pipe.scheduler.config.stochastic) == ("heun", True)
    assert pipe.vae.config.latents_mean == stats["mean"].flatten().tolist()
    assert pipe.vae.config.latents_std == stats["std"].flatten().tolist()
    assert pipe.vae.config.scaling_factor == config["data"]["latent_multiplier"]
    assert pipe.vae.config.sample_size == config["data"]["image_size"]
    assert "normalized with the given statistics and the factor 1.0" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    image = pipe(memory_indices=3, num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt").images
    assert image.shape == (1, 3, config["data"]["image_size"], config["data"]["image_size"])


def test_what_the_pipeline_lacks_is_named(caplog):
    pipe = convert_pipeline(*checkpoint_parts())
    assert pipe.vae is None and pipe.memory_bank is None
    assert "Without a memory bank the pipeline needs `memory`" in caplog.text
    assert "Without the tokenizer's weights the pipeline makes latents only" in caplog.text


@pytest.mark.parametrize(
    "data, factor",
    [
        ({"latent_norm": False, "latent_multiplier": 0.5}, 0.5),
        ({"latent_norm": False}, 0.18215),
        ({"latent_multiplier": 2}, 2.0),
        (None, 0.18215),
    ],
)
def test_latents_without_statistics(data, factor):
    state_dict, config = checkpoint_parts()
    vae = convert_pipeline(state_dict, config | {"data": data}, autoencoder=autoencoder_state_dict()).vae
    assert (vae.config.scaling_factor, vae.config.latents_mean, vae.config.latents_std) == (factor, None, None)


def test_statistics_and_the_rest_have_to_go_together():
    state_dict, config = checkpoint_parts()
    vae = autoencoder_state_dict()
    with pytest.raises(ValueError, match="`data.latent_norm` of the configuration is true, .* of no use without"):
        convert_pipeline(state_dict, config, autoencoder=vae)
    with pytest.raises(ValueError, match="Latent statistics are part of a VAE's config: they need the tokenizer"):
        convert_pipeline(state_dict, config, latents_stats=statistics())
    plain = changed(config, "data", latent_norm=False)
    with pytest.raises(ValueError, match="`data.latent_norm` of the configuration is false"):
        convert_pipeline(state_dict, plain, autoencoder=vae, latents_stats=statistics())
    with pytest.raises(ValueError, match="latent statistics have no std, only mean, var"):
        convert_pipeline(state_dict, config, autoencoder=vae, latents_stats={"mean": vae, "var": vae})
    with pytest.raises(TypeError, match="`latents_stats` must be a dict with `mean` and `std`, got"):
        convert_pipeline(state_dict, config, autoencoder=vae, latents_stats=torch.zeros(2))
    with pytest.raises(ValueError, match="`latents_mean` must be .* finite numbers"):
        convert_pipeline(state_dict, config, autoencoder=vae, latents_stats=statistics(99))


def test_parts_that_do_not_belong_together():
    state_dict, config = checkpoint_parts()
    channels, dim = OPTIONS["in_channels"], OPTIONS["memory_dim"]
    with pytest.raises(ValueError, match=f"snippets have dimension {dim + 1}, but the .* those of dimension {dim}"):
        convert_pipeline(state_dict, config, memory_bank=GMemMemoryBank(torch.randn(5, dim + 1)))
    vae, stats = autoencoder_state_dict(channels + 1), statistics(channels + 1)
    with pytest.raises(
        ValueError, match=f"latents have {channels + 1} channels, but the transformer takes {channels}"
    ):
        convert_pipeline(state_dict, config, autoencoder=vae, latents_stats=stats)
    config = changed(changed(config, "vae", downsample_ratio=8), "data", image_size=8 * OPTIONS["input_size"])
    with pytest.raises(
        ValueError, match="`vae.downsample_ratio` of the configuration is 8, that of the tokenizer is 16"
    ):
        convert_pipeline(state_dict, config, autoencoder=autoencoder_state_dict(), latents_stats=statistics())


@pytest.mark.parametrize("name", ["use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift", "learn_sigma"])
def test_options_that_contradict_the_weights(name):
    state_dict, config = checkpoint_parts()
    message = f"The configuration contradicts the weights: `model.{name}` is {not OPTIONS[name]}, .* {OPTIONS[name]}"
    with pytest.raises(ValueError, match=message):
        convert_pipeline(state_dict, changed(config, "model", **{name: not OPTIONS[name]}))


def test_sizes_that_contradict_the_weights():
    state_dict, config = checkpoint_parts()
    sizes = OPTIONS["hidden_size"], OPTIONS["depth"], OPTIONS["num_heads"]
    size, patch_size = OPTIONS["input_size"], OPTIONS["patch_size"]
    for section, entries, message in (
        ("model", {"in_chans": 99}, f"`model.in_chans` is 99, that of the weights {OPTIONS['in_channels']}"),
        ("model", {"model_type": "LightningDiT-tiny/9"}, f"tiny/9 has patches of 9, the weights of {patch_size}"),
        (
            "model",
            {"model_type": f"LightningDiT-XL/{patch_size}"},
            re.escape(f"has width, blocks and heads (1152, 28, 16), the weights {sizes}"),
        ),
        ("data", {"image_size": 16 * size + 16}, f"16 is {size + 1}, the weights are for latents of {size}"),
    ):
        with pytest.raises(ValueError, match=f"The configuration contradicts the weights: .*{message}"):
            convert_pipeline(state_dict, changed(config, section, **entries))


def test_all_contradictions_are_named_and_silence_is_none():
    state_dict, config = checkpoint_parts()
    with pytest.raises(ValueError, match="`model.in_chans` is 99.*; `model.model_type` .* patches of 9"):
        convert_pipeline(state_dict, changed(config, "model", in_chans=99, model_type="SiT-XL/9"))
    convert_pipeline(state_dict, {"transport": config["transport"], "sample": config["sample"], "model": None})


def plain_config(**model):
    _, config = checkpoint_parts()
    return {"transport": config["transport"], "sample": config["sample"], "model": model}


def test_heads_that_only_the_model_type_tells():
    torch.manual_seed(0)
    state_dict = case_state_dict(PLAIN_CASE)
    with pytest.raises(ValueError, match="pass `num_attention_heads`"):
        convert_pipeline(state_dict, plain_config(model_type="SiT-tiny/2"))
    heads = PLAIN_CASE["options"]["num_heads"]
    pipe = convert_pipeline(state_dict, plain_config(model_type="SiT-tiny/2"), num_attention_heads=heads)
    tensors = case_tensors(PLAIN_CASE)
    with torch.no_grad():
        sample = pipe.transformer(tensors["x"], tensors["t"], tensors["c"]).sample
    torch.testing.assert_close(sample, tensors["v_eval"], rtol=1e-3, atol=1e-3)


def test_heads_of_a_published_size():
    with torch.device("meta"):
        model = GMemTransformer2DModel(
            patch_size=2,
            num_layers=12,
            num_attention_heads=6,
            attention_head_dim=64,
            norm_type="layer_norm",
            ffn_type="gelu",
            use_rope=False,
            alignment_layer=None,
        )
    config = plain_config(model_type="SiT-S/2")
    assert convert_pipeline(export_transformer(model), config).transformer.config.num_attention_heads == 6
    with pytest.raises(ValueError, match=r"has width, blocks and heads \(384, 12, 6\), the weights \(384, 12, 3\)"):
        convert_pipeline(export_transformer(model), config, num_attention_heads=3)


@pytest.mark.parametrize(
    "model_type, expected",
    [
        ("LightningDiT-S/1", ((384, 12, 6), 1)),
        ("LightningDiT-B/2", ((768, 12, 12), 2)),
        ("SiT-L/4", ((1024, 24, 16), 4)),
        ("SiT-XL/2", ((1152, 28, 16), 2)),
        ("LightningDiT-1p0B/1", ((1536, 24, 24), 1)),
        ("LightningDiT-1p6B/2", ((1792, 28, 28), 2)),
        ("LightningDiT-mine/8", (None, 8)),
        ("another", (None, None)),
    ],
)
def test_published_sizes(model_type, expected):
    assert _size_and_patch({"model": {"model_type": model_type}}) == expected
