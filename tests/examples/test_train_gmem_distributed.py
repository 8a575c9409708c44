"""The training script on several processes: on CPUs with gloo, and on GPUs where there are some."""

import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from tiny_training import EXAMPLES, command_line, load_script, run_script, save_digits, save_image_encoder
from torch.distributed.tensor import DTensor, Shard

from diffusers_gmem import GMemPipeline, GMemTransformer2DModel
from diffusers_gmem.training.checkpoints import list_checkpoints, verify_checkpoint


CONFIGS = sorted((EXAMPLES / "accelerate_configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def script():
    return load_script("train_gmem")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    save_digits(folder / "images", num_images=20)
    save_image_encoder(folder / "encoder")
    config = {
        "patch_size": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "memory_dropout": 0.4,
    }
    (folder / "model.json").write_text(json.dumps(config))
    return folder


def arguments(workplace, output_dir, num_processes=1, **overrides):
    """Global batches of 8 images, on any number of processes."""
    return command_line(
        {
            "train_data_dir": workplace / "images",
            "image_encoder": workplace / "encoder",
            "model_config": workplace / "model.json",
            "cache_dir": workplace / "cache",
            "output_dir": output_dir,
            "resolution": 8,
            "random_flip": True,
            "train_batch_size": 4 // num_processes,
            "gradient_accumulation_steps": 2,
            "max_train_steps": 6,
            "learning_rate": 1e-3,
            "memory_drop_prob": 0.2,
            "checkpointing_steps": 3,
            "logging_steps": 4,
            "num_validation_images": 2,
            "validation_inference_steps": 2,
        }
        | overrides
    )


def on_processes(num_processes, function):
    """Runs `function(rank)` in copies of this process that know of each other, and returns their exit codes."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1])}

    def run(rank):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        os.environ.update(address | {name: str(value) for name, value in ranks.items()})
        os.environ["ACCELERATE_USE_CPU"] = "true"
        function(rank)

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(k,)) for k in range(num_processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    return [process.exitcode for process in processes]


def train_on(num_processes, script, command):
    assert on_processes(num_processes, lambda rank: run_script(script, command)) == [0] * num_processes


def manifest(folder):
    verify_checkpoint(folder)
    return json.loads((folder / "manifest.json").read_text())["files"]


def num_processes_of(checkpoint):
    return json.loads((checkpoint / "state.json").read_text())["num_processes"]


def assert_close(folder, other, rtol=1e-4, atol=1e-5):
    """All tensors of two checkpoints but those of single processes; by default, up to the order of float32 sums."""
    for name in manifest(folder):
        if name.endswith(".safetensors") and name != "processes.safetensors":
            expected = load_file(other / name)
            tensors = load_file(folder / name)
            assert tensors.keys() == expected.keys()
            for key, tensor in tensors.items():
                torch.testing.assert_close(
                    tensor, expected[key], rtol=rtol, atol=atol, msg=lambda m, k=key: f"{k}: {m}"
                )


@pytest.fixture(scope="module")
def one(script, workplace):
    output_dir = workplace / "one"
    run_script(script, arguments(workplace, output_dir))
    return output_dir


@pytest.fixture(scope="module")
def two(script, workplace):
    output_dir = workplace / "two"
    train_on(2, script, arguments(workplace, output_dir, 2))
    return output_dir


def test_two_processes_train_what_one_does(one, two):
    assert num_processes_of(two / "checkpoint-6") == 2 and num_processes_of(one / "checkpoint-6") == 1
    assert_close(two / "checkpoint-6", one / "checkpoint-6")
    # Not because they did nothing
    name = "transformer/diffusion_pytorch_model.safetensors"
    first, last = (load_file(two / f"checkpoint-{step}" / name)["proj_out.weight"] for step in (3, 6))
    assert (first - last).abs().max() > 1e-3
    assert_result_is_a_pipeline(two)


def resumed(script, workplace, checkpoint, output_dir, num_processes):
    command = arguments(workplace, output_dir, num_processes, resume_from_checkpoint=checkpoint)
    if num_processes == 1:
        run_script(script, command)
    else:
        train_on(num_processes, script, command)
    return output_dir / "checkpoint-6"


def test_two_processes_repeat_and_resume_to_the_bit(script, workplace, two, tmp_path):
    again = resumed(script, workplace, two / "checkpoint-3", tmp_path, 2)
    assert manifest(again) == manifest(two / "checkpoint-6")


def test_a_checkpoint_resumes_on_another_number_of_processes(script, workplace, one, two, tmp_path):
    on_two = resumed(script, workplace, one / "checkpoint-3", tmp_path / "on_two", 2)
    assert_close(on_two, one / "checkpoint-6")
    assert_close(resumed(script, workplace, two / "checkpoint-3", tmp_path / "on_one", 1), one / "checkpoint-6")


def test_dropout_of_lora_is_the_same_on_two_processes(script, workplace, one, tmp_path):
    def lora_command(output_dir, num_processes, **overrides):
        options = {
            "pretrained_model_name_or_path": one,
            "image_encoder": None,
            "model_config": None,
            "use_lora": True,
            "lora_dropout": 0.3,
            "learning_rate": 0.05,
            "gradient_checkpointing": True,
        }
        return arguments(workplace, output_dir, num_processes, **options | overrides)

    run_script(script, lora_command(tmp_path / "one", 1))
    train_on(2, script, lora_command(tmp_path / "two", 2))
    checkpoint = tmp_path / "one" / "checkpoint-6"
    assert_close(tmp_path / "two" / "checkpoint-6", checkpoint)
    assert {path.name for path in (checkpoint / "transformer").iterdir()} == {"pytorch_lora_weights.safetensors"}

    command = lora_command(tmp_path / "again", 1, resume_from_checkpoint=tmp_path / "one" / "checkpoint-3")
    run_script(script, command)
    assert_close(tmp_path / "again" / "checkpoint-6", checkpoint, rtol=0, atol=0)

    run_script(script, lora_command(tmp_path / "without", 1, lora_dropout=0.0))
    with pytest.raises(AssertionError):
        assert_close(tmp_path / "without" / "checkpoint-6", checkpoint)


@pytest.mark.parametrize("rank_with_signal", [0, 1])
def test_a_signal_to_one_process_stops_all(script, workplace, two, tmp_path, rank_with_signal):
    """It comes during the second micro-batch of step 3; process 0 sends it to itself while it validates."""

    def run(rank):
        name = "make_image_grid" if rank_with_signal == 0 else "flow_matching_loss"
        original, calls = getattr(script, name), []

        def function(*args, **kwargs):
            calls.append(name)
            if rank == rank_with_signal and len(calls) == (1 if rank == 0 else 6):
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        setattr(script, name, function)
        run_script(script, arguments(workplace, tmp_path, 2, checkpointing_steps=100, validation_steps=3))

    assert on_processes(2, run) == [0, 0]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert (tmp_path / "samples" / "step-0000003.png").exists() == (rank_with_signal == 1)
    for name, record in manifest(two / "checkpoint-3").items():
        if name != "state.json":  # it says how many steps there are between checkpoints
            assert manifest(tmp_path / "checkpoint-3")[name] == record, name


def assert_sharded(kind, transformer, optimizer, ema):
    """FSDP 2: weights, averages and the optimizer's state. ZeRO 2: the optimizer's state."""
    num_processes = torch.distributed.get_world_size()
    states = [state[name] for state in optimizer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    if kind == DistributedType.FSDP:
        parameters = list(transformer.parameters())
        assert len(states) == 2 * len(parameters)
        for tensor in (*parameters, *ema.shadow_params, *states):
            assert isinstance(tensor, DTensor) and tensor.placements == (Shard(0),) and tensor.dtype == torch.float32
            assert tensor.to_local().shape[0] <= math.ceil(tensor.shape[0] / num_processes)
    else:
        num_elements = sum(tensor.numel() for tensor in transformer.parameters() if tensor.requires_grad)
        assert transformer.zero_optimization_stage() == 2
        assert sum(tensor.numel() for tensor in states) <= 2 * (num_elements / num_processes + num_processes)


def assert_sharded_at_checkpoints(script, kind):
    save_checkpoint = script.save_checkpoint

    def save(folder, accelerator, template, transformer, optimizer, ema, *others):
        assert accelerator.distributed_type == kind
        assert_sharded(kind, transformer, optimizer, ema)
        save_checkpoint(folder, accelerator, template, transformer, optimizer, ema, *others)

    script.save_checkpoint = save


def train_sharded_on_cpus(script, command, kind):
    """
    Two processes with FSDP 2, which torch has for CPUs, or DeepSpeed. Accelerate has them for GPUs only: it is told that it
    is on some. All the rest is as it is there.
    """

    def run(rank):
        make_accelerator = script.Accelerator

        def make_sharding_accelerator(**kwargs):
            accelerator = make_accelerator(**kwargs)
            accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = kind
            if kind == DistributedType.FSDP:
                accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                    fsdp_version=2,
                    auto_wrap_policy="transformer_based_wrap",
                    transformer_cls_names_to_wrap=["GMemTransformerBlock"],
                    cpu_ram_efficient_loading=False,
                )
            else:
                os.environ["DS_ACCELERATOR"] = "cpu"
                import deepspeed

                deepspeed.init_distributed(dist_backend="gloo")
                plugin = DeepSpeedPlugin(zero_stage=2)
                plugin.set_mixed_precision("no")
                accelerator.state.deepspeed_plugins = {"default": plugin}
                plugin.select(_from_accelerator_state=True)
                accelerator.deepspeed_engine_wrapped = None
            return accelerator

        script.Accelerator = make_sharding_accelerator
        assert_sharded_at_checkpoints(script, kind)
        run_script(script, command)

    assert on_processes(2, run) == [0, 0]


@pytest.fixture(
    scope="module",
    params=[DistributedType.FSDP, pytest.param(DistributedType.DEEPSPEED, marks=pytest.mark.slow)],
    ids=["fsdp2", "zero2"],
)
def sharded(script, workplace, request):
    """A way to shard, and a run with it."""
    if request.param == DistributedType.DEEPSPEED:
        pytest.importorskip("deepspeed")
    output_dir = workplace / request.param.value
    train_sharded_on_cpus(script, arguments(workplace, output_dir, 2), request.param)
    return request.param, output_dir


def assert_result_is_a_pipeline(output_dir):
    """Of the averaged weights of the last checkpoint."""
    pipe = GMemPipeline.from_pretrained(output_dir)
    assert pipe(num_inference_steps=2).images[0].size == (8, 8)
    averaged = load_file(output_dir / "checkpoint-6" / "transformer_ema" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in pipe.transformer.state_dict().items())


def test_sharded_processes_train_what_one_does(one, sharded):
    _, output_dir = sharded
    assert_close(output_dir / "checkpoint-6", one / "checkpoint-6")
    assert_result_is_a_pipeline(output_dir)


def test_a_checkpoint_resumes_with_and_without_sharding(script, workplace, one, sharded, tmp_path):
    kind, output_dir = sharded
    for name, checkpoint in {"its_own": output_dir, "of_one": one}.items():
        options = {"resume_from_checkpoint": checkpoint / "checkpoint-3"}
        train_sharded_on_cpus(script, arguments(workplace, tmp_path / name, 2, **options), kind)
    assert manifest(tmp_path / "its_own" / "checkpoint-6") == manifest(output_dir / "checkpoint-6")
    assert_close(tmp_path / "of_one" / "checkpoint-6", one / "checkpoint-6")
    on_one = resumed(script, workplace, output_dir / "checkpoint-3", tmp_path / "on_one", 1)
    assert_close(on_one, one / "checkpoint-6")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", ["fsdp2", "deepspeed_zero2"])
def test_the_configurations_shard_on_gpus(script, workplace, tmp_path, config):
    """This file is the script that is launched, see its end."""
    if config == "deepspeed_zero2":
        pytest.importorskip("deepspeed")
    num_gpus = max(number for number in (1, 2, 4) if number <= torch.cuda.device_count())
    path = EXAMPLES / "accelerate_configs" / f"{config}.yaml"
    launcher = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", path]
    command = arguments(workplace, tmp_path, num_gpus)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent / "tests"), *sys.path])}
    subprocess.run(
        [*launcher, "--num_processes", str(num_gpus), __file__, *command], env=environment, check=True, timeout=300
    )
    assert num_processes_of(tmp_path / "checkpoint-6") == num_gpus
    assert_result_is_a_pipeline(tmp_path)
    on_one = resumed(script, workplace, tmp_path / "checkpoint-3", tmp_path / "on_one", 1)
    expected = load_file(tmp_path / "checkpoint-6" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in load_file(on_one / "transformer" / "diffusion_pytorch_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0.05, atol=5e-3)  # bfloat16 here, float32 there


@pytest.mark.parametrize("sharding", ["FSDP", "DEEPSPEED"])
def test_sharding_on_a_cpu_is_refused(script, workplace, tmp_path, monkeypatch, sharding):
    monkeypatch.setenv(f"ACCELERATE_USE_{sharding}", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(
        ValueError, match=rf"asks for {sharding}, which needs GPUs, but this run is on the CPU.*cpu\.yaml"
    ):
        run_script(script, arguments(workplace, tmp_path))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the processes connect where there are GPUs")
def test_processes_that_do_not_know_of_each_other_are_refused(script, workplace, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but .*ACCELERATE_USE_CPU=true"):
        run_script(script, arguments(workplace, tmp_path))


def test_there_is_a_configuration_for_each_way_to_train():
    names = ["cpu", "deepspeed_zero2", "fsdp2", "multi_gpu", "multi_node", "single_gpu"]
    assert [path.stem for path in CONFIGS] == names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_understands_the_configurations(path, monkeypatch):
    """What `accelerate launch` does with them, up to the start of the processes."""
    config = load_config_from_file(str(path))
    assert config.mixed_precision == ("no" if path.stem == "cpu" else "bf16")
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train_gmem.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    kind = DistributedType(config.distributed_type).value
    assert (arguments.use_fsdp, arguments.use_deepspeed) == (kind == "FSDP", kind == "DEEPSPEED")
    assert arguments.num_processes == config.num_processes

    if kind == "FSDP":
        environment = prepare_multi_gpu_env(arguments)
        for name, value in environment.items():
            if name.startswith(("FSDP_", "ACCELERATE_")):
                monkeypatch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
        assert environment["ACCELERATE_USE_FSDP"] == "true"
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward
        assert not plugin.activation_checkpointing and not plugin.cpu_ram_efficient_loading
        assert plugin.transformer_cls_names_to_wrap == GMemTransformer2DModel._no_split_modules
    if kind == "DEEPSPEED":
        assert arguments.zero_stage == 2 and arguments.zero3_init_flag in (False, "false")
        assert arguments.offload_optimizer_device == arguments.offload_param_device == "none"
    if path.stem == "multi_node":
        assert arguments.num_machines == 2 and arguments.num_processes % 2 == 0


if __name__ == "__main__":
    train_gmem = load_script("train_gmem")
    sharding = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    assert_sharded_at_checkpoints(train_gmem, DistributedType.FSDP if sharding else DistributedType.DEEPSPEED)
    train_gmem.main(train_gmem.parse_args(sys.argv[1:]))
