from .autoencoder import convert_autoencoder
from .checkpoint import load_checkpoint, select_weights
from .latents import OriginalLatents
from .memory_bank import REFERENCE_ENCODER, convert_memory_bank
from .pipeline import convert_pipeline
from .scheduler import FIRST_VERSION_CONFIG, convert_scheduler, sampling_arguments
from .transformer import convert_transformer, export_transformer


__all__ = [
    "FIRST_VERSION_CONFIG",
    "OriginalLatents",
    "REFERENCE_ENCODER",
    "convert_autoencoder",
    "convert_memory_bank",
    "convert_pipeline",
    "convert_scheduler",
    "convert_transformer",
    "export_transformer",
    "load_checkpoint",
    "sampling_arguments",
    "select_weights",
]
