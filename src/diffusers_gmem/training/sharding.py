# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Training with FSDP and DeepSpeed: what is checked and set beside accelerate's configuration."""

import os

import torch
from accelerate import Accelerator


def check_sharding(accelerator: Accelerator | None = None) -> None:
    """
    Raises if the launcher asks for what accelerate would not do, where it says nothing itself. Before there is an accelerator,
    only what needs none is checked.
    """
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() != "true":
            continue
        if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not torch.accelerator.is_available():
            raise ValueError(
                f"The configuration of accelerate asks for {name}, which needs GPUs, but this run is on the CPU: take "
                "examples/accelerate_configs/cpu.yaml."
            )
        if accelerator is not None and accelerator.distributed_type != name:
            raise ValueError(
                f"The configuration of accelerate asks for {name}, but accelerate made {accelerator.distributed_type} of it."
            )
    if accelerator is None:
        return
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != num_processes:
        raise ValueError(
            f"{num_processes} processes were started, but accelerate does not connect them, and each would train a model of "
            "its own: for several processes on CPUs, set the environment variable ACCELERATE_USE_CPU=true."
        )
    if accelerator.distributed_type == "FSDP" and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            "Of FSDP, only version 2 is supported: set fsdp_version: 2 in the configuration of accelerate."
        )
    if accelerator.distributed_type == "DEEPSPEED":
        if accelerator.state.deepspeed_plugin.zero_stage > 2:
            raise ValueError("Of DeepSpeed, ZeRO 1 and 2 are supported: for what ZeRO 3 does, use FSDP 2.")
        if accelerator.mixed_precision == "fp16":
            raise ValueError("With DeepSpeed, --mixed_precision must be no or bf16.")


def configure_deepspeed(
    accelerator: Accelerator, train_batch_size: int, gradient_accumulation_steps: int, max_grad_norm: float
) -> None:
    """What DeepSpeed's file of settings would say twice. Weights and their averages stay float32, as everywhere else."""
    accelerator.state.deepspeed_plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "torch_autocast": {"enabled": accelerator.mixed_precision == "bf16", "dtype": "bfloat16"},
        "bf16": {"enabled": False},
    }
