# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import json
import pickle
import time

import pyarrow
import pyarrow.parquet
import pytest
import torch
from diffusers.utils import logging

from diffusers_gmem.models.memory_bank import GMemMemoryBank


NAMES = {0: "tench", 1: "crane", 2: "golden retriever", 7: "crane", 9: "mug"}
LABELS = [0, 0, 1, 1, 1, 2, 2, 7, 7, 7]


def rows(count=10, dim=6, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def make_bank(count=10, seed=0, **kwargs):
    defaults = {
        "labels": LABELS[:count],
        "metadata": {"file": [f"secret_{seed}_{i}.png" for i in range(count)]},
        "id2label": NAMES,
        "encoder": "org/encoder",
        "preprocessing": {"size": 224},
        "source_dataset": "org/images",
    }
    return GMemMemoryBank(rows(count, seed=seed), **(defaults | kwargs))


def files_of(bank):
    return bank.metadata.column("file").to_pylist()


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(params=["in RAM", "opened", "edited", "low rank", "int8", "float16"])
def bank(request, tmp_path):
    """The ten rows of `make_bank` in every form that a bank can have."""
    bank = make_bank()
    if request.param == "opened":
        bank.save_pretrained(tmp_path / "bank", max_shard_size=3 * 24)
        bank = GMemMemoryBank.from_pretrained(tmp_path / "bank")
    elif request.param == "edited":
        bank = make_bank(5).extend(rows()[5:], LABELS[5:], {"file": [f"secret_0_{i}.png" for i in range(5, 10)]})
        bank = bank.select(list(range(9, -1, -1))).select(slice(None, None, -1))
    elif request.param == "low rank":
        bank = bank.compress(rank=3)
    elif request.param != "in RAM":
        bank = bank.compress(dtype=request.param)
    return bank


def save_and_open(bank, folder, **kwargs):
    bank.save_pretrained(folder, **kwargs)
    opened = GMemMemoryBank.from_pretrained(folder)
    opened.verify()
    assert torch.equal(opened[:], bank[:]) and opened.fingerprint == bank.fingerprint
    assert torch.equal(opened.labels, bank.labels) and opened.id2label == bank.id2label
    assert opened.metadata.to_pydict() == bank.metadata.to_pydict()
    assert opened.history == bank.history and opened.reconstruction_error == bank.reconstruction_error
    assert opened.rank == bank.rank and opened.dtype == bank.dtype and opened.normalized == bank.normalized
    return opened


def ids_in_parquet(folder, name):
    """The values of a column that a file really holds, those included that no row refers to."""
    table = pyarrow.parquet.read_table(folder / "metadata.parquet", read_dictionary=[name])
    return set(table.column(name).chunk(0).dictionary.to_pylist())


# select and without


def test_select(bank, tmp_path):
    before = bank[:]
    selected = bank.select([7, 0, -2, 0])
    assert torch.equal(selected[:], before[[7, 0, 8, 0]]) and selected.labels.tolist() == [7, 0, 7, 0]
    assert files_of(selected) == [f"secret_0_{i}.png" for i in (7, 0, 8, 0)]
    assert selected.id2label == {0: "tench", 7: "crane", 9: "mug"}
    assert selected.encoder == "org/encoder" and selected.preprocessing == {"size": 224}
    assert torch.equal(bank[:], before) and len(bank.labels) == 10 and bank.id2label == NAMES
    opened = save_and_open(selected, tmp_path / "new", max_shard_size=3 * 24)
    again = opened.select(torch.tensor([False, True, False, True]))
    assert torch.equal(again[:], before[[0, 0]]) and files_of(again) == ["secret_0_0.png"] * 2


@pytest.mark.parametrize("how", ["indices", "labels", "name"])
def test_what_is_removed_is_gone(bank, how, tmp_path):
    removed = [2, 3, 4, 7, 8, 9] if how == "name" else [7, 8, 9]
    before = bank[:]
    kept = [i for i in range(10) if i not in removed]
    argument = {"indices": {"indices": [-1, 7, 8]}, "labels": {"labels": 7}, "name": {"labels": ["crane"]}}[how]
    smaller = bank.without(**argument)
    opened = save_and_open(smaller, tmp_path / "new", max_shard_size=2 * 24)
    for smaller in (smaller, opened):  # noqa: B020
        assert torch.equal(smaller[:], before[kept])
        assert smaller.labels.tolist() == [LABELS[i] for i in kept]
        assert files_of(smaller) == [f"secret_0_{i}.png" for i in kept]
        # No draw and no search returns it
        snippets, _ = smaller.sample(300, torch.Generator().manual_seed(0))
        _, indices = smaller.nearest(before[removed].float(), len(smaller))
        found = torch.cat([snippets, smaller[indices.flatten()], smaller.sample(len(kept), replacement=False)[0]])
        assert not (found[:, None] == before[None, removed]).all(dim=2).any()
        with pytest.raises(ValueError, match="holds 7, but no row"):
            smaller.indices_of(7)

    # No file holds anything of it
    content = b"".join(path.read_bytes() for path in (tmp_path / "new").iterdir())
    assert ids_in_parquet(tmp_path / "new", "file") == {f"secret_0_{i}.png" for i in kept}
    stored = bank._storage.stored(torch.arange(10)).codes
    for i in range(10):
        row = stored[i].view(torch.uint8).numpy().tobytes()
        assert (row in content) == (i in kept)
        assert i in kept or f"secret_0_{i}".encode() not in content
    assert "crane" not in json.dumps(read_config(tmp_path / "new")["id2label"]) or how != "name"
    assert 7 not in smaller.id2label and 9 in smaller.id2label  # a name that no row ever carried stays


def test_removed_values_leave_the_dictionaries_of_columns(tmp_path):
    column = pyarrow.array([f"secret_{i}" for i in range(6)] + ["secret_0"]).dictionary_encode()
    bank = GMemMemoryBank(rows(7), metadata=pyarrow.table({"id": column}))
    bank.without([1, 4]).save_pretrained(tmp_path)
    assert ids_in_parquet(tmp_path, "id") == {f"secret_{i}" for i in (0, 2, 3, 5)}
    table = GMemMemoryBank.from_pretrained(tmp_path).metadata
    assert table.schema == bank.metadata.schema
    assert table.column("id").to_pylist() == ["secret_0", "secret_2", "secret_3", "secret_5", "secret_0"]


def test_saving_over_the_bank_that_was_edited(tmp_path):
    make_bank().save_pretrained(tmp_path, max_shard_size=3 * 24)
    bank = GMemMemoryBank.from_pretrained(tmp_path)
    smaller = bank.without(labels="crane")
    save_and_open(smaller, tmp_path)
    assert torch.equal(bank[:], rows())  # its files are deleted, its mapping is not
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert rows()[2].numpy().tobytes() not in content and b"secret_0_2" not in content


def test_edits_and_saves_in_place(tmp_path):
    make_bank().save_pretrained(tmp_path)
    bank = GMemMemoryBank.from_pretrained(tmp_path)
    for _ in range(3):
        bank = bank.without([0]).extend(rows(1, seed=1), [0], {"file": ["new"], "size": [1]})
        save_and_open(bank, tmp_path)
    assert files_of(bank) == [*(f"secret_0_{i}.png" for i in range(3, 10)), *["new"] * 3]


def test_edits_share_the_rows():
    bank = make_bank()
    block = bank._storage.blocks[0].codes.data_ptr()
    edited = bank.without([1, 2]).extend(rows(3, seed=1), [0, 0, 0]).select([5, 0]).merge(bank)
    assert [b.codes.data_ptr() for b in edited._storage.blocks].count(block) == 2
    assert sum(len(b) for b in edited._storage.blocks) == 23


# extend and merge


def test_extend(bank, tmp_path):
    before = bank[:]
    new = rows(3, seed=1)
    extended = bank.extend(new, labels=[9, 0, 5], metadata={"file": ["a", None, "c"], "size": [1, 2, 3]})
    opened = save_and_open(extended, tmp_path / "new", max_shard_size=4 * 24)
    for extended in (extended, opened):  # noqa: B020
        assert torch.equal(extended[:10], before) and extended.labels.tolist() == [*LABELS, 9, 0, 5]
        assert extended.metadata.to_pydict() == {
            "file": [*(f"secret_0_{i}.png" for i in range(10)), "a", None, "c"],
            "size": [*[None] * 10, 1, 2, 3],
        }
        assert extended.indices_of("mug").tolist() == [10] and extended.id2label == NAMES
        error = (extended[10:].double() - new).norm() / new.norm()
        assert extended.history[-1]["relative_error"] == pytest.approx(error.item(), rel=1e-3, abs=1e-12)
    if bank.rank is None:
        assert error < 1e-2
        assert (error == 0) == (bank.dtype == torch.float32)
    else:
        # The orthogonal projection on the basis
        basis = torch.linalg.qr(bank.basis)[0]
        torch.testing.assert_close(extended[10:], (new - bank.mean) @ basis @ basis.T + bank.mean)
    one = bank.extend(new[0], [9])
    assert len(one) == 11 and files_of(one)[-1] is None
    torch.testing.assert_close(one[10], extended[10])


@pytest.mark.parametrize(
    ("dtype", "new_dtype", "exact"),
    [
        ("float32", torch.float32, True),
        ("float32", torch.bfloat16, True),
        ("float32", torch.float64, False),
        ("float16", torch.float16, True),
        ("float16", torch.float32, False),
        ("bfloat16", torch.float16, False),
        ("int8", torch.float32, False),
    ],
)
def test_rounding_is_logged_and_exact_where_the_dtypes_agree(dtype, new_dtype, exact, caplog):
    bank = GMemMemoryBank(rows()).compress(dtype=dtype)
    new = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(new_dtype)
    logging.enable_propagation()
    try:
        extended = bank.extend(new)
    finally:
        logging.disable_propagation()
    largest_error = (extended[10:].double() - new.double()).abs().max().item()
    assert extended.history[-1]["largest_error"] == pytest.approx(largest_error, rel=1e-3)
    assert (largest_error == 0) == exact and bool(caplog.records) == (not exact)
    if not exact:
        assert f"3 new snippets, stored as {dtype}, lost" in caplog.text and f"{largest_error:.3g}" in caplog.text


def test_projection_is_logged(caplog):
    bank = GMemMemoryBank(rows()).compress(rank=2)
    logging.enable_propagation()
    try:
        extended = bank.extend(rows(seed=1))
    finally:
        logging.disable_propagation()
    error = ((extended[10:] - rows(seed=1)).norm() / rows(seed=1).norm()).item()
    assert 0.1 < error < 1
    assert f"10 new snippets, stored as float32 of rank 2, lost {error:.2g} of their length" in caplog.text
    # What lies in the span of the bank is kept
    torch.testing.assert_close(bank.extend(bank[3])[-1], bank[3])


def test_normalized_stays_true_of_unit_rows_only():
    unit = torch.nn.functional.normalize(rows(), dim=1)
    bank = GMemMemoryBank(unit, normalized=True)
    assert bank.extend(unit).normalized and bank.select([0]).normalized
    assert bank.merge(bank).normalized and not bank.merge(GMemMemoryBank(unit)).normalized
    assert not bank.extend(2 * unit).normalized and not GMemMemoryBank(unit).extend(unit).normalized


@pytest.mark.parametrize("other_form", ["same", "float16", "low rank"])
def test_merge(bank, other_form, tmp_path):
    other = make_bank(4, seed=1, labels=[0, 3, 3, 9], id2label={3: "jay", 9: "mug"}, source_dataset="org/other")
    if other_form == "float16":
        other = other.compress(dtype="float16")
    elif other_form == "low rank":
        other = other.compress(rank=3)
    other = other.without(0)
    before, added = bank[:], other[:].float()
    merged = bank.merge(other)
    opened = save_and_open(merged, tmp_path / "new", max_shard_size=5 * 24)
    for merged in (merged, opened):  # noqa: B020
        assert torch.equal(merged[:10], before) and merged.labels.tolist() == [*LABELS, 3, 3, 9]
        if bank.dtype == torch.float32 and bank.rank is None:
            assert torch.equal(merged[10:], added)
        elif bank.rank is None:
            torch.testing.assert_close(merged[10:].float(), added, atol=0.02, rtol=0)
        else:
            torch.testing.assert_close(merged[10:], bank.extend(added, [3, 3, 9])[10:])
        assert files_of(merged)[10:] == [f"secret_1_{i}.png" for i in (1, 2, 3)]
        assert merged.id2label == NAMES | {3: "jay"}
        assert merged.source_dataset == "org/images, org/other"
        assert merged.history[-1]["parents"] == [bank.fingerprint, other.fingerprint]
        assert merged.history[-1]["added"] == 3 and merged.history[-1]["count"] == 13
    assert bank.merge(bank).source_dataset == "org/images"


def test_banks_of_the_same_basis_are_merged_exactly():
    bank = make_bank().compress(rank=2, dtype="int8")
    merged = bank.select([0, 1]).merge(bank.select([9]))
    assert torch.equal(merged[:], bank[[0, 1, 9]]) and "largest_error" not in merged.history[-1]
    other = make_bank(seed=1).compress(rank=2, dtype="int8")
    assert "largest_error" in bank.merge(other).history[-1]
    assert torch.equal(pickle.loads(pickle.dumps(bank)).merge(bank)[10:], bank[:])
    for basis, mean in ((rows(6, 2), torch.zeros(6)), (rows(6, 2, seed=1), torch.ones(6))):
        other = GMemMemoryBank.from_low_rank(rows(4, 2), basis, mean)
        merged = GMemMemoryBank.from_low_rank(rows(4, 2), rows(6, 2), torch.ones(6)).merge(other)
        assert "largest_error" in merged.history[-1] and not torch.equal(merged[4:], merged[:4])


@pytest.mark.parametrize("first_has", [True, False])
def test_columns_that_one_bank_lacks_become_null(first_has, tmp_path):
    full = GMemMemoryBank(rows(2), metadata={"file": ["a", "b"], "size": [1, 2]})
    others = [GMemMemoryBank(rows(2)), GMemMemoryBank(rows(2), metadata={"size": [3.5, 4]})]
    for other, files, sizes in zip(others, [[None] * 2] * 2, [[None] * 2, [3.5, 4]], strict=True):
        merged = full.merge(other) if first_has else other.merge(full)
        merged.save_pretrained(tmp_path)
        for merged in (merged, GMemMemoryBank.from_pretrained(tmp_path)):  # noqa: B020
            order = slice(None) if first_has else slice(None, None, -1)
            table = merged.select([0, 1, 2, 3]).metadata.to_pydict()
            halves = [["a", "b"], files][order], [[1, 2], sizes][order]
            assert table["file"] == sum(halves[0], []) and table["size"] == sum(halves[1], [])
    assert GMemMemoryBank(rows(2)).merge(GMemMemoryBank(rows(2))).metadata is None


def merge_with(**kwargs):
    return lambda bank: bank.merge(make_bank(**kwargs))


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda bank: bank.without(), ValueError, "one of `indices` and `labels`"),
        (lambda bank: bank.without([0], labels=[1]), ValueError, "one of `indices` and `labels`"),
        (lambda bank: bank.without([10]), IndexError, "row 10 "),
        (lambda bank: bank.without(labels="mug"), ValueError, "'mug', but no row"),
        (lambda bank: bank.without(slice(None)), ValueError, "no row would be left"),
        (lambda bank: bank.select([]), ValueError, "no row would be left"),
        (lambda bank: bank.extend(torch.ones(2, 5), [0, 0]), ValueError, "dimension 6, but is of 5"),
        (lambda bank: bank.extend([[1.0] * 6], [0]), TypeError, "snippets.*list"),
        (lambda bank: bank.extend(torch.ones(2, 6, dtype=torch.int64), [0, 0]), ValueError, "snippets.*int64"),
        (lambda bank: bank.extend(torch.full((1, 6), torch.nan), [0]), ValueError, "row 0 holds NaN"),
        (lambda bank: bank.extend(torch.ones(2, 6)), ValueError, "`labels` is None, but this bank has labels"),
        (lambda bank: bank.extend(torch.ones(2, 6), [1]), ValueError, r"labels.*\(2,\).*\(1,\)"),
        (lambda bank: bank.extend(torch.ones(2, 6), [1, 1], {"file": ["a"]}), ValueError, "metadata.*2 rows.*1"),
        (lambda bank: bank.extend(torch.ones(1, 6), [1], {"file": [1]}), ValueError, "metadata do not go together.*file"),
        (lambda bank: bank.merge(bank[:]), TypeError, "other.*Tensor"),
        (lambda bank: bank.merge(GMemMemoryBank(rows(2, 5))), ValueError, "dim 5, but this bank has 6"),
        (merge_with(encoder=None), ValueError, "encoder None, but this bank has 'org/encoder'"),
        (merge_with(encoder_revision="abc"), ValueError, "encoder_revision 'abc', but this bank has None"),
        (merge_with(preprocessing={"size": 256}), ValueError, "preprocessing {'size': 256}, but .* {'size': 224}"),
        (merge_with(labels=None), ValueError, "only this bank, not `other`, has labels"),
        (merge_with(id2label={1: "jay"}), ValueError, "label 1 is 'jay' .*, but 'crane'"),
        (merge_with(metadata={"file": [[1]] * 10}), ValueError, "metadata do not go together"),
        (lambda bank: bank.compress(), ValueError, "`rank` and `dtype`"),
        (lambda bank: bank.compress(dtype="int4"), ValueError, "dtype.*'int4'.*float32, float16, bfloat16, int8"),
        (lambda bank: bank.compress(rank=0), ValueError, "`rank` is 0, but accepted is 1 to 6"),
        (lambda bank: bank.compress(rank=7), ValueError, "`rank` is 7, but accepted is 1 to 6"),
    ],
)  # fmt: skip
def test_wrong_edits(edit, error, message, tmp_path):
    make_bank().save_pretrained(tmp_path)
    for bank in (make_bank(), GMemMemoryBank.from_pretrained(tmp_path)):
        with pytest.raises(error, match=message):
            edit(bank)
    with pytest.raises(ValueError, match=r"`labels` is \[1\], but this bank has no labels"):
        GMemMemoryBank(rows()).extend(torch.ones(1, 6), [1])


