# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import json
import pickle
import sys
from dataclasses import replace

import pytest
import torch

from diffusers_gmem.models.memory_bank import GMemMemoryBank


def clustered(count=2000, dim=16, num_clusters=40, seed=0):
    """Rows about some centers, of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_clusters, dim, generator=torch.Generator().manual_seed(100))
    rows = centers[torch.randint(num_clusters, (count,), generator=generator)]
    rows = rows + 0.4 * torch.randn(count, dim, generator=generator)
    return rows * torch.rand(count, 1, generator=generator).exp()


def make_bank(count=2000, **kwargs):
    return GMemMemoryBank(clustered(count), labels=[k % 3 for k in range(count)], **kwargs)


def recall_of(bank, queries, k):
    """Measured as one would without knowing how an index works: by both searches."""
    _, exact = bank.nearest(queries, k)
    _, found = bank.nearest(queries, k, approximate=True)
    hits = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(exact, found, strict=True)]
    return sum(hits) / (k * len(hits))


@pytest.fixture(scope="module")
def bank():
    return make_bank().with_index()


def test_recall_on_clustered_rows(bank):
    index = bank.approximate_index
    assert index["num_lists"] == 45 and index["k"] == 10
    # Much better than what chance would find in as many lists
    assert index["num_probes"] <= 5 and index["recall"] > 0.93
    assert recall_of(bank, clustered(300, seed=1), 10) > 0.93
    assert recall_of(bank, clustered(300, seed=1), 1) > 0.93


@pytest.mark.parametrize("wanted", [0.7, 0.9, 0.99, 1.0])
def test_the_stated_recall_is_that_of_the_search(wanted):
    # Without clusters, so that it takes many lists
    rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    bank = GMemMemoryBank(rows).with_index(recall=wanted, k=5)
    index = bank.approximate_index
    assert index["recall"] > wanted - 0.04
    # Of all rows, each left out of its own neighbours
    (_, exact), (_, found) = (bank.nearest(rows, 6, approximate=approximate) for approximate in (False, True))
    hits = (found[:, 1:, None] == exact[:, None, 1:]).any(dim=1).double().mean()
    assert hits == pytest.approx(index["recall"], abs=0.03)
    if wanted < 1:
        assert 1 < index["num_probes"] < index["num_lists"]
        fewer = replace(bank._index, num_probes=index["num_probes"] - 1)
        _, found = fewer.nearest(bank._storage, rows, 6)
        assert (found[:, 1:, None] == exact[:, None, 1:]).any(dim=1).double().mean() < wanted + 0.02


def test_scores_are_exact_and_ties_go_by_row():
    rows = clustered(300)
    bank = GMemMemoryBank(torch.cat([rows, rows, 2 * rows])).with_index(recall=0.9, k=3)
    scores, found = bank.nearest(rows[:50], 6, approximate=True)
    exact_scores, exact = bank.nearest(rows[:50], 6)
    assert found.shape == scores.shape == (50, 6)
    assert torch.equal(found[:, :2], exact[:, :2]) and torch.equal(scores[:, :2], exact_scores[:, :2])
    for query, row_scores, rows_found in zip(rows[:50], scores, found, strict=True):
        true_scores = torch.nn.functional.cosine_similarity(bank[rows_found].double(), query.double(), dim=1)
        torch.testing.assert_close(row_scores, true_scores.float(), rtol=0, atol=1e-6)
        pairs = list(zip((-row_scores).tolist(), rows_found.tolist(), strict=True))
        assert pairs == sorted(pairs)


def test_one_query_row_numbers_and_more_than_a_list_holds(bank):
    scores, rows = bank.nearest(7, 3, approximate=True)
    assert scores.shape == rows.shape == (3,) and rows[0] == 7
    assert torch.equal(bank.nearest([7, 5], 3, approximate=True)[1][0], rows)
    # A search goes on to further lists until there are k rows; with all of them it is exact
    scores, rows = bank.nearest([7, 5], 2000, approximate=True)
    assert torch.equal(rows, bank.nearest([7, 5], 2000)[1])
    assert len(bank.nearest(7, 900, approximate=True)[1].unique()) == 900


@pytest.mark.parametrize("form", ["int8", "low rank", "float16", "selected"])
def test_every_form_of_bank(form, tmp_path):
    bank = make_bank()
    if form == "selected":
        bank = bank.select(list(range(0, 2000, 2)))
    else:
        bank = bank.compress(rank=8) if form == "low rank" else bank.compress(dtype=form)
    bank = bank.with_index()
    assert recall_of(bank, clustered(100, seed=1), 10) > 0.9
    bank.save_pretrained(tmp_path)
    opened = GMemMemoryBank.from_pretrained(tmp_path)
    queries = clustered(20, seed=2)
    for found, expected in zip(
        opened.nearest(queries, 5, approximate=True), bank.nearest(queries, 5, approximate=True), strict=True
    ):
        assert torch.equal(found, expected)


def test_rows_without_direction_and_equal_rows():
    bank = GMemMemoryBank(torch.cat([torch.zeros(30, 4), torch.ones(30, 4)])).with_index(k=3)
    assert bank._index.centroids.isfinite().all() and bank.approximate_index["recall"] == 1
    assert bank.nearest(torch.ones(4), 60, approximate=True)[1].tolist() == [*range(30, 60), *range(30)]
    # Equal scores of rows in several lists
    bank = GMemMemoryBank(torch.eye(4).repeat(10, 1)).with_index(k=3)
    assert bank.nearest(torch.ones(4), 40, approximate=True)[1].tolist() == list(range(40))
    with pytest.raises(ValueError, match="at least two rows that are not the zero vector"):
        GMemMemoryBank(torch.zeros(9, 4)).with_index(k=3)


# Files and edits


def test_save_and_open(bank, tmp_path):
    assert bank.has_additions
    bank.save_pretrained(tmp_path / "a", max_shard_size=20_000)
    opened = GMemMemoryBank.from_pretrained(tmp_path / "a")
    opened.verify()
    assert opened.approximate_index == bank.approximate_index and not opened.has_additions
    assert opened.with_index(recall=0.5).has_additions
    assert opened.fingerprint == bank.fingerprint == make_bank().fingerprint
    for copy in (opened, pickle.loads(pickle.dumps(opened))):
        assert torch.equal(
            copy.nearest(clustered(9), 5, approximate=True)[1], bank.nearest(clustered(9), 5, approximate=True)[1]
        )
    # The same bytes again
    make_bank().with_index().save_pretrained(tmp_path / "b", max_shard_size=20_000)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert contents[0] == contents[1] and any("-index-" in name for name in contents[0])


def test_edits_drop_the_index(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    opened = GMemMemoryBank.from_pretrained(tmp_path)
    for edited in (
        opened.without([0]),
        opened.select(slice(None)),
        opened.extend(clustered(1), [0]),
        opened.merge(make_bank(10)),
        opened.compress(dtype="float16"),
    ):
        assert edited.approximate_index is None
        with pytest.raises(ValueError, match="this bank has no index: make one with `with_index`"):
            edited.nearest(0, 1, approximate=True)
    opened.without([0]).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*index*"))
    assert GMemMemoryBank.from_pretrained(tmp_path).approximate_index is None
    keyed = bank.with_text_keys(clustered(2000, 4))
    assert keyed.approximate_index == bank.approximate_index
    assert keyed.with_index(recall=0.5).text_model == keyed.text_model


def test_some_rows_come_without_the_index(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*index*")
    path.unlink()
    some = GMemMemoryBank.from_pretrained(tmp_path, indices=[3, 1])
    some.verify()
    assert some.approximate_index is None
    with pytest.raises(FileNotFoundError, match=f"{path.name} is missing"):
        GMemMemoryBank.from_pretrained(tmp_path)


def test_an_index_of_another_bank_is_refused(bank, tmp_path):
    bank.save_pretrained(tmp_path / "a")
    bank.select(list(range(1999, -1, -1))).save_pretrained(tmp_path / "b")
    a, b = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    (path,) = (tmp_path / "a").glob("*index*")
    path.rename(tmp_path / "b" / path.name)
    b["index"], b["files"]["index"] = a["index"], a["files"]["index"]
    (tmp_path / "b" / "config.json").write_text(json.dumps(b))
    with pytest.raises(ValueError, match=f"its index is of the bank {bank.fingerprint}, but this is the bank sha256:"):
        GMemMemoryBank.from_pretrained(tmp_path / "b")
    b["index"] = None
    (tmp_path / "b" / "config.json").write_text(json.dumps(b))
    with pytest.raises(ValueError, match=r"`index` is None, but its file is \{"):
        GMemMemoryBank.from_pretrained(tmp_path / "b")


def test_a_damaged_index(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*index*")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        GMemMemoryBank.from_pretrained(tmp_path).verify()
    path.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=f"{path.name} is"):
        GMemMemoryBank.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recall": 0}, "`recall` is 0, but has to be above 0 and at most 1"),
        ({"recall": 1.01}, "`recall` is 1.01, but"),
        ({"k": 0}, "`k` is 0, but accepted is 1 to 9"),
        ({"k": 10}, "`k` is 10, but accepted is 1 to 9"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_bank(10).with_index(**arguments)


def test_wrong_searches(bank):
    with pytest.raises(ValueError, match="`metric` is 'dot', but this bank has an index for the cosine alone"):
        bank.nearest(0, 1, "dot", approximate=True)
    with pytest.raises(ValueError, match="`k` is 2001"):
        bank.nearest(0, 2001, approximate=True)


def test_faiss_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r'pip install "diffusers_gmem\[index\]"'):
        make_bank(100).with_index()
