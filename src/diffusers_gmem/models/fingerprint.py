# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import hashlib

import torch


def fingerprint(module: torch.nn.Module) -> str:
    """A hash of a module's weights, as they are used: names, dtypes, shapes and values. `"sha256:"` and 64 digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()}"
