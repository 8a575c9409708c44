from .cards import memory_bank_card, model_card, space_card
from .locate import locate_memory_bank, locate_pipeline
from .push import push_memory_bank, push_pipeline, push_space
from .remote_code import remote_code_files
from .transfer import HubRepo, squash_history


__all__ = [
    "HubRepo",
    "locate_memory_bank",
    "locate_pipeline",
    "memory_bank_card",
    "model_card",
    "push_memory_bank",
    "push_pipeline",
    "push_space",
    "remote_code_files",
    "space_card",
    "squash_history",
]
