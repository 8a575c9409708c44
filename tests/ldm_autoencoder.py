"""Small autoencoders with the state dict of the original latent diffusion code (LDM)."""

import torch
from diffusers import AutoencoderKL


# The table of the reference vectors' README
NAMES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "down_blocks": "down",
    "resnets": "block",
    "attentions": "attn",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def original_state_dict(vae):
    """The tensors of a diffusers autoencoder under the names of LDM."""
    state_dict, num_levels = {}, len(vae.config.block_out_channels)
    for name, tensor in vae.state_dict().items():
        if ".attentions." in name and tensor.ndim == 2:
            tensor = tensor[..., None, None]
        for level in range(num_levels):
            name = name.replace(f"up_blocks.{num_levels - 1 - level}.", f"up.{level}.")
        for here, there in NAMES.items():
            name = name.replace(here, there)
        state_dict[name] = tensor
    return state_dict


def tiny_vae(**config):
    """Random, with attention on the middle one of three levels."""
    torch.manual_seed(0)
    config = {
        "block_out_channels": (32, 64, 32),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "latent_channels": 5,
    } | config
    return AutoencoderKL(**config).eval()
