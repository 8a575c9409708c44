import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_training import (
    EXAMPLES,
    command_line,
    load_script,
    make_autoencoder,
    run_script,
    save_digits,
    save_image_encoder,
)

from diffusers_gmem import GMemFlowMatchScheduler, GMemMemoryBank, GMemPipeline, GMemTransformer2DModel
from diffusers_gmem.data import ImageSource, center_crop
from diffusers_gmem.training.stopping import LONGEST_WAIT


NUM_IMAGES = 40


@pytest.fixture(scope="module")
def script():
    return load_script("train_gmem")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Scikit-learn's digits as a folder of images, a tiny DINOv2, a tiny VAE, and a model configuration."""
    folder = tmp_path_factory.mktemp("train")
    save_digits(folder / "images", NUM_IMAGES)
    save_image_encoder(folder / "encoder", num_hidden_layers=2, patch_size=7)
    make_autoencoder(latents_mean=[0.1, -0.2], latents_std=[0.5, 0.6], scaling_factor=1.0).save_pretrained(
        folder / "vae"
    )
    model_config = {
        "patch_size": 2,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "alignment_layer": 2,
        "alignment_hidden_dim": 16,
    }
    (folder / "model.json").write_text(json.dumps(model_config))
    return folder


def arguments(workplace, output_dir, **overrides):
    values = {
        "train_data_dir": workplace / "images",
        "image_encoder": workplace / "encoder",
        "model_config": workplace / "model.json",
        "cache_dir": workplace / "cache",
        "output_dir": output_dir,
        "resolution": 8,
        "train_batch_size": 4,
        "max_train_steps": 6,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "checkpointing_steps": 2,
        "logging_steps": 2,
        "num_validation_images": 3,
        "validation_inference_steps": 2,
    } | overrides
    return command_line(values)


def weights(folder):
    return load_file(Path(folder, "diffusion_pytorch_model.safetensors"))


def assert_same_weights(folder, other):
    expected = weights(other)
    assert expected.keys() == weights(folder).keys()
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def finished(script, workplace):
    """A run of 6 steps with everything switched on, and what it logged."""
    output_dir = workplace / "finished"
    command = arguments(
        workplace,
        output_dir,
        gradient_accumulation_steps=2,
        random_flip=True,
        alignment="online",
        memory_drop_prob=0.1,
        validation_steps=4,
        report_to="tensorboard",
        snippet_dim=12,
        snippet_layers=1,
        cache_images=True,
        thumbnail_size=6,
    )
    run_script(script, command)
    return output_dir, command


def test_the_result_is_a_complete_pipeline(finished, workplace):
    output_dir, _ = finished
    source = ImageSource(str(workplace / "images"), cache_dir=str(workplace / "cache"))
    pipe = GMemPipeline.from_pretrained(output_dir)
    pipe.memory_bank.verify()
    assert pipe.memory_bank.labels.tolist() == source.labels
    assert pipe.memory_bank.id2label == source.id2label
    assert pipe.memory_bank.shape == (NUM_IMAGES, 12)
    assert pipe.memory_bank.encoder == str(workplace / "encoder")
    assert pipe.memory_bank.metadata["image"].to_pylist() == [source.image_name(k) for k in range(NUM_IMAGES)]
    thumbnails = pipe.memory_bank.metadata["thumbnail"].to_pylist()
    for image, file in zip(source, thumbnails, strict=True):
        assert np.array_equal(PIL.Image.open(io.BytesIO(file)), center_crop(image, 6))
    # Row k is what `image=` makes of image k
    torch.testing.assert_close(pipe.encode_image([source[0], source[39]]), pipe.memory_bank[[0, 39]])

    output = pipe(class_labels=["3"], num_images_per_memory=2, num_inference_steps=2)
    assert output.images[0].size == (8, 8)
    assert source.labels[output.memory_indices[0]] == 3


def test_validation_grids_and_checkpoints_are_written(finished):
    output_dir, _ = finished
    assert sorted(path.name for path in (output_dir / "samples").iterdir()) == [
        "step-0000004.png",
        "step-0000006.png",
    ]
    grid = PIL.Image.open(output_dir / "samples" / "step-0000006.png")
    assert grid.size == (3 * 8, 2 * 8)
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == [f"checkpoint-{k}" for k in (2, 4, 6)]
    assert list((output_dir / "logs").rglob("events.out.tfevents*"))


def test_the_saved_weights_are_the_moving_average(finished):
    output_dir, _ = finished
    assert_same_weights(output_dir / "transformer", output_dir / "checkpoint-6" / "transformer_ema")
    trained = load_file(output_dir / "checkpoint-6" / "transformer" / "diffusion_pytorch_model.safetensors")
    averaged = weights(output_dir / "transformer")
    assert not torch.equal(trained["proj_out.weight"], averaged["proj_out.weight"])
    # The projector serves training only, but belongs to the model
    assert GMemTransformer2DModel.from_pretrained(output_dir / "transformer").alignment_projector is not None


