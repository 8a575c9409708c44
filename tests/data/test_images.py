import io
import tarfile

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_gmem.data import BrokenImageError, ImageSource, ImageStream, center_crop, image_to_tensor


def write_image(path, color=(10, 20, 30), size=(12, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new(mode, size, color).save(path)


def test_a_folder_of_class_folders_has_labels(tmp_path):
    # "train" and "test" are names of classes here, not of splits
    for name in ("test", "train", "zebra"):
        for number in range(2):
            write_image(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / "LICENSE.txt").write_text("not an image")

    source = ImageSource(str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))
    assert len(source) == 6
    assert source.labels == [0, 0, 1, 1, 2, 2]
    assert source.id2label == {0: "test", 1: "train", 2: "zebra"}
    assert source.image_name(3) == "train/1.png"
    assert source[3].mode == "RGB"
    assert source[3].size == (12, 8)


def test_a_flat_folder_has_no_labels(tmp_path):
    for number in range(3):
        write_image(tmp_path / "images" / f"{number}.png", color=(number, 0, 0))
    source = ImageSource(str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))
    assert source.labels is None
    assert [source.image_name(index) for index in range(3)] == ["0.png", "1.png", "2.png"]
    assert [source[index].getpixel((0, 0))[0] for index in range(3)] == [0, 1, 2]


def test_a_data_set_of_the_datasets_library(tmp_path):
    images = [PIL.Image.new("RGB", (6, 4), (number, 0, 0)) for number in range(4)]
    features = datasets.Features(picture=datasets.Image(), kind=datasets.ClassLabel(names=["cup", "mug"]))
    dataset = datasets.Dataset.from_dict({"picture": images, "kind": [0, 1, 1, 0]}, features=features)
    (tmp_path / "data").mkdir()
    dataset.to_parquet(tmp_path / "data" / "train.parquet")

    source = ImageSource(
        dataset_name=str(tmp_path / "data"),
        image_column="picture",
        label_column="kind",
        cache_dir=str(tmp_path / "cache"),
    )
    assert [source[index].getpixel((0, 0))[0] for index in range(4)] == [0, 1, 2, 3]
    assert source.labels == [0, 1, 1, 0]
    assert source.id2label == {0: "cup", 1: "mug"}
    assert len({source.image_name(index) for index in range(4)}) == 4

    # Images without a file name are called by their numbers, also when others are left out
    nameless = source.dataset.map(lambda record: {"picture": record["picture"] | {"path": None}})
    source.dataset = nameless.cast_column("picture", datasets.Image(decode=False))
    some = source.select([3, 1]).select([0])
    assert some.image_name(0) == "3" and some.read(0)[1:] == ("3", 0)
    assert some[0].getpixel((0, 0))[0] == 3


def parquet_folder(folder, labels):
    images = [PIL.Image.new("RGB", (6, 4))] * len(labels)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.Value("string" if labels[0] == "a" else "int32")
    )
    folder.mkdir()
    dataset = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    dataset.to_parquet(folder / "train.parquet")
    return str(folder)


def test_integer_labels_have_no_names(tmp_path):
    source = ImageSource(dataset_name=parquet_folder(tmp_path / "data", [3, 1]), cache_dir=str(tmp_path / "cache"))
    assert source.labels == [3, 1]
    assert source.id2label is None


def test_labels_of_another_kind_are_refused(tmp_path):
    folder = parquet_folder(tmp_path / "data", ["a", "b"])
    with pytest.raises(ValueError, match=r"'label' must hold class labels or integers, got .*string"):
        ImageSource(dataset_name=folder, cache_dir=str(tmp_path / "cache"))
    source = ImageSource(dataset_name=folder, label_column="none", cache_dir=str(tmp_path / "cache"))
    assert source.labels is None


def test_transparency_is_laid_on_white(tmp_path):
    write_image(tmp_path / "images" / "0.png", color=(255, 0, 0, 0), mode="RGBA")
    write_image(tmp_path / "images" / "1.png", color=(255, 0, 0, 255), mode="RGBA")
    source = ImageSource(str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))
    assert source[0].getpixel((0, 0)) == (255, 255, 255)
    assert source[1].getpixel((0, 0)) == (255, 0, 0)


def test_a_broken_image_is_named(tmp_path):
    for number in range(2):
        write_image(tmp_path / "images" / f"{number}.png")
    source = ImageSource(str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))
    path = tmp_path / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:40])
    source[0]
    with pytest.raises(BrokenImageError, match=r"1\.png.* cannot be read"):
        source[1]


