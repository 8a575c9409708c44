# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""What an optimizer step is, what is done when it goes wrong, and what is said of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import command_line, load_script, make_autoencoder, run_script, save_digits, save_image_encoder

from diffusers_gmem import GMemPipeline
from diffusers_gmem.data import ImageSource
from diffusers_gmem.evaluation import frechet_distance
from diffusers_gmem.training import TrainingBatchSampler, model_flops_per_image
from diffusers_gmem.training.online_evaluation import sample_statistics, snippet_statistics


NUM_IMAGES = 12


@pytest.fixture(scope="module")
def script():
    return load_script("train_gmem")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    save_digits(folder / "images", NUM_IMAGES)
    save_image_encoder(folder / "encoder")
    model_config = {"patch_size": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
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
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "checkpointing_steps": 1,
        "num_validation_images": 2,
        "validation_inference_steps": 2,
    }
    return command_line(values | overrides)


def weights(folder, name="transformer"):
    return load_file(Path(folder, name, "diffusion_pytorch_model.safetensors"))


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def finished(script, workplace):
    run_script(script, arguments(workplace, workplace / "finished"))
    return workplace / "finished"


def spoil(monkeypatch, script, call, how):
    """Makes the loss of one micro-batch, counted from 1, another."""
    loss, calls = script.flow_matching_loss, []

    def spoilt(transformer, *args, **kwargs):
        terms = loss(transformer, *args, **kwargs)
        calls.append(None)
        if len(calls) == call:
            terms["loss"] = terms["loss"] + how(next(transformer.parameters()).sum())
        return terms

    monkeypatch.setattr(script, "flow_matching_loss", spoilt)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda weight: weight * float("nan"), "its loss is nan and the norm of its gradient nan"),
        (lambda weight: (weight * 0).abs().sqrt(), r"its loss is \d\.\d+ and the norm of its gradient nan"),
        (lambda weight: weight * 0 + float("inf"), r"its loss is inf and the norm of its gradient \d+\.\d+"),
    ],
    ids=["both", "gradient", "loss"],
)
def test_a_step_that_is_not_finite_does_not_happen(script, workplace, finished, tmp_path, monkeypatch, how, message):
    """The first micro-batch of step 3 is bad."""
    command = arguments(workplace, tmp_path, checkpointing_steps=9)
    with monkeypatch.context() as context:
        spoil(context, script, 5, how)
        with pytest.raises(RuntimeError, match=f"Step 3 is not finite: {message}") as error:
            run_script(script, command)
    failed = tmp_path / "failed-2"
    assert str(failed) in str(error.value)
    for name in ("transformer", "transformer_ema"):
        assert_same(weights(failed, name), weights(finished / "checkpoint-2", name))
    assert_same(
        load_file(failed / "optimizer.safetensors"), load_file(finished / "checkpoint-2/optimizer.safetensors")
    )
    assert not (tmp_path / "model_index.json").exists()

    samples = json.loads((failed / "samples.json").read_text())
    assert samples["step"] == 3 and len(samples["samples"]) == 4
    sampler = TrainingBatchSampler(NUM_IMAGES, 2, 0, first_step=2, num_steps=3, gradient_accumulation_steps=2)
    keys = [key for micro_batch in sampler for key in micro_batch]
    assert [(sample["epoch"], sample["index"]) for sample in samples["samples"]] == keys
    source = ImageSource(str(workplace / "images"), cache_dir=str(workplace / "cache"))
    for sample in samples["samples"]:
        assert source.image_name(sample["index"]) == sample["image"]
        assert sample["image"] in str(error.value)
    # The state is a checkpoint like any other
    run_script(script, [*command, "--resume_from_checkpoint", str(failed)])
    assert_same(weights(tmp_path), weights(finished))


def test_accumulated_steps_are_those_of_the_whole_batch(script, workplace, finished, tmp_path):
    """The rate and the moving average go on by one for each optimizer step."""
    schedule = {"lr_scheduler": "linear", "lr_warmup_steps": 2}
    run_script(script, arguments(workplace, tmp_path / "accumulated", **schedule))
    whole = {"train_batch_size": 4, "gradient_accumulation_steps": 1}
    run_script(script, arguments(workplace, tmp_path / "whole", **schedule, **whole))
    for name, tensor in weights(tmp_path / "accumulated").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "whole")[name], rtol=1e-4, atol=1e-6)
    # After n steps the decay is (1 + n) / (10 + n), with n one less than the steps done; at n = 0 it is 0
    averages = [weights(finished / f"checkpoint-{step}", "transformer_ema") for step in (1, 2, 3)]
    trained = [weights(finished / f"checkpoint-{step}") for step in (1, 2, 3)]
    for name in trained[0]:
        assert torch.equal(averages[0][name], trained[0][name])
        for step, decay in ((1, 2 / 11), (2, 3 / 12)):
            expected = decay * averages[step - 1][name] + (1 - decay) * trained[step][name]
            torch.testing.assert_close(averages[step][name], expected)


