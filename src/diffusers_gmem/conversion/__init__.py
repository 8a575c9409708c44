from .transformer import convert_transformer


__all__ = [
    "convert_transformer",
]
