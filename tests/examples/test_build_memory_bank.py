import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from tiny_clip import save_model
from tiny_training import EXAMPLES, command_line, load_script, run_script, save_digits, save_image_encoder
from transformers import AutoTokenizer, CLIPModel, CLIPTextModelWithProjection

from diffusers_gmem import GMemMemoryBank
from diffusers_gmem.data import (
    ImageSource,
    center_crop,
    compute_snippets,
    encode_text_keys,
    load_image_encoder,
    load_text_key_encoder,
)


SCRIPT = EXAMPLES / "build_memory_bank.py"
NUM_IMAGES = 50
PROMPTS = {3: "a red mug", 17: "two dogs", 41: "the sea"}


@pytest.fixture(scope="module")
def script():
    return load_script("build_memory_bank")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build_memory_bank")
    save_digits(folder / "images", NUM_IMAGES)
    save_image_encoder(folder / "encoder")
    return folder


def arguments(output_dir, **values):
    return command_line({"output_dir": output_dir, **values})


def image_arguments(workplace, output_dir, **overrides):
    values = {
        "train_data_dir": workplace / "images",
        "image_encoder": workplace / "encoder",
        "cache_dir": workplace / "cache",
        "image_preprocessing": "own",
        "batch_size": 4,
        "shard_size": 10,
    }
    return arguments(output_dir, **(values | overrides))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def clip(workplace):
    """A model in which each of the prompts has the embedding of one image, by its number in the source."""
    source = ImageSource(str(workplace / "images"), cache_dir=str(workplace / "cache"))
    save_model(workplace / "clip", list(PROMPTS.values()), [source[row] for row in PROMPTS])
    return workplace / "clip"


@pytest.fixture(scope="module")
def finished(script, workplace):
    run_script(script, image_arguments(workplace, workplace / "finished"))
    return workplace / "finished"


def test_row_k_is_the_snippet_of_image_k(finished, workplace):
    bank = GMemMemoryBank.from_pretrained(finished)
    bank.verify()
    source = ImageSource(str(workplace / "images"), cache_dir=str(workplace / "cache"))
    encoder, processor = load_image_encoder(str(workplace / "encoder"))
    torch.testing.assert_close(bank[:], compute_snippets(source, encoder, processor), rtol=1e-4, atol=1e-5)
    assert bank.labels.tolist() == source.labels
    assert bank.id2label == source.id2label
    assert bank.metadata["image"].to_pylist() == [source.image_name(index) for index in range(NUM_IMAGES)]
    assert bank.encoder == str(workplace / "encoder")
    assert bank.preprocessing == json.loads(json.dumps(processor.to_dict()))
    assert bank.source_dataset == "images"
    assert not (finished / "parts").exists()


def test_a_finished_bank_is_left_alone(script, finished, workplace):
    with pytest.raises(ValueError, match=r"There is a GMemMemoryBank\(50 snippets.* already"):
        run_script(script, image_arguments(workplace, finished))


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(script, workplace, tmp_path):
    run_script(script, image_arguments(workplace, tmp_path / "one", thumbnail_size=6))
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import accelerate, runpy\n"
        "assert accelerate.Accelerator().num_processes == 2\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    subprocess.run(
        [*command, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", str(driver)]
        + image_arguments(workplace, tmp_path / "two", thumbnail_size=6),
        check=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "2"},
    )
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_killed_and_restarted_it_writes_the_same_bytes(script, workplace, clip, tmp_path):
    small = {"shard_size": 1, "batch_size": 1, "text_keys": clip, "thumbnail_size": 6}
    run_script(script, image_arguments(workplace, tmp_path / "whole", **small))
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, SCRIPT, *image_arguments(workplace, killed, **small)])
    while not list(killed.glob("parts/snippets-00005*.safetensors")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= len(list(killed.glob("parts/*.safetensors"))) < NUM_IMAGES
    with pytest.raises(ValueError, match="batch_size: 1 there, 2 now"):
        run_script(script, image_arguments(workplace, killed, **small | {"batch_size": 2}))
    with pytest.raises(ValueError, match="text_keys: .* there, None now"):
        run_script(script, image_arguments(workplace, killed, shard_size=1, batch_size=1))
    run_script(script, image_arguments(workplace, killed, **small))
    assert contents(killed) == contents(tmp_path / "whole")


def test_broken_images_are_skipped_and_listed(script, workplace, tmp_path, caplog):
    for number in range(4):
        path = tmp_path / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(path)
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"3\.png\) cannot be read"):
        run_script(script, image_arguments(workplace, tmp_path / "stopped", train_data_dir=tmp_path / "images"))
    options = {"train_data_dir": tmp_path / "images", "skip_bad_images": True, "bank_dtype": "float16"}
    run_script(script, image_arguments(workplace, tmp_path / "out", **options))
    bank = GMemMemoryBank.from_pretrained(tmp_path / "out")
    assert bank.metadata["image"].to_pylist() == ["0.png", "1.png", "2.png"]
    assert bank.dtype == torch.float16
    assert "3.png" in (tmp_path / "out" / "skipped_images.txt").read_text()
    assert "1 images could not be read" in caplog.text


