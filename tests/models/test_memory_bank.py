# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_gmem.models.memory_bank import GMemMemoryBank
from diffusers_gmem.models.memory_bank_files import sha256_of_file


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROW_BYTES = 6 * 4
FOUR_SHARDS, TWO_SHARDS = 3 * ROW_BYTES, 5 * ROW_BYTES  # of the ten float32 rows of `make_bank`


def rows(count=10, dim=6, dtype=torch.float32, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_bank(**kwargs):
    """Ten rows with everything that a bank can have."""
    defaults = {
        "snippets": rows(),
        "labels": [0, 0, 1, 1, 1, 2, 2, 7, 7, 7],
        "metadata": {"file": [f"{i}.png" for i in range(10)], "split": ["train"] * 10},
        "id2label": {0: "tench", 1: "crane", 2: "golden retriever", 7: "crane", 9: "mug"},
        "encoder": "org/encoder",
        "encoder_revision": "abc",
        "preprocessing": {"size": [224, 224], "resample": "bicubic"},
        "source_dataset": "org/images",
        "normalized": True,
    }
    return GMemMemoryBank(**(defaults | kwargs))


def edit_config(folder, edit):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def shards(folder):
    return sorted(folder.glob("memory_bank-*-of-*.safetensors"))


def assert_same(bank, other):
    assert bank.dtype == other.dtype and torch.equal(bank[:], other[:])
    assert (bank.labels is None) == (other.labels is None)
    assert bank.labels is None or torch.equal(bank.labels, other.labels)
    assert bank.metadata == other.metadata
    for name in (
        "fingerprint",
        "id2label",
        "encoder",
        "encoder_revision",
        "preprocessing",
        "source_dataset",
        "normalized",
    ):
        assert getattr(bank, name) == getattr(other, name), name


# Construction and immutability


def test_properties():
    bank = make_bank()
    assert len(bank) == 10 and bank.dim == 6 and bank.shape == (10, 6) and bank.dtype == torch.float32
    assert bank.metadata.column("file")[3].as_py() == "3.png"
    assert repr(bank) == "GMemMemoryBank(10 snippets of dimension 6, float32, with labels, encoder 'org/encoder')"
    plain = GMemMemoryBank(rows())
    assert plain.labels is None and plain.metadata is None and plain.id2label is None and plain.preprocessing is None


def test_the_rows_are_copied_unless_the_caller_keeps_them_unchanged():
    snippets = rows()
    copied, shared = GMemMemoryBank(snippets), GMemMemoryBank(snippets, copy=False)
    low_rank = GMemMemoryBank.from_low_rank(snippets, torch.eye(6), torch.zeros(6), copy=False)
    snippets[3] = 7
    assert torch.equal(copied[:], rows())
    assert torch.equal(shared[3], snippets[3]) and torch.equal(low_rank[3], snippets[3])


@pytest.mark.parametrize("copy", [True, False])
def test_rows_that_are_not_contiguous(tmp_path, copy):
    snippets = rows(6, 10).T
    bank = GMemMemoryBank(snippets, copy=copy)
    bank.save_pretrained(tmp_path)
    assert torch.equal(GMemMemoryBank.from_pretrained(tmp_path)[:], snippets)
    assert bank.fingerprint == GMemMemoryBank(snippets.contiguous()).fingerprint


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"snippets": [[1.0]]}, TypeError, "snippets.*list"),
        ({"snippets": torch.ones(3)}, ValueError, r"snippets.*\(3,\)"),
        ({"snippets": torch.ones(0, 6)}, ValueError, r"snippets.*\(0, 6\)"),
        ({"snippets": torch.ones(10, 6, dtype=torch.float64)}, ValueError, "snippets.*float64"),
        ({"snippets": rows().index_fill(0, torch.tensor([4, 7]), float("nan"))}, ValueError, "row 4 "),
        ({"snippets": rows().index_fill(0, torch.tensor([9]), float("inf"))}, ValueError, "row 9 "),
        ({"labels": [0, 1]}, ValueError, r"labels.*\(10,\).*\(2,\)"),
        ({"labels": torch.ones(10)}, TypeError, "labels.*float32"),
        ({"metadata": {"file": ["a"]}}, ValueError, "metadata.*10.*1"),
        ({"metadata": {"file": ["a"] * 10, "split": ["b"]}}, ValueError, "split"),
        ({"id2label": {"0": "tench"}}, TypeError, "id2label.*'0'"),
        ({"preprocessing": {"size": torch.ones(1)}}, TypeError, "preprocessing.*Tensor"),
    ],
)
def test_wrong_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        make_bank(**kwargs)


