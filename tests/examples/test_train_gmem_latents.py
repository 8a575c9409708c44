# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Training from what `cache_latents.py` made of the images."""

import json
import re
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import command_line, load_script, make_autoencoder, run_script, save_digits, save_image_encoder

from diffusers_gmem import GMemMemoryBank, GMemPipeline
from diffusers_gmem.data import LatentCache
from diffusers_gmem.training import GMemLatentTrainingDataset, TrainingBatchSampler


NUM_IMAGES = 20


@pytest.fixture(scope="module")
def script():
    return load_script("train_gmem")


def cache_latents(folder, output_dir, **overrides):
    values = {
        "train_data_dir": folder / "images",
        "image_encoder": folder / "encoder",
        "vae": folder / "vae",
        "cache_dir": folder / "cache",
        "output_dir": output_dir,
        "resolution": 8,
        "shard_size": 8,
        "alignment": True,
    } | overrides
    run_script(load_script("cache_latents"), command_line(values))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Digits, tiny models, and a cache of the digits' latents."""
    folder = tmp_path_factory.mktemp("train_latents")
    save_digits(folder / "images", NUM_IMAGES)
    save_image_encoder(folder / "encoder")
    make_autoencoder().save_pretrained(folder / "vae")
    model_config = {
        "patch_size": 1,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "alignment_layer": 1,
        "alignment_hidden_dim": 16,
    }
    (folder / "model.json").write_text(json.dumps(model_config))
    cache_latents(folder, folder / "latents")
    return folder


def arguments(workplace, output_dir, **overrides):
    values = {
        "latents_dir": workplace / "latents",
        "model_config": workplace / "model.json",
        "output_dir": output_dir,
        "train_batch_size": 4,
        "latents_block_size": 2,
        "max_train_steps": 6,
        "learning_rate": 1e-3,
        "checkpointing_steps": 2,
        "num_validation_images": 3,
        "validation_inference_steps": 2,
    }
    return command_line(values | overrides)


@pytest.fixture(scope="module")
def finished(script, workplace):
    """A run of 6 steps, which lasts 2.4 epochs."""
    output_dir = workplace / "finished"
    command = arguments(
        workplace, output_dir, alignment="cached", random_flip=True, gradient_accumulation_steps=2, validation_steps=3
    )
    run_script(script, command)
    return output_dir, command


def test_the_result_is_a_complete_pipeline(finished, workplace):
    output_dir, _ = finished
    shutil.move(workplace / "latents", workplace / "elsewhere")  # nothing of the cache is needed any more
    try:
        pipe = GMemPipeline.from_pretrained(output_dir)
        pipe.memory_bank.verify()
    finally:
        shutil.move(workplace / "elsewhere", workplace / "latents")
    cache = LatentCache.from_pretrained(workplace / "latents")
    statistics = cache.config["statistics"]["plain"]
    assert pipe.vae.config.latents_mean == statistics["latents_mean"]
    assert pipe.vae.config.latents_std == statistics["latents_std"]
    assert pipe.vae.config.scaling_factor == 1.0
    assert pipe.memory_bank.fingerprint == cache.config["memory_bank_fingerprint"]
    assert pipe.transformer.config.alignment_dim == 16
    name = pipe.memory_bank.metadata["image"][7].as_py()
    snippet = pipe.encode_image(PIL.Image.open(workplace / "images" / name).convert("RGB"))
    torch.testing.assert_close(snippet, pipe.memory_bank[[7]], rtol=1e-4, atol=1e-5)
    assert pipe(num_inference_steps=2).images[0].size == (8, 8)


@pytest.mark.parametrize(("num_files", "block_size"), [(None, 16), (2, 1)])
def test_neighbours_of_a_stream_are_not_drawn_together(script, workplace, tmp_path, num_files, block_size):
    shutil.copytree(workplace / "latents", tmp_path / "latents")
    config = json.loads((tmp_path / "latents" / "config.json").read_text())
    (tmp_path / "latents" / "config.json").write_text(json.dumps(config | {"num_files": num_files}))
    options = {"latents_dir": tmp_path / "latents", "latents_block_size": None, "max_train_steps": 1}
    run_script(script, arguments(workplace, tmp_path / "out", **options, checkpointing_steps=1))
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "state.json").read_text())
    assert state["data_order"]["block_size"] == block_size