# History


def test_history(tmp_path):
    base = make_bank()
    base.save_pretrained(tmp_path / "base")
    for start in (base, make_bank(), GMemMemoryBank.from_pretrained(tmp_path / "base")):
        smaller = start.without(labels=7)
        small = smaller.compress(rank=2, dtype="float16")
        last = small.extend(rows(2, seed=1), [1, 1]).select([0, 3, 8])
        opened = save_and_open(last, tmp_path / "last")
        assert opened.history == read_config(tmp_path / "last")["history"]
        kinds = [(edit["edit"], edit["count"], edit["parents"]) for edit in opened.history]
        assert kinds[:3] == [
            ("without", 7, [base.fingerprint]),
            ("compress", 7, [smaller.fingerprint]),
            ("extend", 9, [small.fingerprint]),
        ]
        assert opened.history[0]["removed"] == 3 and opened.history[2]["added"] == 2
        assert opened.history[1] | {"reconstruction_error": None} == {
            "edit": "compress", "rank": 2, "dtype": "float16", "count": 7,
            "reconstruction_error": None, "parents": [smaller.fingerprint],
        }  # fmt: skip
        for ancestor in (start, smaller, small, last):
            assert opened.descends_from(ancestor.fingerprint)
        assert not opened.descends_from(make_bank(seed=1).fingerprint)
        assert not start.descends_from(opened.fingerprint) and start.history == []
        # It goes on where the files left off
        assert opened.without([0]).history[:4] == opened.history


