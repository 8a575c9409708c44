# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Everything that the public reference implementation keeps in separate files -> one [`GMemPipeline`]."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils import logging

from ..models.memory_bank import GMemMemoryBank
from ..models.transformer_gmem import GMemTransformer2DModel
from ..pipelines.pipeline_gmem import GMemPipeline
from .autoencoder import convert_autoencoder
from .scheduler import convert_scheduler
from .transformer import convert_transformer


logger = logging.get_logger(__name__)

# Name of the size -> width, blocks, heads
_SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
    "1p0B": (1536, 24, 24),
    "1p6B": (1792, 28, 28),
}


def convert_pipeline(
    state_dict: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    memory_bank: GMemMemoryBank | None = None,
    autoencoder: Mapping[str, Any] | None = None,
    latents_stats: Mapping[str, torch.Tensor] | None = None,
    num_attention_heads: int | None = None,
) -> GMemPipeline:
    """
    Puts together a [`GMemPipeline`] from original parts and checks that they belong together.

    Args:
        state_dict (`dict[str, torch.Tensor]`): The transformer's; see [`convert_transformer`].
        config (`dict`):
            The original configuration, as read from YAML. Its sampler settings become the scheduler; what it says about
            the model is compared with the weights.
        memory_bank ([`GMemMemoryBank`], *optional*): The bank, from [`convert_memory_bank`].
        autoencoder (`dict`, *optional*): The state dict of the tokenizer; see [`convert_autoencoder`].
        latents_stats (`dict`, *optional*):
            `mean` and `std` of the tokenizer's latents, of shape `(1, C, 1, 1)`. They go into the config of the
            pipeline's VAE with `data.latent_multiplier` (0.18215 where the configuration has none, as in the original).
        num_attention_heads (`int`, *optional*):
            Only needed where neither the weights nor the configuration's `model.model_type` tell it.

    Raises:
        TypeError: if `autoencoder` or `latents_stats` is not a dict.
        ValueError: if a part cannot be converted, or two parts contradict each other (both are named).
    """
    if num_attention_heads is None:
        num_attention_heads = _heads_of_model_type(config, state_dict)
    transformer = convert_transformer(state_dict, num_attention_heads)
    _check_config(config, transformer)

    if memory_bank is None:
        logger.warning("Without a memory bank the pipeline needs `memory` (or an image) in every call.")
    elif memory_bank.dim != transformer.config.memory_dim:
        raise ValueError(
            f"The bank's snippets have dimension {memory_bank.dim}, but the transformer takes those of dimension "
            f"{transformer.config.memory_dim}."
        )

    vae = None
    if autoencoder is None:
        if latents_stats is not None:
            raise ValueError("Latent statistics are part of a VAE's config: they need the tokenizer's weights too.")
        if transformer.config.in_channels != 3:
            logger.warning("Without the tokenizer's weights the pipeline makes latents only (`output_type='latent'`).")
    else:
        image_size = (config.get("data") or {}).get("image_size", 256)
        vae = convert_autoencoder(autoencoder, **_latents_normalization(config, latents_stats), sample_size=image_size)
        vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        ratio = (config.get("vae") or {}).get("downsample_ratio", vae_scale_factor)
        if ratio != vae_scale_factor:
            raise ValueError(
                f"`vae.downsample_ratio` of the configuration is {ratio}, that of the tokenizer is {vae_scale_factor}."
            )
        if vae.config.latent_channels != transformer.config.in_channels:
            raise ValueError(
                f"The tokenizer's latents have {vae.config.latent_channels} channels, but the transformer takes "
                f"{transformer.config.in_channels}."
            )
    return GMemPipeline(transformer=transformer, scheduler=convert_scheduler(config), vae=vae, memory_bank=memory_bank)


def _latents_normalization(
    config: Mapping[str, Any], latents_stats: Mapping[str, torch.Tensor] | None
) -> dict[str, Any]:
    data = config.get("data") or {}
    normalized = data.get("latent_norm")
    if normalized and latents_stats is None:
        raise ValueError(
            "`data.latent_norm` of the configuration is true, so the tokenizer is of no use without the statistics of "
            "its latents (latents_stats.pt)."
        )
    if normalized is False and latents_stats is not None:
        raise ValueError(
            "`data.latent_norm` of the configuration is false: the model was trained on latents as they are, to which "
            "no statistics belong."
        )
    arguments = {"scaling_factor": float(data.get("latent_multiplier", 0.18215))}
    if latents_stats is not None:
        if not isinstance(latents_stats, Mapping):
            raise TypeError(f"`latents_stats` must be a dict with `mean` and `std`, got {type(latents_stats)}.")
        missing = [name for name in ("mean", "std") if name not in latents_stats]
        if missing:
            raise ValueError(
                f"The latent statistics have no {' and no '.join(missing)}, only {', '.join(latents_stats)}."
            )
        arguments |= {"latents_mean": latents_stats["mean"], "latents_std": latents_stats["std"]}
    statistics = "the given statistics" if latents_stats is not None else "mean 0 and standard deviation 1"
    logger.info(f"Latents are normalized with {statistics} and the factor {arguments['scaling_factor']}.")
    return arguments


def _size_and_patch(config: Mapping[str, Any]) -> tuple[tuple[int, int, int] | None, int | None]:
    """Width, blocks and heads, and the patch size, that `model.model_type` stands for, as far as it is known."""
    model_type = (config.get("model") or {}).get("model_type", "")
    match = re.fullmatch(r"(?:LightningDiT|SiT)-(\w+)/(\d+)", model_type)
    return (_SIZES.get(match[1]), int(match[2])) if match else (None, None)


def _heads_of_model_type(config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]) -> int | None:
    """Only for weights that do not tell the number of heads, so that a contradiction is one of the configuration."""
    size, _ = _size_and_patch(config)
    told = any("feat_rope." in name or ".attn.q_norm." in name for name in state_dict)
    return None if size is None or told else size[2]


def _check_config(config: Mapping[str, Any], transformer: GMemTransformer2DModel) -> None:
    weights = transformer.config
    found = {
        "use_qknorm": weights.qk_norm,
        "use_swiglu": weights.ffn_type == "swiglu",
        "use_rope": weights.use_rope,
        "use_rmsnorm": weights.norm_type == "rms_norm",
        "wo_shift": not weights.adaln_shift,
        "in_chans": weights.in_channels,
        "learn_sigma": weights.learn_sigma,
    }
    model = config.get("model") or {}
    problems = [
        f"`model.{name}` is {model[name]}, that of the weights {value}"
        for name, value in found.items()
        if name in model and model[name] != value
    ]

    size, patch_size = _size_and_patch(config)
    if patch_size is not None and patch_size != weights.patch_size:
        problems.append(
            f"`model.model_type` {model['model_type']} has patches of {patch_size}, the weights of {weights.patch_size}"
        )
    of_weights = (
        weights.num_attention_heads * weights.attention_head_dim,
        weights.num_layers,
        weights.num_attention_heads,
    )
    if size is not None and size != of_weights:
        problems.append(
            f"`model.model_type` {model['model_type']} has width, blocks and heads {size}, the weights {of_weights}"
        )

    image_size = (config.get("data") or {}).get("image_size")
    ratio = (config.get("vae") or {}).get("downsample_ratio", 16)
    if image_size is not None and image_size // ratio != weights.sample_size:
        problems.append(
            f"`data.image_size` {image_size} over `vae.downsample_ratio` {ratio} is {image_size // ratio}, the weights are "
            f"for latents of {weights.sample_size}"
        )
    if problems:
        raise ValueError(f"The configuration contradicts the weights: {'; '.join(problems)}.")
