# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import json
import os
import stat

import pytest

from diffusers_gmem.files import atomic_path, flush_folder, write_json, write_text


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("there", [False, True])
def test_a_file_has_its_name_at_the_end_alone(tmp_path, there):
    path = tmp_path / "a.bin"
    if there:
        path.write_bytes(b"old")
    before = contents(tmp_path)
    with atomic_path(str(path)) as temporary:
        assert temporary.parent == tmp_path  # a rename to another disk would be a copy
        temporary.write_bytes(b"new")
        assert contents(tmp_path) == {**before, "a.bin.tmp": b"new"}
    assert contents(tmp_path) == {"a.bin": b"new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("written", [False, True])
def test_an_error_leaves_what_was_there(tmp_path, error, written):
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(error), atomic_path(tmp_path / "a.bin") as temporary:
        if written:
            temporary.write_bytes(b"half")
        raise error
    assert contents(tmp_path) == {"a.bin": b"old"}


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, function):
    def fail(*args):
        raise OSError("disk full")

    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(tmp_path / "a.txt", "new")
    assert contents(tmp_path) == {"a.txt": b"old"}


def test_a_file_that_was_not_written_is_missed(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.bin.tmp"), atomic_path(tmp_path / "a.bin"):
        pass
    assert contents(tmp_path) == {}


def test_what_a_kill_left_is_written_over(tmp_path):
    (tmp_path / "a.txt.tmp").write_text("half of something longer")
    write_text(tmp_path / "a.txt", "new")
    assert contents(tmp_path) == {"a.txt": b"new"}


def test_the_content_is_on_the_disk_before_the_name_and_the_name_thereafter(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        status = os.fstat(descriptor)
        events.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        fsync(descriptor)

    def noted_replace(source, target):
        events.append((os.path.basename(source), os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_text(tmp_path / "a.txt", "12345")
    assert events == [5, ("a.txt.tmp", "a.txt"), "folder"]


def test_a_folder_that_cannot_be_synced_is_closed(tmp_path, monkeypatch):
    descriptors = []

    def fail(descriptor):
        descriptors.append(descriptor)
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        flush_folder(tmp_path)
    with pytest.raises(OSError):
        os.fstat(descriptors[0])


def test_text_and_json(tmp_path):
    write_text(tmp_path / "a.txt", "Fréchet\n")
    assert (tmp_path / "a.txt").read_bytes() == "Fréchet\n".encode()
    write_json(tmp_path / "a.json", {"name": "Fréchet", "numbers": [1, 2.5, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "name": ') and text.endswith("}\n")
    assert json.loads(text) == {"name": "Fréchet", "numbers": [1, 2.5, None]}
