import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from diffusers import AutoencoderKL
from reference_cases import assert_matches, case_tensors, reference_cases
from safetensors.torch import save_file
from tiny_training import (
    EXAMPLES,
    command_line,
    load_script,
    make_autoencoder,
    run_script,
    save_digits,
    save_image_encoder,
)

from diffusers_gmem.data import (
    ImageSource,
    LatentCache,
    center_crop,
    encode_pixel_values,
    image_to_tensor,
    load_autoencoder,
)
from diffusers_gmem.data.shards import Shard
from diffusers_gmem.models.latent_normalization import normalize_latents


SCRIPT = EXAMPLES / "cache_latents.py"
NUM_IMAGES = 70


@pytest.fixture(scope="module")
def script():
    return load_script("cache_latents")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Scikit-learn's digits in a folder per class, a tiny DINOv2 and a tiny VAE."""
    folder = tmp_path_factory.mktemp("cache_latents")
    save_digits(folder / "images", NUM_IMAGES)
    save_image_encoder(folder / "encoder")
    make_autoencoder().save_pretrained(folder / "vae")
    return folder


def arguments(workplace, output_dir, **overrides):
    values = {
        "train_data_dir": workplace / "images",
        "image_encoder": workplace / "encoder",
        "vae": workplace / "vae",
        "cache_dir": workplace / "cache",
        "output_dir": output_dir,
        "resolution": 16,
        "batch_size": 8,
        "shard_size": 20,
        "alignment": True,
        "latents_dtype": "float32",
    } | overrides
    return command_line(values)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(script, workplace):
    run_script(script, arguments(workplace, workplace / "finished"))
    return workplace / "finished"


def test_the_rows_are_what_the_models_make_of_the_images(finished, workplace):
    from transformers import AutoImageProcessor, AutoModel

    cache = LatentCache.from_pretrained(finished)
    bank = cache.load_memory_bank()
    assert len(cache) == len(bank) == NUM_IMAGES
    source = ImageSource(str(workplace / "images"), cache_dir=str(workplace / "cache"))
    names = [source.image_name(index) for index in range(NUM_IMAGES)]
    encoder = AutoModel.from_pretrained(workplace / "encoder").eval()
    processor = AutoImageProcessor.from_pretrained(workplace / "encoder", backend="pil")
    vae = AutoencoderKL.from_pretrained(workplace / "vae").eval()
    order = [names.index(name) for name in bank.metadata["image"].to_pylist()]
    assert sorted(order) == list(range(NUM_IMAGES)) and order != list(range(NUM_IMAGES))
    assert cache.labels.tolist() == bank.labels.tolist() == [source.labels[index] for index in order]

    for row in (0, 33, 69):
        image = source[order[row]]
        for flipped in (False, True):
            view = PIL.ImageOps.mirror(image) if flipped else image
            with torch.no_grad():
                posterior = vae.encode(image_to_tensor(center_crop(view, 16))[None]).latent_dist
                output = encoder(processor(images=view, return_tensors="pt").pixel_values)
            expected = {
                "latents_mean": posterior.mean,
                "latents_logvar": posterior.logvar,
                "snippets": output.pooler_output,
                "alignment_features": output.last_hidden_state[:, 1:].bfloat16(),
            }
            assert sorted(cache.tensor_names) == sorted(expected)
            for name, tensor in expected.items():
                tolerance = (
                    {"rtol": 1e-2, "atol": 1e-2} if name == "alignment_features" else {"rtol": 1e-4, "atol": 1e-5}
                )
                found = cache.read(name, torch.tensor([row]), torch.tensor([flipped]))
                torch.testing.assert_close(found, tensor, **tolerance)
            if not flipped:
                torch.testing.assert_close(bank[row], output.pooler_output[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", reference_cases("latent_statistics"), ids=lambda case: case["id"])
def test_reference_statistics(case, script, tmp_path):
    # Without a log-variance the mean is the latent. In two shards of unequal size; the flipped view is another one.
    tensors, shards = case_tensors(case), []
    for number, latents in enumerate(tensors["latents"].split([7, len(tensors["latents"]) - 7])):
        kept = {"latents_mean": torch.stack([latents, 2 * latents + 1], dim=1)}
        save_file(kept | script.latent_moments(kept), tmp_path / f"{number}.safetensors")
        shards.append(Shard(f"{number}.safetensors", len(latents), 0, ""))
    statistics = script.latent_statistics(tmp_path, shards)["plain"]
    for name in ("mean", "std"):
        found = torch.tensor(statistics[f"latents_{name}"]).view(tensors[name].shape)
        assert_matches(case, name, found, tensors[name])


def test_the_statistics_are_those_of_sampled_latents_and_reach_the_autoencoder(finished, workplace):
    cache = LatentCache.from_pretrained(finished)
    everyone = torch.arange(NUM_IMAGES)
    generator = torch.Generator().manual_seed(0)
    for view in ("plain", "flipped"):
        flipped = torch.full((NUM_IMAGES,), view == "flipped")
        mean = cache.read("latents_mean", everyone, flipped)
        std = (0.5 * cache.read("latents_logvar", everyone, flipped)).exp()
        samples = torch.stack([mean + std * torch.randn(mean.shape, generator=generator) for _ in range(200)])
        for name, found in (("latents_mean", samples.mean((0, 1, 3, 4))), ("latents_std", samples.std((0, 1, 3, 4)))):
            expected = torch.tensor(cache.config["statistics"][view][name])
            torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert cache.config["statistics"]["plain"] != cache.config["statistics"]["flipped"]

    vae = cache.load_autoencoder()
    vae.save_pretrained(workplace / "normalised")
    config = load_autoencoder(str(workplace / "normalised")).config
    assert config.scaling_factor == 1.0
    latents = normalize_latents(samples.flatten(0, 1), config)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=0.1)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(2), rtol=0, atol=0.1)


