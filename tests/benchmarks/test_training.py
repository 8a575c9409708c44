# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def training():
    path = Path(__file__).parents[2] / "benchmarks/training.py"
    spec = importlib.util.spec_from_file_location("training_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path):
    config = {
        "patch_size": 2,
        "num_layers": 2,
        "num_attention_heads": 1,
        "attention_head_dim": 8,
        "alignment_layer": 1,
    }
    (tmp_path / "model.json").write_text(json.dumps(config))
    options = "--sample_size 4 --in_channels 4 --memory_dim 8 --batch_size 4 --rounds 2 --steps_per_round 1"
    return ["--model_config", str(tmp_path / "model.json"), *options.split()]


@pytest.mark.parametrize("alignment", [False, True])
def test_the_mathematics_is_the_same(training, arguments, alignment):
    args = training.parse_args([*arguments, "--alignment"] if alignment else arguments)
    transformer = training.make_transformer(args)
    batches = training.make_batches(args, transformer)
    plain = training.PlainStep(copy.deepcopy(transformer), args)
    ours = training.OurStep(copy.deepcopy(transformer), args, compiled=False)
    for batch in batches:
        torch.testing.assert_close(plain(batch), ours(batch), rtol=1e-5, atol=0)
    for expected, average, start in zip(
        plain.average.parameters(), ours.ema.shadow_params, transformer.parameters(), strict=True
    ):
        assert alignment is False or not torch.equal(average, start)
        torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow  # compiles
def test_report(training, arguments, capsys, monkeypatch):
    monkeypatch.setattr(training, "peak_memory", lambda way, arguments: 5e6)
    assert training.main(arguments) == 0
    report = capsys.readouterr().out
    assert "losses of the first 5 steps agree" in report
    rows = [line for line in report.splitlines() if line.endswith("5 MB")]
    for way, row in zip(training.WAYS, rows, strict=True):
        rate, ratio = row.removeprefix(way).split()[:2]
        assert float(rate) > 0 and float(ratio) > 0


@pytest.mark.slow  # starts a process
def test_peak_memory(training, arguments):
    assert 50e6 < training.peak_memory("plain", arguments) < 5e9


def test_another_loss_is_noticed(training, arguments, capsys, monkeypatch):
    class OtherStep(training.PlainStep):
        def __call__(self, batch):
            return super().__call__(batch) * 1.001

    monkeypatch.setattr(training, "peak_memory", lambda way, arguments: 0)
    for other, status, verdict in (
        (training.PlainStep, 0, "agree"),
        (OtherStep, 1, "DISAGREE (more than 0.0001)"),
    ):
        ways = {"plain": training.PlainStep, "ours": other}
        monkeypatch.setattr(training, "WAYS", ways)
        assert training.main(arguments) == status
        assert verdict in capsys.readouterr().out