def test_mixed_precision_keeps_float32_weights(script, workplace, finished, tmp_path, monkeypatch):
    dtypes = {}
    loss = script.flow_matching_loss

    def spy(transformer, *args, **kwargs):
        feed_forward = transformer.transformer_blocks[0].ff
        hook = feed_forward.register_forward_hook(lambda module, args, output: dtypes.update(computed=output.dtype))
        terms = loss(transformer, *args, **kwargs)
        hook.remove()
        dtypes["weights"] = {parameter.dtype for parameter in transformer.parameters()}
        dtypes["loss"] = terms["loss"].dtype
        return terms

    monkeypatch.setattr(script, "flow_matching_loss", spy)
    run_script(script, arguments(workplace, tmp_path, mixed_precision="bf16"))
    assert dtypes == {"computed": torch.bfloat16, "weights": {torch.float32}, "loss": torch.float32}
    state = load_file(tmp_path / "checkpoint-4" / "optimizer.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    for name, tensor in weights(tmp_path).items():
        assert tensor.dtype == torch.float32
        # Changes smaller than the rounding of bfloat16 are kept
        torch.testing.assert_close(tensor, weights(finished)[name], rtol=0, atol=6e-3)
    assert not torch.equal(tensor, tensor.bfloat16().float())


def test_gradient_checkpointing_changes_nothing(script, workplace, finished, tmp_path):
    run_script(script, arguments(workplace, tmp_path, gradient_checkpointing=True))
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, weights(finished)[name], rtol=1e-5, atol=1e-7)


@pytest.fixture
def logged(script, monkeypatch):
    """What the script gives to the trackers, step by step."""
    lines = {}
    log = script.Accelerator.log

    def spy(self, values, step=None, **kwargs):
        lines[step] = values
        log(self, values, step=step, **kwargs)

    monkeypatch.setattr(script.Accelerator, "log", spy)
    return lines


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(script, workplace, tmp_path, logged, monkeypatch):
    run_script(script, arguments(workplace, tmp_path / "eager", logging_steps=1))
    expected = dict(logged)
    compiled = []
    compile_block = script.GMemTransformer2DModel.compile_repeated_blocks
    monkeypatch.setattr(
        script.GMemTransformer2DModel,
        "compile_repeated_blocks",
        lambda self, **options: compiled.append(options) or compile_block(self, **options),
    )
    options = {"torch_compile": True, "gradient_checkpointing": True, "logging_steps": 1}
    run_script(script, arguments(workplace, tmp_path / "compiled", **options))
    assert compiled == [{"fullgraph": True}]
    for step, values in expected.items():
        for name in ("loss", "velocity", "cosine", "grad_norm"):
            assert logged[step][name] == pytest.approx(values[name], rel=1e-4), (step, name)
    assert GMemPipeline.from_pretrained(tmp_path / "compiled")(num_inference_steps=2).images[0].size == (8, 8)