def test_the_grid_shows_decoded_latents_above_what_their_snippets_give(finished, workplace):
    output_dir, _ = finished
    assert sorted(path.name for path in (output_dir / "samples").iterdir()) == [
        "step-0000003.png",
        "step-0000006.png",
    ]
    grid = np.array(PIL.Image.open(output_dir / "samples" / "step-0000006.png")).astype(int)
    cache = LatentCache.from_pretrained(workplace / "latents")
    latents = cache.read("latents_mean", torch.tensor([0, 10, 19]), torch.zeros(3, dtype=torch.bool)).float()
    pipe = GMemPipeline.from_pretrained(output_dir)
    with torch.no_grad():
        pictures = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(np.concatenate(list(pictures), axis=1) - grid[:8]).max() <= 1
    generators = [torch.Generator().manual_seed(k) for k in range(3)]
    generated = pipe(memory_indices=[0, 10, 19], generator=generators, num_inference_steps=2).images
    assert np.abs(np.concatenate([np.array(image).astype(int) for image in generated], axis=1) - grid[8:]).max() <= 1


def test_a_resumed_run_is_the_run_that_was_not_interrupted(script, finished):
    output_dir, command = finished
    resumed = output_dir.with_name("resumed")
    shutil.copytree(output_dir, resumed)
    for step in (4, 6):
        shutil.rmtree(resumed / f"checkpoint-{step}")
    command = [str(resumed) if word == str(output_dir) else word for word in command]
    run_script(script, [*command, "--resume_from_checkpoint", "latest"])
    path = "transformer/diffusion_pytorch_model.safetensors"
    expected = load_file(output_dir / path)
    for name, tensor in load_file(resumed / path).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("independent_flips", [None, True])
def test_the_transformer_learns_the_normalised_samples_of_the_posterior(
    script, workplace, tmp_path, monkeypatch, independent_flips
):
    batches = []
    loss = script.flow_matching_loss

    def spy(transformer, latents, memory, noise, timestep, alignment_features, **kwargs):
        batches.append((latents, memory, noise, alignment_features))
        return loss(transformer, latents, memory, noise, timestep, alignment_features, **kwargs)

    monkeypatch.setattr(script, "flow_matching_loss", spy)
    options = {"random_flip": True, "independent_flips": independent_flips, "alignment": "cached"}
    run_script(script, arguments(workplace, tmp_path, max_train_steps=3, seed=5, **options))

    cache = LatentCache.from_pretrained(workplace / "latents")
    mean, std = (torch.tensor(cache.config["statistics"]["plain"][f"latents_{k}"]) for k in ("mean", "std"))
    flips = {"random_flip": True, "independent_flips": bool(independent_flips)}
    dataset = GMemLatentTrainingDataset(cache, 5, 0.4, alignment=True, **flips)
    sampler = TrainingBatchSampler(NUM_IMAGES, 4, seed=5, first_step=0, num_steps=3, block_size=2)
    assert len(batches) == 3
    for keys, (latents, memory, noise, features) in zip(sampler, batches, strict=True):
        expected = dataset.__getitems__(keys)
        normalised = (expected["latents"] - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        torch.testing.assert_close(latents, normalised)
        assert torch.equal(memory, expected["memory"]) and torch.equal(noise, expected["noise"])
        # 2 x 2 patches of the encoder for 4 x 4 tokens
        corners = features.unflatten(1, (4, 4))[:, ::3, ::3].flatten(1, 2)
        torch.testing.assert_close(corners, expected["alignment_features"].float())


@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderRAE"])
def test_other_autoencoders(script, workplace, tmp_path, kind):
    make_autoencoder(kind).save_pretrained(tmp_path / "vae")
    cache_latents(workplace, tmp_path / "latents", vae=tmp_path / "vae")
    options = {"latents_dir": tmp_path / "latents", "max_train_steps": 2}
    run_script(script, arguments(workplace, tmp_path / "out", **options))
    pipe = GMemPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe.vae).__name__ == kind
    statistics = LatentCache.from_pretrained(tmp_path / "latents").config["statistics"]["plain"]
    # RAE normalises by itself, with its own
    expected = None if kind == "AutoencoderRAE" else statistics["latents_std"]
    assert pipe.vae.config.get("latents_std") == expected
    assert pipe(num_inference_steps=2).images[0].size == (8, 8)


def adaptation_arguments(workplace, pretrained, output_dir, **overrides):
    options = {"pretrained_model_name_or_path": pretrained, "model_config": None, "max_train_steps": 2}
    return arguments(workplace, output_dir, **(options | overrides))


