# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""The Inception network of 2015 by which FID, sFID, Inception score, precision and recall are defined."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


# The port of the TensorFlow graph to PyTorch that most evaluations use; the name ends with the start of its SHA-256
WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)


class InceptionFeatures(NamedTuple):
    """
    Features of a batch of images.

    Attributes:
        pool (`torch.Tensor` of shape `(batch_size, 2048)`): for FID, precision and recall, and the logits.
        spatial (`torch.Tensor` of shape `(batch_size, 2023)`): for sFID; 17 x 17 places, row by row, of 7 channels each.
    """

    pool: torch.Tensor
    spatial: torch.Tensor


class ConvNormReLU(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: str = "same",
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(hidden_states)))


def _average_pool(hidden_states: torch.Tensor) -> torch.Tensor:
    # TensorFlow's average is over the pixels that exist; torchvision's counts the padding
    return F.avg_pool2d(hidden_states, 3, stride=1, padding=1, count_include_pad=False)


class InceptionBlock35(nn.Module):
    """On the grid of 35 x 35."""

    def __init__(self, in_channels: int, pool_channels: int):
        super().__init__()
        self.branch1x1 = ConvNormReLU(in_channels, 64, 1)
        self.branch5x5_1 = ConvNormReLU(in_channels, 48, 1)
        self.branch5x5_2 = ConvNormReLU(48, 64, 5)
        self.branch3x3dbl_1 = ConvNormReLU(in_channels, 64, 1)
        self.branch3x3dbl_2 = ConvNormReLU(64, 96, 3)
        self.branch3x3dbl_3 = ConvNormReLU(96, 96, 3)
        self.branch_pool = ConvNormReLU(in_channels, pool_channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        branches = [
            self.branch1x1(hidden_states),
            self.branch5x5_2(self.branch5x5_1(hidden_states)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(hidden_states))),
            self.branch_pool(_average_pool(hidden_states)),
        ]
        return torch.cat(branches, dim=1)


class InceptionDownsample35(nn.Module):
    """From 35 x 35 to 17 x 17."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3 = ConvNormReLU(in_channels, 384, 3, stride=2, padding="valid")
        self.branch3x3dbl_1 = ConvNormReLU(in_channels, 64, 1)
        self.branch3x3dbl_2 = ConvNormReLU(64, 96, 3)
        self.branch3x3dbl_3 = ConvNormReLU(96, 96, 3, stride=2, padding="valid")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        branches = [
            self.branch3x3(hidden_states),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(hidden_states))),
            F.max_pool2d(hidden_states, 3, stride=2),
        ]
        return torch.cat(branches, dim=1)


class InceptionBlock17(nn.Module):
    """On the grid of 17 x 17."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.branch1x1 = ConvNormReLU(in_channels, 192, 1)
        self.branch7x7_1 = ConvNormReLU(in_channels, channels, 1)
        self.branch7x7_2 = ConvNormReLU(channels, channels, (1, 7))
        self.branch7x7_3 = ConvNormReLU(channels, 192, (7, 1))
        self.branch7x7dbl_1 = ConvNormReLU(in_channels, channels, 1)
        self.branch7x7dbl_2 = ConvNormReLU(channels, channels, (7, 1))
        self.branch7x7dbl_3 = ConvNormReLU(channels, channels, (1, 7))
        self.branch7x7dbl_4 = ConvNormReLU(channels, channels, (7, 1))
        self.branch7x7dbl_5 = ConvNormReLU(channels, 192, (1, 7))
        self.branch_pool = ConvNormReLU(in_channels, 192, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(hidden_states)))
        branches = [
            self.branch1x1(hidden_states),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(hidden_states))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_average_pool(hidden_states)),
        ]
        return torch.cat(branches, dim=1)


