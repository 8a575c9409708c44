# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Reading original files without running what is in them, and checking that every tensor has its place."""

import os
import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors import SafetensorError
from safetensors.torch import load_file


logger = logging.get_logger(__name__)

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def load_checkpoint(path: str | os.PathLike) -> Any:
    """
    Reads an original file: a `.safetensors`, or what `torch.save` wrote. No code in it is run, and its tensors are
    memory-mapped: they take no RAM until they are touched.

    Args:
        path (`str` or `os.PathLike`): The file.

    Returns:
        What is in the file: tensors in dicts and lists, numbers and strings.

    Raises:
        `FileNotFoundError`: There is no such file.
        `ValueError`: The file holds anything else (it is named), or cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"it holds `{refused[1]}`, and only tensors, numbers, strings, lists and dicts are read"
            if refused
            else error
        )
        raise ValueError(f"{path} is refused: {what}.") from error
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def select_weights(checkpoint: Mapping[str, Any], weights: str = "ema") -> dict[str, torch.Tensor]:
    """
    The state dict of the transformer in what [`load_checkpoint`] read.

    Args:
        checkpoint (`dict`):
            A training checkpoint with the entries `model` and `ema`, a file of the paper's first version with the entry
            `network`, or a bare state dict. The latter two hold one set of weights, which is taken with a log message.
        weights (`str`, defaults to `"ema"`):
            `"ema"` (the running average, which the reference samples with) or `"model"`.

    Raises:
        `ValueError`: The checkpoint has no such entry; those it has are named.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"A checkpoint must be a dict of entries or of tensors, got {type(checkpoint)}.")
    if weights in checkpoint:
        return checkpoint[weights]
    if "network" in checkpoint:
        logger.info(f"The checkpoint holds one set of weights, `network`: `{weights}` cannot be chosen.")
        return checkpoint["network"]
    if checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        logger.info(f"The checkpoint is a bare state dict: `{weights}` cannot be chosen.")
        return checkpoint
    raise ValueError(f"The checkpoint has no entry `{weights}`, only {', '.join(map(str, checkpoint))}.")


def strip_wrapper_prefixes(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Removes what DistributedDataParallel and `torch.compile` put before every name, where every name has it."""
    state_dict = dict(state_dict)
    while state_dict:
        prefix = next((prefix for prefix in _WRAPPER_PREFIXES if next(iter(state_dict)).startswith(prefix)), None)
        if prefix is None or not all(name.startswith(prefix) for name in state_dict):
            break
        state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    return state_dict


def check_names_and_shapes(
    state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], ignored: Collection[str] = ()
) -> None:
    """
    Raises:
        `ValueError`: A tensor is missing, has no use or has another shape than expected; all of them are named.
    """
    problems = [f"missing {name}" for name in sorted(expected.keys() - state_dict.keys())]
    problems += [f"unexpected {name}" for name in sorted(state_dict.keys() - expected.keys() - set(ignored))]
    problems += [
        f"{name} has shape {tuple(state_dict[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in state_dict and state_dict[name].shape != shape
    ]
    if problems:
        raise ValueError(f"The state dict does not fit: {'; '.join(problems)}.")
