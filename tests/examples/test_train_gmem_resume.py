"""A run that is stopped at any moment and resumed is the run that was not: compared bit for bit."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import EXAMPLES, command_line, load_script, run_script, save_digits, save_image_encoder

from diffusers_gmem import GMemPipeline
from diffusers_gmem.training import checkpoints, run_checkpoints
from diffusers_gmem.training.checkpoints import latest_checkpoint, list_checkpoints, verify_checkpoint


NUM_STEPS = 6
STEPS_PER_EPOCH = 3
ACCUMULATION = 2


@pytest.fixture(scope="module")
def script():
    return load_script("train_gmem")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    save_digits(folder / "images", num_images=STEPS_PER_EPOCH * 2 * ACCUMULATION)
    save_image_encoder(folder / "encoder")
    config = {"patch_size": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    (folder / "model.json").write_text(json.dumps(config))
    return folder


def arguments(workplace, output_dir, **overrides):
    """Global batches of 4 images, a line of the log every 4 steps, a checkpoint every step."""
    return command_line(
        {
            "train_data_dir": workplace / "images",
            "image_encoder": workplace / "encoder",
            "model_config": workplace / "model.json",
            "cache_dir": workplace / "cache",
            "output_dir": output_dir,
            "resolution": 8,
            "random_flip": True,
            "train_batch_size": 2,
            "gradient_accumulation_steps": ACCUMULATION,
            "max_train_steps": NUM_STEPS,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 2,
            "memory_drop_prob": 0.2,
            "checkpointing_steps": 1,
            "logging_steps": 4,
            "num_validation_images": 2,
            "validation_inference_steps": 2,
            "report_to": "tensorboard",
        }
        | overrides
    )


@pytest.fixture(scope="module")
def straight(script, workplace):
    output_dir = workplace / "straight"
    run_script(script, arguments(workplace, output_dir))
    return output_dir


def manifest(folder):
    verify_checkpoint(folder)
    return json.loads((folder / "manifest.json").read_text())["files"]


def logged(output_dir):
    """What the log says, by (quantity, step), without what depends on the clock."""
    values = {}
    for path in sorted((output_dir / "logs").rglob("events.out.tfevents*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            values |= {(tag, event.step): event.value for event in events.Scalars(tag)}
    return {key: value for key, value in values.items() if key[0] in ("loss", "velocity", "cosine", "lr", "grad_norm")}


def assert_same_run(output_dir, straight):
    """Weights, average, optimizer, generators, sums for the log and settings, and the pipeline."""
    last = f"checkpoint-{NUM_STEPS}"
    assert manifest(output_dir / last) == manifest(straight / last)
    for name in ("transformer/diffusion_pytorch_model.safetensors", "transformer/config.json"):
        assert (output_dir / name).read_bytes() == (straight / name).read_bytes()
    assert not list(output_dir.glob("*.tmp"))


def in_a_process_of_its_own(function):
    """Runs a function in a copy of this process, to be killed, and returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    return process.exitcode


def call_before(owner, name, count, action):
    """Makes the call number `count`, from 0, of a function do something first."""
    original = getattr(owner, name)
    calls = iter(range(count))

    def function(*args, **kwargs):
        if next(calls, None) is None:
            action()
        return original(*args, **kwargs)

    setattr(owner, name, function)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


MICRO_BATCHES = {
    "at the start": (0, 0),
    "mid-epoch": (2 * ACCUMULATION, 2),
    "between micro-batches": (2 * ACCUMULATION + 1, 2),
    "at an epoch border": (STEPS_PER_EPOCH * ACCUMULATION, STEPS_PER_EPOCH),
    "in the last step": (NUM_STEPS * ACCUMULATION - 1, NUM_STEPS - 1),
}


@pytest.mark.parametrize("moment", MICRO_BATCHES)
def test_killed_while_training(script, workplace, straight, tmp_path, moment):
    micro_batch, steps_done = MICRO_BATCHES[moment]
    command = arguments(workplace, tmp_path)

    def killed():
        call_before(script, "flow_matching_loss", micro_batch, die)
        run_script(script, command)

    assert in_a_process_of_its_own(killed) == -signal.SIGKILL
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{k + 1}" for k in range(steps_done)]
    run_script(script, [*command, "--resume_from_checkpoint", "latest"])
    assert_same_run(tmp_path, straight)
    assert {key: logged(tmp_path)[key] for key in logged(straight)} == logged(straight)
    assert ("loss", 4) in logged(straight) and ("loss", NUM_STEPS) in logged(straight)


