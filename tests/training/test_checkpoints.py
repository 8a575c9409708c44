import json
import multiprocessing
import os
import shutil
import signal
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from diffusers_gmem.training import checkpoints
from diffusers_gmem.training.checkpoints import (
    DamagedCheckpointError,
    checkpoint_step,
    latest_checkpoint,
    list_checkpoints,
    remove_old_checkpoints,
    verify_checkpoint,
    write_checkpoint,
)


def write_files(folder):
    (folder / "inner").mkdir()
    (folder / "inner" / "weights.bin").write_bytes(bytes(range(200)))
    (folder / "state.json").write_text("{}")


@pytest.fixture
def three(tmp_path):
    for step in (8, 9, 10):
        write_checkpoint(tmp_path / f"checkpoint-{step}", write_files)
    return tmp_path


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_manifest_names_every_file(three):
    files = json.loads((three / "checkpoint-9" / "manifest.json").read_text())["files"]
    assert files == {
        "inner/weights.bin": {
            "bytes": 200,
            "sha256": "1901da1c9f699b48f6b2636e65cbf73abf99d0441ef67f5c540a42f7051dec6f",
        },
        "state.json": {
            "bytes": 2,
            "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        },
    }
    verify_checkpoint(three / "checkpoint-9")


def test_steps_are_numbers(three):
    (three / "checkpoint-11.tmp").mkdir()
    (three / "checkpoint-last").mkdir()
    assert [path.name for path in list_checkpoints(three)] == ["checkpoint-8", "checkpoint-9", "checkpoint-10"]
    assert checkpoint_step("a/checkpoint-007") == 7 and checkpoint_step("a/checkpoint-7/b") is None
    assert latest_checkpoint(three).name == "checkpoint-10"
    assert latest_checkpoint(three / "checkpoint-9") is None and latest_checkpoint(three / "missing") is None


DAMAGES = {
    "bit": (lambda folder: flip_a_bit(folder / "inner" / "weights.bin"), r"inner/weights.bin is not what was written"),
    "cut": (lambda folder: os.truncate(folder / "inner" / "weights.bin", 199), "weights.bin has 199 bytes, of 200"),
    "missing": (lambda folder: (folder / "state.json").unlink(), "lacks the file state.json"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "no readable manifest.json"),
    "cut manifest": (lambda folder: os.truncate(folder / "manifest.json", 40), "no readable manifest.json"),
    "other manifest": (lambda folder: (folder / "manifest.json").write_text("[]"), "no readable manifest.json"),
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "no readable manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(three, caplog, damage):
    do_damage, message = DAMAGES[damage]
    do_damage(three / "checkpoint-10")
    with pytest.raises(DamagedCheckpointError, match=message):
        verify_checkpoint(three / "checkpoint-10")
    assert latest_checkpoint(three).name == "checkpoint-9"
    assert len(caplog.messages) == 1 and str(three / "checkpoint-10") in caplog.text
    assert (three / "checkpoint-10").is_dir()


def test_damaged_ones_do_not_count_among_those_to_keep(three, caplog):
    flip_a_bit(three / "checkpoint-9" / "state.json")
    remove_old_checkpoints(three / "checkpoint-10", 2)
    assert names(three) == ["checkpoint-10", "checkpoint-8", "checkpoint-9"]
    assert "does not count" in caplog.text
    remove_old_checkpoints(three / "checkpoint-10", 1)
    assert names(three) == ["checkpoint-10"]


def test_damaged_ones_of_later_steps_do_not_cost_the_good_ones(three):
    """A run that passed over checkpoint-10 went on from checkpoint-8, and has written checkpoint-9 anew."""
    flip_a_bit(three / "checkpoint-10" / "state.json")
    remove_old_checkpoints(three / "checkpoint-9", 1)
    assert names(three) == ["checkpoint-10", "checkpoint-9"]
    assert latest_checkpoint(three).name == "checkpoint-9"


def test_a_checkpoint_of_the_same_step_is_replaced(three):
    flip_a_bit(three / "checkpoint-10" / "state.json")
    write_checkpoint(three / "checkpoint-10", lambda folder: (folder / "new").write_text("new"))
    verify_checkpoint(three / "checkpoint-10")
    assert names(three / "checkpoint-10") == ["manifest.json", "new"]
    assert names(three) == ["checkpoint-10", "checkpoint-8", "checkpoint-9"]


def test_files_and_folders_are_synced_before_the_name_is_there(tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "checkpoint-1").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_checkpoint(tmp_path / "checkpoint-1", write_files)
    temporary = f"{tmp_path}/checkpoint-1.tmp"
    before = {path for path, renamed in synced if not renamed}
    assert before == {
        temporary,
        *(f"{temporary}/{name}" for name in ("inner", "inner/weights.bin", "state.json", "manifest.json")),
    }
    assert [path for path, renamed in synced if renamed] == [str(tmp_path)]


@pytest.mark.parametrize(
    ("step", "moment"),
    [
        *((11, moment) for moment in ("flush", "flush_folder", "_sha256", "rename")),
        *((10, moment) for moment in ("flush", "flush_folder", "rename", "rmtree")),
    ],
)
def test_a_kill_at_any_moment_leaves_good_checkpoints(three, step, moment):
    """Killed at the first, second, ... call of what the writing is made of, until it is not reached any more."""

    def write_and_die(count):
        owner = {"rename": checkpoints.Path, "rmtree": checkpoints.shutil}.get(moment, checkpoints)
        original = getattr(owner, moment)
        calls = iter(range(count))

        def die(*args, **kwargs):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, moment, die)
        write_checkpoint(three / f"checkpoint-{step}", lambda folder: (folder / "new").write_text("new"))

    for count in range(100):
        process = multiprocessing.get_context("fork").Process(target=write_and_die, args=(count,))
        process.start()
        process.join()
        newest = latest_checkpoint(three)  # verified
        assert newest.name in ("checkpoint-10", f"checkpoint-{step}")
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        for folder in list_checkpoints(three):
            verify_checkpoint(folder)
    assert count > 0
    assert (newest / "new").read_text() == "new"
    write_checkpoint(three / "checkpoint-12", write_files)
    assert not [name for name in names(three) if not name.split("-")[1].isdigit()]


def test_a_kill_while_old_ones_are_removed(three, caplog):
    def remove_and_die():
        checkpoints.shutil.rmtree = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
        remove_old_checkpoints(three / "checkpoint-10", 2)

    process = multiprocessing.get_context("fork").Process(target=remove_and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in list_checkpoints(three)] == ["checkpoint-9", "checkpoint-10"]
    write_checkpoint(three / "checkpoint-11", write_files)
    assert names(three) == ["checkpoint-10", "checkpoint-11", "checkpoint-9"] and not caplog.messages


def test_an_error_while_writing_removes_what_was_written(three):
    def write(folder):
        write_files(folder)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        write_checkpoint(three / "checkpoint-11", write)
    assert names(three) == ["checkpoint-10", "checkpoint-8", "checkpoint-9"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("library", ["python", "safetensors"])
def test_a_full_disk(tmp_path, library):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        write_checkpoint(disk / "checkpoint-1", write_files)

        def write(folder):
            (folder / "small").write_text("small")
            if library == "python":
                (folder / "large").write_bytes(bytes(10**6))
            else:
                save_file({"large": torch.zeros(10**6)}, folder / "large.safetensors")

        with pytest.raises(
            OSError, match=r"checkpoint-2 could not be written: .*No space left .*go on from checkpoint-1"
        ):
            write_checkpoint(disk / "checkpoint-2", write)
        assert names(disk) == ["checkpoint-1"]
        verify_checkpoint(disk / "checkpoint-1")
        write_checkpoint(disk / "checkpoint-2", write_files)
        shutil.rmtree(disk / "checkpoint-1")
        shutil.rmtree(disk / "checkpoint-2")
        with pytest.raises(OSError, match="There is none yet"):
            write_checkpoint(disk / "checkpoint-1", write)
    finally:
        subprocess.run(["umount", disk], check=True)
