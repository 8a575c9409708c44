# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""
Folders `checkpoint-<step>` that are complete or not there: written under a temporary name, synced, and renamed.

Each holds a `manifest.json` with the size and SHA-256 of its files, by which a damaged one is told from a good one.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..files import flush, flush_folder


logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"


class DamagedCheckpointError(ValueError):
    """A checkpoint is not as it was written. The message names the folder and the file."""


def checkpoint_step(folder: str | Path) -> int | None:
    """The step of a folder `checkpoint-<step>`; `None` for one of another name."""
    match = re.fullmatch(r"checkpoint-(\d+)", Path(folder).name)
    return int(match[1]) if match else None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, good and damaged, by ascending step."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if checkpoint_step(path) is not None]
    return sorted(folders, key=checkpoint_step)


def write_checkpoint(folder: str | Path, write: Callable[[Path], None]) -> None:
    """
    Writes a checkpoint. A kill at any moment leaves the earlier ones, and this one complete or not at all. A folder of the
    same name is replaced.

    Args:
        folder (`str` or `Path`): what to write, `checkpoint-<step>` for the functions of this module to find it.
        write (`Callable`): gets an empty folder and writes files into it.

    Raises:
        OSError: if it cannot be written, for example because the disk is full. What was written of it is removed.
    """
    folder = Path(folder)
    output_dir = folder.parent
    for leftover in output_dir.glob("*-[0-9]*.tmp"):  # of runs that were killed while they wrote or removed
        shutil.rmtree(leftover)
    temporary = output_dir / f"{folder.name}.tmp"
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        with ThreadPoolExecutor(4) as threads:
            records = list(threads.map(_flush_and_describe, files))
        manifest = {
            path.relative_to(temporary).as_posix(): record for path, record in zip(files, records, strict=True)
        }
        (temporary / MANIFEST_NAME).write_text(json.dumps({"files": manifest}, indent=2) + "\n")
        flush(temporary / MANIFEST_NAME)
        for path in (*temporary.rglob("*/"), temporary):
            flush_folder(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # Libraries that write have errors of their own for a full disk
        if isinstance(error, OSError) or "os error" in str(error):
            earlier = [path.name for path in list_checkpoints(output_dir)]
            raise OSError(
                f"{folder} could not be written: {error}. "
                + (f"Training can go on from {earlier[-1]}, which is as it was." if earlier else "There is none yet.")
            ) from error
        raise
    _settle_replaced(output_dir)
    if folder.exists():
        folder.rename(output_dir / f"{folder.name}.replaced")
    temporary.rename(folder)
    flush_folder(output_dir)
    _settle_replaced(output_dir)


def verify_checkpoint(folder: str | Path) -> None:
    """
    Compares a checkpoint with its manifest.

    Raises:
        DamagedCheckpointError: if a file is missing, or its size or SHA-256 is another.
    """
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text())["files"]
        expected = {name: (record["bytes"], record["sha256"]) for name, record in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{folder} has no readable {MANIFEST_NAME}: {error}.") from error
    for name, (size, _) in expected.items():
        if not (folder / name).is_file():
            raise DamagedCheckpointError(f"{folder} lacks the file {name}.")
        if (folder / name).stat().st_size != size:
            raise DamagedCheckpointError(
                f"{folder / name} has {(folder / name).stat().st_size} bytes, of {size} that were written."
            )
    with ThreadPoolExecutor(4) as threads:
        digests = threads.map(_sha256, (folder / name for name in expected))
        for (name, (_, sha256)), digest in zip(expected.items(), digests, strict=True):
            if digest != sha256:
                raise DamagedCheckpointError(f"{folder / name} is not what was written: its SHA-256 is another.")


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest good checkpoint in a folder, if there is one. Damaged ones are named in a warning and passed over."""
    _settle_replaced(Path(output_dir))
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            verify_checkpoint(folder)
        except DamagedCheckpointError as error:
            logger.warning(f"Passing over a damaged checkpoint: {error}")
        else:
            return folder
    return None


def remove_old_checkpoints(newest: str | Path, limit: int) -> None:
    """
    Removes the checkpoints that are older than the newest `limit` good ones.

    Args:
        newest (`str` or `Path`):
            The checkpoint that [`write_checkpoint`] has just written, which is taken for good; the others are verified. Those
            of later steps, of a run that went on from an earlier one, stay and do not count.
        limit (`int`): how many to keep, at least 1.
    """
    newest = Path(newest)
    num_good = 1
    for folder in reversed(list_checkpoints(newest.parent)):
        if checkpoint_step(folder) >= checkpoint_step(newest):
            continue
        if num_good == limit:
            _remove(folder)
            continue
        try:
            verify_checkpoint(folder)
            num_good += 1
        except DamagedCheckpointError as error:
            logger.warning(f"A damaged checkpoint does not count among those to keep: {error}")


def _settle_replaced(output_dir: Path) -> None:
    """Removes checkpoints that were replaced; puts one back whose replacement a kill prevented."""
    for replaced in output_dir.glob("*-[0-9]*.replaced"):
        if replaced.with_suffix("").exists():
            _remove(replaced)
        else:
            replaced.rename(replaced.with_suffix(""))


def _remove(folder: Path) -> None:
    """A kill on the way leaves no folder that looks like a damaged checkpoint."""
    shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.tmp")))


def _flush_and_describe(path: Path) -> dict[str, int | str]:
    flush(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
