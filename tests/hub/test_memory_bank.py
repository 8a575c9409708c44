# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import re

import datasets
import pytest
import torch
from huggingface_hub import DatasetCard, HfApi

from diffusers_gmem import GMemMemoryBank
from diffusers_gmem.hub import transfer


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(transfer, "SECONDS_BETWEEN_ATTEMPTS", 0.0)


@pytest.fixture(params=["float32", "int8", "low rank", "text keys and index"])
def stored_bank(bank, request):
    if request.param == "float32":
        return bank
    if request.param == "text keys and index":
        text_keys = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
        return bank.with_text_keys(text_keys, "org/clip").with_index(k=2)
    return bank.compress(dtype="int8") if request.param == "int8" else bank.compress(rank=3)


def push_in_shards(bank):
    """Two rows in each of four shards, but one in the first."""
    bank.push_to_hub("me/snippets", max_shard_size=2 * bank._storage.row_bytes)


def shards(hub):
    """The numbers of the shards that were downloaded, each of them with its text keys where the bank has any."""
    names = hub.downloaded("me/snippets")
    of_keys = [int(match[1]) for name in names if (match := re.search(r"text_keys-(\d+)-of-00004", name))]
    of_rows = [int(match[1]) for name in names if (match := re.search(r"bank-(\d+)-of-00004", name))]
    assert not of_keys or sorted(of_keys) == sorted(of_rows)
    return of_rows


def assert_same(bank, expected):
    assert torch.equal(bank[:], expected[:]) and torch.equal(bank.labels, expected.labels)
    assert bank.metadata.equals(expected.metadata) and bank.fingerprint == expected.fingerprint
    for name in ("id2label", "encoder", "encoder_revision", "preprocessing", "source_dataset", "dtype", "rank"):
        assert getattr(bank, name) == getattr(expected, name)
    assert bank.text_model == expected.text_model and bank.approximate_index == expected.approximate_index
    assert bank.text_keys is None or torch.equal(bank.text_keys, expected.text_keys)


def test_push_and_open(hub, stored_bank):
    commit = stored_bank.push_to_hub("me/snippets", private=True, license="mit", commit_message="My snippets")
    repo = hub.repository("me/snippets", "dataset")
    assert repo.private and repo.commits[commit.oid].title == "My snippets"
    assert DatasetCard.load("me/snippets").data.license == "mit"
    opened = GMemMemoryBank.from_pretrained("me/snippets")
    assert_same(opened, stored_bank)
    assert "memory-mapped" in repr(opened) and commit.oid in repr(opened)
    opened.verify()
    assert opened.history == stored_bank.history

    hub.requests.clear()
    assert_same(GMemMemoryBank.from_pretrained("me/snippets", local_files_only=True), stored_bank)
    assert not hub.requests
    assert datasets.load_dataset("me/snippets", split="train")["file"] == stored_bank.metadata["file"].to_pylist()


def test_revisions(hub, bank):
    first = bank.push_to_hub("me/snippets")
    HfApi().create_tag("me/snippets", tag="v1", repo_type="dataset")
    bank.without(indices=[0]).push_to_hub("me/snippets", revision="small")
    change = bank.without(indices=[0, 1]).push_to_hub("me/snippets", create_pr=True)
    bank.without(indices=[0, 1, 2]).push_to_hub("me/snippets")
    for revision, count in (("v1", 7), (first.oid, 7), ("small", 6), (change.pr_revision, 5), ("main", 4), (None, 4)):
        assert len(GMemMemoryBank.from_pretrained("me/snippets", revision=revision)) == count


@pytest.mark.parametrize(
    ("wanted", "rows", "needed"),
    [
        ({"indices": slice(1, 3)}, [1, 2], [2]),
        ({"indices": [6, 0, -1]}, [6, 0, 6], [1, 4]),
        ({"indices": 3}, [3], [3]),
        ({"class_labels": "dog"}, [2, 3], [2, 3]),
        ({"class_labels": [2, "dog"]}, [2, 3, 4, 5, 6], [2, 3, 4]),
    ],
    ids=str,
)
def test_some_rows(hub, stored_bank, wanted, rows, needed, tmp_path):
    push_in_shards(stored_bank)
    hub.requests.clear()
    some = GMemMemoryBank.from_pretrained("me/snippets", **wanted)
    assert sorted(shards(hub)) == needed and not any("index" in name for name in hub.downloaded("me/snippets"))
    expected = stored_bank.select(rows)
    assert_same(some, expected)
    assert some.history[-1]["parents"] == [stored_bank.fingerprint] and some.descends_from(stored_bank.fingerprint)
    some.verify()
    some.save_pretrained(tmp_path)
    assert_same(GMemMemoryBank.from_pretrained(tmp_path), expected)

    hub.requests.clear()
    GMemMemoryBank.from_pretrained("me/snippets")  # the others are fetched then
    assert sorted(shards(hub)) == sorted({1, 2, 3, 4} - set(needed))


