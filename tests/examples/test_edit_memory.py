# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import importlib.util
import logging
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_pipeline import LABELS, make_image_encoder, make_picture, make_pipeline, make_transformer

from diffusers_gmem import GMemMemoryBank, GMemPipeline, read_provenance


SCRIPT = Path(__file__).parents[2] / "examples" / "edit_memory.py"
NAMES = {0: "cat", 1: "dog", 2: "fish"}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("edit_memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline, and two folders of images."""
    folder = tmp_path_factory.mktemp("edit_memory")
    snippets = torch.randn(len(LABELS), 16, generator=torch.Generator().manual_seed(0))
    bank = GMemMemoryBank(snippets, LABELS, {"image": [f"{k}.png" for k in range(len(LABELS))]}, NAMES)
    pipe = make_pipeline(make_transformer(in_channels=3), memory_bank=bank, **make_image_encoder())
    pipe.save_pretrained(folder / "model")
    for name, count in (("first/inner", 3), ("second", 2)):
        (folder / name).mkdir(parents=True)
        for k in range(count):
            make_picture(k).save(folder / name / f"{k}.png")
    (folder / "first" / "notes.txt").write_text("no image")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def edit(script, folder, tmp_path):
    """Runs a command; returns its picture and what the single files say."""

    def edit(command, *arguments):
        fixed = ["--model", folder / "model", "--output", tmp_path / "out" / "grid.png", "--tile_size", 24]
        fixed += ["--save_images", tmp_path / "images", "--num_inference_steps", 2]
        script.main(script.parse_args([command, *map(str, fixed), *map(str, arguments)]))
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["grid.png"]
        said = {path.stem: read_provenance(path) for path in sorted((tmp_path / "images").iterdir())}
        return PIL.Image.open(tmp_path / "out" / "grid.png"), said

    return edit


def tile(grid, row, column):
    return np.array(grid)[row * 68 + 26 :, 6 + column * 30 :][:24, :24]


def single(tmp_path, name):
    image = PIL.Image.open(tmp_path / "images" / f"{name}.png")
    return np.array(image.resize((24, 24), PIL.Image.Resampling.NEAREST))


def test_variations(edit, folder, tmp_path):
    images = [folder / "first", folder / "second" / "1.png"]
    grid, said = edit("variations", "--images", *images, "--num_images", 3, "--num_variations", 2)
    assert grid.size == (3 * 30 + 6, 3 * 68 + 6)
    # Three of the four images, evenly spaced
    assert [said[f"variations{k}-00001"]["sources"][0]["image"] for k in range(3)] == ["0.png", "1.png", "2.png"]
    for row in range(3):
        for column in range(2):
            expected = single(tmp_path, f"variations{row}-0000{column}")
            assert np.array_equal(tile(grid, row, column + 1), expected)
        assert not np.array_equal(tile(grid, row, 1), tile(grid, row, 2))
    assert {record["seed"] for record in said.values()} == {0, 1}


def test_interpolation(edit, folder, tmp_path, caplog):
    arguments = ["--first_dir", folder / "first", "--second_dir", folder / "second"]
    grid, said = edit("interpolate", *arguments, "--num_steps", 3, "--num_pairs", 3, "--method", "linear")
    assert "has 3 images for pairs" in caplog.text and "2 strips" in caplog.text
    assert grid.size == (5 * 30 + 6, 2 * 68 + 6)
    assert {record["seed"] for record in said.values()} == {0}
    for row in range(2):
        weights = [[part["weight"] for part in said[f"strip{row}-0000{k}"]["sources"]] for k in range(3)]
        assert weights == [[1, 0], [0.5, 0.5], [0, 1]]
        assert [part["image"] for part in said[f"strip{row}-00000"]["sources"]] == [f"{row}.png"] * 2
        for k in range(3):
            assert np.array_equal(tile(grid, row, k + 1), single(tmp_path, f"strip{row}-0000{k}"))


@pytest.mark.parametrize("labels", [["dog"], ["1"], ["dog", "fish"]], ids=str)
def test_a_removed_class(edit, folder, tmp_path, caplog, labels):
    caplog.set_level(logging.INFO)
    grid, said = edit("remove", "--labels", *labels, "--num_images", 4, "--save_bank", tmp_path / "bank")
    before = GMemPipeline.from_pretrained(folder / "model").memory_bank
    after = GMemMemoryBank.from_pretrained(tmp_path / "bank")
    gone = {1, 2} if "fish" in labels else {1}
    assert set(after.labels.tolist()) == set(LABELS) - gone
    assert f"{sum(label in gone for label in LABELS)} of 7 memories are of {', '.join(labels)}" in caplog.text
    for label in labels:
        assert f"A request for {int(label) if label == '1' else label!r} now says: `class_labels` holds" in caplog.text

    def column(name):
        return [said[f"{name}-0000{k}"] for k in range(4)]

    assert {record["sources"][0]["label"] for record in column("before")} == gone
    assert not {record["sources"][0]["label"] for record in column("after") + column("substitutes")} & gone
    for first, substitute in zip(column("before"), column("substitutes"), strict=True):
        nearest = after.nearest(before[first["memory_index"]], 1)[1].item()
        assert substitute["memory_index"] == nearest and substitute["memory_bank"] == after.fingerprint
        assert substitute["seed"] == first["seed"]
    for row, name in enumerate(("before", "after", "substitutes")):
        assert np.array_equal(tile(grid, row, 3), single(tmp_path, f"{name}-00003"))


def test_the_picture_is_labelled(script):
    row = ("Heading", [(make_picture().resize((8, 8)), "a caption that is far too long"), (None, "only words")])
    grid = np.array(script.make_grid([row], 60))
    assert grid.shape == (26 + 60 + 18 + 6, 2 * 66 + 6, 3)
    assert (grid[:26] < 100).any() and (grid[-24:, :66] < 200).any() and (grid[-24:, 72:] < 200).any()
    assert (grid[26:86, 72:132] == 255).all()
    assert (grid[-24:, 66:72] == 255).all()  # shortened, not written into the next
    blank = np.array(script.make_grid([("", [(None, "")] * 2)], 60))
    assert (blank == 255).all()


def test_choice_of_images(script, folder):
    assert script.choose_images([str(folder / "first"), "http://host/a.png"], 9)[-1] == "http://host/a.png"
    assert [Path(path).name for path in script.choose_images([str(folder / "first")], 2)] == ["0.png", "1.png"]
    with pytest.raises(ValueError, match="no images in the folder .*empty"):
        script.choose_images([str(folder / "empty")], 2)


def test_wrong_arguments(script, edit, tmp_path, capsys):
    for arguments, message in (
        (["variations", "--model", "m", "--images", "a.png", "--num_variations", "0"], "--num_variations must be"),
        (["remove", "--model", "m"], "--labels"),
        (["forget"], "invalid choice: 'forget'"),
    ):
        with pytest.raises(SystemExit):
            script.parse_args(arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="'bird'"):
        edit("remove", "--labels", "bird")
    pipe = make_pipeline(make_transformer(in_channels=3))
    pipe.save_pretrained(tmp_path / "no_bank")
    with pytest.raises(ValueError, match="no_bank has no memory bank"):
        script.main(script.parse_args(["remove", "--labels", "1", "--model", str(tmp_path / "no_bank")]))
