# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Whole pipelines, memory banks and Spaces to the Hub."""

import io
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
from huggingface_hub import CommitInfo, RepoCard

from .cards import memory_bank_card, model_card, space_card
from .remote_code import PACKAGE, remote_code_files
from .transfer import HubRepo


if TYPE_CHECKING:
    from ..models.memory_bank import GMemMemoryBank
    from ..pipelines.pipeline_gmem import GMemPipeline


REMOTE_CODE_BRANCH = "remote-code"
SAMPLE_GRID = "samples.png"
# The one that the page is tested with
GRADIO_VERSION = "6.31.0"


def push_memory_bank(
    bank: "GMemMemoryBank",
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload memory bank",
    token: str | bool | None = None,
    max_shard_size: int | str = "1GB",
    license: str | None = None,
    card: RepoCard | None = None,
) -> CommitInfo:
    """
    Puts a memory bank and its card into a data set repository, with one commit that also deletes the files of the bank
    that was there.

    Args:
        bank ([`GMemMemoryBank`]): The bank.
        repo_id (`str`): The repository; made where it does not exist.
        private (`bool`, *optional*): Of a repository that is made; the default of the namespace if not given.
        revision (`str`, *optional*): The branch; made where it does not exist.
        create_pr (`bool`, defaults to `False`): Whether to open a pull request instead.
        commit_message (`str`): The first line of the commit.
        token (`str` or `bool`, *optional*): That of `hf auth login` by default.
        max_shard_size (`int` or `str`, defaults to `"1GB"`): See [`~GMemMemoryBank.save_pretrained`].
        license (`str`, *optional*): Of the source data, for the card.
        card (`RepoCard`, *optional*): Instead of [`memory_bank_card`].

    Returns:
        `CommitInfo`: `oid` is the revision for a model to point to.

    Raises:
        See [`HubRepo.upload`].
    """
    with tempfile.TemporaryDirectory() as folder:
        bank.save_pretrained(folder, max_shard_size=max_shard_size)
        card = card or memory_bank_card(bank, repo_id, license=license)
        return HubRepo(repo_id, "dataset", revision, token=token).upload(
            {**_files(folder), "README.md": str(card).encode()},
            commit_message,
            stale=re.compile(r"memory_bank-.*|metadata\.parquet").fullmatch,
            private=private,
            create_pr=create_pr,
        )


