# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints of `examples/train_gmem.py`: all that a run needs to go on as if nothing had happened."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file

from ..models.transformer_gmem import GMemTransformer2DModel
from .checkpoints import write_checkpoint
from .moving_average import GMemEMAModel
from .training_state import gather_optimizer, scatter_optimizer, scatter_tensor
from .weights import gather_weights, has_lora, named_trained_parameters, read_weights, save_weights


logger = get_logger(__name__)

EMA_FOLDER = "transformer_ema"


def save_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    template: GMemTransformer2DModel,
    transformer: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: GMemEMAModel | None,
    step: int,
    data_order: dict[str, int],
    log_sums: dict[str, torch.Tensor],
    arguments: dict[str, Any],
) -> None:
    """
    Writes all that a run needs to go on as if nothing had happened, on any number of processes: see [`write_checkpoint`]. All
    processes must call it.

    Args:
        folder (`Path`): what to write, `checkpoint-<step>`.
        template (`GMemTransformer2DModel`): a plain copy of the transformer, whose weights are overwritten.
        data_order (`dict`): what the order of the samples and all draws follow from, together with the step.
        log_sums (`dict`): this process's sums for the next line of the log.
        arguments (`dict`): the command-line arguments by name, as they may be asked for later.
    """
    is_main = accelerator.is_main_process
    weights = {"transformer": gather_weights(accelerator, transformer)}
    if ema is not None:
        weights[EMA_FOLDER] = gather_weights(accelerator, transformer, ema)
    parameters = dict(named_trained_parameters(accelerator.unwrap_model(transformer)))
    optimizer_state = gather_optimizer(parameters, optimizer.optimizer, keep=is_main)
    # No generator has a part in the training, but in what others add to it one may
    process_state = {"generator": torch.get_rng_state()} | {
        f"log_sum/{name}": total.cpu() for name, total in log_sums.items()
    }
    if accelerator.device.type != "cpu":
        process_state["device_generator"] = torch.get_device_module(accelerator.device).get_rng_state()
    process_states = gather_object([process_state])
    state = {
        "step": step,
        "data_order": data_order,
        "num_processes": accelerator.num_processes,
        "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
        "arguments": arguments,
    }

    def write(folder: Path) -> None:
        for name, tensors in weights.items():
            template.load_state_dict(tensors, strict=not has_lora(template))
            save_weights(template, folder / name)
        save_file(optimizer_state, folder / "optimizer.safetensors")
        save_file(
            {f"{k}/{name}": tensor for k, tensors in enumerate(process_states) for name, tensor in tensors.items()},
            folder / "processes.safetensors",
        )
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")

    if is_main:
        write_checkpoint(folder, write)
    accelerator.wait_for_everyone()
    logger.info(f"Saved {folder}")


def load_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    transformer: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR,
    ema: GMemEMAModel | None,
    data_order: dict[str, int],
    arguments: dict[str, Any],
) -> tuple[int, dict[str, torch.Tensor]]:
    """
    Reads what [`save_checkpoint`] wrote, into a model with an optimizer that has not stepped. All processes must call it.
    Arguments that are others than those of the checkpoint are named in a warning.

    Returns:
        `tuple[int, dict[str, torch.Tensor]]`: the number of steps done, and this process's `log_sums`, which are empty if
        another number of processes wrote the checkpoint.

    Raises:
        ValueError: if `data_order` is another, if one run has a moving average and the other none, or if the LoRA layers
            are of other modules.
    """
    state = json.loads((folder / "state.json").read_text())
    for name, value in data_order.items():
        if state["data_order"][name] != value:
            raise ValueError(
                f"{folder} is of a run with {name} {state['data_order'][name]}, this one has {value}: its samples would "
                "come in another order. The global batch is --train_batch_size x processes x "
                "--gradient_accumulation_steps, of which each may change."
            )
    for name, value in json.loads(json.dumps(arguments)).items():
        if name in state["arguments"] and state["arguments"][name] != value:
            logger.warning(f"--{name} is {value}, and was {state['arguments'][name]} before {folder.name}.")
    if (EMA_FOLDER in {path.name for path in folder.iterdir()}) != (ema is not None):
        raise ValueError(f"{folder} is of a run {'without' if ema is not None else 'with'} a moving average (--ema).")

    model = accelerator.unwrap_model(transformer)
    parameters = dict(named_trained_parameters(model))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, whole in read_weights(model, folder / "transformer").items():
        scatter_tensor(whole, tensors[name])
    if ema is not None:
        averages = read_weights(model, folder / EMA_FOLDER)
        for name, average in zip(parameters, ema.shadow_params, strict=True):
            scatter_tensor(averages[name], average)
        ema.optimization_step = state["step"]
    scatter_optimizer(load_file(folder / "optimizer.safetensors"), parameters, optimizer.optimizer)
    lr_scheduler.last_epoch = state["step"]
    for group, rate, schedule in zip(
        lr_scheduler.optimizer.param_groups, lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = rate * schedule(state["step"])
    if state["scaler"] is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])

    log_sums = {}
    if state["num_processes"] == accelerator.num_processes:
        prefix = f"{accelerator.process_index}/"
        process_state = {
            name.removeprefix(prefix): tensor
            for name, tensor in load_file(folder / "processes.safetensors").items()
            if name.startswith(prefix)
        }
        torch.set_rng_state(process_state["generator"])
        if "device_generator" in process_state and accelerator.device.type != "cpu":
            torch.get_device_module(accelerator.device).set_rng_state(process_state["device_generator"])
        log_sums = {
            name.removeprefix("log_sum/"): tensor.to(accelerator.device)
            for name, tensor in process_state.items()
            if name.startswith("log_sum/")
        }
    logger.info(f"Resuming from {folder}")
    return state["step"], log_sums
