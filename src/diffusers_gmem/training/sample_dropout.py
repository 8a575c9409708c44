# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import torch


def _mix(values: torch.Tensor) -> torch.Tensor:
    """Pseudo-random 32-bit numbers, one from each: MurmurHash3's last step, in int64."""
    values = ((values ^ (values >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    values = ((values ^ (values >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return values ^ (values >> 16)


class SampleDropout(torch.nn.Module):
    """
    Dropout whose mask follows from the sample's seed, the layer and the position alone: the same in any batch, on any
    device, and when gradient checkpointing computes the layer again.

    Args:
        p (`float`): probability with which an entry becomes zero; the others are divided by 1 - p.
        layer (`int`): number of the layer, to tell its masks from those of the other layers.
        seeds (`dict[str, torch.Tensor]`):
            Shared by all layers of a model. Before each forward pass in training, its entry `"dropout_seed"` must be set to
            the samples' seeds, `(batch_size,)`, int64 in [0, 2**32).
    """

    def __init__(self, p: float, layer: int, seeds: dict[str, torch.Tensor]):
        super().__init__()
        self.p = p
        self.layer = layer
        self.seeds = seeds

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return hidden_states
        keys = _mix((self.seeds["dropout_seed"] + self.layer * 0x9E3779B9) & 0xFFFFFFFF)
        positions = torch.arange(hidden_states[0].numel(), device=hidden_states.device)
        values = _mix(_mix(positions) ^ keys[:, None])
        keep = (values >= self.p * 2**32).view_as(hidden_states)
        return torch.where(keep, hidden_states / (1 - self.p), 0.0)

    def extra_repr(self) -> str:
        return f"p={self.p}, layer={self.layer}"