# Text keys


@pytest.fixture(scope="module")
def finished_with_keys(script, workplace, clip):
    run_script(script, image_arguments(workplace, workplace / "with_keys", text_keys=clip))
    return workplace / "with_keys"


def found_rows(bank, clip):
    text_encoder = CLIPTextModelWithProjection.from_pretrained(clip)
    tokenizer = AutoTokenizer.from_pretrained(clip)
    return bank.search_text(list(PROMPTS.values()), 1, text_encoder, tokenizer)[1].flatten().tolist()


def test_text_keys(finished_with_keys, finished, workplace, clip):
    bank = GMemMemoryBank.from_pretrained(finished_with_keys)
    bank.verify()
    assert bank.text_model == {"name": str(clip), "revision": None, "type": "clip", "dim": 12}
    model, processor = load_text_key_encoder(str(clip))
    source = ImageSource(str(workplace / "images"), cache_dir=str(workplace / "cache"))
    pixel_values = processor(images=[source[row] for row in range(NUM_IMAGES)], return_tensors="pt").pixel_values
    torch.testing.assert_close(bank.text_keys, encode_text_keys(model, pixel_values), rtol=1e-4, atol=1e-5)
    assert found_rows(bank, clip) == list(PROMPTS)
    # All else is as without keys
    plain = GMemMemoryBank.from_pretrained(finished)
    assert bank.fingerprint == plain.fingerprint and bank.metadata.equals(plain.metadata)
    assert bank.encoder == plain.encoder and not (finished_with_keys / "parts").exists()


def test_text_keys_are_added_to_a_bank(script, finished, finished_with_keys, workplace, clip, tmp_path):
    shutil.copytree(finished, tmp_path / "whole")
    run_script(script, image_arguments(workplace, tmp_path / "whole", text_keys=clip))
    assert contents(tmp_path / "whole") == contents(finished_with_keys)
    with pytest.raises(ValueError, match=r"There is a .*with text keys.* already"):
        run_script(script, image_arguments(workplace, tmp_path / "whole", text_keys=clip))

    # By name: of some rows in another order
    some = GMemMemoryBank.from_pretrained(finished).select([41, 0, 3, 17, 3])
    some.save_pretrained(tmp_path / "some")
    run_script(script, image_arguments(workplace, tmp_path / "some", text_keys=clip, bank_dtype="float16"))
    bank = GMemMemoryBank.from_pretrained(tmp_path / "some")
    assert found_rows(bank, clip) == [2, 3, 0] and bank.text_keys.dtype == torch.float16
    assert torch.equal(bank[:], some[:]) and bank.history == some.history


