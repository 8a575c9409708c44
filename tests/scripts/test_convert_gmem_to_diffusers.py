# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import importlib.util
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest
import torch
import yaml
from ldm_autoencoder import original_state_dict, tiny_vae
from reference_cases import REFERENCE_DIR, assert_matches, case_state_dict, case_tensors, reference_cases
from safetensors.torch import save_file
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from diffusers_gmem import GMemImageProcessor, GMemMemoryBank, GMemPipeline, GMemTransformer2DModel
from diffusers_gmem.conversion import REFERENCE_ENCODER, convert_transformer, export_transformer, load_checkpoint


SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_gmem_to_diffusers.py"
CASE = reference_cases("checkpoint")[0]
OPTIONS = CASE["options"]
CHECKPOINT = REFERENCE_DIR / CASE["checkpoint"]
BANKS = reference_cases("banks")[0]
LATENTS = REFERENCE_DIR / reference_cases("dataset")[0]["folder"]
STATISTICS = REFERENCE_DIR / reference_cases("latents_stats")[0]["pt"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_gmem_to_diffusers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the reference has no files for: a tokenizer that fits the checkpoint, and a YAML."""
    folder = tmp_path_factory.mktemp("original")
    vae = tiny_vae(
        block_out_channels=(32,) * 5,
        down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
        latent_channels=OPTIONS["in_channels"],
    )
    extra = {"loss.logvar": torch.zeros(1)}
    torch.save({"state_dict": original_state_dict(vae) | extra, "global_step": 7}, folder / "vae.pt")
    config = copy.deepcopy(load_checkpoint(CHECKPOINT)["config"])
    config["sample"] |= {"cfg_scale": 7.75, "sampling_method": "Euler", "num_sampling_steps": 3}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def run(script, output_dir, *more, checkpoint=CHECKPOINT):
    script.main(script.parse_args(["--checkpoint", str(checkpoint), "--output_dir", str(output_dir), *map(str, more)]))
    return GMemPipeline.from_pretrained(output_dir)


def test_as_a_command(files, tmp_path):
    """The command of the documentation, then a new pipeline from what it wrote."""
    output_dir = tmp_path / "new" / "pipeline"
    command = [sys.executable, SCRIPT, "--checkpoint", CHECKPOINT, "--config", files / "config.yaml"]
    command += ["--bank", REFERENCE_DIR / BANKS["full"], "--bank_encoder", "dinov2_vitb14"]
    command += ["--vae", files / "vae.pt", "--latents_stats", STATISTICS, "--output_dir", output_dir]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "Left out, as only training needs them: loss.logvar." in log
    assert "it is called with num_inference_steps=3, guidance_scale=7.75, guidance_interval=(0.89, 1.0)." in log
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pipeline"]
    assert not [path for path in output_dir.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]

    pipe = GMemPipeline.from_pretrained(output_dir)
    tensors = case_tensors(CASE)
    with torch.no_grad():
        assert_matches(
            CASE, "v_ema", pipe.transformer(tensors["x"], tensors["t"], tensors["c"]).sample, tensors["v_ema"]
        )
    assert torch.equal(pipe.memory_bank[:], case_tensors(BANKS)["full"])
    assert pipe.memory_bank.encoder == REFERENCE_ENCODER["encoder"]
    assert pipe.scheduler.config.solver == "euler"
    assert torch.equal(torch.tensor(pipe.vae.config.latents_std), load_checkpoint(STATISTICS)["std"].flatten())
    output = pipe(num_images=2, num_inference_steps=3, guidance_scale=7.75, guidance_interval=(0.89, 1.0))
    assert len(output.images) == len(output.memory_indices) == 2
    assert output.images[0].size == (16 * OPTIONS["input_size"],) * 2


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_weights_and_the_configuration_of_the_checkpoint(script, weights, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pipe = run(script, tmp_path / "pipeline", "--weights", weights)
    tensors = case_tensors(CASE)
    with torch.no_grad():
        sample = pipe.transformer(tensors["x"], tensors["t"], tensors["c"]).sample
    assert_matches(CASE, f"v_{weights}", sample, tensors[f"v_{weights}"])
    assert "Using the configuration that is stored in the checkpoint." in caplog.text
    assert "pipeline makes latents only" in caplog.text and "Without a memory bank" in caplog.text
    original = load_checkpoint(CHECKPOINT)[weights]
    exported = export_transformer(pipe.transformer)
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)


def test_low_rank_bank(script, tmp_path, caplog):
    bank = run(script, tmp_path / "pipeline", "--bank", REFERENCE_DIR / BANKS["dmd"]).memory_bank
    assert bank.rank is not None and bank.encoder is None
    assert "The bank's encoder is not recorded" in caplog.text
    assert_matches(BANKS, "dmd_reconstruction", bank[:], case_tensors(BANKS)["dmd_reconstruction"])


def test_image_encoder(script, tmp_path):
    config = Dinov2Config(
        hidden_size=OPTIONS["memory_dim"], num_hidden_layers=1, num_attention_heads=2, image_size=518
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    BitImageProcessor().save_pretrained(tmp_path / "dinov2")
    arguments = ["--bank_encoder", "dinov2_vitb14", "--image_encoder", tmp_path / "dinov2"]
    pipe = run(script, tmp_path / "pipeline", "--bank", REFERENCE_DIR / BANKS["full"], *arguments)
    assert isinstance(pipe.image_processor, GMemImageProcessor)
    assert pipe.image_encoder.config.image_size == 224
    output = pipe(image=PIL.Image.new("RGB", (300, 280)), num_inference_steps=2, output_type="latent")
    assert len(output.images) == 1
    with pytest.raises(ValueError, match="pass `--bank`, too"):
        run(script, tmp_path / "other", *arguments)
    with pytest.raises(ValueError, match="does not record its encoder"):
        run(script, tmp_path / "other", "--bank", REFERENCE_DIR / BANKS["full"], *arguments[2:])


def test_bank_from_latent_shards(script, tmp_path):
    bank = run(script, tmp_path / "pipeline", "--bank", LATENTS).memory_bank
    assert len(bank) == reference_cases("dataset")[0]["length"] and bank.labels is not None


def test_bare_state_dict_in_safetensors(script, files, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    state_dict = load_checkpoint(CHECKPOINT)["model"]
    save_file(
        {f"module.{name}": tensor.contiguous() for name, tensor in state_dict.items()}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ValueError, match="The checkpoint has no configuration: pass `--config`"):
        run(script, tmp_path / "pipeline", checkpoint=tmp_path / "a.safetensors")
    config = ["--config", files / "config.yaml"]
    pipe = run(script, tmp_path / "pipeline", *config, checkpoint=tmp_path / "a.safetensors")
    assert "bare state dict" in caplog.text
    exported = export_transformer(pipe.transformer)
    assert all(torch.equal(exported[name], state_dict[name]) for name in state_dict)


def test_first_version_with_its_bank(script, tmp_path, caplog):
    model = convert_transformer(load_checkpoint(CHECKPOINT)["ema"])
    network = {name.replace("projector.", "projectors."): x for name, x in export_transformer(model).items()}
    bank = torch.randn(6, OPTIONS["memory_dim"])
    torch.save({"network": network, "memorybank": bank, "memoryfreq": [1] * 6}, tmp_path / "a.pth")
    pipe = run(script, tmp_path / "pipeline", checkpoint=tmp_path / "a.pth")
    assert torch.equal(pipe.memory_bank[:], bank)
    assert "The frequencies in `memoryfreq` are left out" in caplog.text
    assert (pipe.scheduler.config.solver, pipe.scheduler.config.last_step_size) == ("euler", 0.04)
    other = GMemMemoryBank(torch.randn(2, OPTIONS["memory_dim"]))[:]
    torch.save(other, tmp_path / "bank.pth")
    pipe = run(script, tmp_path / "pipeline2", "--bank", tmp_path / "bank.pth", checkpoint=tmp_path / "a.pth")
    assert torch.equal(pipe.memory_bank[:], other)


def test_number_of_heads(script, files, tmp_path):
    """Of a model whose tensors do not tell it, with a model type that does not either."""
    case = next(
        case
        for case in reference_cases("model_forward")
        if not case["options"]["use_rope"] and not case["options"]["use_qknorm"]
    )
    torch.save(case_state_dict(case), tmp_path / "a.pt")
    config = yaml.safe_load((files / "config.yaml").read_text())
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({name: config[name] for name in ("transport", "sample")}))
    arguments = [tmp_path / "pipeline", "--config", tmp_path / "a.yaml"]
    with pytest.raises(ValueError, match="pass `num_attention_heads`"):
        run(script, *arguments, checkpoint=tmp_path / "a.pt")
    heads = case["options"]["num_heads"]
    pipe = run(script, *arguments, "--num_attention_heads", heads, checkpoint=tmp_path / "a.pt")
    assert pipe.transformer.config.num_attention_heads == heads


# Nothing half-written


def files_below(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.mark.parametrize("what", ["file", "folder with a file"])
def test_an_output_that_exists_is_not_touched(script, what, tmp_path):
    output_dir = tmp_path / "pipeline"
    if what == "file":
        output_dir.write_text("mine")
    else:
        output_dir.mkdir()
        (output_dir / "a.txt").write_text("mine")
    before = files_below(tmp_path)
    with pytest.raises(
        FileExistsError, match="`--output_dir` must be a new or an empty folder, but .*pipeline is not"
    ):
        run(script, output_dir)
    assert files_below(tmp_path) == before


def test_an_empty_folder_is_filled(script, tmp_path, monkeypatch):
    (tmp_path / "pipeline").mkdir()
    run(script, tmp_path / "pipeline")
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    monkeypatch.chdir(tmp_path)
    run(script, "beside")
    assert (tmp_path / "beside" / "model_index.json").is_file()


def test_an_error_leaves_nothing(script, files, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no use without"):
        run(script, tmp_path / "pipeline", "--vae", files / "vae.pt")
    assert not files_below(tmp_path)

    def full_disk(self, folder, **kwargs):
        Path(folder).mkdir(parents=True)
        Path(folder, "model_index.json").touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(GMemPipeline, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space left"):
        run(script, tmp_path / "pipeline")
    assert not files_below(tmp_path)


def in_a_fork(function):
    """Runs it in a copy of this process, which has everything imported already; returns how that ended."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_kill_while_saving_leaves_no_output(script, tmp_path):
    """The process is stopped for good after the weights are written and before the rename."""

    def convert_and_die():
        os.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        run(script, tmp_path / "pipeline")

    assert in_a_fork(convert_and_die) == -signal.SIGKILL
    assert not (tmp_path / "pipeline").exists()
    assert list(tmp_path.glob(".pipeline-*/pipeline/transformer/*.safetensors"))


def test_files_of_the_wrong_kind(script, tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="list.yaml is not a configuration: it holds list instead of a mapping"):
        run(script, tmp_path / "pipeline", "--config", tmp_path / "list.yaml")
    with pytest.raises(ValueError, match="Not the state dict of an LDM-style KL autoencoder"):
        run(script, tmp_path / "pipeline", "--vae", CHECKPOINT, "--latents_stats", STATISTICS)
    with pytest.raises(FileNotFoundError, match="no file missing.pth"):
        run(script, tmp_path / "pipeline", "--bank", "missing.pth")
    torch.save({"ema": {"a": torch.zeros(1)}, "when": time.struct_time}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt is refused: it holds `time.struct_time`"):
        run(script, tmp_path / "pipeline", checkpoint=tmp_path / "a.pt")


def resident_memory(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak")
def test_peak_memory(script, files, tmp_path):
    """Resident memory, mapped pages of the file included, for the worst case of a file without other weights."""
    with torch.device("meta"):
        model = GMemTransformer2DModel(num_layers=4, num_attention_heads=8, attention_head_dim=64)
    state_dict = export_transformer(model.to_empty(device="cpu"))
    torch.save({name: tensor.clone() for name, tensor in state_dict.items()}, tmp_path / "a.pt")
    del model, state_dict
    config = yaml.safe_load((files / "config.yaml").read_text())
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({name: config[name] for name in ("transport", "sample")}))

    def measure():
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = resident_memory("VmRSS")
        command = ["--checkpoint", tmp_path / "a.pt", "--config", tmp_path / "a.yaml", "--output_dir", tmp_path / "b"]
        script.main(script.parse_args([str(part) for part in command]))
        (tmp_path / "peak").write_text(str(resident_memory("VmHWM") - before))

    assert in_a_fork(measure) == 0
    size = (tmp_path / "a.pt").stat().st_size
    assert 0.9 * size < int((tmp_path / "peak").read_text()) < 1.3 * size