def test_some_rows_of_a_folder(bank, tmp_path):
    bank.save_pretrained(tmp_path, max_shard_size=2 * bank.dim * 4)
    for name in tmp_path.glob("memory_bank-0000[134]-of*"):
        name.unlink()
    some = GMemMemoryBank.from_pretrained(tmp_path, indices=[2, 1])
    assert_same(some, bank.select([2, 1]))
    some.verify()
    (name,) = tmp_path.glob("memory_bank-00002-of*")
    name.write_bytes(name.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        some.verify()
    with pytest.raises(FileNotFoundError, match="memory_bank-00001-of-00004"):
        GMemMemoryBank.from_pretrained(tmp_path, indices=[0])


@pytest.mark.parametrize(
    ("error", "wanted", "message"),
    [
        (IndexError, {"indices": [7]}, "row 7 is not in the bank"),
        (ValueError, {"class_labels": "bird"}, "'bird', which is not in this bank's `id2label`"),
        (ValueError, {"indices": []}, "no row would be left"),
        (ValueError, {"indices": [0], "class_labels": [0]}, "only one of `indices` and `class_labels`"),
    ],
)
def test_rows_that_are_not_there(hub, bank, error, wanted, message):
    push_in_shards(bank)
    hub.requests.clear()
    with pytest.raises(error, match=message):
        GMemMemoryBank.from_pretrained("me/snippets", **wanted)
    assert not shards(hub)


def test_a_cache_and_a_token(hub, bank, tmp_path, monkeypatch):
    bank.push_to_hub("me/snippets", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="'me/snippets' does not exist, or it is private: log in"):
        GMemMemoryBank.from_pretrained("me/snippets")
    opened = GMemMemoryBank.from_pretrained("me/snippets", token="hf_me", cache_dir=tmp_path)
    assert str(tmp_path) in repr(opened)


def test_an_interrupted_download_goes_on(hub, bank):
    push_in_shards(bank)
    third = "GET .*/resolve/.*00003-of"
    hub.cut(third, after=100)
    hub.fail(third, times=50)
    with pytest.raises(ConnectionError, match="'memory_bank-00003-of-.*' in the dataset repository 'me/snippets'"):
        GMemMemoryBank.from_pretrained("me/snippets")
    hub.faults.clear()
    hub.requests.clear()
    assert_same(GMemMemoryBank.from_pretrained("me/snippets"), bank)
    assert 3 in shards(hub) and 1 not in shards(hub)


def test_a_damaged_shard_is_never_used(hub, bank):
    push_in_shards(bank)
    folder = GMemMemoryBank.from_pretrained("me/snippets")._folder
    (path,) = folder.glob("memory_bank-00002-of*")
    content = path.read_bytes()
    path.resolve().write_bytes(content[:-1] + b"!")
    hub.requests.clear()
    assert_same(GMemMemoryBank.from_pretrained("me/snippets", indices=slice(None)), bank.select(slice(None)))
    assert shards(hub) == [2] and path.read_bytes() == content


def test_what_is_not_a_bank(hub, pipe):
    pipe.push_to_hub("me/model")
    with pytest.raises(FileNotFoundError, match="there is a model repository of this name"):
        GMemMemoryBank.from_pretrained("me/model")
    with pytest.raises(FileNotFoundError, match="has no file 'config.json': it does not hold a memory bank"):
        GMemMemoryBank.from_pretrained("me/model", repo_type="model")
    with pytest.raises(ValueError, match="does not describe a GMemMemoryBank"):
        GMemMemoryBank.from_pretrained("me/model", "transformer", repo_type="model")
    assert len(GMemMemoryBank.from_pretrained("me/model", "bank", repo_type="model")) == 7
