# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class GMemImageEncoderOutput(BaseOutput):
    """
    The output of [`GMemImageEncoder`].

    Args:
        pooler_output (`torch.Tensor` of shape `(batch_size, snippet_dim)`):
            The snippets; without a projection, the features, of width `sum(feature_dims)`.
    """

    pooler_output: torch.Tensor


class GMemImageEncoder(ModelMixin, ConfigMixin):
    r"""
    Snippets from more of a vision model than its pooled output, fitted to a set of images.

    A small generator that trains for minutes cannot learn to read raw features: most of their length is a common
    mean and a few directions. Here the features are the backbone's `pooler_output` and, if asked for, some of its
    hidden states averaged over a coarse grid; each of these groups is scaled to the same total variance, and all are
    projected on the principal components of the training images, partly whitened:

        snippet = diag(s)^(-whitening) V^T (features - mean)

    with V the leading principal axes and s the standard deviations along them.

        encoder = GMemImageEncoder.from_backbone(AutoModel.from_pretrained("facebook/dinov2-small"), hidden_layers=[6])
        features = torch.cat([encoder(pixel_values).pooler_output for pixel_values in batches])
        encoder.fit_projection(features, snippet_dim=256)

    Args:
        backbone_config (`dict`):
            `to_dict()` of the configuration of a vision model of transformers that has a `pooler_output`.
        feature_dims (`list[int]`):
            Width of each group of features: the pooled output, then each hidden state's channels times `grid_size ** 2`.
        hidden_layers (`list[int]`, defaults to `[]`):
            Which hidden states to take, as indices of the backbone's `hidden_states`: 0 is the embedding, n the output of
            block n.
        grid_size (`int`, defaults to 2):
            The hidden states are averaged over `grid_size` x `grid_size` equal cells.
        snippet_dim (`int`, *optional*):
            Dimension of a snippet. `None` until a projection is fitted.
    """

    @register_to_config
    def __init__(
        self,
        backbone_config: dict[str, Any],
        feature_dims: list[int],
        hidden_layers: list[int] = [],  # noqa: B006 (diffusers saves defaults as they are)
        grid_size: int = 2,
        snippet_dim: int | None = None,
    ):
        super().__init__()
        from transformers import AutoConfig, AutoModel

        self.backbone = AutoModel.from_config(AutoConfig.for_model(**backbone_config))
        if snippet_dim is not None:
            self.register_buffer("mean", torch.zeros(sum(feature_dims)))
            self.register_buffer("projection", torch.zeros(snippet_dim, sum(feature_dims)))

    @classmethod
    @torch.no_grad()
    def from_backbone(
        cls, backbone: "PreTrainedModel", hidden_layers: list[int] | None = None, grid_size: int = 2
    ) -> "GMemImageEncoder":
        r"""
        Wraps a loaded vision model; its weights are shared, not copied. There is no projection yet.

        Args:
            backbone (`transformers.PreTrainedModel`): a vision model with a `pooler_output`.
            hidden_layers (`list[int]`, *optional*): see the class.
            grid_size (`int`, defaults to 2): see the class.

        Raises:
            ValueError: if the model has no pooled output or not as many hidden states.
        """
        hidden_layers = list(hidden_layers or [])
        size = getattr(backbone.config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        example = torch.zeros(1, backbone.config.num_channels, height, width, dtype=backbone.dtype)
        output = backbone.eval()(example.to(backbone.device), output_hidden_states=True)
        if getattr(output, "pooler_output", None) is None:
            raise ValueError(f"`backbone` must have a pooled output, {type(backbone).__name__} has none.")
        for layer in hidden_layers:
            if not 0 <= layer < len(output.hidden_states):
                raise ValueError(
                    f"`hidden_layers` must be in 0..{len(output.hidden_states) - 1} for this backbone, got {layer}."
                )
        groups = _pool_features(output, hidden_layers, grid_size)
        config = {key: value for key, value in backbone.config.to_dict().items() if key != "dtype"}
        encoder = cls(config, [group.shape[1] for group in groups], hidden_layers, grid_size)
        encoder.backbone = backbone
        return encoder.eval()

    @torch.no_grad()
    def fit_projection(self, features: torch.Tensor, snippet_dim: int, whitening: float = 0.5) -> None:
        r"""
        Fits the projection to the features of the training images; from now on the encoder returns snippets.

        Args:
            features (`torch.Tensor` of shape `(num_images, sum(feature_dims))`):
                What the encoder returned for the training images before it had a projection.
            snippet_dim (`int`):
                Number of principal components, less than the number of images and at most that of features.
            whitening (`float`, defaults to 0.5):
                0 keeps the components' variances, 1 makes them all 1; between, the large ones lead and the small ones
                are still heard.

        Raises:
            ValueError: if the shape of `features` or `snippet_dim` does not fit.
        """
        width = sum(self.config.feature_dims)
        if features.ndim != 2 or features.shape[1] != width:
            raise ValueError(f"`features` must have shape (num_images, {width}), got {tuple(features.shape)}.")
        if not 1 <= snippet_dim <= min(len(features) - 1, width):
            raise ValueError(
                f"`snippet_dim` must be in 1..{min(len(features) - 1, width)} for {len(features)} images of {width} "
                f"features, got {snippet_dim}."
            )
        features = features.double()
        mean = features.mean(dim=0)
        centered = features - mean
        group_scales = [
            group.var(dim=0, unbiased=False).sum().rsqrt().expand(group.shape[1])
            for group in centered.split(self.config.feature_dims, dim=1)
        ]
        scale = torch.cat(group_scales)

        covariance = (centered * scale).T @ (centered * scale) / len(features)
        variances, axes = torch.linalg.eigh(covariance)
        variances = variances[-snippet_dim:].flip(0)
        axes = axes[:, -snippet_dim:].flip(1)
        # The sign of an axis is arbitrary: make its largest entry positive
        largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
        axes = axes * largest.sign()
        projection = (axes * variances.clamp(min=1e-12) ** (-whitening / 2)).T * scale

        self.register_buffer("mean", mean.to(self.device, self.dtype))
        self.register_buffer("projection", projection.to(self.device, self.dtype))
        self.register_to_config(snippet_dim=snippet_dim)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(batch_size, sum(feature_dims))` to snippets `(batch_size, snippet_dim)`."""
        return F.linear(features - self.mean, self.projection)

    def forward(
        self, pixel_values: torch.Tensor, return_dict: bool = True
    ) -> GMemImageEncoderOutput | tuple[torch.Tensor]:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                What the backbone's image processor returns.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`GMemImageEncoderOutput`] or a tuple `(snippets,)`.
        """
        output = self.backbone(pixel_values, output_hidden_states=len(self.config.hidden_layers) > 0)
        features = torch.cat(_pool_features(output, self.config.hidden_layers, self.config.grid_size), dim=1)
        if self.config.snippet_dim is not None:
            features = self.project(features)
        if not return_dict:
            return (features,)
        return GMemImageEncoderOutput(pooler_output=features)


def _pool_features(output, hidden_layers: list[int], grid_size: int) -> list[torch.Tensor]:
    groups = [output.pooler_output]
    for layer in hidden_layers:
        hidden_states = output.hidden_states[layer]
        if hidden_states.ndim == 3:
            # A vision transformer's sequence; it starts with tokens that stand for no patch
            side = math.isqrt(hidden_states.shape[1])
            hidden_states = hidden_states[:, -side * side :].transpose(1, 2).unflatten(-1, (side, side))
        groups.append(F.adaptive_avg_pool2d(hidden_states, grid_size).flatten(1))
    return groups


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image in RGB, as training and pipeline show it to an encoder: upright, and transparency is laid on white."""
    image = PIL.ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