def test_banks_that_no_text_keys_can_be_added_to(script, finished, workplace, clip, tmp_path):
    bank = GMemMemoryBank.from_pretrained(finished)
    GMemMemoryBank(bank[:]).save_pretrained(tmp_path / "unnamed")
    with pytest.raises(ValueError, match="no column 'image' in its metadata"):
        run_script(script, image_arguments(workplace, tmp_path / "unnamed", text_keys=clip))
    GMemMemoryBank(bank[:2], metadata={"image": ["0/000.png", "gone.png"]}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"1 images of the bank are not in images.*'gone\.png'"):
        run_script(script, image_arguments(workplace, tmp_path / "other", text_keys=clip))
    with pytest.raises(ValueError, match="The names of the images in x are not unique"):
        script.rows_of_images(["a"], ["a", "b", "a"], "x")


def test_thumbnails(script, finished, workplace, clip, tmp_path):
    values = {"thumbnail_size": 6, "bank_dtype": "float16"}
    run_script(script, image_arguments(workplace, tmp_path / "bank", **values))
    bank = GMemMemoryBank.from_pretrained(tmp_path / "bank")
    source = ImageSource(str(workplace / "images"), cache_dir=str(workplace / "cache"))
    files = bank.metadata["thumbnail"].to_pylist()
    for image, file in zip(source, files, strict=True):
        picture = PIL.Image.open(io.BytesIO(file))
        assert picture.format == "PNG" and picture.mode == "RGB"
        assert np.array_equal(picture, center_crop(image, 6))
    assert torch.equal(bank[:], GMemMemoryBank.from_pretrained(finished)[:].half())
    # What is removed is in no file, a thumbnail neither
    bank.without([7]).save_pretrained(tmp_path / "edited")
    kept = GMemMemoryBank.from_pretrained(tmp_path / "edited").metadata["thumbnail"].to_pylist()
    assert kept == files[:7] + files[8:]
    pixels = files[7][files[7].index(b"IDAT") + 8 :][:16]  # the rest of a file is much the same in all
    for name, is_there in {"bank": True, "edited": False}.items():
        assert any(pixels in content for content in contents(tmp_path / name).values()) == is_there
    # They are made with the bank
    with pytest.raises(ValueError, match="--thumbnail_size goes with a new bank, but there is a GMem"):
        run_script(script, image_arguments(workplace, tmp_path / "edited", text_keys=clip, thumbnail_size=6))


def test_text_keys_are_not_added_to_a_bank_of_another_encoder(script, finished, workplace, clip, tmp_path):
    shutil.copytree(finished, tmp_path / "bank")
    before = contents(tmp_path / "bank")
    for values, message in (
        (
            {"image_encoder": "other/encoder"},
            "--image_encoder is 'other/encoder', but the snippets of .* with .*/encoder'",
        ),
        ({"image_encoder_revision": "abc"}, "--image_encoder_revision is 'abc', but .* with None: leave it out"),
    ):
        with pytest.raises(ValueError, match=message):
            run_script(script, image_arguments(workplace, tmp_path / "bank", text_keys=clip, **values))
    assert contents(tmp_path / "bank") == before


def test_models_that_make_no_text_keys(script, workplace, clip, tmp_path):
    with pytest.raises(ValueError, match="is a Dinov2Model, which does not embed images and texts in one space"):
        run_script(script, image_arguments(workplace, tmp_path / "out", text_keys=workplace / "encoder"))
    model = CLIPModel.from_pretrained(clip)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "visual_projection.weight"}
    model.save_pretrained(tmp_path / "half", state_dict=weights)
    with pytest.raises(ValueError, match="has not all weights of CLIPModel.*visual_projection"):
        load_text_key_encoder(str(tmp_path / "half"))


# Embeddings


