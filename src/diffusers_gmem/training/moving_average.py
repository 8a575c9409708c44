# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel


class GMemEMAModel(EMAModel):
    """
    diffusers' `EMAModel` for parameters that are all trained, whose step is one pass over the weights: `EMAModel` makes,
    at each step, a copy of all of them for the differences.
    """

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Moves the average towards the parameters by 1 minus the decay."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)