def test_history_of_a_merge():
    first, second = make_bank(), make_bank(seed=1)
    left, right = first.without([0]), first.merge(second)
    merged = left.merge(right)
    assert [edit["edit"] for edit in merged.history] == ["without", "merge", "merge"]
    for ancestor in (first, second, left, right, merged):
        assert merged.descends_from(ancestor.fingerprint)


def test_fingerprints_of_parents_are_computed_when_they_are_needed(monkeypatch):
    computed = []
    compute = GMemMemoryBank._compute_fingerprint
    monkeypatch.setattr(GMemMemoryBank, "_compute_fingerprint", lambda bank: computed.append(1) or compute(bank))
    bank = make_bank()
    edited = bank.without([0]).extend(rows(1), [0]).merge(bank).select([3, 4])
    assert not computed
    assert edited.history[0]["parents"] == [bank.fingerprint]
    assert len(computed) == 4  # of each parent, once
    computed.clear()
    edited = bank.without([0]).extend(rows(1), [0])
    assert edited.descends_from(bank.fingerprint) and not computed  # the one that is known is looked at first


def test_a_compressed_bank_does_not_hold_on_to_its_parents():
    edited = make_bank().without([0]).compress(rank=2)
    assert all(isinstance(parent, str) for edit in edited._history for parent in edit.parents)