def test_embeddings_of_a_numpy_file(script, tmp_path):
    embeddings = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    np.save(tmp_path / "clip.npy", embeddings)
    np.save(tmp_path / "labels.npy", np.arange(7) % 2)
    command = arguments(
        tmp_path / "out",
        embeddings=tmp_path / "clip.npy",
        embedding_labels=tmp_path / "labels.npy",
        image_encoder="org/clip",
    )
    run_script(script, command)
    bank = GMemMemoryBank.from_pretrained(tmp_path / "out")
    assert np.array_equal(bank[:].numpy(), embeddings)
    assert bank.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert (bank.encoder, bank.source_dataset) == ("org/clip", "clip.npy")

    np.save(tmp_path / "flat.npy", np.arange(3))
    with pytest.raises(ValueError, match=r"flat\.npy must hold numbers of shape \(N, D\), got int64 of shape \(3,\)"):
        run_script(script, arguments(tmp_path / "flat", embeddings=tmp_path / "flat.npy"))


@pytest.mark.parametrize("as_data_set", [False, True])
def test_embeddings_of_a_column(script, tmp_path, as_data_set):
    embeddings = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    features = datasets.Features(
        embedding=datasets.List(datasets.Value("float32")), label=datasets.ClassLabel(names=["cup", "mug"])
    )
    (tmp_path / "data").mkdir()
    dataset = datasets.Dataset.from_dict(
        {"embedding": list(embeddings), "label": [0, 1, 0, 1, 0, 1, 0]}, features=features
    )
    dataset.to_parquet(tmp_path / "data" / "train.parquet")
    source = (
        {"dataset_name": tmp_path / "data"} if as_data_set else {"embeddings": tmp_path / "data" / "train.parquet"}
    )
    options = source | {"embedding_column": "embedding", "cache_dir": tmp_path / "cache"}
    run_script(script, arguments(tmp_path / "out", **options))
    bank = GMemMemoryBank.from_pretrained(tmp_path / "out")
    assert np.array_equal(bank[:].numpy(), embeddings)
    assert bank.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert bank.id2label == {0: "cup", 1: "mug"}
    assert bank.encoder is None
    with pytest.raises(ValueError, match=r"no column 'vector': there are \['embedding', 'label'\]"):
        run_script(script, arguments(tmp_path / "other", **(options | {"embedding_column": "vector"})))


def test_vectors_of_unequal_length_are_refused(script, tmp_path):
    dataset = datasets.Dataset.from_dict({"embedding": [[1.0, 2.0], [3.0]]})
    dataset.to_parquet(tmp_path / "train.parquet")
    options = {
        "embeddings": tmp_path / "train.parquet",
        "embedding_column": "embedding",
        "cache_dir": tmp_path / "cache",
    }
    with pytest.raises(ValueError, match="must all have the length 2 of the first"):
        run_script(script, arguments(tmp_path / "out", **options))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--embeddings", "a.npy", "--train_data_dir", "b"], "either --embeddings or a source of images"),
        (["--embeddings", "a.parquet"], "--embedding_column goes with a .parquet file"),
        (["--embeddings", "a.npy", "--embedding_column", "b"], "--embedding_column goes with a .parquet file"),
        (["--embeddings", "a.npy", "--text_keys", "b"], "--text_keys needs images"),
        (["--train_data_dir", "a", "--embedding_column", "b"], "--embedding_column goes with --embeddings"),
        (["--embedding_column", "b"], "--embedding_column goes with --embeddings"),
        (["--embeddings", "a.npy", "--skip_bad_images"], "--skip_bad_images is for images"),
        (["--dataset_name", "a", "--embedding_column", "b", "--streaming"], "--streaming is for images"),
        (["--embeddings", "a.npy", "--thumbnail_size", "8"], "--thumbnail_size needs images"),
        (["--train_data_dir", "a", "--thumbnail_size", "0"], "--thumbnail_size must be at least 1, got 0"),
        (["--embedding_labels", "a.npy"], "--embedding_labels goes with --embeddings of a .npy file"),
    ],
)
def test_wrong_arguments_are_refused(script, capsys, command, message):
    with pytest.raises(SystemExit):
        script.parse_args(["--output_dir", "out", *command])
    assert message in capsys.readouterr().err
