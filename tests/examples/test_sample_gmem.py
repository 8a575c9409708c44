# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tiny_pipeline import ID2LABEL, LABELS, MEMORY_DIM, make_bank, make_pipeline, make_transformer, make_vae, seed

from diffusers_gmem import GMemMemoryBank, GMemPipeline


SCRIPT = Path(__file__).parents[2] / "examples" / "sample_gmem.py"
NUM_IMAGES = 10


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("sample_gmem", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved pipeline with a VAE and a bank of seven snippets of three classes."""
    folder = tmp_path_factory.mktemp("sample_gmem") / "model"
    make_pipeline(vae=make_vae(), memory_bank=make_bank()).save_pretrained(folder)
    return folder


def arguments(model, output_dir, **overrides):
    values = {
        "model": model,
        "output_dir": output_dir,
        "num_images": NUM_IMAGES,
        "num_inference_steps": 3,
        "batch_size": 4,
        "folder_size": 6,
    } | overrides
    command = []
    for name, value in values.items():
        if value is not None:
            command += [f"--{name}"] if value is True else [f"--{name}", *map(str, np.atleast_1d(value))]
    return command


def run(script, command):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script.main(script.parse_args(command))


def contents(folder, *patterns):
    paths = [path for pattern in patterns or ("*",) for path in folder.rglob(pattern) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def pictures(folder):
    return [np.array(PIL.Image.open(path)) for path in sorted(folder.rglob("*.png"))]


def protocol(folder):
    return json.loads((folder / "protocol.json").read_text())


@pytest.fixture(scope="module")
def finished(script, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(script, arguments(model, folder, npz=True))
    return folder


def test_image_k_is_what_the_pipeline_makes_of_its_generator(script, model, finished):
    pipe = GMemPipeline.from_pretrained(model)
    rows = np.load(finished / "memory_indices.npy")
    assert sorted(contents(finished, "*.png")) == [f"{k // 6:05d}/{k:06d}.png" for k in range(NUM_IMAGES)]
    for k in (0, 3, 9):
        output = pipe(generator=[script.image_generator(0, k)], num_inference_steps=3)
        assert output.memory_indices == [rows[k]]
        found = np.array(PIL.Image.open(finished / f"{k // 6:05d}" / f"{k:06d}.png"), dtype=int)
        assert found.shape == (16, 16, 3)
        assert np.abs(found - np.array(output.images[0])).max() <= 1


def test_memory_and_noise_do_not_depend_on_the_batch(script, model, finished, tmp_path, monkeypatch):
    seen = []
    evaluate = script.GMemPipeline._predict

    def record(self, latents, memory, time, context):
        seen.append((latents, memory))
        return torch.zeros_like(latents)

    # With a network whose output is zero, what it gets at a later time is the noise of the steps, without rounding
    monkeypatch.setattr(script.GMemPipeline, "_predict", record)
    inputs = []
    for batch_size in (4, 3, 10):
        seen.clear()
        run(script, arguments(model, tmp_path / f"noise-{batch_size}", batch_size=batch_size))
        # Five evaluations for each batch
        inputs.append([torch.cat(tensors) for k in range(5) for tensors in zip(*seen[k::5], strict=True)])
    assert not torch.equal(inputs[0][0], inputs[0][-2])
    for other in inputs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(inputs[0], other, strict=True))

    monkeypatch.setattr(script.GMemPipeline, "_predict", evaluate)
    run(script, arguments(model, tmp_path / "three", batch_size=3))
    assert np.array_equal(np.load(tmp_path / "three" / "memory_indices.npy"), np.load(finished / "memory_indices.npy"))
    for one, two in zip(pictures(tmp_path / "three"), pictures(finished), strict=True):
        assert np.abs(one.astype(int) - two).max() <= 1


def test_more_images_begin_with_the_same(script, model, finished, tmp_path):
    run(script, arguments(model, tmp_path, num_images=4))
    assert contents(tmp_path, "*.png").items() <= contents(finished, "*.png").items()
    run(script, arguments(model, tmp_path / "seed", num_images=4, seed=1))
    assert not set(contents(tmp_path / "seed", "*.png").values()) & set(contents(finished, "*.png").values())


def test_npz_holds_the_images_of_the_folder(finished):
    with np.load(finished / "images.npz") as archive:
        assert archive.files == ["arr_0"]
        images = archive["arr_0"]
    assert images.dtype == np.uint8 and images.shape == (NUM_IMAGES, 16, 16, 3)
    assert np.array_equal(images, pictures(finished))


def test_protocol(script, model, finished):
    found = protocol(finished)
    assert found["complete"] and found["num_images"] == NUM_IMAGES and found["seed"] == 0
    assert (found["draws"], found["replacement"]) == ("uniform", True)
    assert (found["num_inference_steps"], found["guidance_scale"], found["guidance_interval"]) == (3, 1.0, [0.0, 1.0])
    assert found["scheduler"]["_class_name"] == "GMemFlowMatchScheduler"
    assert (found["scheduler"]["solver"], found["scheduler"]["stochastic"]) == ("heun", True)
    assert found["memory_bank"]["fingerprint"] == make_bank().fingerprint
    assert found["model"]["name_or_path"] == str(model)
    transformer = make_transformer()
    assert found["model"]["transformer"] == script.fingerprint(transformer)
    assert found["model"]["vae"] == script.fingerprint(make_vae())
    transformer.proj_out.bias.data[0] += 1e-6
    assert found["model"]["transformer"] != script.fingerprint(transformer)
    assert found["model"]["transformer"] != script.fingerprint(make_transformer().bfloat16())
    (where,) = found["runs"]
    assert where["batch_size"] == 4 and where["num_processes"] == 1
    assert where["versions"]["torch"] == torch.__version__


def test_what_is_there_stays_and_what_is_missing_is_made(script, model, finished, tmp_path):
    options = {"npz": True}
    run(script, arguments(model, tmp_path, **options))
    assert contents(tmp_path) == contents(finished)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    run(script, arguments(model, tmp_path, **options))
    written = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert written == {"protocol.json", "memory_indices.npy"}
    assert contents(tmp_path) == contents(finished)

    # A file that was being written when the process was killed
    (tmp_path / "00001" / "000007.png").rename(tmp_path / "00001" / "000007.png.tmp")
    (tmp_path / "00001" / "000007.png.tmp").write_bytes(b"half")
    (tmp_path / "00000" / "000002.png").unlink()
    run(script, arguments(model, tmp_path, **options))
    assert contents(tmp_path) == contents(finished)
    for name in ("000000.png", "000001.png"):
        path = tmp_path / "00000" / name
        assert path.stat().st_mtime_ns == before[path]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"num_images": 9}, "num_images: 10 there, 9 now"),
        ({"num_inference_steps": 4}, "num_inference_steps: 3 there, 4 now"),
        ({"guidance_scale": 2.0}, r"guidance_scale: 1.0 there, 2.0 now"),
        ({"guidance_interval": [0.5, 1]}, r"guidance_interval: \[0.0, 1.0\] there, \[0.5, 1.0\] now"),
        ({"draws": "class_balanced"}, "draws: 'uniform' there, 'class_balanced' now"),
        ({"dtype": "bfloat16"}, "dtype: 'float32' there, 'bfloat16' now"),
        ({"scheduler_options": '{"shift": 2.0}'}, "'shift': 1.0.* there, .*'shift': 2.0.* now"),
        ({"scheduler": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler"),
        ({"folder_size": 5}, "folder_size: 6 there, 5 now"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused(script, model, finished, setting, message):
    before = contents(finished)
    with pytest.raises(ValueError, match=f"begun with other settings: .*{message}"):
        run(script, arguments(model, finished, **setting))
    assert contents(finished) == before


def test_another_bank_and_another_model_are_refused(script, model, finished, tmp_path):
    bank = make_bank(generator=5)
    bank.save_pretrained(tmp_path / "bank")
    with pytest.raises(ValueError, match=f"memory_bank: .* there, .*{bank.fingerprint}.* now"):
        run(script, arguments(model, finished, memory_bank=tmp_path / "bank"))
    pipe = GMemPipeline.from_pretrained(model)
    pipe.transformer.proj_out.bias.data[0] += 1
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="model: "):
        run(script, arguments(tmp_path / "model", finished))


def make_draws(script, num_images, draws, replacement, labels=LABELS, sampling_seed=0):
    snippets = torch.randn(len(labels), MEMORY_DIM, generator=seed(0))
    bank = GMemMemoryBank(snippets, labels=labels)
    memory_draws = script.MemoryDraws(bank, num_images, sampling_seed, draws, replacement)
    return [memory_draws.row(k, script.image_generator(sampling_seed, k)) for k in range(num_images)]


def test_uniform_draws(script):
    rows = make_draws(script, 1400, "uniform", True)
    assert np.bincount(rows, minlength=7) == pytest.approx([200] * 7, abs=55)  # four standard deviations
    once = make_draws(script, 7, "uniform", False)
    assert sorted(once) == list(range(7)) != once
    assert make_draws(script, 7, "uniform", False, sampling_seed=1) != once


def test_class_balanced_draws(script):
    # Classes of two, two and three rows, in no order; the labels have gaps
    labels = torch.tensor([30, 10, 30, 20, 10, 30, 20])
    rows = make_draws(script, 900, "class_balanced", True, labels)
    assert labels[rows[:6]].tolist() == [10, 20, 30] * 2
    counts = np.bincount(rows, minlength=7)
    assert [counts[labels == label].sum() for label in (10, 20, 30)] == [300] * 3
    assert counts == pytest.approx([100, 150, 100, 150, 150, 100, 150], abs=40)
    once = make_draws(script, 6, "class_balanced", False, labels)
    assert len(set(once)) == 6 and labels[once].tolist() == [10, 20, 30] * 2


def test_draws_that_cannot_be_made_are_refused(script):
    with pytest.raises(ValueError, match=r"num_images 8 without replacement takes 8 rows, but there are only 7"):
        make_draws(script, 8, "uniform", False)
    with pytest.raises(ValueError, match=r"num_images 7 .* takes 3 rows of each class, but there are only 2"):
        make_draws(script, 7, "class_balanced", False)
    bank = GMemMemoryBank(torch.randn(3, MEMORY_DIM))
    with pytest.raises(ValueError, match="class_balanced needs labels"):
        script.MemoryDraws(bank, 2, 0, "class_balanced", True)


def test_balanced_draws_guidance_and_solver_reach_the_pipeline(script, model, tmp_path):
    bank = GMemMemoryBank(make_bank(generator=5)[:], labels=LABELS[::-1], id2label=ID2LABEL)
    bank.save_pretrained(tmp_path / "bank")
    options = {
        "memory_bank": tmp_path / "bank",
        "draws": "class_balanced",
        "guidance_scale": 3.0,
        "guidance_interval": [0.2, 0.7],
        "scheduler_options": '{"stochastic": false, "solver": "euler"}',
        "num_images": 3,
        "batch_size": 1,
    }
    run(script, arguments(model, tmp_path / "out", **options))
    pipe = GMemPipeline.from_pretrained(model, memory_bank=bank)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, stochastic=False, solver="euler")
    for k, found in enumerate(pictures(tmp_path / "out")):
        output = pipe(
            class_labels=[k],
            generator=[script.image_generator(0, k)],
            num_inference_steps=3,
            guidance_scale=3.0,
            guidance_interval=(0.2, 0.7),
        )
        assert bank.labels[output.memory_indices[0]] == k
        assert np.array_equal(found, np.array(output.images[0]))


def test_schedulers_of_diffusers(script, model, tmp_path):
    run(script, arguments(model, tmp_path, scheduler="UniPCMultistepScheduler", num_images=2))
    found = protocol(tmp_path)["scheduler"]
    assert found["use_flow_sigmas"] and found["prediction_type"] == "flow_prediction"
    assert len(pictures(tmp_path)) == 2


def test_wrong_arguments_are_refused(script, model, tmp_path, capsys):
    with pytest.raises(
        ValueError, match=r"--scheduler_options holds \['solvr'\]; GMemFlowMatchScheduler accepts .*solver"
    ):
        run(script, arguments(model, tmp_path, scheduler_options='{"solvr": "euler"}'))
    with pytest.raises(ValueError, match="--batch_size must be 1, got 4"):
        run(script, arguments(model, tmp_path, scheduler_options='{"solver": "dopri5", "stochastic": false}'))
    make_pipeline().save_pretrained(tmp_path / "bankless")
    with pytest.raises(ValueError, match="has no memory bank: name one by --memory_bank"):
        run(script, arguments(tmp_path / "bankless", tmp_path / "out"))
    for overrides, message in (
        ({"num_images": 0}, "--num_images must be at least 1, got 0"),
        ({"scheduler_options": "[1]"}, r"must be a JSON object, got [1]"),
        ({"memory_bank_revision": "v1"}, "--memory_bank_revision needs --memory_bank"),
    ):
        with pytest.raises(SystemExit):
            script.parse_args(arguments(model, "out", **overrides))
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(finished, model, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import accelerate, runpy\n"
        "assert accelerate.Accelerator().num_processes == 2\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    subprocess.run(
        [*command, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", str(driver)]
        + arguments(model, tmp_path / "two", npz=True),
        check=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "2"},
    )
    patterns = ("*.png", "*.np?")
    assert contents(tmp_path / "two", *patterns) == contents(finished, *patterns)
    (where,) = protocol(tmp_path / "two")["runs"]
    assert where["num_processes"] == 2


@pytest.mark.slow
def test_killed_and_restarted_it_writes_the_same_bytes(script, model, tmp_path):
    options = {"num_images": 200, "batch_size": 2, "npz": True, "num_inference_steps": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(script, arguments(model, whole, **options))
    process = subprocess.Popen([sys.executable, SCRIPT, *arguments(model, killed, **options)])
    while len(list(killed.rglob("*.png"))) < 10:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 10 <= len(list(killed.rglob("*.png"))) < 200
    assert not protocol(killed)["complete"] and not (killed / "images.npz").exists()
    run(script, arguments(model, killed, **options))
    assert contents(killed) == contents(whole)
