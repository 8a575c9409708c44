# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Tiny models of images and texts, fitted so that each of a few prompts has the embedding of one image."""

import string

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from diffusers_gmem.data import encode_text_keys


DIM = 12
MAX_LENGTH = 20


def make_tokenizer():
    words = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase]
    words += [f"{letter}</w>" for letter in string.ascii_lowercase]
    return CLIPTokenizer({word: number for number, word in enumerate(words)}, model_max_length=MAX_LENGTH)


def make_image_processor(model_type="clip"):
    if model_type == "siglip":
        return SiglipImageProcessor(size={"height": 16, "width": 16})
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def make_model(model_type="clip", seed=5):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 54, "max_position_embeddings": MAX_LENGTH}
    text |= {"projection_dim": DIM, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    if model_type == "siglip":
        # Both halves of SigLIP end at the size of the images' features
        vision["hidden_size"] = DIM
        model = SiglipModel(SiglipConfig(text_config={**text, "projection_size": DIM}, vision_config=vision))
    else:
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM))
    return model.eval()


@torch.no_grad()
def fit(model, prompts, images):
    """Sets the last layer of the text half so that prompt k has the embedding of image k."""
    processor = make_image_processor(model.config.model_type)
    keys = encode_text_keys(model, processor(images=images, return_tensors="pt").pixel_values)
    is_siglip = model.config.model_type == "siglip"
    head = model.text_model.head if is_siglip else model.text_projection
    features = []
    hook = head.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    tokens = make_tokenizer()(prompts, padding="max_length", return_tensors="pt")
    model.get_text_features(**tokens)
    hook.remove()
    if is_siglip:
        keys = keys - head.bias
    head.weight.copy_(torch.linalg.lstsq(features[0], keys).solution.T)
    return model


def save_model(folder, prompts, images, model_type="clip"):
    """As a folder on the Hub would be: the model, its image processor and its tokenizer."""
    fit(make_model(model_type), prompts, images).save_pretrained(folder)
    make_image_processor(model_type).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