def push_pipeline(
    pipe: "GMemPipeline",
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload GMemPipeline",
    token: str | bool | None = None,
    bank_repo_id: str | None = None,
    include_code: bool = False,
    card: Mapping[str, Any] | None = None,
    sample_grid: PIL.Image.Image | None = None,
    **save_kwargs,
) -> CommitInfo:
    """
    Puts a pipeline and its card into a model repository, with one commit that also deletes the weights and the bank that
    it replaces. Weights of other variants stay.

    Args:
        pipe ([`GMemPipeline`]): The pipeline.
        repo_id (`str`): The repository; made where it does not exist.
        private, revision, create_pr, commit_message, token: See [`push_memory_bank`].
        bank_repo_id (`str`, *optional*):
            A data set repository to push the bank to, with its card. The pipeline then points to the commit that this
            makes; `private`, `create_pr` and `token` are for both repositories. By default the pipeline's repository
            holds the bank, or the pointer that the pipeline was loaded with.
        include_code (`bool`, defaults to `False`):
            Whether to put the pipeline into the branch `remote-code` as well, there with its code: for users who do not
            have this package (`revision="remote-code", trust_remote_code=True`).
        card (`dict`, *optional*): What [`model_card`] is told: `dataset`, `license`, `training`, `evaluation`.
        sample_grid (`PIL.Image.Image`, *optional*): Generated images to show on the card.
        save_kwargs: Those of [`~GMemPipeline.save_pretrained`], such as `variant="fp16"`.

    Returns:
        `CommitInfo`: of the commit without code.

    Raises:
        `ValueError`: `include_code` together with `create_pr` or `revision`, or `bank_repo_id` for a pipeline without a
            bank.
        See also [`HubRepo.upload`].
    """
    if include_code and (create_pr or revision is not None):
        raise ValueError(
            f"`include_code=True` writes to the main branch and to {REMOTE_CODE_BRANCH!r}, and does not go with "
            f"`create_pr={create_pr}` and `revision={revision!r}`."
        )
    if bank_repo_id is not None:
        bank = pipe.load_memory_bank()
        if bank is None:
            raise ValueError(f"`bank_repo_id` is {bank_repo_id!r}, but the pipeline has no memory bank.")
        commit = push_memory_bank(bank, bank_repo_id, private=private, create_pr=create_pr, token=token)
        save_kwargs["memory_bank_source"] = {"repo_id": bank_repo_id, "revision": commit.oid}
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder, **save_kwargs)
        index = json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8"))
        files = _files(folder)
        if sample_grid is not None:
            content = io.BytesIO()
            sample_grid.save(content, format="PNG")
            files[SAMPLE_GRID] = content.getvalue()
        files["README.md"] = str(
            model_card(
                pipe,
                repo_id,
                bank_source=index.get("memory_bank_source"),
                sample_grid=SAMPLE_GRID if sample_grid is not None else None,
                has_code=include_code,
                **(card or {}),
            )
        ).encode()

        variant = save_kwargs.get("variant")
        weights = r"[^/]+/(diffusion_pytorch_)?model{}(-\d+-of-\d+)?\.safetensors(\.index{}\.json)?"
        weights = weights.format(*(2 * [rf"\.{re.escape(variant)}" if variant else ""]))
        stale = re.compile(rf"{weights}|bank/.*|[^/]+/{PACKAGE}_[0-9a-f]{{8}}\.py").fullmatch
        options = {"commit_message": commit_message, "stale": stale, "private": private}
        commit = HubRepo(repo_id, "model", revision, token=token).upload(files, create_pr=create_pr, **options)
        if include_code:
            files |= remote_code_files(folder)
            HubRepo(repo_id, "model", REMOTE_CODE_BRANCH, token=token).upload(files, **options)
    return commit


def push_space(
    repo_id: str,
    model_id: str,
    *,
    title: str | None = None,
    bank_id: str | None = None,
    license: str = "apache-2.0",
    private: bool | None = None,
    commit_message: str = "Upload the page of a GMemPipeline",
    token: str | bool | None = None,
) -> CommitInfo:
    """
    Puts the demo (`examples/space`) into a Space, with its card and the code of this package, and points it to a pipeline on
    the Hub. A pipeline in a private repository needs a token that may read it, as the secret HF_TOKEN in the settings of the
    Space.

    Args:
        repo_id (`str`): The Space, such as `"me/draw-from-memory"`; made where it does not exist.
        model_id (`str`): The repository of the pipeline, such as `"me/gmem-mine"`.
        title (`str`, *optional*): The title of the Space; the name of its repository by default.
        bank_id (`str`, *optional*): The data set repository of the pipeline's bank, if it has one of its own; for the card.
        license (`str`, defaults to `"apache-2.0"`): Of the Space's code, as the Hub names it.
        private (`bool`, *optional*): Of a Space that is made; the default of the namespace if not given.
        commit_message (`str`): The first line of the commit.
        token (`str` or `bool`, *optional*): That of `hf auth login` by default.

    Returns:
        `CommitInfo`

    Raises:
        See [`HubRepo.upload`].
    """
    package = Path(__file__).parents[1]
    page = package / "hub" / "space"
    code = [path for path in package.rglob("*") if path.suffix in (".py", ".md", ".typed") and path.parent != page]
    card = space_card(title or repo_id.split("/")[-1], model_id, bank_id, GRADIO_VERSION, license)
    repo = HubRepo(repo_id, "space", token=token)
    commit = repo.upload(
        {
            "app.py": page / "app.py",
            "requirements.txt": page / "requirements.txt",
            "README.md": str(card).encode(),
            **{f"{PACKAGE}/{path.relative_to(package).as_posix()}": path for path in code},
        },
        commit_message,
        stale=re.compile(rf"{PACKAGE}/.*").fullmatch,
        private=private,
        space_sdk="gradio",
    )
    repo.set_space_variable("GMEM_MODEL", model_id)
    return commit


def _files(folder: str | Path) -> dict[str, Path | bytes]:
    """All files below a folder, by their names in a repository."""
    return {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
