# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import re

import torch

from diffusers_gmem.models.fingerprint import fingerprint


def test_a_fingerprint_is_of_the_weights():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    expected = fingerprint(module)
    assert re.fullmatch("sha256:[0-9a-f]{64}", expected)
    assert fingerprint(copy.deepcopy(module).eval().requires_grad_(False)) == expected

    others = [copy.deepcopy(module) for _ in range(4)]
    others[0][0].weight.data[2, 1] += 1e-3
    others[1][1].num_batches_tracked += 1  # a buffer without dimensions
    others[2][0].weight.data = others[2][0].weight.data.reshape(2, 3)
    others[3] = torch.nn.Sequential(*others[3], torch.nn.Identity(), torch.nn.Linear(1, 1))
    halves = copy.deepcopy(module).to(torch.bfloat16)
    prints = {expected, fingerprint(halves), fingerprint(halves.float()), *map(fingerprint, others)}
    assert len(prints) == 7


def test_the_order_of_the_names_does_not_count():
    a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    assert fingerprint(torch.nn.ModuleDict({"a": a, "b": b})) == fingerprint(torch.nn.ModuleDict({"b": b, "a": a}))
    assert fingerprint(torch.nn.ModuleDict({"a": a})) != fingerprint(torch.nn.ModuleDict({"b": a}))
