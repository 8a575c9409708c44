# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_gmem import GMemMemoryBank
from diffusers_gmem.hub import HubRepo, locate_memory_bank, locate_pipeline, push_memory_bank, push_pipeline
from diffusers_gmem.models.memory_bank_files import read_config, sha256_of_file


def all_files(manifest):
    return [*manifest.beside_metadata(), *([manifest.metadata] if manifest.metadata else [])]


# Memory banks


def test_a_bank_in_a_folder(bank, tmp_path, hub):
    bank.save_pretrained(tmp_path / "bank")
    folder, fetch = locate_memory_bank(tmp_path, "bank")
    assert folder == tmp_path / "bank"
    fetch(all_files(read_config(folder)[1]))
    assert hub.requests == []


@pytest.mark.parametrize("subfolder", [None, "bank"])
def test_a_bank_on_the_hub(hub, pipe, bank, subfolder):
    if subfolder is None:
        push_memory_bank(bank, "me/snippets")
        arguments = {"name_or_path": "me/snippets"}
    else:
        push_pipeline(pipe, "me/snippets")
        arguments = {"name_or_path": "me/snippets", "subfolder": "bank", "repo_type": "model"}
    hub.requests.clear()
    folder, fetch = locate_memory_bank(**arguments)
    config, manifest = read_config(folder)
    fetch(all_files(manifest))
    opened = GMemMemoryBank.from_pretrained(folder)
    opened.verify()
    assert opened.fingerprint == bank.fingerprint
    prefix = f"{subfolder}/" if subfolder else ""
    expected = {f"{prefix}{name}" for name in ["config.json", *(entry.file for entry in all_files(manifest))]}
    assert set(hub.downloaded("me/snippets")) == expected

    hub.requests.clear()
    folder, fetch = locate_memory_bank(**arguments, local_files_only=True)
    fetch(all_files(manifest))
    assert hub.requests == []


def test_only_what_is_asked_for_is_downloaded(hub, bank):
    push_memory_bank(bank, "me/snippets", max_shard_size=3 * bank.dim * 4)
    folder, fetch = locate_memory_bank("me/snippets")
    manifest = read_config(folder)[1]
    hub.requests.clear()
    fetch([manifest.snippets[1]])
    assert hub.downloaded("me/snippets") == [manifest.snippets[1].file]


def test_a_new_commit_does_not_mix_in(hub, bank):
    push_memory_bank(bank, "me/snippets")
    folder, fetch = locate_memory_bank("me/snippets", revision="main")
    push_memory_bank(bank.without(indices=[0]), "me/snippets")
    fetch(all_files(read_config(folder)[1]))
    assert GMemMemoryBank.from_pretrained(folder).fingerprint == bank.fingerprint


def test_a_bank_that_is_not_finite(hub, bank, tmp_path):
    bank.save_pretrained(tmp_path)
    entry = read_config(tmp_path)[1].snippets[0]
    rows = load_file(tmp_path / entry.file)["snippets"].clone()
    rows[3, 2] = torch.nan
    save_file({"snippets": rows}, tmp_path / entry.file, metadata={"shard": "1 of 1"})
    config = (tmp_path / "config.json").read_text().replace(entry.sha256, sha256_of_file(tmp_path / entry.file))
    (tmp_path / "config.json").write_text(config)
    HubRepo("me/snippets").upload({path.name: path for path in tmp_path.iterdir()}, "Upload")
    folder, fetch = locate_memory_bank("me/snippets")
    for _ in range(2):
        with pytest.raises(ValueError, match="row 3 of 'snippets' holds NaN"):
            fetch(read_config(folder)[1].snippets)


def test_a_repository_without_a_bank(hub):
    HubRepo("me/other").upload({"data.txt": b"text"}, "Upload")
    with pytest.raises(
        FileNotFoundError, match="'me/other' has no file 'config.json': it does not hold a memory bank"
    ):
        locate_memory_bank("me/other")
    with pytest.raises(FileNotFoundError, match="'/no/where' is neither a local folder nor"):
        locate_memory_bank(Path("/no/where"))


# Pipelines


def test_locate_pipeline(hub, pipe):
    commit = push_pipeline(pipe, "me/model", include_code=True)
    assert locate_pipeline(HubRepo("me/model", "model")) == HubRepo("me/model", "model", commit.oid)
    assert locate_pipeline(HubRepo("me/model", "model", "remote-code")).revision != commit.oid


def test_what_is_not_our_pipeline(hub):
    HubRepo("me/other", "model").upload({"model_index.json": b'{"_class_name": "DDPMPipeline"}'}, "Upload")
    with pytest.raises(ValueError, match="'me/other' holds a DDPMPipeline, not a GMemPipeline"):
        locate_pipeline(HubRepo("me/other", "model"))
    HubRepo("me/model", "model").upload({"config.json": b"{}"}, "Upload")
    with pytest.raises(
        FileNotFoundError, match="'me/model' has no file 'model_index.json': it does not hold a pipeline"
    ):
        locate_pipeline(HubRepo("me/model", "model"))
    with pytest.raises(FileNotFoundError, match="'me/nothing' does not exist"):
        locate_pipeline(HubRepo("me/nothing", "model"))