def test_long_histories_are_pickled_and_saved(tmp_path):
    bank = make_bank()
    for k in range(100):
        bank = bank.extend(rows(1, seed=k), [0])
    copy = pickle.loads(pickle.dumps(bank))
    assert torch.equal(copy[:], bank[:]) and len(copy.history) == 100
    copy.save_pretrained(tmp_path)
    assert GMemMemoryBank.from_pretrained(tmp_path).descends_from(make_bank().fingerprint)


def test_verify_of_an_edited_bank_checks_the_files_below(tmp_path):
    make_bank().save_pretrained(tmp_path)
    edited = GMemMemoryBank.from_pretrained(tmp_path).without([0]).extend(rows(1), [0])
    edited.verify()
    (path,) = tmp_path.glob("*-of-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        edited.verify()


# Low rank and small types


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("rank", [None, 3, 6])
def test_compress(dtype, rank, tmp_path):
    bank = make_bank()
    small = bank.compress(rank=rank, dtype=getattr(torch, dtype))
    assert small.shape == bank.shape and small.rank == rank and small.dtype == getattr(torch, dtype)
    error = ((small[:].double() - bank[:]).norm() / bank[:].double().norm()).item()
    assert small.reconstruction_error == pytest.approx(error, rel=1e-3, abs=1e-6)
    opened = save_and_open(small, tmp_path, max_shard_size=20)
    assert (
        opened.reconstruction_error == small.reconstruction_error == opened.extend(bank[0], [0]).reconstruction_error
    )
    assert bank.reconstruction_error is None
    bounds = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-3, "int8": 1e-2}
    if rank == 3:
        centred = rows() - rows().mean(dim=0)
        left = torch.linalg.svdvals(centred)[3:].norm() / rows().norm()
        assert error == pytest.approx(left.item(), abs=bounds[dtype])
    else:
        assert error < bounds[dtype]
    if dtype == "int8" and rank is None:  # also of rows that are already rounded
        rounded = bank.compress(dtype="bfloat16")
        torch.testing.assert_close(rounded.compress(dtype="int8")[:], rounded[:].float(), rtol=0, atol=0.02)
        scales = rows().abs().amax(dim=1) / 127
        assert ((small[:] - rows()).abs() <= scales[:, None] * 0.5001).all()