def test_a_pretrained_pipeline_is_trained_further(script, finished, workplace, tmp_path):
    pretrained = finished[0]
    # Statistics of the pipeline stay, whatever those of other images are
    cache_latents(workplace, tmp_path / "latents", train_data_dir=workplace / "images" / "3")
    command = adaptation_arguments(workplace, pretrained, tmp_path / "out", latents_dir=tmp_path / "latents")
    run_script(script, command)
    pipe = GMemPipeline.from_pretrained(tmp_path / "out")
    assert pipe.vae.config.latents_mean == GMemPipeline.from_pretrained(pretrained).vae.config.latents_mean
    cache = LatentCache.from_pretrained(tmp_path / "latents")
    assert pipe.vae.config.latents_mean != cache.config["statistics"]["plain"]["latents_mean"]
    assert pipe.memory_bank.fingerprint == cache.config["memory_bank_fingerprint"]
    assert pipe(num_inference_steps=2).images[0].size == (8, 8)


def test_alignment_needs_a_transformer_that_predicts_the_features(script, workplace, tmp_path):
    model_config = json.loads((workplace / "model.json").read_text()) | {"alignment_layer": None}
    (tmp_path / "model.json").write_text(json.dumps(model_config))
    options = {"alignment": "cached", "model_config": tmp_path / "model.json"}
    with pytest.raises(
        ValueError, match="--alignment cached needs .* of 16 dimensions, but its `alignment_layer` is None"
    ):
        run_script(script, arguments(workplace, tmp_path / "out", **options))


def test_lora_layers(script, finished, workplace, tmp_path):
    command = adaptation_arguments(
        workplace, finished[0], tmp_path, use_lora=True, alignment="cached", random_flip=True
    )
    run_script(script, command)
    bank = GMemMemoryBank.from_pretrained(tmp_path / "bank")
    pipe = GMemPipeline.from_pretrained(finished[0], memory_bank=bank)
    pipe.load_lora_weights(tmp_path)
    assert len(bank) == NUM_IMAGES and pipe(num_inference_steps=2).images[0].size == (8, 8)


def test_a_cache_of_other_models_is_refused(script, finished, workplace, tmp_path):
    pretrained = finished[0]
    vae = make_autoencoder()
    with torch.no_grad():
        vae.decoder.conv_out.weight += 0.1
    vae.save_pretrained(tmp_path / "vae")
    cache_latents(workplace, tmp_path / "latents", vae=tmp_path / "vae")
    command = adaptation_arguments(workplace, pretrained, tmp_path / "out", latents_dir=tmp_path / "latents")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / 'vae'))} is not the pipeline's autoencoder"):
        run_script(script, command)

    shutil.copytree(workplace / "encoder", tmp_path / "encoder")
    cache_latents(workplace, tmp_path / "latents_2", image_encoder=tmp_path / "encoder")
    command = adaptation_arguments(workplace, pretrained, tmp_path / "out", latents_dir=tmp_path / "latents_2")
    with pytest.raises(ValueError, match="the `encoder` of its snippets is .*, but .* in the pipeline"):
        run_script(script, command)


def test_alignment_needs_features_in_the_cache(script, workplace, tmp_path):
    cache_latents(workplace, tmp_path / "latents", alignment=None)
    command = arguments(workplace, tmp_path / "out", latents_dir=tmp_path / "latents", alignment="cached")
    with pytest.raises(ValueError, match="has no alignment_features: it has"):
        run_script(script, command)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--latents_dir", "a", "--train_data_dir", "b"], "give one of --train_data_dir"),
        (["--latents_dir", "a", "--vae", "b"], "--vae does not go with --latents_dir: the cache says"),
        (["--latents_dir", "a", "--resolution", "8"], "--resolution does not go with --latents_dir"),
        (["--latents_dir", "a", "--skip_bad_images"], "--skip_bad_images does not go with --latents_dir"),
        (["--latents_dir", "a", "--alignment", "online"], "--alignment online does not go with --latents_dir"),
        (["--train_data_dir", "a", "--alignment", "cached"], "--alignment cached needs --latents_dir"),
        (["--latents_dir", "a", "--independent_flips"], "--independent_flips needs --random_flip"),
        (["--latents_dir", "a", "--latents_block_size", "0"], "--latents_block_size must be at least 1, got 0"),
        (["--webdataset", "a.tar", "--streaming"], "cache_latents.py, and train with --latents_dir"),
    ],
)
def test_wrong_arguments_are_refused(script, capsys, command, message):
    with pytest.raises(SystemExit):
        script.parse_args(command)
    assert message in capsys.readouterr().err
