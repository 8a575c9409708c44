# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import collections
import datetime
import logging
import pickle
from pathlib import Path

import pytest
import torch
from reference_cases import REFERENCE_DIR, assert_matches, case_tensors, reference_cases
from safetensors.torch import save_file

from diffusers_gmem.conversion import convert_transformer, load_checkpoint, select_weights


CASES = reference_cases("checkpoint")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
@torch.no_grad()
def test_reference_checkpoint(case):
    tensors, checkpoint = case_tensors(case), load_checkpoint(REFERENCE_DIR / case["checkpoint"])
    for weights in ("ema", "model"):
        model = convert_transformer(select_weights(checkpoint, weights), case["options"]["num_heads"])
        sample = model(tensors["x"], tensors["t"], tensors["c"]).sample
        assert_matches(case, f"v_{weights}", sample, tensors[f"v_{weights}"])
    model = convert_transformer(select_weights(checkpoint), case["options"]["num_heads"])
    assert_matches(case, "v_ema", model(tensors["x"], tensors["t"], tensors["c"]).sample, tensors["v_ema"])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_tensors_are_memory_mapped(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(5.0)}, path)
    before = path.read_bytes()
    tensor = load_checkpoint(path)["a"]
    mapped = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
    ]
    assert any(int(start, 16) <= tensor.data_ptr() < int(stop, 16) for start, stop in mapped)
    tensor.zero_()  # a private mapping
    assert path.read_bytes() == before


def test_safetensors(tmp_path):
    save_file({"a": torch.arange(5.0)}, tmp_path / "a.safetensors")
    assert torch.equal(load_checkpoint(tmp_path / "a.safetensors")["a"], torch.arange(5.0))


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("code of the file was run",))


@pytest.mark.parametrize(
    "content, name",
    [
        (Malicious(), "pytest.fail|_pytest.outcomes"),
        (datetime.date(2026, 1, 1), "datetime.date"),
        (collections.deque(), "collections.deque"),
    ],
)
def test_anything_but_tensors_and_numbers_is_refused_by_name(tmp_path, content, name):
    path = tmp_path / "a.pt"
    torch.save({"model": {"a": torch.zeros(2)}, "extra": content}, path)
    with pytest.raises(ValueError, match=rf"a\.pt is refused: it holds `({name}).*`, and only tensors"):
        load_checkpoint(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*missing.pt"):
        load_checkpoint(tmp_path / "missing.pt")
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"a\.pt (cannot be read|is refused)"):
        load_checkpoint(tmp_path / "a.pt")
    (tmp_path / "a.safetensors").write_bytes(b"no safetensors file")
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be read"):
        load_checkpoint(tmp_path / "a.safetensors")
    torch.save({"a": torch.zeros(100)}, tmp_path / "b.pt")
    (tmp_path / "b.pt").write_bytes((tmp_path / "b.pt").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"b\.pt cannot be read"):
        load_checkpoint(tmp_path / "b.pt")


def test_choice_of_the_weights(caplog):
    caplog.set_level(logging.INFO)
    model, ema = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    assert select_weights({"model": model, "ema": ema, "config": {}}) is ema
    assert select_weights({"model": model, "ema": ema, "config": {}}, "model") is model
    assert not caplog.records
    assert select_weights(model) is model
    assert "bare state dict: `ema` cannot be chosen" in caplog.text
    assert select_weights({"network": model, "memorybank": torch.zeros(2, 2)}) is model
    assert "one set of weights, `network`" in caplog.text

    with pytest.raises(ValueError, match="has no entry `ema`, only model, config"):
        select_weights({"model": model, "config": {}})
    with pytest.raises(ValueError, match="has no entry `model`, only ema, step"):
        select_weights({"ema": ema, "step": 3}, "model")
    with pytest.raises(ValueError, match="must be a dict of entries or of tensors, got .*Tensor"):
        select_weights(torch.zeros(2))
