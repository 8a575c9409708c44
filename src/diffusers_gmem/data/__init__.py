from .images import ImageSource, center_crop, image_to_tensor
from .snippets import compute_snippets, load_image_encoder


__all__ = [
    "ImageSource",
    "center_crop",
    "compute_snippets",
    "image_to_tensor",
    "load_image_encoder",
]
