# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0
"""The files of a saved memory bank: its `config.json` with the manifest, and what is checked when they are opened."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..files import flush_folder
from .snippet_storage import STORED_DTYPES


CLASS_NAME = "GMemMemoryBank"
CONFIG_NAME = "config.json"
METADATA_NAME = "metadata.parquet"
TEMPORARY_FILE = "memory_bank-file.tmp"
TEMPORARY_CONFIG = "memory_bank-config.tmp"
FORMAT_VERSION = 1

# Everything that a save writes, `config.json` and `metadata.parquet` apart. The eight digits are the start of the file's
# SHA-256, so that a file never takes the name of another with other content.
_OWN_FILE = re.compile(
    r"memory_bank-(((text_keys-)?\d+-of-\d+|basis|labels|index)-[0-9a-f]{8}\.safetensors|metadata-[0-9a-f]{8}\.parquet|(file|config)\.tmp)"
)
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")


class BankFile(NamedTuple):
    """One file of a saved bank, as `config.json` lists it."""

    file: str
    rows: int
    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """All files of a saved bank but `config.json`."""

    snippets: list[BankFile]
    basis: BankFile | None = None
    labels: BankFile | None = None
    metadata: BankFile | None = None
    text_keys: tuple[BankFile, ...] = ()
    index: BankFile | None = None

    def beside_metadata(self) -> list[BankFile]:
        singles = (entry for entry in (self.basis, self.labels, self.index) if entry is not None)
        return [*self.snippets, *self.text_keys, *singles]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_nonfinite_row(rows: torch.Tensor) -> int | None:
    step = max(1, 2**24 // rows[0].numel())  # in pieces, as the intermediate results are as large as the rows
    for start in range(0, len(rows), step):
        finite = rows[start : start + step].isfinite()
        if not finite.all():
            return start + int(finite.reshape(len(finite), -1).all(dim=1).logical_not().nonzero()[0])
    return None


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_size(path: Path, entry: BankFile) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, though {CONFIG_NAME} lists it.")
    size = path.stat().st_size
    if size != entry.bytes:
        fault = "is truncated" if size < entry.bytes else "is too long"
        raise ValueError(f"{path} {fault}: it has {size} bytes, but {CONFIG_NAME} says {entry.bytes}.")


def check_sha256(path: Path, entry: BankFile) -> None:
    found = sha256_of_file(path)
    if found != entry.sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is {found}, but {CONFIG_NAME} says {entry.sha256}.")


def open_tensors(
    path: Path, entry: BankFile, expected: dict[str, tuple[torch.dtype, tuple[int, ...]]], shard: str | None = None
) -> dict[str, torch.Tensor]:
    """Maps the tensors of a file. What its header says is checked before the size, as the more telling fault."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, though {CONFIG_NAME} lists it.")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if set(names) != set(expected):
                accepted = " and ".join(repr(name) for name in expected)
                raise ValueError(f"{path} has to hold {accepted} alone, but holds {names}.")
            tensors = {name: file.get_tensor(name) for name in expected}
            found_shard = (file.metadata() or {}).get("shard", shard)
    except SafetensorError as error:
        check_size(path, entry)
        raise ValueError(f"{path} is not a readable safetensors file: {error}.") from error
    if found_shard != shard:
        raise ValueError(f"{path} is out of order: it is shard {found_shard}, but {CONFIG_NAME} lists it as {shard}.")
    for name, (dtype, shape) in expected.items():
        found = tensors[name]
        if found.dtype != dtype:
            raise ValueError(f"{path} has the wrong dtype: {name!r} is {found.dtype}, but {CONFIG_NAME} says {dtype}.")
        if found.shape != shape:
            raise ValueError(
                f"{path} has the wrong shape: {name!r} is {tuple(found.shape)}, but {CONFIG_NAME} says {shape}."
            )
    check_size(path, entry)
    return tensors


