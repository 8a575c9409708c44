# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.datasets import load_digits
from tiny_pipeline import make_image_encoder

from diffusers_gmem.data import ImageSource
from diffusers_gmem.models.memory_bank import GMemMemoryBank
from diffusers_gmem.training import GMemTrainingDataset


@pytest.fixture(scope="module")
def convergence():
    path = Path(__file__).parents[2] / "benchmarks/convergence.py"
    spec = importlib.util.spec_from_file_location("convergence_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Forty of scikit-learn's digits, ten of them held out, a tiny encoder and a tiny model."""
    folder = tmp_path_factory.mktemp("convergence")
    digits = load_digits()
    for number in range(40):
        path = folder / "data" / ("train" if number < 30 else "held_out") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray((digits.images[number] * 15.9).astype(np.uint8)).save(path)
    components = make_image_encoder()
    components["image_encoder"].save_pretrained(folder / "encoder")
    components["image_processor"].save_pretrained(folder / "encoder")
    config = {"patch_size": 4, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
    (folder / "model.json").write_text(json.dumps(config))
    return folder


def arguments(workplace, **overrides):
    values = {
        "data_dir": workplace / "data",
        "cache_dir": workplace / "cache",
        "image_encoder": workplace / "encoder",
        "snippet_layers": [0],
        "snippet_dim": 8,
        "model_config": workplace / "model.json",
        "resolution": 8,
        "evaluation_steps": [1, 3],
        "num_images": 20,
        "num_inference_steps": 2,
        "feature_size": 28,
        "feature_dim": 4,
        "output_dir": workplace / "out",
    } | overrides
    return [text for name, value in values.items() for text in (f"--{name}", *map(str, np.atleast_1d(value)))]


def test_curves_picture_and_report(convergence, workplace, capsys):
    convergence.main(arguments(workplace))
    with (workplace / "out" / "convergence.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [(s, c, f) for s in ("1", "3") for c in convergence.CURVES for f in convergence.SPACES]
    assert [(row["step"], row["curve"], row["space"]) for row in rows] == expected
    assert all(0 < float(row["fd"]) < 1e6 for row in rows)
    with PIL.Image.open(workplace / "out" / "convergence.png") as picture:
        assert np.array(picture).std() > 10
    assert PIL.Image.open(workplace / "out" / "samples.png").size == (16 * 8 * 3, 3 * 8 * 3)
    report = capsys.readouterr().out
    assert "30 training images, 10 held out, 20 generated" in report
    assert report.count("the last one without memory, is reached from") == 4


def test_both_runs_differ_by_the_memory_alone(convergence, workplace):
    source = ImageSource(str(workplace / "data" / "train"), cache_dir=str(workplace / "cache"))
    bank = GMemMemoryBank(torch.randn(30, 8))
    with_memory, without = (
        GMemTrainingDataset(source, bank, 8, (3, 8, 8), 0, memory_dropout=0.4, memory_drop_prob=probability)
        for probability in (0.0, 1.0)
    )
    one, other = with_memory[2, 7], without[2, 7]
    assert not other.pop("memory").any() and one.pop("memory").any()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_distance_to_the_training_images(convergence):
    generator = np.random.default_rng(0)
    images = [PIL.Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(40)]
    space = convergence.FeatureSpace(convergence.pixel_features, images, 5)
    assert space.distance(images) == pytest.approx(0, abs=1e-9)
    assert space.distance(images[:20]) > 0.01
    dark = [image.point(lambda value: value // 2) for image in images]
    assert space.distance(dark) > space.distance(images[:20])


def test_steps_until(convergence):
    steps, distances = [100, 200, 400], [100.0, 10.0, 0.1]
    assert convergence.steps_until(steps, distances, 200.0) == 100
    assert convergence.steps_until(steps, distances, 10.0) == pytest.approx(200)
    assert convergence.steps_until(steps, distances, 1.0) == pytest.approx(300)  # half the way in the logarithm
    assert convergence.steps_until(steps, distances, 0.05) is None


def test_ratios_and_what_is_not_reached(convergence, capsys):
    curves = {"no memory": [9.0, 4.0], "training memories": [16.0, 1.0], "held-out memories": [20.0, 5.0]}
    rows = [
        {"step": step, "seconds": step, "curve": curve, "space": space, "fd": fd}
        for space in convergence.SPACES
        for curve, distances in curves.items()
        for step, fd in zip((100, 300), distances, strict=True)
    ]
    convergence.report(rows, {"encoder": 0.5, "pixels": 0.5})
    report = capsys.readouterr().out
    assert report.count("from training memories: after 200 steps instead of 300: 1.50x fewer") == 2
    assert report.count("from held-out memories: not reached") == 2


def test_wrong_arguments_are_refused(convergence, workplace, capsys):
    with pytest.raises(SystemExit):
        convergence.parse_args(arguments(workplace, evaluation_steps=[3, 1]))
    assert "--evaluation_steps must ascend from at least 1, got [3, 1]" in capsys.readouterr().err