def tar_files(folder, broken=None):
    """Three tar files of four images each, whose red is their number and whose label is that modulo 3."""
    folder.mkdir()
    for file in range(3):
        with tarfile.open(folder / f"train-{file}.tar", "w") as archive:
            for number in range(4 * file, 4 * file + 4):
                buffer = io.BytesIO()
                PIL.Image.new("RGB", (6, 4), (number, 0, 0)).save(buffer, "png")
                content = buffer.getvalue()[:20] if number == broken else buffer.getvalue()
                for extension, data in (("png", content), ("cls", str(number % 3).encode())):
                    member = tarfile.TarInfo(f"image{number:02d}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return str(folder / "*.tar")


def test_webdataset_files(tmp_path):
    options = {"image_column": "png", "label_column": "cls", "cache_dir": str(tmp_path / "cache")}
    source = ImageSource(webdataset=tar_files(tmp_path / "tars", broken=5), **options)
    assert len(source) == 12
    assert source.labels == [number % 3 for number in range(12)]
    image, name, label = source.read(7)
    assert (image.getpixel((0, 0))[0], name, label) == (7, "image07.png", 1)
    with pytest.raises(BrokenImageError, match=r"Image 5 \(image05\.png\) cannot be read"):
        source.read(5)
    with pytest.raises(ValueError, match=r"no column 'image'.*'png', 'cls'"):
        ImageSource(webdataset=str(tmp_path / "tars" / "*.tar"), cache_dir=str(tmp_path / "cache"))


def test_a_stream_of_webdataset_files(tmp_path):
    options = {"image_column": "png", "label_column": "cls", "cache_dir": str(tmp_path / "cache")}
    stream = ImageStream(webdataset=tar_files(tmp_path / "tars"), **options)
    assert stream.num_files == 3
    assert stream.num_images is None
    images = [stream.read(record) for record in stream.records(1)]
    assert [(image.getpixel((0, 0))[0], name, label) for image, name, label in images] == [
        (number, f"image{number:02d}.png", number % 3) for number in range(4, 8)
    ]


def test_a_stream_of_a_data_set(tmp_path):
    folder = parquet_folder(tmp_path / "data", [3, 1, 2])
    stream = ImageStream(dataset_name=folder, cache_dir=str(tmp_path / "cache"))
    assert stream.num_files == 1
    assert [stream.read(record)[1:] for record in stream.records(0)] == [("0/0", 3), ("0/1", 1), ("0/2", 2)]
    with pytest.raises(ValueError, match="folder of images cannot be streamed"):
        ImageStream(train_data_dir=folder)


def test_a_missing_image_is_a_broken_one(tmp_path):
    features = datasets.Features(image=datasets.Image())
    dataset = datasets.Dataset.from_dict({"image": [PIL.Image.new("RGB", (6, 4)), None]}, features=features)
    (tmp_path / "data").mkdir()
    dataset.to_parquet(tmp_path / "data" / "train.parquet")
    source = ImageSource(dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    source.read(0)
    with pytest.raises(BrokenImageError, match="Image 1 .* cannot be read"):
        source.read(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a folder of images or a data set's name"),
        ({"train_data_dir": "nowhere"}, "no folder 'nowhere'"),
        ({"train_data_dir": "."}, "no images in the folder"),
        ({"train_data_dir": "images", "image_column": "picture"}, r"no column 'picture'.*'image'"),
    ],
)
def test_wrong_sources_are_refused(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "empty").mkdir()
    write_image(tmp_path / "images" / "0.png")
    monkeypatch.chdir(tmp_path / "empty" if arguments.get("train_data_dir") == "." else tmp_path)
    with pytest.raises(ValueError, match=message):
        ImageSource(**arguments, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("size", [(8, 8), (50, 8), (8, 50), (17, 33), (5, 6), (100, 64)])
def test_center_crop_is_the_central_square(size):
    # A horizontal ramp: the crop's columns are symmetric about the middle
    ramp = np.tile(np.linspace(0, 255, size[0]), (size[1], 1))
    image = PIL.Image.fromarray(np.stack([ramp] * 3, axis=-1).astype(np.uint8))
    cropped = center_crop(image, 8)
    assert cropped.size == (8, 8)
    mean = np.asarray(cropped, dtype=float).mean()
    assert abs(mean - 127) < 255 / min(size)


def test_center_crop_leaves_a_square_of_the_right_size_alone():
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(center_crop(image, 8)), np.asarray(image))


def test_pixels_are_scaled_to_minus_one_to_one():
    image = PIL.Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8))
    torch.testing.assert_close(image_to_tensor(image), torch.tensor([-1.0, 1.0, -0.6]).view(3, 1, 1))