@pytest.mark.parametrize("function", ["_flush_and_describe", "_settle_replaced"])
def test_killed_while_writing_a_checkpoint(script, workplace, straight, tmp_path, function):
    """Again and again, each time in a later step than before, and resumed each time."""
    command = arguments(workplace, tmp_path, resume_from_checkpoint="latest")

    def killed():
        # The first checkpoint is let through, the second is not finished
        done = len(list_checkpoints(tmp_path))
        call_before(
            run_checkpoints, "write_checkpoint", 1 if done else 2, lambda: call_before(checkpoints, function, 0, die)
        )
        run_script(script, command)

    steps = []
    for _ in range(2):
        assert in_a_process_of_its_own(killed) == -signal.SIGKILL
        steps.append([path.name for path in list_checkpoints(tmp_path)][-1])
        assert list(tmp_path.glob("checkpoint-*.tmp"))
    assert steps == ["checkpoint-2", "checkpoint-3"]
    run_script(script, command)
    assert_same_run(tmp_path, straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(script, workplace, straight, tmp_path, monkeypatch, number):
    command = arguments(workplace, tmp_path, checkpointing_steps=100)
    with monkeypatch.context() as patches:
        patches.setattr(script, "flow_matching_loss", script.flow_matching_loss)
        call_before(script, "flow_matching_loss", 2 * ACCUMULATION + 1, lambda: os.kill(os.getpid(), number))
        run_script(script, command)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert not (tmp_path / "model_index.json").exists()
    for name, record in manifest(straight / "checkpoint-3").items():
        if name != "state.json":  # it says how many steps there are between checkpoints
            assert manifest(tmp_path / "checkpoint-3")[name] == record, name
    run_script(script, [*arguments(workplace, tmp_path), "--resume_from_checkpoint", "latest"])
    assert_same_run(tmp_path, straight)


def test_a_signal_ends_a_validation(script, workplace, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patches:
        patches.setattr(script, "make_image_grid", script.make_image_grid)
        call_before(script, "make_image_grid", 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run_script(script, arguments(workplace, tmp_path, checkpointing_steps=100, validation_steps=2))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not (tmp_path / "samples").exists()
    run_script(script, [*arguments(workplace, tmp_path), "--resume_from_checkpoint", "latest"])
    assert_same_run(tmp_path, straight)


def test_a_signal_ends_the_encoding(script, workplace, straight, tmp_path, monkeypatch):
    command = arguments(workplace, tmp_path, resume_from_checkpoint="latest")
    with monkeypatch.context() as patches:
        patches.setattr(script, "compute_snippets", script.compute_snippets)
        call_before(script, "compute_snippets", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run_script(script, command)
    assert not list_checkpoints(tmp_path) and not (tmp_path / "cache").exists()
    run_script(script, command)
    assert_same_run(tmp_path, straight)


@pytest.fixture(scope="module")
def interrupted(script, workplace):
    """A run that stopped after its third step, as if killed right after the checkpoint."""
    output_dir = workplace / "interrupted"

    def killed():
        call_before(script, "flow_matching_loss", 3 * ACCUMULATION, die)
        run_script(script, arguments(workplace, output_dir))

    assert in_a_process_of_its_own(killed) == -signal.SIGKILL
    return output_dir


def copy_of(interrupted, folder):
    subprocess.run(["cp", "-r", f"{interrupted}/.", folder], check=True)
    return folder


def damage(checkpoint):
    path = checkpoint / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_newest_good_checkpoint_is_taken(script, workplace, straight, interrupted, tmp_path, caplog):
    copy_of(interrupted, tmp_path)
    damage(tmp_path / "checkpoint-3")
    command = arguments(workplace, tmp_path, checkpoints_total_limit=2)
    with pytest.raises(ValueError, match="checkpoint-3/optimizer.safetensors is not what was written"):
        run_script(script, [*command, "--resume_from_checkpoint", str(tmp_path / "checkpoint-3")])
    with pytest.raises(FileNotFoundError, match="got .*checkpoint-9"):
        run_script(script, [*command, "--resume_from_checkpoint", str(tmp_path / "checkpoint-9")])
    caplog.clear()
    run_script(script, [*command, "--resume_from_checkpoint", "latest"])
    assert any("damaged" in message and "checkpoint-3" in message for message in caplog.messages)
    assert "--checkpoints_total_limit is 2, and was None before checkpoint-2." in caplog.text
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-6"]
    for name, record in manifest(straight / "checkpoint-6").items():
        if name != "state.json":  # it says how many checkpoints are kept
            assert manifest(tmp_path / "checkpoint-6")[name] == record, name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"seed": 1}, "a run with seed 0, this one has 1"),
        ({"train_batch_size": 4}, "a run with global_batch_size 4, this one has 8: its samples would come in another"),
    ],
)
def test_another_order_of_the_samples_is_refused(script, workplace, interrupted, overrides, message):
    with pytest.raises(ValueError, match=message):
        run_script(script, arguments(workplace, interrupted, resume_from_checkpoint="latest", **overrides))
    command = arguments(workplace, interrupted, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="is of a run with a moving average"):
        run_script(script, [*command, "--no-ema"])


