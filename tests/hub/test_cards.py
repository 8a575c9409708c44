# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard, SpaceCard

import diffusers_gmem
from diffusers_gmem import GMemMemoryBank, GMemPipeline
from diffusers_gmem.hub.cards import memory_bank_card, model_card, space_card
from diffusers_gmem.hub.transfer import HubRepo


def sections(card):
    """The text below each heading."""
    parts = re.split(r"^#+ (.+)$", card.text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def check_form(card):
    """What is left of templates, broken tables, untidy blank lines; and the round trip through text."""
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\bNone\b", card.text)
    assert "\n\n\n" not in card.text
    lines = card.text.splitlines()
    for before, line in zip(lines, lines[1:], strict=False):
        if line.startswith("| ---"):
            assert before.count("|") == line.count("|")
        if before.startswith("|") and line.startswith("|"):
            assert line.replace("\\|", "").count("|") == before.replace("\\|", "").count("|"), line
        assert not (before.startswith("|") and line and not line.startswith("|")), line
        assert not (line.startswith("|") and before and not before.startswith("|")), line
    assert type(card)(str(card)).data.to_dict() == card.data.to_dict()


def test_templates_are_where_the_package_finds_them():
    templates = Path(diffusers_gmem.__file__).parent / "hub/templates"
    assert {path.name for path in templates.iterdir()} == {"model_card.md", "memory_bank_card.md", "space_card.md"}


# Memory banks


def test_memory_bank_card(bank):
    card = memory_bank_card(bank, "me/snippets", license="cc-by-4.0", pretty_name="My snippets")
    check_form(card)
    assert isinstance(card, DatasetCard)
    assert card.data.license == "cc-by-4.0"
    assert card.data.size_categories == ["n<1K"]
    assert card.data.configs == [{"config_name": "default", "data_files": "metadata.parquet"}]
    parts = sections(card)
    assert "My snippets" in parts
    assert 'GMemMemoryBank.from_pretrained("me/snippets")' in card.text
    held = parts["What it holds"]
    assert "| snippets | 7 |" in held and "| dimension | 16 |" in held and f"`{bank.fingerprint}`" in held
    norms = bank[:].double().norm(dim=1)
    assert f"smallest {norms.min():.4g}, mean {norms.mean():.4g}, largest {norms.max():.4g}" in held
    assert "| 0 | cat | 2 |\n| 1 | dog | 2 |\n| 2 | fish | 3 |" in parts["Classes"]
    made = parts["How it was made"]
    for text in (bank.encoder, bank.encoder_revision, "'resize': 256", "my_images", "cc-by-4.0"):
        assert text in made
    assert 'squash_history("me/snippets", repo_type="dataset")' in parts["Removing an entry"]


def test_a_bank_with_thumbnails(bank):
    assert "small copy" not in memory_bank_card(bank, "me/snippets").text
    pictured = GMemMemoryBank(bank[:], metadata={"thumbnail": [b"png"] * 7})
    card = memory_bank_card(pictured, "me/snippets")
    check_form(card)
    assert "The column `thumbnail` holds a small copy of each image" in card.text
    check_form(memory_bank_card(pictured.with_text_keys(torch.ones(7, 5)), "me/snippets"))


def test_a_bank_with_text_keys(bank):
    assert "search_text" not in memory_bank_card(bank, "me/snippets").text
    card = memory_bank_card(bank.with_text_keys(torch.ones(7, 5), "org/clip", "abc", "clip"), "me/snippets")
    check_form(card)
    assert "| text keys | 5 numbers for each snippet, by org/clip, revision abc |" in card.text
    assert 'bank.search_text("a red mug", 8,' in card.text and 'pipe(prompt="a red mug")' in card.text
    card = memory_bank_card(bank.with_text_keys(torch.ones(7, 5), "/home/me/clip"), "me/snippets")
    check_form(card)
    assert "by a local path, `clip`, revision not recorded |" in card.text and "/home" not in card.text


def test_a_bank_with_an_index():
    rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    bank = GMemMemoryBank(rows).with_index(recall=0.8, k=5)
    card = memory_bank_card(bank, "me/snippets")
    check_form(card)
    index = bank.approximate_index
    searched = f"{index['num_probes']} of 20 lists are searched, which finds {index['recall']:.3f} of the 5 nearest"
    assert f"| approximate index | {searched} |" in card.text
    assert "index" not in memory_bank_card(bank.select([0]), "me/snippets").text


def test_what_a_bank_does_not_know_is_not_recorded():
    card = memory_bank_card(GMemMemoryBank(torch.eye(3)), "me/snippets")
    check_form(card)
    parts = sections(card)
    made = [line for line in parts["How it was made"].splitlines() if line]
    assert len(made) == 5 and all(line.endswith("not recorded") for line in made)
    assert "Classes" not in parts
    assert card.data.viewer is False
    assert "configs" not in card.data.to_dict() and card.data.license is None


def test_a_bank_with_many_classes_and_odd_names():
    bank = GMemMemoryBank(torch.eye(30), labels=list(range(30)), id2label={0: "a|b\nc"}, source_dataset="x | y")
    card = memory_bank_card(bank, "me/snippets")
    check_form(card)
    assert "| 0 | a\\|b c | 1 |" in card.text
    assert "| 19 | not recorded | 1 |\n| ... | 10 more | |" in card.text


def test_the_history_of_an_edited_bank(bank):
    edited = bank.without(indices=[3])
    card = memory_bank_card(edited, "me/snippets")
    check_form(card)
    assert bank.fingerprint in sections(card)["How it was made"]


def test_a_compressed_bank(bank):
    small = bank.compress(rank=3)
    card = memory_bank_card(small, "me/snippets")
    check_form(card)
    assert "3 coefficients" in card.text
    assert f"| relative reconstruction error | {small.reconstruction_error} |" in card.text


@pytest.mark.parametrize(("count", "category"), [(999, "n<1K"), (1000, "1K<n<10K"), (20_000, "10K<n<100K")])
def test_size_categories(count, category):
    card = memory_bank_card(GMemMemoryBank(torch.ones(count, 1)), "me/snippets")
    assert card.data.size_categories == [category]


@pytest.mark.parametrize("with_metadata", [True, False])
def test_load_dataset_reads_the_metadata(hub, bank, tmp_path, with_metadata):
    import datasets

    if not with_metadata:
        bank = GMemMemoryBank(bank[:])
    bank.save_pretrained(tmp_path / "bank")
    files = {path.name: path for path in (tmp_path / "bank").iterdir()}
    HubRepo("me/snippets").upload(files | {"README.md": str(memory_bank_card(bank, "me/snippets")).encode()}, "Upload")
    if with_metadata:
        data = datasets.load_dataset("me/snippets", split="train")
        assert data.to_dict() == {"file": [f"{k}.png" for k in range(7)]}
    else:
        with pytest.raises(datasets.exceptions.DataFilesNotFoundError, match="me/snippets"):
            datasets.load_dataset("me/snippets")


# Models


BANK_SOURCE = {"repo_id": "me/snippets", "revision": "f" * 40, "fingerprint": "sha256:" + "0" * 64}
EVALUATION = {
    "metric": "FID",
    "value": 1.53,
    "num_images": 50_000,
    "protocol": "train set, SDE, 50 steps, no guidance",
}


def test_cards_tell_no_local_paths(pipe, tmp_path):
    folder = tmp_path / "my_encoder"
    bank = GMemMemoryBank(torch.eye(16), encoder=str(folder), source_dataset=str(tmp_path / "my_images"))
    pipe.memory_bank = bank
    pipe.save_pretrained(folder)
    pipe = GMemPipeline.from_pretrained(folder)
    cards = [
        memory_bank_card(bank, "me/snippets"),
        model_card(
            pipe,
            "me/model",
            bank_source={"subfolder": "bank"},
            dataset=str(tmp_path / "my_images"),
            training={"started from": str(folder)},
        ),
    ]
    for card in cards:
        check_form(card)
        assert str(tmp_path) not in card.content
        assert "a local path, `my_encoder`" in card.text and "a local path, `my_images`" in card.text


def test_model_card(pipe):
    card = model_card(
        pipe,
        "me/model",
        bank_source=BANK_SOURCE,
        dataset="ImageNet-1k | 256",
        license="apache-2.0",
        training={"steps": 100_000, "global_batch_size": 1024, "num_images": 1_281_167, "epochs": 79.9, "lr": 2e-4},
        evaluation=[EVALUATION],
        sample_grid="samples.png",
        has_code=True,
    )
    check_form(card)
    assert isinstance(card, ModelCard)
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.datasets == ["me/snippets"] and card.data.license == "apache-2.0"
    assert [(result.metric_name, result.metric_value) for result in card.data.eval_results] == [("FID", 1.53)]
    parts = sections(card)
    assert 'GMemPipeline.from_pretrained("me/model")' in parts["Use"] and "num_images=8" in parts["Use"]
    assert 'revision="remote-code", trust_remote_code=True' in parts["Use"]
    assert "![Images generated with this model](samples.png)" in card.text
    assert "8 x 8 pixels" in parts["The model"] and "latents of AutoencoderKL" in parts["The model"]
    bank = parts["The memory bank"]
    for text in ("me/snippets", "f" * 40, BANK_SOURCE["fingerprint"], "facebook/dinov2-base", "| snippets | 7 |"):
        assert text in bank
    training = parts["Training"]
    assert "100,000 optimizer steps, each with a global batch of 1,024 images" in training
    assert "79.9 epochs of 1,281,167 images" in training
    assert "| lr | 0.0002 |" in training and "ImageNet-1k \\| 256" in training
    assert "| FID | 1.53 | 50000 | train set, SDE, 50 steps, no guidance |" in parts["Evaluation"]


def test_what_a_model_does_not_know_is_not_recorded(pipe):
    pipe.memory_bank = None
    card = model_card(pipe, "me/model")
    check_form(card)
    parts = sections(card)
    assert parts["Evaluation"].strip() == "Not recorded."
    assert parts["Training"].strip().startswith("Not recorded.")
    assert parts["The memory bank"].strip().startswith("This model is published without one.")
    assert "memory=torch.randn(8, 16)" in parts["Use"]
    assert "remote-code" not in card.text and "![" not in card.text
    assert not {"license", "datasets", "model-index"} & card.data.to_dict().keys()


def test_a_model_with_its_own_bank(pipe, bank):
    card = model_card(pipe, "me/model", bank_source={"subfolder": "bank", "fingerprint": bank.fingerprint})
    check_form(card)
    text = sections(card)["The memory bank"]
    assert "in the folder `bank` of this repository" in text and bank.fingerprint in text
    assert "datasets" not in card.data.to_dict()


def test_training_that_is_known_in_part(pipe):
    card = model_card(pipe, "me/model", training={"steps": 10})
    check_form(card)
    assert "10 optimizer steps, each with a global batch whose size is not recorded: an unrecorded number" in card.text


def test_a_result_needs_its_protocol(pipe):
    with pytest.raises(ValueError, match="lacks protocol"):
        model_card(pipe, "me/model", evaluation=[{"metric": "FID", "value": 1.5}])


# Spaces


@pytest.mark.parametrize("bank_id", [None, "me/snippets"])
def test_space_card(bank_id):
    card = space_card("Draw from memory", "me/model", bank_id, sdk_version="6.31.0", license="apache-2.0")
    check_form(card)
    assert isinstance(card, SpaceCard)
    data = card.data.to_dict()
    assert (data["sdk"], data["sdk_version"], data["app_file"]) == ("gradio", "6.31.0", "app.py")
    assert data["models"] == ["me/model"] and data.get("datasets") == (bank_id and [bank_id])
    assert ("datasets/me/snippets" in card.text) == (bank_id is not None)