def test_statistics_of_the_autoencoder_itself_stay(finished, workplace, tmp_path):
    vae = load_autoencoder(str(workplace / "vae"))
    vae.register_to_config(latents_mean=[0.5, 0.5], latents_std=[2.0, 2.0])
    vae.save_pretrained(tmp_path)
    cache = LatentCache.from_pretrained(finished)
    cache.config["autoencoder"] = {"name_or_path": str(tmp_path)}
    assert cache.load_autoencoder().config.latents_mean == [0.5, 0.5]


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(finished, workplace, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import accelerate, runpy\n"
        "assert accelerate.Accelerator().num_processes == 2\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    subprocess.run(
        [*command, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", str(driver)]
        + arguments(workplace, tmp_path / "two", dataloader_num_workers=1),
        check=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "2"},
    )
    assert contents(tmp_path / "two") == contents(finished)


@pytest.mark.slow
def test_killed_and_restarted_it_writes_the_same_bytes(script, workplace, tmp_path):
    # Small shards, so that there is a moment between the first and the last
    whole = arguments(workplace, tmp_path / "whole", shard_size=2, batch_size=1)
    run_script(script, whole)
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, SCRIPT, *arguments(workplace, killed, shard_size=2, batch_size=1)])
    while not list(killed.glob("latents-00005*.safetensors")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= len(list(killed.glob("latents-*.safetensors"))) < NUM_IMAGES / 2
    with pytest.raises(ValueError, match="is not complete"):
        LatentCache.from_pretrained(killed)
    with pytest.raises(ValueError, match="other settings: seed: 0 there, 1 now"):
        run_script(script, arguments(workplace, killed, shard_size=2, batch_size=1, seed=1))

    run_script(script, arguments(workplace, killed, shard_size=2, batch_size=1))
    assert contents(killed) == contents(tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in killed.rglob("*")}
    run_script(script, arguments(workplace, killed, shard_size=2, batch_size=1))  # nothing is left to do
    assert before == {path: path.stat().st_mtime_ns for path in killed.rglob("*")}


def test_paths_in_the_configuration_hold_from_anywhere(script, workplace, tmp_path, monkeypatch):
    monkeypatch.chdir(workplace)
    run_script(script, arguments(workplace, tmp_path / "out", vae="vae", image_encoder="encoder"))
    monkeypatch.chdir(tmp_path)
    cache = LatentCache.from_pretrained("out")
    assert cache.load_autoencoder().config.latents_mean == cache.config["statistics"]["plain"]["latents_mean"]
    assert cache.config["image_encoder"]["encoder"] == str(workplace / "encoder")
    assert cache.load_memory_bank().fingerprint == cache.config["memory_bank_fingerprint"]


def test_broken_images_are_skipped_and_listed(script, workplace, tmp_path, caplog):
    for number in range(6):
        PIL.Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    options = {"train_data_dir": tmp_path, "batch_size": 2, "alignment": None}
    with pytest.raises(ValueError, match=r"2\.png\) cannot be read"):
        run_script(script, arguments(workplace, tmp_path / "out", **options))
    run_script(script, arguments(workplace, tmp_path / "skipped", **options, skip_bad_images=True))
    cache = LatentCache.from_pretrained(tmp_path / "skipped")
    assert len(cache) == 5 and cache.config["num_skipped"] == 1
    assert "alignment_features" not in cache.tensor_names and cache.labels is None
    assert "1 images could not be read" in caplog.text
    (line,) = (tmp_path / "skipped" / "skipped_images.txt").read_text().splitlines()
    assert re.search(r"2\.png\) cannot be read", line)


def test_the_papers_preprocessing_is_dinov2s_default(script, workplace, tmp_path):
    (tmp_path / "images").mkdir()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(
        tmp_path / "images" / "0.png"
    )
    options = {"train_data_dir": tmp_path / "images", "resolution": 256, "batch_size": 1}
    run_script(script, arguments(workplace, tmp_path / "paper", **options))
    run_script(script, arguments(workplace, tmp_path / "own", **options, image_preprocessing="own"))
    paper, own = (LatentCache.from_pretrained(tmp_path / name) for name in ("paper", "own"))
    assert paper.config["image_encoder"]["preprocessing"]["size"] == 224
    image = ImageSource(str(tmp_path / "images"), cache_dir=str(workplace / "cache"))[0]
    for cache in (paper, own):
        encoder, processor = cache.load_image_encoder()
        snippet = encode_pixel_values(encoder, processor(images=image, return_tensors="pt").pixel_values)[0]
        torch.testing.assert_close(cache.load_memory_bank()[:], snippet, rtol=1e-4, atol=1e-5)
    assert paper.shape("alignment_features") == (256, 16)
    assert own.shape("alignment_features") == (4, 16)


def test_a_deterministic_autoencoder(script, workplace, tmp_path):
    make_autoencoder("AutoencoderDC").save_pretrained(tmp_path / "dc")
    run_script(script, arguments(workplace, tmp_path / "out", vae=tmp_path / "dc"))
    cache = LatentCache.from_pretrained(tmp_path / "out")
    assert "latents_logvar" not in cache.tensor_names
    # AutoencoderDC has no fields for statistics; they are kept all the same
    cache.load_autoencoder().save_pretrained(tmp_path / "again")
    statistics = json.loads((tmp_path / "again" / "config.json").read_text())
    assert statistics["latents_std"] == cache.config["statistics"]["plain"]["latents_std"]
    assert load_autoencoder(str(tmp_path / "again")).config["latents_std"] == statistics["latents_std"]
    latents = cache.read("latents_mean", torch.arange(NUM_IMAGES), torch.zeros(NUM_IMAGES, dtype=torch.bool))
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.tensor(statistics["latents_std"]))


def test_wrong_arguments_are_refused(script, workplace, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(arguments(workplace, "out", batch_size=0))
    assert "--batch_size must be at least 1, got 0" in capsys.readouterr().err