class InceptionDownsample17(nn.Module):
    """From 17 x 17 to 8 x 8."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3_1 = ConvNormReLU(in_channels, 192, 1)
        self.branch3x3_2 = ConvNormReLU(192, 320, 3, stride=2, padding="valid")
        self.branch7x7x3_1 = ConvNormReLU(in_channels, 192, 1)
        self.branch7x7x3_2 = ConvNormReLU(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvNormReLU(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvNormReLU(192, 192, 3, stride=2, padding="valid")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        branches = [
            self.branch3x3_2(self.branch3x3_1(hidden_states)),
            self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(hidden_states)))),
            F.max_pool2d(hidden_states, 3, stride=2),
        ]
        return torch.cat(branches, dim=1)


class InceptionBlock8(nn.Module):
    """On the grid of 8 x 8. The last of the two pools by the maximum, which other Inception networks do not."""

    def __init__(self, in_channels: int, max_pool: bool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = ConvNormReLU(in_channels, 320, 1)
        self.branch3x3_1 = ConvNormReLU(in_channels, 384, 1)
        self.branch3x3_2a = ConvNormReLU(384, 384, (1, 3))
        self.branch3x3_2b = ConvNormReLU(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvNormReLU(in_channels, 448, 1)
        self.branch3x3dbl_2 = ConvNormReLU(448, 384, 3)
        self.branch3x3dbl_3a = ConvNormReLU(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvNormReLU(384, 384, (3, 1))
        self.branch_pool = ConvNormReLU(in_channels, 192, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        single = self.branch3x3_1(hidden_states)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(hidden_states))
        pooled = F.max_pool2d(hidden_states, 3, stride=1, padding=1) if self.max_pool else _average_pool(hidden_states)
        branches = [
            self.branch1x1(hidden_states),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, dim=1)


class InceptionV3(nn.Module):
    """
    TensorFlow's "inception-2015-12-05" graph, as ADM's evaluator (arXiv 2105.05233) uses it: images of any size and
    values 0 to 255 are resized to 299 x 299 as TensorFlow 1 did, and brought to [-1, 1) by `(x - 128) / 128`.

    Its tensors, by the names of the graph: `pool_3` is the average over the 8 x 8 grid; `mixed_6/conv`, of which sFID
    (arXiv 2103.03841) takes the first 7 channels, is the 1 x 1 branch of the block that the PyTorch port calls
    `Mixed_6d`, after its ReLU (`mixed` to `mixed_10` are `Mixed_5b` to `Mixed_7c`). `spatial` is laid out as there, channels
    last, so that it goes with published `mu_s` and `sigma_s`. The logits of the Inception score are without bias.

    The modules are named as in the PyTorch port of the weights. A new object has random weights: see [`load_inception`].
    """

    pool_dim = 2048
    spatial_dim = 17 * 17 * 7

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, 3, stride=2, padding="valid")
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, 3, padding="valid")
        self.Mixed_5b = InceptionBlock35(192, pool_channels=32)
        self.Mixed_5c = InceptionBlock35(256, pool_channels=64)
        self.Mixed_5d = InceptionBlock35(288, pool_channels=64)
        self.Mixed_6a = InceptionDownsample35(288)
        self.Mixed_6b = InceptionBlock17(768, channels=128)
        self.Mixed_6c = InceptionBlock17(768, channels=160)
        self.Mixed_6d = InceptionBlock17(768, channels=160)
        self.Mixed_6e = InceptionBlock17(768, channels=192)
        self.Mixed_7a = InceptionDownsample17(768)
        self.Mixed_7b = InceptionBlock8(1280, max_pool=False)
        self.Mixed_7c = InceptionBlock8(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: torch.Tensor) -> InceptionFeatures:
        """
        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): RGB, 0 to 255, uint8 or float.

        Returns:
            [`InceptionFeatures`]: float32.

        Raises:
            ValueError: if the shape is another.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"`images` must have the shape (batch_size, 3, height, width), got {tuple(images.shape)}."
            )
        hidden_states = (resize_like_tensorflow(images.float(), 299) - 128) / 128
        hidden_states = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(hidden_states)))
        hidden_states = F.max_pool2d(hidden_states, 3, stride=2)
        hidden_states = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden_states))
        hidden_states = F.max_pool2d(hidden_states, 3, stride=2)
        hidden_states = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(hidden_states)))
        hidden_states = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(hidden_states)))
        hidden_states = self.Mixed_6d(hidden_states)
        # The first channels of the concatenated branches are those of the 1 x 1 branch
        spatial = hidden_states[:, :7].permute(0, 2, 3, 1).flatten(1)
        hidden_states = self.Mixed_7a(self.Mixed_6e(hidden_states))
        hidden_states = self.Mixed_7c(self.Mixed_7b(hidden_states))
        return InceptionFeatures(hidden_states.mean(dim=(2, 3)), spatial)

    def logits(self, pool: torch.Tensor) -> torch.Tensor:
        """From `pool` features, `(batch_size, 2048)`, the logits of 1008 classes without bias, `(batch_size, 1008)`."""
        return F.linear(pool, self.fc.weight)


def load_inception(weights: str | os.PathLike | None = None) -> InceptionV3:
    """
    The network with its published weights, in eval mode.

    Args:
        weights (`str` or `os.PathLike`, *optional*):
            The file `pt_inception-2015-12-05-6726825d.pth` of mseitzer/pytorch-fid, or the same as safetensors. By default it
            is downloaded into `torch.hub`'s folder.

    Raises:
        FileNotFoundError: if there is no such file.
        RuntimeError: if it holds another network, or a download has another hash.
    """
    if weights is None:
        state_dict = torch.hub.load_state_dict_from_url(
            WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True
        )
    elif Path(weights).suffix == ".safetensors":
        state_dict = load_file(weights)
    else:
        state_dict = torch.load(weights, map_location="cpu", weights_only=True)
    inception = InceptionV3()
    inception.load_state_dict(state_dict)
    return inception.eval().requires_grad_(False)


def resize_like_tensorflow(images: torch.Tensor, size: int) -> torch.Tensor:
    """
    Bilinear interpolation as of TensorFlow 1 without `align_corners`: pixel i of the result lies at `i * old / new`, not at
    the centers' `(i + 0.5) * old / new - 0.5`, and nothing is smoothed before shrinking.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): of a floating dtype.
        size (`int`): height and width of the result.
    """
    for dim in (-1, -2):
        length = images.shape[dim]
        position = torch.arange(size, device=images.device) * torch.tensor(length / size, dtype=torch.float32)
        lower = position.long()
        upper = (lower + 1).clamp(max=length - 1)
        weight = (position - lower).to(images.dtype).view((-1,) + (1,) * (-1 - dim))
        below, above = images.index_select(dim, lower), images.index_select(dim, upper)
        images = below + (above - below) * weight
    return images
