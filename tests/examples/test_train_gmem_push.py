# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import logging
import multiprocessing
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import load_file
from tiny_training import load_script, run_script, save_image_encoder

from diffusers_gmem import GMemMemoryBank, GMemPipeline
from diffusers_gmem.hub import transfer
from diffusers_gmem.training.hub_pusher import HubPusher


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(transfer, "SECONDS_BETWEEN_ATTEMPTS", 0.0)


@pytest.fixture(scope="module")
def script():
    return load_script("train_gmem")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Ten images, a tiny DINOv2 and a model configuration."""
    folder = tmp_path_factory.mktemp("push")
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(10, 8, 8, 3), dtype=np.uint8)
    for number in range(10):
        PIL.Image.fromarray(pixels[number]).save(folder / "images" / f"{number}.png")
    save_image_encoder(folder / "encoder")
    (folder / "model.json").write_text(
        '{"patch_size": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}'
    )
    return folder


@pytest.fixture
def train(script, workplace, tmp_path):
    """Runs the script with these arguments more; the folder it wrote."""

    def run(*arguments, output_dir="trained", new=True):
        command = (
            f"--train_data_dir {workplace}/images --cache_dir {workplace}/cache --output_dir {tmp_path}/{output_dir}"
        )
        command += " --resolution 8 --train_batch_size 4 --max_train_steps 6 --checkpointing_steps 2 --logging_steps 2"
        command += " --num_validation_images 3 --validation_inference_steps 2 --learning_rate 0.01"
        if new:
            command += f" --image_encoder {workplace}/encoder --model_config {workplace}/model.json"
        run_script(script, [*command.split(), *arguments])
        return tmp_path / output_dir

    return run


@pytest.fixture
def messages(caplog):
    """What the script logged so far."""
    caplog.set_level(logging.INFO)
    names = ("train_gmem", "diffusers_gmem.training.hub_pusher")
    return lambda: [record.getMessage() for record in caplog.records if record.name in names]


def titles(hub, repo_id, kind="model"):
    """The first lines of the commits, newest first."""
    repo = hub.repository(repo_id, kind)
    return [repo.commits[commit].title for commit in repo.history(repo.branches["main"])]


def assert_same_weights(model, folder):
    state_dict = model.state_dict()
    for name, tensor in load_file(Path(folder, "diffusion_pytorch_model.safetensors")).items():
        assert torch.equal(state_dict[name], tensor), name


def test_pipeline_and_bank_are_pushed(hub, train, messages, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    output_dir = train(
        *("--push_to_hub", "--hub_model_id", "me/model", "--hub_bank_id", "me/memory"),
        *("--hub_token", "hf_me", "--report_to", "tensorboard", "--mixed_precision", "bf16"),
    )
    logs = [path for path in (output_dir / "logs").rglob("*") if path.is_file()]
    assert logs and not any(b"hf_me" in path.read_bytes() for path in logs)
    plain = train("--mixed_precision", "bf16", output_dir="plain")
    assert titles(hub, "me/memory", "dataset") == ["Upload memory bank", "initial commit"]
    assert titles(hub, "me/model")[0] == "Step 6"
    assert sum("Pushed step 6: http" in message for message in messages()) == 1

    pipe = GMemPipeline.from_pretrained("me/model")
    assert_same_weights(pipe.transformer, output_dir / "transformer")
    assert_same_weights(pipe.transformer, plain / "transformer")  # the pushes changed nothing
    source = pipe.config.memory_bank_source
    assert source["repo_id"] == "me/memory"
    assert source["revision"] == hub.repository("me/memory", "dataset").branches["main"]
    bank = GMemMemoryBank.from_pretrained("me/memory")
    assert bank.fingerprint == GMemMemoryBank.from_pretrained(output_dir / "bank").fingerprint
    assert pipe(num_inference_steps=2).images[0].size == (8, 8)

    card = ModelCard.load("me/model")
    assert card.data.datasets == ["me/memory"]
    assert "6 optimizer steps, each with a global batch of 4 images" in card.text
    assert "2.4 epochs of 10 images" in card.text
    assert "**Training data:** images" in card.text and "| learning rate | 0.01, constant" in card.text
    # The generated row alone
    shown = np.array(PIL.Image.open(hf_hub_download("me/model", "samples.png")))
    grid = np.array(PIL.Image.open(output_dir / "samples" / "step-0000006.png"))
    assert np.array_equal(shown, grid[8:])


def test_every_checkpoint_is_pushed_as_it_was(hub, script, train, monkeypatch):
    """The pushes wait until the training has gone on, but not until it ends."""
    losses, gate = 0, threading.Event()
    loss, push = script.flow_matching_loss, HubPusher.push

    def counted_loss(*args, **kwargs):
        nonlocal losses
        losses += 1
        if losses == 4:  # the pushes of step 2 and of the end may begin
            gate.set()
        return loss(*args, **kwargs)

    def late_push(self, *args):
        assert gate.wait(20)
        push(self, *args)

    monkeypatch.setattr(script, "flow_matching_loss", counted_loss)
    monkeypatch.setattr(HubPusher, "push", late_push)
    output_dir = train("--push_to_hub", "--hub_private_repo", "--max_train_steps", "4", output_dir="mine")
    assert titles(hub, "me/mine") == ["Step 4", "Step 2", "initial commit"]
    repo = hub.repository("me/mine")
    assert repo.private
    for step, commit in zip((4, 2), repo.history(repo.branches["main"]), strict=False):
        pipe = GMemPipeline.from_pretrained("me/mine", revision=commit)
        assert_same_weights(pipe.transformer, output_dir / f"checkpoint-{step}" / "transformer_ema")
        assert len(pipe.load_memory_bank()) == 10


def test_one_push_at_a_time_and_of_those_that_wait_the_newest(hub, monkeypatch):
    events, started, gate = [], threading.Event(), threading.Event()

    def slow_push(self, pipeline, training, grid):
        events.append(f"{training['steps']} starts")
        started.set()
        assert gate.wait(20)
        events.append(f"{training['steps']} ends")

    monkeypatch.setattr(HubPusher, "push", slow_push)
    pusher = HubPusher("mine")
    for steps in ((1, 2, 3), (4, 5)):
        gate.clear()
        started.clear()
        for step in steps:
            pusher.push_in_background(None, {"steps": step}, None)
            assert started.wait(20)
        if steps == (1, 2, 3):
            gate.set()
            pusher.thread.join()
    threading.Timer(0.1, gate.set).start()
    pusher.finish(None, {"steps": 6}, None)
    assert events == [f"{step} {what}" for step in (1, 3, 4, 6) for what in ("starts", "ends")]


def test_a_process_that_ends_does_not_wait_for_a_push(script, hub, monkeypatch):
    monkeypatch.setattr(script.HubPusher, "push", lambda *args: time.sleep(60))
    pusher = HubPusher("mine")
    context = multiprocessing.get_context("fork")
    process = context.Process(target=pusher.push_in_background, args=(None, {"steps": 1}, None))
    process.start()
    process.join(20)
    assert process.exitcode == 0


def test_a_hub_that_fails_does_not_stop_the_training(hub, script, train, messages, monkeypatch):
    """Until the end, the Hub answers every commit with an error. The last push brings what is missing."""
    finish = HubPusher.finish

    def finish_on_a_better_day(self, *args):
        self.thread.join()
        hub.faults.clear()
        finish(self, *args)

    monkeypatch.setattr(HubPusher, "finish", finish_on_a_better_day)
    hub.fail("POST .*/commit/", times=10_000)
    train("--push_to_hub", "--hub_model_id", "org/model", "--hub_bank_id", "org/memory")
    failures = [message for message in messages() if "not pushed" in message]
    assert failures and all("'org/memory': the Hub answers with the status 503" in message for message in failures)
    assert titles(hub, "org/model") == ["Step 6", "initial commit"]
    assert len(GMemPipeline.from_pretrained("org/model").load_memory_bank()) == 10


def test_a_result_that_cannot_be_pushed_is_saved(hub, train, messages):
    hub.fail("POST .*/commit/", times=10_000)
    with pytest.raises(ConnectionError, match="'me/trained': the Hub answers with the status 503"):
        train("--push_to_hub", "--checkpointing_steps", "6")
    saved = next(message for message in messages() if "Saved the pipeline in" in message)
    GMemPipeline.from_pretrained(saved.split()[-1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--hub_model_id", "me/model"], PermissionError, "'me/model' is not open to this token.*hf auth login"),
        ([], LocalTokenNotFoundError, "hf auth login"),
    ],
)
def test_a_missing_login_is_found_before_the_training(hub, script, train, monkeypatch, arguments, error, message):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(script, "ImageSource", None)
    with pytest.raises(error, match=message):
        train("--push_to_hub", *arguments)


def test_a_foreign_namespace_is_found_before_the_training(hub, script, train, monkeypatch):
    monkeypatch.setattr(script, "ImageSource", None)
    with pytest.raises(PermissionError, match="the dataset repository 'org/memory' is not open to this token"):
        train("--push_to_hub", "--hub_token", "hf_you", "--hub_bank_id", "org/memory")


def test_lora_layers_are_pushed(hub, train):
    train("--push_to_hub", "--hub_model_id", "me/model", "--max_train_steps", "2")
    output_dir = train(
        *("--pretrained_model_name_or_path", "me/model", "--use_lora", "--max_train_steps", "4"),
        *("--push_to_hub", "--hub_model_id", "me/lora", "--hub_bank_id", "me/style"),
        output_dir="lora",
        new=False,
    )
    files = hub.repository("me/lora").commits[hub.repository("me/lora").branches["main"]].files
    assert files.keys() == {".gitattributes", "README.md", "pytorch_lora_weights.safetensors"}
    pushed = load_file(hf_hub_download("me/lora", "pytorch_lora_weights.safetensors"))
    for name, tensor in load_file(output_dir / "pytorch_lora_weights.safetensors").items():
        assert torch.equal(tensor, pushed[name]), name

    card = ModelCard.load("me/lora")
    assert card.data.base_model == "me/model" and card.data.datasets == ["me/style"]
    assert "4 optimizer steps, each with a global batch of 4 images:\n1.6 epochs of the 10 images" in card.text
    # The card's own lines work
    lines = card.text.split("```python")[1].split("```")[0]
    names = {}
    exec(lines.replace("num_images=8", "num_images=2, num_inference_steps=2"), names)
    assert len(names["images"]) == 2 and names["pipe"].transformer.peft_config
    assert len(names["pipe"].memory_bank) == 10


def test_hub_arguments_need_push_to_hub(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--train_data_dir", "a", "--hub_bank_id", "me/memory"])
    assert "--hub_bank_id needs --push_to_hub" in capsys.readouterr().err