def test_compress_again():
    bank = make_bank(labels=None, id2label=None)
    small = bank.compress(rank=4).without([0]).compress(dtype="int8")
    assert small.rank == 4 and small.dtype == torch.int8
    torch.testing.assert_close(small[:], bank.compress(rank=4)[1:], atol=0.05, rtol=0)
    smaller = small.compress(rank=2)
    assert smaller.rank == 2 and smaller.dtype == torch.int8
    with pytest.raises(ValueError, match="`rank` is 5, but accepted is 1 to 4"):
        bank.compress(rank=4).compress(rank=5)


def test_zero_rows_and_equal_rows():
    bank = GMemMemoryBank(torch.zeros(3, 4))
    assert torch.equal(bank.compress(dtype="int8")[:], torch.zeros(3, 4))
    assert bank.compress(dtype="int8").reconstruction_error == 0
    with pytest.raises(ValueError, match="`rank` is 1, but accepted is 1 to 0"):
        bank.compress(rank=1)


def test_out_of_range():
    with pytest.raises(ValueError, match=r"1e\+05.*range of torch.float16"):
        GMemMemoryBank(torch.full((2, 3), 1e5)).compress(dtype="float16")
    with pytest.raises(ValueError, match="range of torch.float16"):
        GMemMemoryBank(torch.ones(2, 3)).compress(dtype="float16").extend(torch.full((3,), 1e5))


