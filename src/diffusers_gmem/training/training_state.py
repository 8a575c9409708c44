# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""
What training changes, as whole tensors by the names of the transformer's parameters, however many processes hold it in
however many pieces. What one topology gathered, another one scatters.
"""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def gather_tensor(tensor: torch.Tensor, keep: bool = True) -> torch.Tensor | None:
    """
    The whole of a tensor, on the CPU: a copy that further training does not change. All processes must call it; `None`
    where they do not `keep` it.
    """
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu", copy=True).contiguous() if keep else None


@torch.no_grad()
def scatter_tensor(whole: torch.Tensor, tensor: torch.Tensor) -> None:
    """Writes a whole tensor, which every process has, into one that may be a piece of it."""
    if isinstance(tensor, DTensor):
        whole = whole.to(tensor.device)
        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(whole)


def gather_optimizer(
    parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, keep: bool = True
) -> dict[str, torch.Tensor]:
    """
    An optimizer's state by `<name of the parameter>/<name of the quantity>`, for example `proj_out.weight/exp_avg`. All
    processes must call it; empty where they do not `keep` it.
    """
    state = {
        f"{name}/{quantity}": gather_tensor(tensor, keep)
        for name, parameter in parameters.items()
        for quantity, tensor in optimizer.state.get(parameter, {}).items()
    }
    return state if keep else {}


def scatter_optimizer(
    state: dict[str, torch.Tensor], parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Gives an optimizer that has not stepped the state that [`gather_optimizer`] made."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for key, whole in state.items():
        name, quantity = key.split("/")
        parameter = parameters[name]
        if quantity == "step":
            piece = whole.to(parameter.device if fused else "cpu", copy=True)
        else:
            piece = torch.empty_like(parameter, dtype=whole.dtype, requires_grad=False)
            scatter_tensor(whole, piece)
        optimizer.state[parameter][quantity] = piece
