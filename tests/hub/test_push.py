# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import json
import os
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import DatasetCard, ModelCard, SpaceCard, snapshot_download

from diffusers_gmem import GMemMemoryBank, GMemPipeline
from diffusers_gmem.hub import push_memory_bank, push_pipeline, push_space
from diffusers_gmem.hub.transfer import HubRepo


CHECKOUT = Path(__file__).parents[2]


def names(hub, repo_id, kind, revision="main"):
    repo = hub.repository(repo_id, kind)
    return sorted(repo.commits[repo.resolve(revision)].files)


def images(pipe, bank):
    generator = torch.Generator().manual_seed(0)
    return pipe(memory=bank[:2], num_inference_steps=2, generator=generator, output_type="pt").images


def assert_same(loaded, pipe, bank):
    """The weights to the bit; the images, since kernels round differently where weights are mapped from a file."""
    weights = pipe.transformer.state_dict()
    for name, tensor in loaded.transformer.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    torch.testing.assert_close(images(loaded, bank), images(pipe, bank), rtol=0, atol=2e-6)


# Memory banks


def test_push_memory_bank(hub, bank):
    commit = push_memory_bank(bank, "me/snippets", private=True, license="cc0-1.0")
    assert hub.repository("me/snippets", "dataset").private
    folder = snapshot_download("me/snippets", repo_type="dataset", revision=commit.oid)
    opened = GMemMemoryBank.from_pretrained(folder)
    opened.verify()
    assert opened.fingerprint == bank.fingerprint and opened.metadata.equals(bank.metadata)
    assert DatasetCard.load(f"{folder}/README.md").data.license == "cc0-1.0"


def test_push_of_another_bank_deletes_the_files_of_the_first(hub, bank):
    push_memory_bank(bank, "me/snippets", max_shard_size=64)
    HubRepo("me/snippets").upload({"notes.txt": b"mine"}, "Notes")
    push_memory_bank(GMemMemoryBank(bank[:3]), "me/snippets")
    left = names(hub, "me/snippets", "dataset")
    assert [name for name in left if not name.startswith("memory_bank-00001-of-00001")] == [
        ".gitattributes",
        "README.md",
        "config.json",
        "notes.txt",
    ]
    assert len(left) == 5


def test_push_memory_bank_elsewhere(hub, bank):
    push_memory_bank(bank, "me/snippets")
    push_memory_bank(bank.without(indices=[0]), "me/snippets", revision="small", commit_message="Less")
    change = push_memory_bank(bank.without(indices=[1]), "me/snippets", create_pr=True, card=DatasetCard("Mine"))
    for revision, count in (("main", 7), ("small", 6), (change.pr_revision, 6)):
        folder = snapshot_download("me/snippets", repo_type="dataset", revision=revision)
        assert len(GMemMemoryBank.from_pretrained(folder)) == count
    assert DatasetCard.load(f"{folder}/README.md").text == "Mine"


# Pipelines


def test_push_pipeline(hub, pipe, bank):
    commit = push_pipeline(pipe, "me/model", sample_grid=PIL.Image.new("RGB", (4, 4)), card={"dataset": "icons"})
    assert commit.oid == hub.repository("me/model").branches["main"]
    files = names(hub, "me/model", "model")
    assert {"README.md", "samples.png", "model_index.json", "bank/config.json"} <= set(files)
    assert not [name for name in files if name.endswith(".py")]
    card = ModelCard.load("me/model")
    assert card.data.library_name == "diffusers"
    assert "icons" in card.text and "samples.png" in card.text and bank.fingerprint in card.text

    hub.requests.clear()
    for cls in (GMemPipeline, DiffusionPipeline):
        loaded = cls.from_pretrained("me/model")
        loaded.set_progress_bar_config(disable=True)
        assert isinstance(loaded, GMemPipeline)
        assert_same(loaded, pipe, bank)
    assert not [name for name in hub.downloaded("me/model") if name.endswith((".md", ".png", ".py"))]