def read_config(folder: Path) -> tuple[dict[str, Any], Manifest]:
    """The content of `config.json` and its manifest, both checked."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"there is no memory bank in {folder}: looked for the file {path}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken: it is not JSON ({error}).") from error
    if not isinstance(config, dict) or config.get("_class_name") != CLASS_NAME:
        raise ValueError(f"{path} does not describe a {CLASS_NAME}.")
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has the format version {config.get('format_version')!r}, but this version of diffusers_gmem reads"
            f" {FORMAT_VERSION}."
        )
    try:
        count, dim, dtype, rank = config["count"], config["dim"], config["dtype"], config["rank"]
        if dtype not in STORED_DTYPES:
            raise ValueError(f"`dtype` is {dtype!r}, but accepted are {', '.join(STORED_DTYPES)}")
        if count < 1 or dim < 1:
            raise ValueError(f"`count` is {count} and `dim` is {dim}, but both have to be at least 1")
        if rank is not None and rank < 1:
            raise ValueError(f"`rank` is {rank}, but has to be null or at least 1")
        for fingerprint in [config["fingerprint"], *(name for edit in config["history"] for name in edit["parents"])]:
            if not _FINGERPRINT.fullmatch(fingerprint):
                raise ValueError(f"a fingerprint is {fingerprint!r}, but has to be 'sha256:' and 64 digits")
        for name in ("encoder", "encoder_revision", "preprocessing", "normalized", "source_dataset"):
            config[name]
        if config["id2label"] is not None:
            config["id2label"] = {int(i): name for i, name in config["id2label"].items()}

        files = config["files"]
        files = {"text_keys": (), "index": None, **files}
        single = {name: files[name] and BankFile(**files[name]) for name in ("basis", "labels", "metadata", "index")}
        text_keys = tuple(BankFile(**entry) for entry in files["text_keys"])
        manifest = Manifest([BankFile(**entry) for entry in files["snippets"]], **single, text_keys=text_keys)
        if (manifest.basis is None) != (rank is None):
            raise ValueError(f"`rank` is {rank}, but the file of the basis is {files['basis']}")
        text_model = config.setdefault("text_model", None)
        if (text_model is None) != (not text_keys):
            raise ValueError(f"`text_model` is {text_model}, but the text keys have {len(text_keys)} files")
        if text_model is not None:
            if text_model["dtype"] not in STORED_DTYPES or text_model["dim"] < 1:
                raise ValueError(f"`text_model` is {text_model}, whose dtype or dim is not one of text keys")
            for name in ("name", "revision", "type"):
                text_model[name]
            if [entry.rows for entry in text_keys] != [entry.rows for entry in manifest.snippets]:
                raise ValueError("the shards of the text keys do not have as many rows as those of the snippets")
        index = config.setdefault("index", None)
        if (index is None) != (manifest.index is None):
            raise ValueError(f"`index` is {index}, but its file is {files['index']}")
        if index is not None:
            if index["fingerprint"] != config["fingerprint"]:
                raise ValueError(
                    f"its index is of the bank {index['fingerprint']}, but this is the bank {config['fingerprint']}"
                )
            for name in ("num_lists", "num_probes", "k", "recall"):
                index[name]
        for entry in manifest.beside_metadata():
            if not _OWN_FILE.fullmatch(entry.file):
                raise ValueError(f"{entry.file!r} is not a file name of a memory bank")
        for name, rows in (
            ("the shards together", sum(entry.rows for entry in manifest.snippets)),
            ("the labels", manifest.labels.rows if manifest.labels else count),
            ("the metadata", manifest.metadata.rows if manifest.metadata else count),
        ):
            if rows != count:
                raise ValueError(f"`count` is {count}, but {name} have {rows} rows")
    except KeyError as error:
        raise ValueError(f"{path} is broken: {error} is missing.") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is broken: {error}.") from error
    return config, manifest


# `metadata.parquet` keeps its name, so that data set readers find it, but a rename over it could not be committed together
# with `config.json`. Around the commit the old file and the new one therefore have names of their own, which readers know.


def metadata_alias(entry: BankFile) -> str:
    return f"memory_bank-metadata-{entry.sha256[:8]}.parquet"


def metadata_path(folder: Path, entry: BankFile) -> Path:
    alias = folder / metadata_alias(entry)
    return alias if alias.is_file() else folder / METADATA_NAME


def tidy(folder: Path) -> Manifest:
    """Completes or undoes what a save left, ended or cut short, as the `config.json` that is there says. Returns the
    manifest."""
    flush_folder(folder)
    manifest = Manifest([])
    if (folder / CONFIG_NAME).exists():
        _, manifest = read_config(folder)
    if manifest.metadata is not None and (folder / metadata_alias(manifest.metadata)).is_file():
        os.replace(folder / metadata_alias(manifest.metadata), folder / METADATA_NAME)
    in_use = {entry.file for entry in manifest.beside_metadata()}
    for path in list(folder.iterdir()):
        if _OWN_FILE.fullmatch(path.name) and path.name not in in_use:
            path.unlink()
    return manifest
