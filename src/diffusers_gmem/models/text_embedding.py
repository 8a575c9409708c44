# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence

import torch
from diffusers.utils import logging


logger = logging.get_logger(__name__)


@torch.no_grad()
def embed_text(texts: Sequence[str], text_encoder: torch.nn.Module, tokenizer) -> tuple[torch.Tensor, str]:
    """
    Embeddings of texts in the space that a model of images and texts has for both.

    Args:
        texts (`list[str]`): At least one. What a model has no room for is cut off, with a warning.
        text_encoder (`torch.nn.Module`):
            A model of transformers that has `get_text_features` (`CLIPModel`, `SiglipModel`), or is the text half of one
            (`CLIPTextModelWithProjection`, `SiglipTextModel`).
        tokenizer: Its tokenizer, of transformers.

    Returns:
        `tuple[torch.Tensor, str]`: the embeddings, float32 of shape `(n, K)`, on the device of the model; and the type of
        the model, such as `"clip"`, the same for the whole model and its text half.

    Raises:
        `TypeError`: `texts` are not text.
        `ValueError`: there is no text, or the model does not embed texts where it embeds images.
    """
    texts = list(texts)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"`text` has to be a text or a list of them, but is {texts!r}.")
    if not texts:
        raise ValueError("`text` is an empty list: at least one text is needed.")
    config = getattr(text_encoder.config, "text_config", text_encoder.config)
    for text, tokens in zip(texts, tokenizer(texts).input_ids, strict=True):
        if len(tokens) > config.max_position_embeddings:
            logger.warning(
                f"{text!r} is cut off: it has {len(tokens)} tokens, and the text encoder takes"
                f" {config.max_position_embeddings}."
            )
    # Padded to the full length, with which SigLIP was trained; for CLIP it makes no difference
    tokens = tokenizer(
        texts, padding="max_length", max_length=config.max_position_embeddings, truncation=True, return_tensors="pt"
    )
    if text_encoder.device.type != "meta":  # of weights that are offloaded, whose hooks move the inputs
        tokens = tokens.to(text_encoder.device)

    model_type = text_encoder.config.model_type.removesuffix("_text_model")
    if hasattr(text_encoder, "get_text_features"):
        embeddings = text_encoder.get_text_features(**tokens).pooler_output
    else:
        output = text_encoder(**tokens)
        # Without its projection the text half of CLIP has a pooled output, too, which is not comparable with images
        embeddings = output.pooler_output if model_type.startswith("siglip") else getattr(output, "text_embeds", None)
        if embeddings is None:
            raise ValueError(
                f"`text_encoder` is a {type(text_encoder).__name__}, whose outputs cannot be compared with images: take"
                " CLIPModel, CLIPTextModelWithProjection, SiglipModel or SiglipTextModel."
            )
    return embeddings.float(), model_type