def test_images_per_second_and_mfu_are_logged(script, workplace, tmp_path, logged, monkeypatch):
    now = iter(range(0, 1000, 2))
    monkeypatch.setattr(script.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(script, "peak_flops", lambda device: 1e9)
    run_script(script, arguments(workplace, tmp_path, logging_steps=2, mixed_precision="bf16"))
    assert sorted(logged) == [2, 4]
    config = GMemPipeline.from_pretrained(tmp_path).transformer.config
    for values in logged.values():
        assert values["images_per_second"] == 2 * 4 / 2  # two steps of 4 images in "two seconds"
        assert values["mfu"] == pytest.approx(4 * model_flops_per_image(config) / 1e9)
        assert {"loss", "velocity", "cosine", "lr", "grad_norm"} <= values.keys()

    logged.clear()
    run_script(script, arguments(workplace, tmp_path / "float32"))
    assert "mfu" not in logged[4]  # of which the peak is another


def test_the_frechet_distance_is_logged(script, workplace, finished, tmp_path, logged):
    options = {"fd_steps": 3, "fd_num_images": 10}
    run_script(script, arguments(workplace, tmp_path, **options))
    distances = {step: values["frechet_distance"] for step, values in logged.items() if "frechet_distance" in values}
    assert sorted(distances) == [3, 4]
    pipe = GMemPipeline.from_pretrained(tmp_path)
    samples = sample_statistics(pipe, 10, batch_size=5, num_inference_steps=2, seed=0)
    expected = frechet_distance(samples, snippet_statistics(pipe.memory_bank))
    assert distances[4] == pytest.approx(expected, rel=1e-3)
    # It leaves the training alone, and the grid is drawn at the end only
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-0000004.png"]
    assert_same(weights(tmp_path), weights(finished))


def test_several_trackers_with_pictures(script, workplace, tmp_path, monkeypatch):
    import trackio.utils

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    before = set(trackio.utils.TRACKIO_DIR.rglob("*"))
    command = arguments(workplace, tmp_path, report_to="tensorboard,wandb, trackio", max_train_steps=1)
    run_script(script, command)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events.out.tfevents*")).parent)).Reload()
    assert "validation" in events.Tags()["images"] and "loss" in events.Tags()["scalars"]
    pictures = list((tmp_path / "logs" / "wandb").rglob("media/images/validation_*.png"))
    assert len(pictures) == 1
    pictures += set(trackio.utils.TRACKIO_DIR.rglob("*.png")) - before
    assert len(pictures) == 2
    shown = np.array(PIL.Image.open(tmp_path / "samples" / "step-0000001.png"))
    for path in pictures:
        assert np.array_equal(np.array(PIL.Image.open(path).convert("RGB")), shown), path


def test_a_tracker_that_is_not_installed_is_named(script, workplace, tmp_path):
    with pytest.raises(ValueError, match="--report_to tensorboard,comet_ml: comet_ml is not installed"):
        run_script(script, arguments(workplace, tmp_path, report_to="tensorboard,comet_ml"))


@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderRAE", "AutoencoderTiny"])
def test_other_autoencoders(script, workplace, tmp_path, kind):
    make_autoencoder(kind).save_pretrained(tmp_path / "vae")
    (tmp_path / "model.json").write_text(
        (workplace / "model.json").read_text().replace('"patch_size": 2', '"patch_size": 1')
    )
    options = {"vae": tmp_path / "vae", "model_config": tmp_path / "model.json", "max_train_steps": 1}
    run_script(script, arguments(workplace, tmp_path / "out", **options))
    pipe = GMemPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe.vae).__name__ == kind
    assert (
        pipe.transformer.config.in_channels == {"AutoencoderDC": 4, "AutoencoderRAE": 64, "AutoencoderTiny": 4}[kind]
    )
    assert pipe(num_inference_steps=2).images[0].size == (8, 8)
    with pytest.raises(ValueError, match="--resolution must be a multiple of the autoencoder's .*, got 9"):
        run_script(script, arguments(workplace, tmp_path / "other", **(options | {"resolution": 9})))
    if kind == "AutoencoderRAE":
        with pytest.raises(ValueError, match="makes images of 8 pixels, .* got 16"):
            run_script(script, arguments(workplace, tmp_path / "other", **(options | {"resolution": 16})))


def test_broken_images_are_left_out_and_listed(script, workplace, tmp_path, caplog):
    shutil.copytree(workplace / "images", tmp_path / "images")
    (tmp_path / "images" / "3" / "003.png").write_bytes(b"no picture")
    options = {"train_data_dir": tmp_path / "images", "max_train_steps": 6}
    with pytest.raises(ValueError, match=r"003\.png\) cannot be read"):
        run_script(script, arguments(workplace, tmp_path / "stopped", **options))
    command = arguments(workplace, tmp_path / "out", **options, skip_bad_images=True)
    run_script(script, command)
    assert "1 images could not be read" in caplog.text
    (line,) = (tmp_path / "out" / "skipped_images.txt").read_text().splitlines()
    assert "003.png) cannot be read" in line
    bank = GMemPipeline.from_pretrained(tmp_path / "out").memory_bank
    assert len(bank) == NUM_IMAGES - 1
    assert "3/003.png" not in bank.metadata["image"].to_pylist()
    assert bank.labels.tolist() == [int(name.split("/")[0]) for name in bank.metadata["image"].to_pylist()]
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    run_script(script, [*command, "--resume_from_checkpoint", "latest"])


def test_tar_files(script, workplace, tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "digits.tar", "w") as tar:
        for path in sorted((workplace / "images").rglob("*.png")):
            tar.add(path, arcname=f"{path.parent.name}-{path.name}")
    options = {"train_data_dir": None, "webdataset": tmp_path / "digits.tar", "image_column": "png"}
    run_script(script, arguments(workplace, tmp_path / "out", **options, max_train_steps=1))
    assert len(GMemPipeline.from_pretrained(tmp_path / "out").memory_bank) == NUM_IMAGES


def test_the_papers_preprocessing_is_dinov2s_default(script, workplace, tmp_path):
    (tmp_path / "images").mkdir()
    pixels = torch.randint(256, (300, 256, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    PIL.Image.fromarray(pixels.numpy()).save(tmp_path / "images" / "0.png")
    (tmp_path / "model.json").write_text((workplace / "model.json").read_text().replace("2", "64", 1))
    options = {"train_data_dir": tmp_path / "images", "model_config": tmp_path / "model.json", "resolution": None}
    run_script(script, arguments(workplace, tmp_path / "out", **options, max_train_steps=1, num_validation_images=1))
    pipe = GMemPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe.image_processor).__name__ == "GMemImageProcessor" and pipe.image_processor.size == 224
    torch.testing.assert_close(pipe.encode_image(PIL.Image.open(tmp_path / "images" / "0.png")), pipe.memory_bank[:])