def test_nothing_changes_a_bank(tmp_path):
    snippets, labels = rows(), torch.zeros(10, dtype=torch.int64)
    bank = make_bank(snippets=snippets, labels=labels)
    bank.save_pretrained(tmp_path)
    for bank in (bank, GMemMemoryBank.from_pretrained(tmp_path)):  # noqa: B020
        expected = bank[:]
        snippets.zero_(), labels.fill_(5)
        for view in (bank[0], bank[[0, 1]], bank[:], bank.sample(4)[0], bank.labels):
            view.fill_(7)
        bank.id2label.clear(), bank.preprocessing.clear()
        assert torch.equal(bank[:], expected) and bank.labels.eq(0).all()
        assert bank.id2label and bank.preprocessing
        for name in ("encoder", "labels", "metadata", "fingerprint", "anything"):
            with pytest.raises(AttributeError, match=f"immutable.*{name}"):
                setattr(bank, name, None)
        bank.verify()


def test_pickle(tmp_path):
    make_bank().save_pretrained(tmp_path, max_shard_size=FOUR_SHARDS)
    for bank in (make_bank(), GMemMemoryBank.from_pretrained(tmp_path)):
        assert_same(pickle.loads(pickle.dumps(bank)), bank)


# Rows


@pytest.mark.parametrize("shard_size", [None, ROW_BYTES, FOUR_SHARDS])
def test_indexing(shard_size, tmp_path):
    expected, bank = rows(), make_bank()
    if shard_size is not None:
        bank.save_pretrained(tmp_path, max_shard_size=shard_size)
        bank = GMemMemoryBank.from_pretrained(tmp_path)
    for index in (0, 9, -1, -10, torch.tensor(3)):
        assert bank[index].shape == (6,) and torch.equal(bank[index], expected[index])
    for index in ([3], [9, 0, 0, -2], torch.tensor([5, 1, -10]), torch.tensor([8, 2], dtype=torch.int16), []):
        assert torch.equal(bank[index], expected[torch.as_tensor(index, dtype=torch.int64)])
    for index in (slice(None), slice(2, 7, 2), slice(-3, None), slice(5, 2), slice(0, 99)):
        assert torch.equal(bank[index], expected[index])
    assert torch.equal(bank[::-3], expected.flip(0)[::3])
    assert torch.equal(bank[bank.labels == 7], expected[7:])
    assert torch.equal(torch.stack(list(bank)), expected)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (10, IndexError, "row 10 .*-10 to 9"),
        (-11, IndexError, "row -11 .*-10 to 9"),
        ([0, 12, 3], IndexError, "row 12 .*-10 to 9"),
        (torch.zeros(2, 2, dtype=torch.int64), IndexError, r"\(2, 2\)"),
        ([True, False], IndexError, r"\(10,\).*\(2,\)"),
        ([0.5], TypeError, "integers.*float"),
    ],
)
def test_wrong_indices(index, error, message):
    with pytest.raises(error, match=message):
        make_bank()[index]


def test_indices_of():
    bank = make_bank()
    assert bank.indices_of(7).tolist() == [7, 8, 9]
    assert bank.indices_of("golden retriever").tolist() == [5, 6]
    assert bank.indices_of("crane").tolist() == [2, 3, 4, 7, 8, 9]  # two labels have this name
    assert bank.indices_of([2, "tench", 0]).tolist() == [0, 1, 5, 6]