def test_a_resumed_run_is_the_run_that_was_not_interrupted(script, finished):
    output_dir, command = finished
    resumed = output_dir.with_name("resumed")
    shutil.copytree(output_dir, resumed)
    shutil.rmtree(resumed / "checkpoint-6")
    shutil.rmtree(resumed / "checkpoint-4")
    # What a kill while writing a checkpoint leaves is passed over, and does not get into the next
    (resumed / "checkpoint-4.tmp").mkdir()
    (resumed / "checkpoint-4.tmp" / "half.bin").write_bytes(b"half")
    command = [str(resumed) if word == str(output_dir) else word for word in command]
    run_script(script, [*command, "--resume_from_checkpoint", "latest"])
    assert_same_weights(resumed / "transformer", output_dir / "transformer")
    resumed_state = load_file(resumed / "checkpoint-6" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in load_file(
        output_dir / "checkpoint-6" / "transformer" / "diffusion_pytorch_model.safetensors"
    ).items():
        assert torch.equal(tensor, resumed_state[name]), name
    assert not (resumed / "checkpoint-4" / "half.bin").exists()
    assert not list(resumed.glob("*.tmp"))


def test_a_new_run_does_not_mix_with_the_checkpoints_of_another(script, finished):
    _, command = finished
    with pytest.raises(
        ValueError, match="holds checkpoints of another run .of step 6.: .*--resume_from_checkpoint latest"
    ):
        run_script(script, command)


def test_resuming_with_other_images_is_refused(script, finished, workplace):
    output_dir, command = finished
    images = workplace / "other_images"
    shutil.copytree(workplace / "images", images)
    (images / "0" / "000.png").rename(images / "0" / "0000.png")
    command = [str(images) if word == str(workplace / "images") else word for word in command]
    with pytest.raises(ValueError, match=r"40 rows. is not that of these 40 images"):
        run_script(script, [*command, "--resume_from_checkpoint", "latest"])


def test_resuming_with_another_encoder_is_refused(script, finished, workplace):
    _, command = finished
    other = workplace / "other_encoder"
    shutil.copytree(workplace / "encoder", other)
    command = [str(other) if word == str(workplace / "encoder") else word for word in command]
    with pytest.raises(ValueError, match="is not that of these 40 images and this encoder"):
        run_script(script, [*command, "--resume_from_checkpoint", "latest"])


def test_alignment_needs_a_vision_transformer(script, workplace):
    command = arguments(workplace, workplace / "aligned", image_encoder="efficientnet-lite0", alignment="online")
    with pytest.raises(ValueError, match="needs a vision transformer as the encoder, got EfficientNetModel"):
        run_script(script, command)


def test_old_checkpoints_are_removed(script, workplace):
    output_dir = workplace / "limited"
    run_script(script, arguments(workplace, output_dir, checkpoints_total_limit=1))
    assert [path.name for path in output_dir.glob("checkpoint-*")] == ["checkpoint-6"]


def test_latents_of_a_vae(script, workplace):
    output_dir = workplace / "latent"
    run_script(script, arguments(workplace, output_dir, vae=workplace / "vae", max_train_steps=2))
    pipe = GMemPipeline.from_pretrained(output_dir)
    assert pipe.transformer.config.in_channels == 2
    assert pipe.transformer.config.sample_size == 4
    assert pipe.vae.config.latents_std == [0.5, 0.6]
    assert pipe(num_inference_steps=2).images[0].size == (8, 8)


def test_without_moving_average_the_weights_are_the_last(script, workplace):
    output_dir = workplace / "no_ema"
    run_script(script, [*arguments(workplace, output_dir, max_train_steps=2), "--no-ema"])
    trained = load_file(output_dir / "checkpoint-2" / "transformer" / "diffusion_pytorch_model.safetensors")
    saved = weights(output_dir / "transformer")
    assert all(torch.equal(saved[name], trained[name]) for name in saved)


def adaptation_arguments(workplace, pretrained, output_dir, **overrides):
    """Arguments for a run from a pretrained pipeline, which brings its own encoder."""
    options = {"pretrained_model_name_or_path": pretrained, "max_train_steps": 4, **overrides}
    command = arguments(workplace, output_dir, **options)
    for name in ("--image_encoder", "--model_config"):
        position = command.index(name)
        del command[position : position + 2]
    return command


def lora_weights(folder):
    return load_file(Path(folder, "pytorch_lora_weights.safetensors"))


@pytest.fixture(scope="module")
def lora(script, workplace, finished):
    """LoRA layers for the pipeline of the first run, and the command that trained them."""
    output_dir = workplace / "lora"
    command = adaptation_arguments(
        workplace,
        finished[0],
        output_dir,
        use_lora=True,
        rank=3,
        lora_alpha=5,
        lora_dropout=0.1,
        lora_layers="to_q, to_v, linear_in",
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        random_flip=True,
        alignment="online",
        learning_rate=0.05,
    )
    run_script(script, command)
    return output_dir, command


def test_lora_layers_are_all_that_is_saved(lora, finished):
    output_dir, _ = lora
    tensors = lora_weights(output_dir)
    layers = ("attn.to_q", "attn.to_v", "ff.linear_in")
    assert tensors.keys() == {
        f"transformer.transformer_blocks.{block}.{layer}.lora_{matrix}.weight"
        for block in range(3)
        for layer in layers
        for matrix in "AB"
    }
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in tensors.values())
    assert tensors["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"].shape == (3, 16)
    assert not (output_dir / "model_index.json").exists() and not (output_dir / "transformer").exists()
    for name, tensor in tensors.items():
        averaged = lora_weights(output_dir / "checkpoint-4" / "transformer_ema")[name]
        assert torch.equal(tensor, averaged) and not torch.equal(
            tensor, lora_weights(output_dir / "checkpoint-4" / "transformer")[name]
        )
    weight_files = [path.name for path in (output_dir / "checkpoint-4").rglob("*.safetensors")]
    assert set(weight_files) == {"pytorch_lora_weights.safetensors", "optimizer.safetensors", "processes.safetensors"}
    # The pipeline they are for is as it was, its bank included
    GMemPipeline.from_pretrained(finished[0]).memory_bank.verify()


