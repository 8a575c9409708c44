# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""
What training changes, as whole tensors by the names of the transformer's parameters, however many processes hold it in
however many pieces: one process, DDP, FSDP 2, and DeepSpeed's ZeRO 1 and 2 over float32 weights. What one of them gathers,
another one scatters. All processes must call these functions.
"""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def gather_tensor(tensor: torch.Tensor, keep: bool = True) -> torch.Tensor | None:
    """The whole of a tensor, on the CPU: a copy that further training does not change. `None` where it is not to `keep`."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu", copy=True).contiguous() if keep else None


@torch.no_grad()
def scatter_tensor(whole: torch.Tensor, tensor: torch.Tensor) -> None:
    """Writes a whole tensor, which every process has, into one of which this process may hold but a piece."""
    if isinstance(tensor, DTensor):
        whole = whole.to(tensor.device)
        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(whole)
    if _is_of_deepspeed(tensor):  # whose optimizer steps a copy
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(tensor, whole.to(tensor.device))


def gather_optimizer(
    parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, keep: bool = True
) -> dict[str, torch.Tensor]:
    """
    An optimizer's state by `<name of the parameter>/<name of the quantity>`, for example `proj_out.weight/exp_avg`. Empty
    where it is not to `keep`.
    """
    state = {}
    for name, parameter in parameters.items():
        for quantity, tensor in _parameter_state(parameter, optimizer).items():
            state[f"{name}/{quantity}"] = gather_tensor(tensor, keep)
    return state if keep else {}


def scatter_optimizer(
    state: dict[str, torch.Tensor], parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Gives an AdamW that has not stepped the state that [`gather_optimizer`] made."""
    if any(_is_of_deepspeed(parameter) for parameter in parameters.values()):
        _scatter_deepspeed_optimizer(state, parameters, optimizer)
        return
    fused = any(group["fused"] for group in optimizer.param_groups)
    for key, whole in state.items():
        name, quantity = key.split("/")
        parameter = parameters[name]
        if quantity == "step":
            piece = whole.to(parameter.device if fused else "cpu", copy=True)
        else:
            piece = torch.empty_like(parameter, dtype=whole.dtype, requires_grad=False)
            scatter_tensor(whole, piece)
        optimizer.state[parameter][quantity] = piece


def _is_of_deepspeed(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "_hp_mapping")


def _parameter_state(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    if not _is_of_deepspeed(parameter):
        return optimizer.state.get(parameter, {})
    from deepspeed.utils import safe_get_full_optimizer_state

    # DeepSpeed's optimizer steps flat pieces of many parameters: the number of steps is the same for all
    flat_state = next(iter(optimizer.state.values()))
    return {
        quantity: tensor if quantity == "step" else safe_get_full_optimizer_state(parameter, quantity)
        for quantity, tensor in flat_state.items()
    }


def _scatter_deepspeed_optimizer(
    state: dict[str, torch.Tensor], parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state

    steps = next(tensor for key, tensor in state.items() if key.endswith("/step"))
    fused = any(group["fused"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        for flat in group["params"]:
            optimizer.state[flat] = {
                "step": steps.to(flat.device if fused else "cpu", copy=True),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
    # What the first step would do, which has not come
    optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in parameters.items():
        for quantity in ("exp_avg", "exp_avg_sq"):
            safe_set_full_optimizer_state(parameter, state[f"{name}/{quantity}"].to(parameter.device), quantity)