@pytest.mark.parametrize(
    ("kwargs", "class_labels", "message"),
    [
        ({}, 3, "holds 3,.*0, 1, 2, 7"),
        ({}, [0, "mug"], "holds 'mug',.*0, 1, 2, 7"),
        ({}, "golden retreiver", "'golden retreiver'.*close.*'golden retriever'"),
        ({}, "xyz", "'xyz'.*'tench', 'crane'"),
        ({}, [], "empty"),
        ({"id2label": None}, "tench", "'tench'.*no `id2label`"),
        ({"labels": None}, 3, "3, but this bank has no labels"),
    ],
)
def test_unknown_labels(kwargs, class_labels, message):
    bank = make_bank(**kwargs)
    with pytest.raises(ValueError, match=message):
        bank.indices_of(class_labels)
    with pytest.raises(ValueError, match=message):
        bank.sample(1, class_labels=class_labels)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("class_labels", [None, ["crane"]])
def test_sample(replacement, class_labels, tmp_path):
    bank = make_bank()
    bank.save_pretrained(tmp_path, max_shard_size=FOUR_SHARDS)

    def draw(bank, seed):
        return bank.sample(5, torch.Generator().manual_seed(seed), class_labels, replacement)

    snippets, indices = draw(bank, 3)
    assert snippets.shape == (5, 6) and indices.shape == (5,) and indices.dtype == torch.int64
    assert torch.equal(snippets, bank[indices])
    torch.randn(1)  # the global generator has no part in it
    for same in (bank, GMemMemoryBank.from_pretrained(tmp_path)):
        assert torch.equal(draw(same, 3)[1], indices)
    assert len({tuple(draw(bank, seed)[1].tolist()) for seed in range(20)}) > 10
    if class_labels is not None:
        assert set(indices.tolist()) <= {2, 3, 4, 7, 8, 9}
    if not replacement:
        for seed in range(20):
            assert len(set(draw(bank, seed)[1].tolist())) == 5


def test_sample_is_uniform():
    _, indices = make_bank().sample(6000, torch.Generator().manual_seed(0), class_labels=[0, 1, 7])
    counts = indices.bincount(minlength=10)
    assert counts[5:7].sum() == 0  # label 2
    # eight rows with 750 each on average, standard deviation 26
    assert (counts[[0, 1, 2, 3, 4, 7, 8, 9]] - 750).abs().max() < 110