def test_a_large_mean_costs_no_digits():
    bank = GMemMemoryBank(rows(500, 20) / torch.arange(1, 21).sqrt() + 1000)
    basis = bank.compress(rank=5).basis
    directions = torch.linalg.svd(bank[:].double() - bank[:].double().mean(dim=0), full_matrices=False)[2][:5].T
    found = torch.linalg.qr(basis.double())[0]
    assert torch.linalg.matrix_norm(directions - found @ (found.T @ directions), 2) < 1e-4


def test_subspace_of_a_slowly_decaying_spectrum(monkeypatch):
    from diffusers_gmem.models import snippet_storage

    monkeypatch.setattr(snippet_storage, "PIECE_ELEMENTS", 50_000)  # several pieces, the last one short
    dim = 96
    rotation = torch.linalg.qr(rows(dim, dim))[0]
    bank = GMemMemoryBank(rows(3001, dim, seed=1) * torch.arange(1, dim + 1) ** -0.5 @ rotation + rows(1, dim, seed=2))
    small = bank.compress(rank=16)
    expected = torch.linalg.svd(bank[:].double() - bank[:].double().mean(dim=0), full_matrices=False)[2][:16].T
    found = torch.linalg.qr(small.basis.double())[0]
    assert torch.linalg.matrix_norm(expected - found @ (found.T @ expected), 2) < 1e-4
    torch.testing.assert_close(
        small.basis.T @ small.basis, small.coefficients.T @ small.coefficients, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_from_low_rank(dtype, tmp_path):
    coefficients, basis, mean = rows(10, 3).to(dtype), rows(6, 3, seed=1), rows(1, 6, seed=2)[0]
    bank = GMemMemoryBank.from_low_rank(
        coefficients, basis, mean, labels=LABELS, metadata={"file": ["a"] * 10}, id2label=NAMES, encoder="org/encoder"
    )
    assert bank.shape == (10, 6) and bank.rank == 3 and bank.dtype == dtype and bank.encoder == "org/encoder"
    expected = coefficients.float() @ basis.T + mean
    torch.testing.assert_close(bank[:], expected)
    assert bank[:].dtype == torch.float32 and torch.equal(bank[4], bank[:][4])
    assert repr(bank).startswith("GMemMemoryBank(10 snippets of dimension 6, ") and "rank 3" in repr(bank)
    coefficients.zero_(), basis.zero_(), mean.zero_(), bank.basis.zero_(), bank.mean.zero_(), bank.coefficients.zero_()
    torch.testing.assert_close(bank[:], expected)
    opened = save_and_open(bank, tmp_path, max_shard_size=3 * 3 * 4)
    for a, b in ((opened.coefficients, bank.coefficients), (opened.basis, bank.basis), (opened.mean, bank.mean)):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    full = make_bank()
    assert full.rank is full.coefficients is full.basis is full.mean is None


def test_fingerprint_covers_all_of_a_low_rank_bank():
    def make(coefficients=0, basis=0, mean=0, labels=None, dtype=torch.float32):
        parts = [rows(4, 3, seed=1), rows(6, 3, seed=2), rows(1, 6, seed=3)[0]]
        for part, change in zip(parts, (coefficients, basis, mean), strict=True):
            part.view(-1)[-1] += change
        return GMemMemoryBank.from_low_rank(parts[0].to(dtype), *parts[1:], labels=labels).fingerprint

    different = [make(), make(1), make(0, 1), make(0, 0, 1), make(labels=[0] * 4), make(dtype=torch.float16)]
    assert len(set(different)) == len(different) and make() == make()
    parts = rows(3, 3)  # as one row of coefficients, basis and mean
    low_rank = GMemMemoryBank.from_low_rank(parts[0][:, None], parts[1][:, None], parts[2])
    assert low_rank.shape == parts.shape and low_rank.fingerprint != GMemMemoryBank(parts).fingerprint
    bank = GMemMemoryBank(rows()).compress(dtype="int8")
    scaled = GMemMemoryBank(2 * rows()).compress(dtype="int8")  # the same numbers, other scales
    assert torch.equal(bank._storage.blocks[0].codes, scaled._storage.blocks[0].codes)
    assert bank.fingerprint != scaled.fingerprint


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(4, 3), torch.ones(6, 2), torch.ones(6)), ValueError, r"basis.*\(6, 3\).*\(6, 2\)"),
        ((torch.ones(4, 3), torch.ones(6, 3), torch.ones(5)), ValueError, r"basis.*\(5, 3\).*\(6, 3\)"),
        ((torch.ones(4), torch.ones(6, 1), torch.ones(6)), ValueError, r"coefficients.*\(N, r\).*\(4,\)"),
        ((torch.ones(4, 3), torch.ones(6, 3), torch.ones(6, 1)), ValueError, r"mean.*\(D,\).*\(6, 1\)"),
        ((torch.ones(4, 3), torch.full((6, 3), torch.inf), torch.ones(6)), ValueError, "basis.*finite"),
        ((torch.ones(4, 3), torch.ones(6, 3), torch.full((6,), torch.nan)), ValueError, "mean.*finite"),
        ((torch.ones(4, 3).char(), torch.ones(6, 3), torch.ones(6)), ValueError, "coefficients.*int8"),
        ((torch.ones(4, 3), torch.ones(6, 3), None), TypeError, "mean.*NoneType"),
    ],
)
def test_wrong_low_rank_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        GMemMemoryBank.from_low_rank(*arguments)


