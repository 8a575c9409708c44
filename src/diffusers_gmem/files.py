# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Files that appear under their names as a whole: written beside them, put on the disk, and renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """
    A temporary name to write a file to, which gets its own at the end of the `with` block and replaces what was there. After
    an error what was there stays, and nothing else. A kill leaves `<name>.tmp`, which the next try writes over.

    Args:
        path (`str` or `os.PathLike`): the file, in a folder that exists.

    Example:
        ```py
        >>> with atomic_path("grid.png") as temporary:
        ...     image.save(temporary, format="PNG")
        ```
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file as a whole, in UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """The same for a JSON file."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def flush(path: Path) -> None:
    """Puts the content of a file on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Makes renames in a folder last; Windows neither needs nor allows it."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
