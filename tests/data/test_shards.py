import collections
import hashlib
from pathlib import Path

import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_gmem.data import BrokenImageError, ImageSource, ImageStream, image_to_tensor
from diffusers_gmem.data.shards import (
    compute_shards,
    memory_bank_of_shards,
    open_folder,
    read_header,
    write_skipped_images,
)


NUM_IMAGES = 50
PER_CLASS = 10


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """50 images of a pixel, whose red is their number, in 5 folders of one class each."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(NUM_IMAGES):
        path = folder / f"class{number // PER_CLASS}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (1, 1), (number, 0, 0)).save(path)
    return ImageSource(str(folder), cache_dir=str(tmp_path_factory.mktemp("cache")))


def prepare(image):
    return {"red": (image_to_tensor(image)[0, 0, :1] + 1) * 127.5}


def encode(inputs):
    return {"snippets": inputs["red"].round().clone()}


def compute(folder, images, **options):
    folder.mkdir(exist_ok=True)
    options = {"prepare": prepare, "encode": encode, "shard_size": 12, "batch_size": 5} | options
    return compute_shards(Accelerator(cpu=True), folder, "numbers", images, **options)


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def rows(folder, shards):
    return [load_file(folder / shard.file)["snippets"].flatten().int().tolist() for shard in shards]


def test_every_image_is_in_one_row_with_its_label_and_name(images, tmp_path):
    shards = compute(tmp_path, images, seed=0)
    assert [shard.rows for shard in shards] == [12, 12, 12, 12, 2]
    numbers = rows(tmp_path, shards)
    assert sorted(sum(numbers, [])) == list(range(NUM_IMAGES))
    for shard, expected in zip(shards, numbers, strict=True):
        path = tmp_path / shard.file
        assert load_file(path)["labels"].tolist() == [number // PER_CLASS for number in expected]
        assert read_header(path)["names"] == [f"class{number // PER_CLASS}/{number:02d}.png" for number in expected]
        assert shard.bytes == path.stat().st_size
        assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_without_a_seed_the_order_is_that_of_the_source(images, tmp_path):
    shards = compute(tmp_path, images)
    assert sum(rows(tmp_path, shards), []) == list(range(NUM_IMAGES))
    bank = memory_bank_of_shards(tmp_path, shards, images, encoder="red")
    assert bank[:].flatten().tolist() == list(range(NUM_IMAGES))
    assert bank.labels.tolist() == images.labels
    assert bank.id2label == images.id2label
    assert bank.metadata["image"][13].as_py() == images.image_name(13)


def test_contiguous_batches_of_class_ordered_images_mix_the_classes(tmp_path):
    class ClassOrdered(ImageSource):
        """100 classes of 100 images, in order of the classes."""

        label_column = "label"

        def __init__(self):
            pass

        def __len__(self):
            return 10_000

        def read(self, index):
            return PIL.Image.new("RGB", (1, 1)), str(index), index // 100

    shards = compute(tmp_path, ClassOrdered(), seed=0, shard_size=1000, batch_size=500)
    labels = torch.cat([load_file(tmp_path / shard.file)["labels"] for shard in shards])
    largest = [max(collections.Counter(batch.tolist()).values()) for batch in labels.split(64)]
    distinct = [len(batch.unique()) for batch in labels[:-16].split(64)]
    # In random order, 64 images have 0.64 of each class, more than 7 of any of them once in 10^5 batches, and 47.5 classes
    assert max(largest) <= 7
    assert abs(sum(distinct) / len(distinct) - 47.5) < 1


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(images, tmp_path, num_workers):
    compute(tmp_path / "none", images, seed=0)
    compute(tmp_path / "some", images, seed=0, num_workers=num_workers)
    assert contents(tmp_path / "none") == contents(tmp_path / "some")


def test_batches_do_not_cross_shards_and_depend_on_nothing_else(images, tmp_path):
    seen = []

    def encode_and_note(inputs):
        seen.append(inputs["red"].flatten().round().int().tolist())
        return encode(inputs)

    shards = compute(tmp_path, images, seed=0, encode=encode_and_note)
    batches = [batch for batch in seen if set(batch) != {0} or len(batch) == 1]  # but the blank ones of the estimate
    expected = [shard[k : k + 5] for shard in rows(tmp_path, shards) for k in range(0, len(shard), 5)]
    assert batches == expected

    # What is missing afterwards is computed in the same batches, and nothing else is
    before = contents(tmp_path)
    (tmp_path / shards[1].file).unlink()
    (tmp_path / "numbers-00003-of-00005.safetensors.tmp").write_bytes(b"half a shard")
    seen.clear()
    compute(tmp_path, images, seed=0, encode=encode_and_note)
    assert [batch for batch in seen if set(batch) != {0}] == expected[3:6]
    assert contents(tmp_path) == before


def test_a_seed_is_an_order(images, tmp_path):
    first, second = (sum(rows(tmp_path / str(s), compute(tmp_path / str(s), images, seed=s)), []) for s in (0, 1))
    assert first != second


@pytest.fixture(scope="module")
def broken_images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(10):
        PIL.Image.new("RGB", (1, 1), (number, 0, 0)).save(folder / f"{number}.png")
    for number in (3, 4, 5):
        (folder / f"{number}.png").write_bytes(b"no picture")
    return ImageSource(str(folder), cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_a_broken_image_stops_by_default(broken_images, tmp_path):
    with pytest.raises(BrokenImageError, match=r"3\.png.* cannot be read"):
        compute(tmp_path, broken_images, shard_size=3, batch_size=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_skipped_and_listed(broken_images, tmp_path, num_workers):
    # The second shard has broken images only
    shards = compute(
        tmp_path, broken_images, shard_size=3, batch_size=2, skip_bad_images=True, num_workers=num_workers
    )
    assert rows(tmp_path, shards) == [[0, 1, 2], [], [6, 7, 8], [9]]
    assert len(memory_bank_of_shards(tmp_path, shards, broken_images)) == 7
    assert write_skipped_images(tmp_path / "skipped.txt", tmp_path, shards) == 3
    lines = (tmp_path / "skipped.txt").read_text().splitlines()
    assert [f"{number}.png" in line for number, line in zip((3, 4, 5), lines, strict=True)] == [True] * 3


def test_a_stream_is_cut_at_its_files_and_at_the_size_of_a_shard(tmp_path):
    import datasets

    (tmp_path / "data").mkdir()
    for file, start in enumerate((0, 7)):
        pictures = [PIL.Image.new("RGB", (1, 1), (number, 0, 0)) for number in range(start, start + 7)]
        dataset = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features(image=datasets.Image()))
        dataset.to_parquet(tmp_path / "data" / f"train-{file}.parquet")
    stream = ImageStream(dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    shards = compute(tmp_path / "shards", stream, shard_size=3, batch_size=2)
    assert rows(tmp_path / "shards", shards) == [[0, 1, 2], [3, 4, 5], [6], [7, 8, 9], [10, 11, 12], [13]]

    # Killed before the last shard of the first file: the file is done again
    before = contents(tmp_path / "shards")
    (tmp_path / "shards" / shards[2].file).unlink()
    assert compute(tmp_path / "shards", stream, shard_size=3, batch_size=2, num_workers=2) == shards
    assert contents(tmp_path / "shards") == before


def test_a_result_that_is_not_finite_is_named(images, tmp_path):
    def divide(inputs):
        return {"snippets": 1 / (inputs["red"].round() - 17)}

    with pytest.raises(ValueError, match=r"snippets of class1/17\.png are not finite"):
        compute(tmp_path, images, encode=divide)


def test_memory_does_not_grow_with_the_number_of_images(images, tmp_path):
    def anonymous_bytes():
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["RssAnon"].split()[0]) * 1024

    most = []

    def encode_large(inputs):
        most.append(anonymous_bytes())
        return {"snippets": torch.ones(len(inputs["red"]), 3 * 2**18)}  # 3 MB each

    compute(tmp_path, images, encode=encode_large, shard_size=2, batch_size=2)
    assert max(most) - most[0] < 60e6  # a few shards of 6 MB, and not 150 MB


def test_the_estimate_and_the_progress_are_shown(images, tmp_path, capsys):
    compute(tmp_path, images)
    output = capsys.readouterr()
    assert "50 images to encode: about 0.00 GB of disk" in output.out
    assert "snippets 0.0" in output.out and "images/s" in output.out
    assert "50/50" in output.err and "images/s" in output.err
    compute(tmp_path, images)
    assert "to encode" not in capsys.readouterr().out


def test_other_settings_are_named(tmp_path):
    assert open_folder(tmp_path / "new", {"seed": 0, "sizes": (1, 2)}) == {"seed": 0, "sizes": [1, 2]}
    open_folder(tmp_path / "new", {"seed": 0, "sizes": (1, 2)})
    with pytest.raises(ValueError, match="other settings: seed: 0 there, 1 now"):
        open_folder(tmp_path / "new", {"seed": 1, "sizes": (1, 2)})


def test_half_precision_shards_are_read_as_they_were_written(images, tmp_path):
    shards = compute(tmp_path, images, encode=lambda inputs: {"snippets": inputs["red"].bfloat16()})
    with safe_open(tmp_path / shards[0].file, framework="pt") as file:
        assert file.get_tensor("snippets").dtype == torch.bfloat16
