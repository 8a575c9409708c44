# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Where saved memory banks and pipelines are: in a local folder or on the Hub."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors.torch import load_file

from ..models.memory_bank_files import CONFIG_NAME, METADATA_NAME, BankFile, first_nonfinite_row
from .transfer import HubRepo


def locate_memory_bank(
    name_or_path: str | Path, subfolder: str | None = None, **hub_kwargs
) -> tuple[Path, Callable[[Iterable[BankFile]], None]]:
    """
    The folder of a memory bank, in which its `config.json` is, and a function that brings files of its manifest there.
    From the Hub they all come from one commit, and are checked once: their SHA-256, and that all numbers are finite.

    Args:
        name_or_path (`str` or `Path`): A local folder, or the id of a repository of the Hub.
        subfolder (`str`, *optional*): The folder in it that holds the bank.
        hub_kwargs: Those of [`HubRepo`] for a repository of the Hub.

    Raises:
        See [`HubRepo.download`] and [`HubRepo.download_verified`].
    """
    folder = Path(name_or_path, subfolder or "")
    if Path(name_or_path).is_dir():
        return folder, lambda entries: None

    repo = HubRepo(str(name_or_path), **hub_kwargs)
    prefix = f"{subfolder}/" if subfolder else ""
    config_path = repo.download(f"{prefix}{CONFIG_NAME}", part_of="a memory bank")
    repo = repo.at(repo.commit_of(f"{prefix}{CONFIG_NAME}", config_path))

    def fetch(entries: Iterable[BankFile]) -> None:
        repo.download_all([(f"{prefix}{entry.file}", entry.bytes, entry.sha256) for entry in entries], _check_finite)

    return config_path.parent, fetch


def _check_finite(path: Path) -> None:
    if path.name == METADATA_NAME:
        return
    for name, tensor in load_file(path).items():
        bad_row = first_nonfinite_row(tensor) if tensor.is_floating_point() else None
        if bad_row is not None:
            raise ValueError(f"{path} is not finite: row {bad_row} of {name!r} holds NaN or infinity.")


def locate_pipeline(repo: HubRepo) -> HubRepo:
    """
    The repository of a [`GMemPipeline`] at the commit that its revision stands for now.

    Raises:
        `ValueError`: the repository holds another pipeline.
        See also [`HubRepo.download`].
    """
    path = repo.download("model_index.json", part_of="a pipeline of diffusers")
    name = json.loads(path.read_text(encoding="utf-8")).get("_class_name")
    name = name[-1] if isinstance(name, list) else name
    if name != "GMemPipeline":
        raise ValueError(
            f"{repo} holds a {name}, not a GMemPipeline: load it with `DiffusionPipeline.from_pretrained`."
        )
    return repo.at(repo.commit_of("model_index.json", path))