def test_a_pipeline_with_the_lora_layers_is_the_trained_one(lora, finished):
    """The grid that the script drew with its own transformer at the end is drawn again."""
    output_dir, _ = lora
    pipe = GMemPipeline.from_pretrained(finished[0], memory_bank=GMemMemoryBank.from_pretrained(output_dir / "bank"))

    def generated():
        generators = [torch.Generator().manual_seed(k) for k in range(3)]
        output = pipe(memory_indices=[0, 20, 39], generator=generators, num_inference_steps=2)
        return np.concatenate([np.array(image) for image in output.images], axis=1).astype(int)

    without = generated()
    pipe.load_lora_weights(output_dir)
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 5
    grid = np.array(PIL.Image.open(output_dir / "samples" / "step-0000004.png")).astype(int)
    assert np.abs(generated() - grid[8:]).max() <= 1
    assert np.abs(without - grid[8:]).max() > 10


def test_resumed_lora_layers_are_those_of_the_run_that_was_not_interrupted(script, lora):
    output_dir, command = lora
    resumed = output_dir.with_name("resumed_lora")
    shutil.copytree(output_dir, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    (resumed / "pytorch_lora_weights.safetensors").unlink()
    command = [str(resumed) if word == str(output_dir) else word for word in command]
    command += ["--resume_from_checkpoint", "latest"]
    run_script(script, command)
    for folder in ("", "checkpoint-4/transformer", "checkpoint-4/transformer_ema"):
        expected = lora_weights(output_dir / folder)
        for name, tensor in lora_weights(resumed / folder).items():
            assert torch.equal(tensor, expected[name]), name

    with pytest.raises(
        ValueError, match="are not those of the transformer: transformer.*lora_[AB].weight is in one of them only"
    ):
        run_script(script, [*command, "--lora_layers", "to_q,to_k"])


def test_lora_layers_are_float32_and_what_they_adapt_is_not(script, workplace, finished, monkeypatch):
    dtypes = {}
    loss = script.flow_matching_loss

    def spy(transformer, *args, **kwargs):
        dtypes.update({name: parameter.dtype for name, parameter in transformer.named_parameters()})
        return loss(transformer, *args, **kwargs)

    monkeypatch.setattr(script, "flow_matching_loss", spy)
    output_dir = workplace / "lora_bf16"
    options = {"use_lora": True, "mixed_precision": "bf16", "max_train_steps": 2}
    run_script(script, adaptation_arguments(workplace, finished[0], output_dir, **options))
    for name, dtype in dtypes.items():
        in_float32 = "lora" in name or "timestep_embedder" in name
        assert dtype == (torch.float32 if in_float32 else torch.bfloat16), name
    assert {tensor.dtype for tensor in lora_weights(output_dir).values()} == {torch.float32}
    pipe = GMemPipeline.from_pretrained(finished[0])
    pipe.load_lora_weights(output_dir)
    assert pipe(num_inference_steps=2).images[0].size == (8, 8)


def test_a_pretrained_pipeline_is_trained_further(script, workplace, finished):
    pretrained, output_dir = finished[0], workplace / "further"
    run_script(script, adaptation_arguments(workplace, pretrained, output_dir))
    before, after = weights(pretrained / "transformer"), weights(output_dir / "transformer")
    assert before.keys() == after.keys()
    for name in before:
        # Without --alignment the projector takes no part
        fixed = name.startswith("alignment_projector") or name == "pos_embed"
        assert torch.equal(before[name], after[name]) == fixed, name
    pipe = GMemPipeline.from_pretrained(output_dir)
    assert pipe.memory_bank.encoder == str(workplace / "encoder") and pipe.memory_bank.dim == 12
    torch.testing.assert_close(pipe.memory_bank[:], GMemPipeline.from_pretrained(pretrained).memory_bank[:])


def test_a_pretrained_pipeline_of_latents_is_trained_further(script, workplace):
    first, pretrained, output_dir = (workplace / name for name in ("latent_1", "latent_2", "latent_3"))
    run_script(script, arguments(workplace, first, vae=workplace / "vae", max_train_steps=2))
    scheduler = GMemFlowMatchScheduler(shift=2.0)
    GMemPipeline.from_pretrained(first, scheduler=scheduler).save_pretrained(pretrained)
    run_script(script, adaptation_arguments(workplace, pretrained, output_dir, max_train_steps=2))
    pipe = GMemPipeline.from_pretrained(output_dir)
    assert pipe.vae.config.latents_std == [0.5, 0.6]
    assert pipe.scheduler.config.shift == 2.0


def test_a_pretrained_pipeline_takes_its_own_resolution(script, workplace, finished):
    command = adaptation_arguments(workplace, finished[0], workplace / "larger", resolution=16)
    with pytest.raises(ValueError, match=r"shape \(3, 16, 16\), but the pretrained one takes \(3, 8, 8\)"):
        run_script(script, command)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "give one of --train_data_dir, --dataset_name, --webdataset and --latents_dir"),
        (
            ["--train_data_dir", "a", "--dataset_name", "b"],
            "give one of --train_data_dir, --dataset_name, --webdataset and --latents_dir",
        ),
        (["--train_data_dir", "a", "--train_batch_size", "0"], "--train_batch_size must be at least 1, got 0"),
        (["--train_data_dir", "a", "--memory_drop_prob", "1.5"], r"--memory_drop_prob must be in \[0, 1\], got 1.5"),
        (["--train_data_dir", "a", "--lr_scheduler", "steps"], "invalid choice: 'steps'"),
        (["--train_data_dir", "a", "--lr_scheduler", "piecewise_constant"], "invalid choice: 'piecewise_constant'"),
        (["--train_data_dir", "a", "--lr_warmup_steps", "5"], "--lr_scheduler constant has no warm-up"),
        (["--train_data_dir", "a", "--use_lora"], "--use_lora needs --pretrained_model_name_or_path"),
        (
            ["--train_data_dir", "a", "--pretrained_model_name_or_path", "b", "--vae", "c"],
            "--vae does not go with --pretrained_model_name_or_path",
        ),
        (
            ["--train_data_dir", "a", "--pretrained_model_name_or_path", "b", "--output_dir", "./b"],
            "--output_dir must be another folder than the pretrained pipeline's",
        ),
    ],
)
def test_wrong_arguments_are_refused(script, capsys, command, message):
    with pytest.raises(SystemExit):
        script.parse_args(command)
    assert re.search(message, capsys.readouterr().err)


def test_processes_wait_long_for_the_main_one(script, workplace, monkeypatch):
    given = []
    monkeypatch.setattr(script, "Accelerator", lambda **kwargs: given.append(kwargs) or Accelerator(**kwargs))
    run_script(script, arguments(workplace, workplace / "waiting", max_train_steps=1))
    assert [handler.timeout for handler in given[0]["kwargs_handlers"]] == [LONGEST_WAIT]


@pytest.mark.slow
def test_accelerate_launch_with_two_processes(script, workplace):
    """Two processes of batch 2 train what one process of batch 4 does, up to the order of a float32 sum."""
    one, two = workplace / "one", workplace / "two"
    run_script(script, arguments(workplace, one))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launcher = [Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    result = subprocess.run(
        [*launcher, EXAMPLES / "train_gmem.py", *arguments(workplace, two, train_batch_size=2)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "Global batch: 4 images = 2 per device x 2 processes x 1 accumulation steps" in result.stderr
    assert "6 optimizer steps = 0.6 epochs of 40 images" in result.stderr
    expected = weights(one / "transformer")
    for name, tensor in weights(two / "transformer").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
