# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""LDM-style KL autoencoders, such as the VA-VAE tokenizer -> diffusers' [`AutoencoderKL`]."""

import re
from collections.abc import Mapping, Sequence

import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging

from .checkpoint import check_names_and_shapes, strip_wrapper_prefixes


logger = logging.get_logger(__name__)

# What VA-VAE's training adds: perceptual loss and discriminator, the foundation model, the projection of latents onto it
_TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.")
# diffusers' names -> the original's; levels of the decoder, which count from the other end, apart
_NAMES = {
    r"mid_block\.resnets\.0\.": "mid.block_1.",
    r"mid_block\.attentions\.0\.": "mid.attn_1.",
    r"mid_block\.resnets\.1\.": "mid.block_2.",
    r"down_blocks\.": "down.",
    r"resnets\.": "block.",
    r"attentions\.": "attn.",
    r"downsamplers\.0\.": "downsample.",
    r"upsamplers\.0\.": "upsample.",
    r"conv_norm_out": "norm_out",
    r"conv_shortcut": "nin_shortcut",
    r"group_norm": "norm",
    r"to_([qkv])\.": r"\1.",
    r"to_out\.0\.": "proj_out.",
}


def _original_name(name: str, num_levels: int) -> str:
    name = re.sub(r"up_blocks\.(\d+)", lambda level: f"up.{num_levels - 1 - int(level[1])}", name)
    for ours, original in _NAMES.items():
        name = re.sub(ours, original, name)
    return name


def _infer_config(state_dict: Mapping[str, torch.Tensor]) -> dict:
    def count(prefix: str) -> int:
        """How many of `prefix0.`, `prefix1.`, ... there are."""
        return len({name[len(prefix) :].split(".")[0] for name in state_dict if name.startswith(prefix)})

    num_levels = count("encoder.down.")
    widths = [state_dict[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(num_levels)]
    first_width = state_dict["encoder.conv_in.weight"].shape[0]
    if first_width != widths[0]:
        raise ValueError(
            f"The first of `ch_mult` must be 1 for diffusers' AutoencoderKL, whose first convolution is as wide as the "
            f"first level; here it has {first_width} channels and the level {widths[0]}."
        )
    return {
        "in_channels": state_dict["encoder.conv_in.weight"].shape[1],
        "out_channels": state_dict["decoder.conv_out.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": count("encoder.down.0.block."),
        "down_block_types": [
            "AttnDownEncoderBlock2D" if count(f"encoder.down.{level}.attn.") else "DownEncoderBlock2D"
            for level in range(num_levels)
        ],
        "up_block_types": [
            "AttnUpDecoderBlock2D" if count(f"decoder.up.{level}.attn.") else "UpDecoderBlock2D"
            for level in reversed(range(num_levels))
        ],
        "latent_channels": state_dict["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": 32,
    }


def convert_autoencoder(
    state_dict: Mapping[str, torch.Tensor],
    *,
    latents_mean: torch.Tensor | Sequence[float] | None = None,
    latents_std: torch.Tensor | Sequence[float] | None = None,
    scaling_factor: float = 1.0,
    sample_size: int = 256,
) -> AutoencoderKL:
    """
    Builds diffusers' [`AutoencoderKL`] from an LDM-style KL autoencoder (latent diffusion, arXiv 2112.10752), such as
    the VA-VAE (arXiv 2501.01423) that the published GMem is trained with.

    Widths, number of levels and blocks, latent channels and the levels that have attention follow from the tensors.
    What only training needs (`loss.*`, `foundation_model.*`, `linear_proj.*`) is left out and named in the log.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            The original tensors, or a checkpoint that has them in the entry `state_dict` or `model`. The tensors are
            not changed, but the autoencoder shares their memory.
        latents_mean, latents_std (`torch.Tensor` or sequence of C `float`, *optional*):
            Statistics per latent channel, of shape `(C,)` or `(1, C, 1, 1)`: what the transformer sees is
            `(latents - mean) / std * scaling_factor`.
        scaling_factor (`float`, defaults to 1.0): See above; `data.latent_multiplier` of the original configuration.
        sample_size (`int`, defaults to 256): Side of the images in pixels, which tiled encoding goes by.

    Returns:
        [`AutoencoderKL`]: in eval mode, in the state dict's dtype.

    Raises:
        TypeError: if `state_dict` is not a dict.
        ValueError: if tensors are missing, left over or of the wrong shape (they are named), the first level is wider
            than the first convolution (which `AutoencoderKL` cannot be), or the statistics do not fit.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"`state_dict` must be a dict of tensors, got {type(state_dict)}.")
    for entry in ("state_dict", "model"):
        if isinstance(state_dict.get(entry), Mapping):
            state_dict = state_dict[entry]
    state_dict = strip_wrapper_prefixes(state_dict)
    unused = [name for name in state_dict if name.startswith(_TRAINING_ONLY)]
    if unused:
        logger.info(f"Left out, as only training needs them: {', '.join(unused)}.")

    try:
        config = _infer_config(state_dict)
    except (KeyError, IndexError) as error:
        what = f"it has no {error.args[0]}" if isinstance(error, KeyError) else "it has no encoder.down.0.*"
        raise ValueError(f"Not the state dict of an LDM-style KL autoencoder: {what}.") from error
    if (latents_mean is None) != (latents_std is None):
        raise ValueError("`latents_mean` and `latents_std` must both be given, or neither.")
    if latents_mean is not None:
        config["latents_mean"] = _per_channel("latents_mean", latents_mean, config["latent_channels"])
        config["latents_std"] = _per_channel("latents_std", latents_std, config["latent_channels"])
        if min(config["latents_std"]) <= 0:
            raise ValueError(f"`latents_std` must be positive, got {config['latents_std']}.")

    with torch.device("meta"):
        vae = AutoencoderKL(**config, scaling_factor=scaling_factor, sample_size=sample_size)
    names = {name: _original_name(name, len(config["block_out_channels"])) for name in vae.state_dict()}
    shapes = {}
    for name, tensor in vae.state_dict().items():
        # the original's attention has 1x1 convolutions where diffusers has linear layers
        convolution = re.search(r"\.to_(q|k|v|out\.0)\.weight$", name)
        shapes[names[name]] = (*tensor.shape, 1, 1) if convolution else tuple(tensor.shape)
    check_names_and_shapes(state_dict, shapes, ignored=unused)

    vae.load_state_dict(
        {name: state_dict[names[name]].detach().reshape(tensor.shape) for name, tensor in vae.state_dict().items()},
        assign=True,
    )
    return vae.eval()


def _per_channel(name: str, values: torch.Tensor | Sequence[float], num_channels: int) -> list[float]:
    values = torch.as_tensor(values)
    if values.shape not in ((num_channels,), (1, num_channels, 1, 1)) or not values.isfinite().all():
        raise ValueError(
            f"`{name}` must be {num_channels} finite numbers, one for each latent channel, got shape {tuple(values.shape)}."
        )
    return values.flatten().tolist()