def test_sample_limits():
    bank = make_bank()
    assert sorted(bank.sample(10, replacement=False)[1].tolist()) == list(range(10))
    assert len(bank.sample(50)[1]) == 50
    with pytest.raises(ValueError, match="`n` is 11.*1 to 10 without replacement"):
        bank.sample(11, replacement=False)
    with pytest.raises(ValueError, match="`n` is 3.*1 to 2 without"):
        bank.sample(3, class_labels="tench", replacement=False)
    with pytest.raises(ValueError, match="`n` is 0.*1 or more"):
        bank.sample(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sample_with_a_generator_on_a_gpu():
    draws = [make_bank().sample(5, torch.Generator("cuda").manual_seed(0), replacement=r) for r in (True, True, False)]
    assert all(snippets.device.type == indices.device.type == "cpu" for snippets, indices in draws)
    assert torch.equal(draws[0][1], draws[1][1]) and len(set(draws[2][1].tolist())) == 5


# Fingerprint


def test_fingerprint_depends_on_dtype_shape_rows_and_labels_alone(tmp_path):
    base = make_bank().fingerprint
    assert base.startswith("sha256:") and len(base) == 7 + 64
    for kwargs in ({"metadata": None}, {"id2label": None}, {"encoder": "other"}, {"normalized": False}):
        assert make_bank(**kwargs).fingerprint == base
    for shard_size in (1, FOUR_SHARDS, "1GB"):
        make_bank().save_pretrained(tmp_path, max_shard_size=shard_size)
        bank = GMemMemoryBank.from_pretrained(tmp_path)
        assert bank.fingerprint == base == bank._compute_fingerprint()

    changed = rows()
    changed[9, 5] = torch.nextafter(changed[9, 5], torch.tensor(9.0))
    others = [
        make_bank(snippets=changed),
        make_bank(snippets=rows().flip(0)),
        make_bank(snippets=rows().bfloat16()),
        make_bank(labels=None),
        make_bank(labels=[0] * 10),
        make_bank(labels=[0, 0, 1, 1, 1, 2, 7, 2, 7, 7]),
        GMemMemoryBank(rows().reshape(5, 12)),
        GMemMemoryBank(rows().reshape(12, 5)),
        GMemMemoryBank(torch.zeros(4, 4, dtype=torch.float16)),
        GMemMemoryBank(torch.zeros(4, 4, dtype=torch.bfloat16)),
    ]
    assert len({base, *(bank.fingerprint for bank in others)}) == 1 + len(others)


def test_fingerprint_stays_what_it_is():
    """Published pipelines carry fingerprints: how they are computed must never change."""
    bank = GMemMemoryBank(torch.arange(6, dtype=torch.float16).reshape(3, 2), labels=[2, 0, 1])
    assert bank.fingerprint == "sha256:4335975edcf7e152a34aed3f3fde59cc3d1a93ce2575725fb190469fa9aab0b0"


# Saving and opening


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_rows", [1, 3, 4, 7, 100])
def test_round_trip_is_exact(dtype, shard_rows, tmp_path):
    bank = make_bank(snippets=rows(dtype=dtype))
    bank.save_pretrained(tmp_path / "deep" / "bank", max_shard_size=shard_rows * 6 * dtype.itemsize)
    opened = GMemMemoryBank.from_pretrained(tmp_path / "deep", subfolder="bank")
    assert_same(opened, bank)
    opened.verify()
    sizes = [entry["rows"] for entry in json.loads((opened._folder / "config.json").read_text())["files"]["snippets"]]
    assert sum(sizes) == 10 and max(sizes) <= shard_rows and max(sizes) - min(sizes) <= 1

    # An opened bank can be saved again, in other shards, also over itself.
    opened.save_pretrained(tmp_path / "deep" / "bank", max_shard_size="1KB")
    again = GMemMemoryBank.from_pretrained(str(tmp_path / "deep" / "bank"))
    again.verify()
    assert_same(again, bank)
    assert_same(opened, bank)  # its files are deleted, its mapping is not
    assert len(shards(tmp_path / "deep" / "bank")) == 1


def test_round_trip_of_a_plain_bank(tmp_path):
    bank = GMemMemoryBank(rows())
    bank.save_pretrained(tmp_path)
    assert_same(GMemMemoryBank.from_pretrained(tmp_path), bank)
    assert len(list(tmp_path.iterdir())) == 2


def test_files_are_what_others_can_read(tmp_path):
    import pyarrow.parquet

    bank = make_bank()
    bank.save_pretrained(tmp_path, max_shard_size=FOUR_SHARDS)
    names = [re.sub("[0-9a-f]{8}", "?", path.name) for path in tmp_path.iterdir()]
    assert sorted(names) == [
        "config.json",
        *(f"memory_bank-0000{k}-of-00004-?.safetensors" for k in range(1, 5)),
        "memory_bank-labels-?.safetensors",
        "metadata.parquet",
    ]
    assert torch.equal(torch.cat([load_file(path)["snippets"] for path in shards(tmp_path)]), rows())
    assert pyarrow.parquet.read_table(tmp_path / "metadata.parquet") == bank.metadata
    with safe_open(shards(tmp_path)[1], framework="pt") as file:
        assert file.metadata() == {"shard": "2 of 4"}


def test_equal_banks_make_equal_files(tmp_path):
    for name in ("a", "b"):
        make_bank().save_pretrained(tmp_path / name, max_shard_size=FOUR_SHARDS)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_opening_does_not_import_pyarrow(tmp_path, monkeypatch):
    make_bank().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    bank = GMemMemoryBank.from_pretrained(tmp_path)
    assert len(bank.sample(3)[0]) == 3 and bank.fingerprint == make_bank(metadata=None).fingerprint
    with pytest.raises(ImportError):
        bank.metadata  # noqa: B018


@pytest.mark.parametrize("max_shard_size", [0, -1, "many", "-1GB"])
def test_wrong_shard_size(max_shard_size, tmp_path):
    with pytest.raises(ValueError, match=f"max_shard_size.*{max_shard_size}"):
        make_bank().save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert not list(tmp_path.iterdir())


# Damaged files: the error names the file and the fault.


@pytest.fixture
def folder(tmp_path):
    make_bank().save_pretrained(tmp_path, max_shard_size=FOUR_SHARDS)
    assert len(shards(tmp_path)) == 4
    return tmp_path


def rewrite(path, **tensors):
    """Replaces the tensors of a shard and keeps its header."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file(tensors, path, metadata=header)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-4])


def swap(path, other):
    between = path.with_suffix(".between")
    path.rename(between), other.rename(path), between.rename(other)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: path.unlink(), "missing"),
        (truncate, "truncated"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "too long"),
        (lambda path: path.write_bytes(b"\xff" * path.stat().st_size), "not a readable safetensors file"),
        (lambda path: rewrite(path, rows=load_file(path)["snippets"]), r"'snippets' alone.*\['rows'\]"),
        (lambda path: rewrite(path, **load_file(path), more=torch.ones(1)), "'snippets' alone.*'more'"),
        (lambda path: rewrite(path, snippets=load_file(path)["snippets"].half()), "dtype.*float16.*float32"),
        (lambda path: rewrite(path, snippets=load_file(path)["snippets"].view(torch.int32)), "dtype.*int32.*float32"),
        (lambda path: rewrite(path, snippets=load_file(path)["snippets"][:1]), r"shape.*\(1, 6\).*\(3, 6\)"),
        (lambda path: rewrite(path, snippets=torch.ones(6, 3)), r"shape.*\(6, 3\).*\(3, 6\)"),
    ],
)
def test_damaged_shard_is_found_on_opening(damage, fault, folder):
    path = shards(folder)[3]
    damage(path)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{path.name} .*{fault}"):
        GMemMemoryBank.from_pretrained(folder)


def test_reordered_shards_are_found_on_opening(folder):
    first, second = shards(folder)[1::2]
    swap(first, second)
    with pytest.raises(ValueError, match=f"{first.name} is out of order: it is shard 4 of 4.* 2 of 4"):
        GMemMemoryBank.from_pretrained(folder)
    swap(first, second)
    GMemMemoryBank.from_pretrained(folder)
    edit_config(folder, lambda config: config["files"]["snippets"].reverse())
    with pytest.raises(ValueError, match="00004-of-00004-.*.safetensors is out of order"):
        GMemMemoryBank.from_pretrained(folder)


@pytest.mark.parametrize("name", ["*-labels-*.safetensors", "metadata.parquet"])
def test_damaged_labels_and_metadata_are_found_on_opening(name, folder):
    (path,) = folder.glob(name)
    truncate(path)
    with pytest.raises(ValueError, match=f"{path.name} is truncated"):
        GMemMemoryBank.from_pretrained(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path.name} is missing"):
        GMemMemoryBank.from_pretrained(folder)


def test_wrong_labels_file_is_found_on_opening(folder):
    (path,) = folder.glob("*-labels-*.safetensors")
    rewrite(path, labels=torch.zeros(10))
    with pytest.raises(ValueError, match=f"{path.name} has the wrong dtype.*float32.*int64"):
        GMemMemoryBank.from_pretrained(folder)
    rewrite(path, labels=torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"{path.name} has the wrong shape.*\(9,\).*\(10,\)"):
        GMemMemoryBank.from_pretrained(folder)


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda config: config.pop("fingerprint"), "'fingerprint' is missing"),
        (lambda config: config.pop("files"), "'files' is missing"),
        (lambda config: config["files"]["snippets"][0].pop("sha256"), "sha256"),
        (lambda config: config["files"].update(snippets=None), "broken"),
        (lambda config: config["files"]["snippets"].pop(), "`count` is 10.* shards .* 7 rows"),
        (lambda config: config["files"]["labels"].update(rows=9), "`count` is 10.* labels .* 9 rows"),
        (lambda config: config["files"]["metadata"].update(rows=9), "`count` is 10.* metadata .* 9 rows"),
        (lambda config: config["files"]["snippets"][0].update(file="../x.safetensors"), "'../x.safetensors'"),
        (lambda config: config.update(dtype="float64"), "float64.*float32, float16, bfloat16"),
        (lambda config: config.update(dim=-1), "`dim` is -1"),
        (lambda config: config.update(count="10"), "broken"),
        (lambda config: config.update(fingerprint="md5:0"), "md5:0"),
        (lambda config: config.update(format_version=2), "format version 2, but .* reads 1"),
        (lambda config: config.update(_class_name="AutoencoderKL"), "does not describe a GMemMemoryBank"),
    ],
)
def test_damaged_config_is_found_on_opening(edit, fault, folder):
    edit_config(folder, edit)
    with pytest.raises(ValueError, match=f"config.json .*{fault}"):
        GMemMemoryBank.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b'{"_class_name": "GMemMem', b"\xff\xfe", b"[]"])
def test_unreadable_config(content, folder):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json (is broken: it is not JSON|does not describe)"):
        GMemMemoryBank.from_pretrained(folder)


def test_no_bank_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'bank' / 'config.json'}"):
        GMemMemoryBank.from_pretrained(tmp_path, subfolder="bank")
    with pytest.raises(FileNotFoundError, match="neither a local folder nor a repository of the Hub"):
        GMemMemoryBank.from_pretrained(tmp_path / "nothing")


def overwrite(path, offset, content):
    with path.open("rb+") as file:
        file.seek(offset, os.SEEK_END)
        file.write(content)


def put_sha256(folder, name):
    """Makes `config.json` agree with a changed file, so that only the changed content can give it away."""
    digest = sha256_of_file(folder / name)

    def edit(config):
        files = config["files"]
        for entry in [*files["snippets"], files["labels"], files["metadata"]]:
            if entry["file"] == name:
                entry.update(sha256=digest, bytes=(folder / name).stat().st_size)

    edit_config(folder, edit)


@pytest.mark.parametrize("which", ["*00003-of-00004-*.safetensors", "*-labels-*.safetensors", "metadata.parquet"])
def test_verify_finds_a_changed_byte(which, folder):
    (path,) = folder.glob(which)
    overwrite(path, -8, b"\x01")
    bank = GMemMemoryBank.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"{path.name} is damaged: its SHA-256 is .* but config.json says"):
        bank.verify()
    if which == "metadata.parquet":
        with pytest.raises(ValueError, match="metadata.parquet is damaged"):
            bank.metadata  # noqa: B018


@pytest.mark.parametrize("agreeing_sha256", [False, True])
def test_verify_finds_rows_that_are_not_finite(agreeing_sha256, folder):
    path = shards(folder)[2]  # rows 5 and 6
    overwrite(path, -4, torch.tensor([float("nan")]).numpy().tobytes())
    if agreeing_sha256:
        put_sha256(folder, path.name)
    with pytest.raises(ValueError, match=f"{path.name} is not finite: row 6 "):
        GMemMemoryBank.from_pretrained(folder).verify()


@pytest.mark.parametrize("which", ["*00003-of-00004-*.safetensors", "*-labels-*.safetensors"])
def test_verify_finds_a_wrong_fingerprint(which, folder):
    (path,) = folder.glob(which)
    overwrite(path, -8, b"\x01")
    put_sha256(folder, path.name)
    with pytest.raises(ValueError, match="config.json gives the fingerprint sha256:.*rows and labels is sha256:"):
        GMemMemoryBank.from_pretrained(folder).verify()


def test_verify_finds_metadata_of_another_length(folder):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"file": ["a"]}), folder / "metadata.parquet")
    put_sha256(folder, "metadata.parquet")
    bank = GMemMemoryBank.from_pretrained(folder)
    for read in (bank.verify, lambda: bank.metadata):
        with pytest.raises(ValueError, match="metadata.parquet has 1 rows, but the bank has 10"):
            read()


def test_verify_finds_damage_after_opening(folder):
    bank = GMemMemoryBank.from_pretrained(folder)
    truncate(shards(folder)[1])
    with pytest.raises(ValueError, match="00002-of-00004-.*.safetensors is truncated"):
        bank.verify()
    shards(folder)[1].unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00004-.*.safetensors is missing"):
        bank.verify()


def test_metadata_of_another_bank_is_never_read(folder):
    bank = GMemMemoryBank.from_pretrained(folder)
    make_bank(snippets=rows(seed=1), metadata={"other": [str(i) for i in range(10)]}).save_pretrained(folder)
    assert torch.equal(bank[:], rows())
    with pytest.raises(ValueError, match="metadata.parquet is (truncated|too long|damaged)"):
        bank.metadata  # noqa: B018


# Writes are atomic


def test_saving_over_another_bank_leaves_nothing_of_it(folder):
    (folder / "notes.safetensors").write_text("mine")
    new = GMemMemoryBank(rows(count=4, seed=1))
    new.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["config.json", "notes.safetensors", shards(folder)[0].name]
    )
    assert_same(GMemMemoryBank.from_pretrained(folder), new)


def test_a_config_that_is_not_a_banks_is_not_overwritten(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="config.json does not describe a GMemMemoryBank"):
        make_bank().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"] and "AutoencoderKL" in config.read_text()


def save_and_die(bank, folder, step):
    """Saves in a child process that kills itself right before step number `step` on the disk. True if it died."""
    child = os.fork()
    if child == 0:
        steps = 0

        def kill(event, args):
            nonlocal steps
            if event in ("open", "os.mkdir", "os.rename", "os.remove"):
                steps += 1
                if steps == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        try:
            bank.save_pretrained(folder, max_shard_size=TWO_SHARDS)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("old_kwargs", "new_kwargs"),
    [
        ({}, {"snippets": rows(seed=1), "metadata": {"other": list(range(10))}}),
        ({}, {"snippets": rows(seed=1), "labels": None, "metadata": None}),
        ({"metadata": None}, {"metadata": {"other": list(range(10))}}),  # the same rows, so some of the same files
    ],
)
def test_a_kill_at_any_step_leaves_the_old_or_the_new_bank_whole(old_kwargs, new_kwargs, tmp_path):
    old, new = make_bank(**old_kwargs), make_bank(**new_kwargs)
    assert old.fingerprint and new.fingerprint  # computed here once rather than in each child
    start, folder = tmp_path / "start", tmp_path / "bank"
    old.save_pretrained(start, max_shard_size=TWO_SHARDS)
    last = GMemMemoryBank(rows(count=2))
    last.save_pretrained(tmp_path / "last")
    last_names = {path.name for path in (tmp_path / "last").iterdir()}
    found = []
    for step in itertools.count(1):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        died = save_and_die(new, folder, step)
        opened = GMemMemoryBank.from_pretrained(folder)
        opened.verify()
        is_new = opened.fingerprint == new.fingerprint and opened.metadata == new.metadata
        assert_same(opened, new if is_new else old)
        found.append(is_new)
        if not died:
            break
        if step % 3 == 0:  # what is left over is no hindrance and goes with the next save
            last.save_pretrained(folder)
            assert {path.name for path in folder.iterdir()} == last_names
            assert_same(GMemMemoryBank.from_pretrained(folder), last)
    # Only ever from the old one to the new one, and several times each.
    assert found == sorted(found) and found.count(False) >= 10 and found.count(True) >= 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_first_save_leaves_no_bank(tmp_path):
    bank = make_bank()
    assert save_and_die(bank, tmp_path, step=4)
    assert list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="no memory bank"):
        GMemMemoryBank.from_pretrained(tmp_path)
    bank.save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_full_disk(small_disk):
    old = make_bank()
    old.save_pretrained(small_disk / "bank", max_shard_size=FOUR_SHARDS)
    before = sorted(path.name for path in (small_disk / "bank").iterdir())
    large = GMemMemoryBank(rows(count=1000, dim=100))
    for max_shard_size in ("1GB", "50KB"):  # the first shard does not fit; some do
        with pytest.raises(OSError, match=f"cannot be saved in {small_disk / 'bank'}: .*No space left"):
            large.save_pretrained(small_disk / "bank", max_shard_size=max_shard_size)
        assert sorted(path.name for path in (small_disk / "bank").iterdir()) == before
        opened = GMemMemoryBank.from_pretrained(small_disk / "bank")
        opened.verify()
        assert_same(opened, old)
    smaller = GMemMemoryBank(rows(count=400, dim=100))
    smaller.save_pretrained(small_disk / "bank")
    assert_same(GMemMemoryBank.from_pretrained(small_disk / "bank"), smaller)


def test_a_tensor_of_one_row_number_gives_one_row():
    bank = GMemMemoryBank(torch.arange(12.0).reshape(4, 3))
    assert bank[torch.tensor([2])].shape == bank[[2]].shape == (1, 3)
    assert bank[torch.tensor(2)].shape == bank[2].shape == (3,)
