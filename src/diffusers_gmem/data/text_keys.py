# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""From images to the text keys of a bank, with a model that embeds images and texts in one space."""

from typing import Any

import torch


def load_text_key_encoder(
    name_or_path: str, revision: str | None = None, cache_dir: str | None = None
) -> tuple[torch.nn.Module, Any]:
    """
    Loads a model of images and texts of transformers, such as CLIP or SigLIP, and its image processor (the Pillow one, which
    needs no torchvision).

    Args:
        name_or_path (`str`): Name on the Hub, or folder.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        cache_dir (`str`, *optional*): the Hub's cache.

    Returns:
        `tuple`: the model, in eval mode, and the processor.

    Raises:
        ValueError: if the model does not embed both images and texts, or weights are missing.
    """
    from transformers import AutoImageProcessor, AutoModel

    model, info = AutoModel.from_pretrained(
        name_or_path, revision=revision, cache_dir=cache_dir, output_loading_info=True
    )
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise ValueError(
            f"{name_or_path} is a {type(model).__name__}, which does not embed images and texts in one space: take a CLIP or"
            " SigLIP model, with both halves."
        )
    if info["missing_keys"]:
        raise ValueError(
            f"{name_or_path} has not all weights of {type(model).__name__}, whose outputs would be partly random: "
            f"{sorted(info['missing_keys'])} are missing."
        )
    processor = AutoImageProcessor.from_pretrained(name_or_path, revision=revision, cache_dir=cache_dir, backend="pil")
    return model.eval(), processor


@torch.no_grad()
def encode_text_keys(model: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    The embeddings of images, in the space of texts.

    Args:
        model (`torch.nn.Module`): what [`load_text_key_encoder`] loads.
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): what its image processor makes.

    Returns:
        `torch.Tensor` of shape `(batch_size, dim)`, float32, not normalised.
    """
    return model.get_image_features(pixel_values=pixel_values.to(model.device, model.dtype)).pooler_output.float()
