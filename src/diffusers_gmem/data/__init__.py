from .autoencoders import encode_images, load_autoencoder
from .images import BrokenImageError, ImageSource, ImageStream, center_crop, image_to_tensor, thumbnail_column
from .latent_cache import LatentCache
from .snippets import (
    compute_patch_features,
    compute_snippets,
    encode_pixel_values,
    load_bank_encoder,
    load_image_encoder,
    paper_image_processor,
    resize_patch_features,
)
from .text_keys import encode_text_keys, load_text_key_encoder


__all__ = [
    "BrokenImageError",
    "ImageSource",
    "ImageStream",
    "LatentCache",
    "center_crop",
    "compute_patch_features",
    "compute_snippets",
    "encode_images",
    "encode_pixel_values",
    "encode_text_keys",
    "image_to_tensor",
    "load_autoencoder",
    "load_bank_encoder",
    "load_image_encoder",
    "load_text_key_encoder",
    "paper_image_processor",
    "resize_patch_features",
    "thumbnail_column",
]
