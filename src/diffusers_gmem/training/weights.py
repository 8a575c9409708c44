# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""The weights that a training saves: those of the transformer, or only its LoRA layers."""

from pathlib import Path

import torch
from accelerate import Accelerator

from ..models.transformer_gmem import GMemTransformer2DModel
from ..pipelines.pipeline_gmem import GMemPipeline
from .moving_average import GMemEMAModel
from .training_state import gather_tensor


def has_lora(transformer: torch.nn.Module) -> bool:
    return hasattr(transformer, "peft_config")


def named_trained_parameters(transformer: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in transformer.named_parameters() if parameter.requires_grad]


def trained_parameters(transformer: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for _, parameter in named_trained_parameters(transformer)]


def save_weights(transformer: GMemTransformer2DModel, folder: str | Path) -> None:
    """Saves the transformer, or only its LoRA layers if it has any."""
    if not has_lora(transformer):
        transformer.save_pretrained(folder)
        return
    from peft import get_peft_model_state_dict

    GMemPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )


def read_weights(transformer: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """
    What [`save_weights`] saved, by the names of the transformer's parameters.

    Raises:
        ValueError: if these are the LoRA layers of other modules.
    """
    if not has_lora(transformer):
        return GMemTransformer2DModel.from_pretrained(folder).state_dict()
    state_dict = GMemPipeline.lora_state_dict(folder)
    keys = {
        f"transformer.{name.replace('.default.', '.')}": name for name in dict(named_trained_parameters(transformer))
    }
    if state_dict.keys() != keys.keys():
        others = sorted(state_dict.keys() ^ keys.keys())
        raise ValueError(
            f"The LoRA layers in {folder} are not those of the transformer: {others[0]} is in one of them only."
        )
    return {keys[key]: tensor for key, tensor in state_dict.items()}


def gather_weights(
    accelerator: Accelerator, transformer: torch.nn.Module, ema: GMemEMAModel | None = None
) -> dict[str, torch.Tensor]:
    """
    All weights, or all that LoRA trains, or with `ema` their moving average, on the main process. All processes must call
    it: each may hold but a piece.
    """
    model = accelerator.unwrap_model(transformer)
    trained = dict(named_trained_parameters(model))
    tensors = trained if has_lora(model) else model.state_dict()
    if ema is not None:
        tensors = {**tensors, **dict(zip(trained, ema.shadow_params, strict=True))}
    is_main = accelerator.is_main_process
    weights = {name: gather_tensor(tensor, keep=is_main) for name, tensor in tensors.items()}
    return weights if is_main else {}