def test_other_micro_batches_of_the_same_global_batch(script, workplace, straight, interrupted, tmp_path, caplog):
    copy_of(interrupted, tmp_path)
    overrides = {"train_batch_size": 4, "gradient_accumulation_steps": 1, "resume_from_checkpoint": "latest"}
    run_script(script, arguments(workplace, tmp_path, **overrides))
    assert "--train_batch_size is 4, and was 2 before checkpoint-3." in caplog.text
    name = "transformer/diffusion_pytorch_model.safetensors"
    expected = load_file(straight / name)
    for key, tensor in load_file(tmp_path / name).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-6)


def test_the_learning_rate_is_the_one_given(script, workplace, interrupted, tmp_path, caplog):
    copy_of(interrupted, tmp_path)
    overrides = {"learning_rate": 0.0, "resume_from_checkpoint": "latest"}
    run_script(script, arguments(workplace, tmp_path, **overrides))
    assert "--learning_rate is 0.0, and was 0.0002 before checkpoint-3." in caplog.text
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "checkpoint-6" / name).read_bytes() == (interrupted / "checkpoint-3" / name).read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_leaves_the_previous_checkpoint(script, workplace, straight, tmp_path):
    size = sum(path.stat().st_size for path in (straight / "checkpoint-1").rglob("*") if path.is_file())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={3 * size}", "none", disk]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        command = arguments(workplace, disk)
        with pytest.raises(
            OSError, match=r"checkpoint-\d could not be written: .*No space left on device.* from chec"
        ):
            run_script(script, command)
        assert not list(disk.glob("*.tmp"))
        last = latest_checkpoint(disk)
        assert last == list_checkpoints(disk)[-1] and last.name != f"checkpoint-{NUM_STEPS}"
        subprocess.run(["mount", "-o", f"remount,size={100 * size}", disk], check=True)
        run_script(script, [*command, "--resume_from_checkpoint", "latest"])
        assert_same_run(disk, straight)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_checkpoint_is_a_transformer(straight):
    pipe = GMemPipeline.from_pretrained(straight)
    averaged = type(pipe.transformer).from_pretrained(straight / "checkpoint-6", subfolder="transformer_ema")
    for name, tensor in averaged.state_dict().items():
        assert torch.equal(tensor, pipe.transformer.state_dict()[name]), name


def wait_until(condition, seconds, process):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.slow
def test_the_script_itself_is_killed_terminated_and_resumed(script, workplace, tmp_path):
    """As it is started by a user: SIGKILL while a checkpoint is written, then SIGTERM, then the rest of it."""
    command = arguments(
        workplace, tmp_path / "run", max_train_steps=100_000, lr_scheduler="constant_with_warmup", report_to="none"
    )
    command += [
        "--resume_from_checkpoint",
        "latest",
        "--checkpoints_total_limit",
        "2",
        "--dataloader_num_workers",
        "1",
    ]

    def start():
        return subprocess.Popen(
            [sys.executable, EXAMPLES / "train_gmem.py", *command], stderr=subprocess.PIPE, text=True
        )

    process = start()
    wait_until(lambda: len(list_checkpoints(tmp_path / "run")) == 2, 60, process)
    wait_until(lambda: list((tmp_path / "run").glob("checkpoint-*.tmp/transformer")), 60, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    killed_after = latest_checkpoint(tmp_path / "run")

    process = start()
    wait_until(lambda: latest_checkpoint(tmp_path / "run") not in (killed_after, None), 60, process)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, log = process.communicate(timeout=25)
    assert process.returncode == 0 and time.monotonic() - began < 25, log
    assert f"Resuming from {killed_after}" in log and "Got SIGTERM" in log
    last = latest_checkpoint(tmp_path / "run")
    num_steps = int(last.name.removeprefix("checkpoint-"))
    assert f"Saved {last}" in log

    straight_command = [word.replace(str(tmp_path / "run"), str(tmp_path / "straight")) for word in command]
    straight_command[straight_command.index("100000")] = str(num_steps + 1)  # the last one ends a line of the log
    straight_command[straight_command.index("latest") - 1 : straight_command.index("latest") + 1] = []
    run_script(script, straight_command)
    expected = manifest(tmp_path / "straight" / last.name)
    for name, record in manifest(last).items():
        if name != "state.json":  # it says how many steps there are
            assert record == expected[name], name
