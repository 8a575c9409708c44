# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""
Model FLOPs utilisation (MFU): what part of a device's peak rate goes into the arithmetic that a training step needs, whatever
else it does (PaLM, arXiv 2204.02311, appendix B).
"""

import torch
from diffusers.configuration_utils import FrozenDict


# Dense matrix products in bfloat16, in FLOP/s, from the vendors' data sheets (without sparsity). A name that is a part of
# another one comes after it.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200 NVL": 835e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H800 PCIe": 756e12,
    "H800": 989.4e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71.2e12,
    "MI300X": 1307.4e12,
    "MI250X": 383e12,
}


def peak_flops(device: torch.device | str) -> float | None:
    """A device's peak rate of dense bfloat16 (or float16) matrix products in FLOP/s; `None` where it is not known."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    return peak_flops_by_name(torch.cuda.get_device_name(device))


def peak_flops_by_name(name: str) -> float | None:
    """The same by the device's name, such as `"NVIDIA H100 80GB HBM3"`."""
    words = f" {name.replace('-', ' ')} "
    return next((peak for part, peak in PEAK_FLOPS.items() if f" {part} " in words), None)


def forward_flops_per_image(config: FrozenDict, alignment: bool = False) -> int:
    """
    FLOPs of the matrix products in one evaluation of a [`GMemTransformer2DModel`] for one image: two for each multiplication
    of a weight, or of a query, key or value. With T tokens of width d, a block takes `2 T (4 d^2 + feed-forward) + 4 T^2 d`,
    and its adaptive norms `2 * 6 d^2` once.

    Args:
        config (`FrozenDict`): the transformer's.
        alignment (`bool`, defaults to `False`): whether the alignment projector is computed.
    """
    dim = config.num_attention_heads * config.attention_head_dim
    num_tokens = (config.sample_size // config.patch_size) ** 2
    inner_dim = int(dim * config.mlp_ratio)
    if config.ffn_type == "swiglu":
        feed_forward = 3 * dim * (inner_dim * 2 // 3)
    else:
        feed_forward = 2 * dim * inner_dim
    patch_channels = config.patch_size**2 * config.in_channels
    out_channels = 2 * patch_channels if config.learn_sigma else patch_channels

    per_block = num_tokens * (4 * dim**2 + feed_forward) + 2 * num_tokens**2 * dim
    per_block += (6 if config.adaln_shift else 4) * dim**2
    products = config.num_layers * per_block
    products += num_tokens * dim * (patch_channels + out_channels)
    products += 256 * dim + dim**2 + config.memory_dim * dim  # time and memory
    products += 2 * dim**2  # the adaptive norm of the output
    if alignment:
        hidden_dim = config.alignment_hidden_dim
        products += num_tokens * (dim * hidden_dim + hidden_dim**2 + hidden_dim * config.alignment_dim)
    return 2 * products


def model_flops_per_image(config: FrozenDict, alignment: bool = False) -> int:
    """
    FLOPs that training on one image needs: three times the forward pass, as the backward pass multiplies twice where the
    forward pass multiplies once. What gradient checkpointing computes again, autoencoder and image encoder do not count.
    """
    return 3 * forward_flops_per_image(config, alignment)