@pytest.mark.parametrize("kind", ["basis", "coefficients", "scales"])
def test_verify_finds_what_is_wrong_with_the_files_of_a_compressed_bank(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    make_bank().compress(rank=3, dtype="int8").save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*-basis-*" if kind == "basis" else "*-of-*")
    tensors = load_file(path)
    assert set(tensors) == ({"basis", "mean"} if kind == "basis" else {"coefficients", "scales"})
    header = None if kind == "basis" else {"shard": "1 of 1"}
    tensors[kind][0] += 1
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        GMemMemoryBank.from_pretrained(tmp_path).verify()
    save_file({kind: tensors[kind]}, path, metadata=header)
    with pytest.raises(ValueError, match=f"{path.name} has to hold .* and .* alone, but holds \\['{kind}'\\]"):
        GMemMemoryBank.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path.name} is missing"):
        GMemMemoryBank.from_pretrained(tmp_path)


def test_config_and_files_have_to_agree_on_the_rank(tmp_path):
    make_bank().compress(rank=3).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    for change, message in (
        ({"rank": None}, "`rank` is None"),
        ({"rank": 0}, "`rank` is 0"),
        ({"rank": 2}, "basis-.* has the wrong shape"),
        ({"history": [{"edit": "without", "parents": ["x"], "count": 1}]}, "fingerprint is 'x'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            GMemMemoryBank.from_pretrained(tmp_path)


# Cost


def test_edits_of_a_large_bank_are_cheap():
    # 1,000,000 rows; narrow, as their width plays no part
    bank = GMemMemoryBank(torch.zeros(1_000_000, 2), labels=torch.zeros(1_000_000, dtype=torch.int64))
    bank = bank.without(range(0, 1000, 100))
    new = torch.ones(1000, 2)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        extended = bank.extend(new, [1] * 1000)
        seconds.append(time.perf_counter() - start)
    assert len(extended) == 1_000_990 and min(seconds) < 0.05
    made = [extended._storage.rows, extended._labels, extended._storage.blocks[1].codes]
    assert sum(tensor.nbytes for tensor in made) < 20e6
    assert extended._storage.blocks[0] is bank._storage.blocks[0]