def test_push_pipeline_again(hub, pipe, bank):
    push_pipeline(pipe, "me/model", max_shard_size="20KB")
    push_pipeline(pipe, "me/model", variant="fp16")
    before = names(hub, "me/model", "model")
    sharded = [name for name in before if name.startswith("transformer/") and "fp16" not in name]
    assert len(sharded) > 3
    pipe.memory_bank = None
    push_pipeline(pipe, "me/model")
    after = names(hub, "me/model", "model")
    assert [name for name in after if name.startswith("transformer/")] == [
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    assert not [name for name in after if name.startswith("bank/")]
    for variant in (None, "fp16"):
        loaded = GMemPipeline.from_pretrained("me/model", variant=variant)
        loaded.set_progress_bar_config(disable=True)
        assert_same(loaded, pipe, bank)


def test_push_pipeline_with_code(hub, pipe):
    push_pipeline(pipe, "me/model", include_code=True)
    index = json.loads(
        (
            hub.folder
            / hub.repository("me/model")
            .commits[hub.repository("me/model").branches["remote-code"]]
            .files["model_index.json"]
            .sha256
        ).read_text()
    )
    library = index["transformer"][0]
    main, code = names(hub, "me/model", "model"), names(hub, "me/model", "model", "remote-code")
    added = {"pipeline_gmem.py", f"transformer/{library}.py", f"scheduler/{library}.py"}
    assert set(code) - set(main) == added and set(main) <= set(code)

    HubRepo("me/model", "model", "remote-code").upload({"transformer/diffusers_gmem_01234567.py": b""}, "Of old")
    push_pipeline(pipe, "me/model", include_code=True)
    assert names(hub, "me/model", "model", "remote-code") == code
    assert "remote-code" in ModelCard.load("me/model").text
    with pytest.raises(ValueError, match="does not go with `create_pr=True`"):
        push_pipeline(pipe, "me/model", include_code=True, create_pr=True)


def test_push_pipeline_as_a_pull_request(hub, pipe):
    push_pipeline(pipe, "me/model")
    change = push_pipeline(pipe, "me/model", create_pr=True, card={"license": "mit"})
    assert ModelCard.load("me/model").data.license is None
    snapshot = snapshot_download("me/model", revision=change.pr_revision)
    assert ModelCard.load(f"{snapshot}/README.md").data.license == "mit"


# Spaces


def test_push_space(hub):
    commit = push_space("me/demo", "me/model", bank_id="me/snippets", title="Draw: from memory", private=True)
    repo = hub.repository("me/demo", "space")
    assert repo.private and repo.variables == {"GMEM_MODEL": "me/model"} and repo.branches["main"] == commit.oid
    folder = Path(snapshot_download("me/demo", repo_type="space"))
    card = SpaceCard.load(folder / "README.md").data
    assert (card.sdk, card.app_file, card.title) == ("gradio", "app.py", "Draw: from memory")
    assert card.models == ["me/model"] and card.datasets == ["me/snippets"] and card.license == "apache-2.0"
    assert f"gradio=={card.sdk_version}" in Path(CHECKOUT, "constraints.txt").read_text().splitlines()

    # Its own copy of the package, and a page that runs with it
    program = "import app, diffusers_gmem; print(diffusers_gmem.__file__); app.parse_args([])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.strip().startswith(str(folder.resolve()))


def test_push_space_again(hub):
    push_space("me/demo", "me/model")
    HubRepo("me/demo", "space").upload(
        {"diffusers_gmem/old.py": b"", "notes.txt": b"mine"}, "Of old", space_sdk="gradio"
    )
    push_space("me/demo", "me/other")
    left = names(hub, "me/demo", "space")
    assert "diffusers_gmem/old.py" not in left and "notes.txt" in left
    assert hub.repository("me/demo", "space").variables == {"GMEM_MODEL": "me/other"}


def test_push_space_asks_again_after_an_error(hub, monkeypatch):
    monkeypatch.setattr("diffusers_gmem.hub.transfer.SECONDS_BETWEEN_ATTEMPTS", 0.0)
    hub.fail("POST /api/spaces/me/demo/(commit|variables)", times=2)
    push_space("me/demo", "me/model")
    assert hub.repository("me/demo", "space").variables == {"GMEM_MODEL": "me/model"}
    with pytest.raises(PermissionError, match="the space repository 'you/demo'"):
        push_space("you/demo", "me/model")


def test_requirements_of_the_space_are_those_of_the_package():
    """The Hub installs them for the copy of the package in the Space."""
    listed = Path(CHECKOUT, "examples/space/requirements.txt").read_text().splitlines()
    assert set(listed) == {line for line in requires("diffusers_gmem") if "extra ==" not in line} | {"gradio>=6"}
