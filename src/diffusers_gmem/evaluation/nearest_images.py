# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""How near generated images come to training images."""

from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw
import torch
import torch.nn.functional as F


PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


class NearestImages:
    """
    For each query, the most similar of any number of images whose features arrive in batches: an exact search in memory
    that does not grow with them. Of snippets that lie in a bank, [`GMemMemoryBank.nearest`] does the same.

    Args:
        queries (`torch.Tensor` of shape `(num_queries, dim)`): features of the queries.

    Attributes:
        similarities (`torch.Tensor` of shape `(num_queries,)`): float32, cosine of the angle to the most similar one.
        indices (`torch.Tensor` of shape `(num_queries,)`): int64, its number in the order of arrival, -1 before the first.
    """

    def __init__(self, queries: torch.Tensor):
        self._queries = F.normalize(queries.float(), dim=1)
        self._count = 0
        self.similarities = self._queries.new_full((len(queries),), -torch.inf)
        self.indices = torch.full((len(queries),), -1, device=queries.device)

    @torch.no_grad()
    def update(self, features: torch.Tensor) -> None:
        """Adds images by their features, `(batch_size, dim)`."""
        similarities = self._queries @ F.normalize(features.to(self._queries), dim=1).T
        best, columns = similarities.max(dim=1)
        is_nearer = best > self.similarities
        self.similarities = torch.where(is_nearer, best, self.similarities)
        self.indices = torch.where(is_nearer, columns + self._count, self.indices)
        self._count += len(features)


def similarity_percentiles(similarities: torch.Tensor) -> dict[str, float]:
    """Mean, percentiles and maximum of similarities of shape `(n,)`."""
    similarities = similarities.double().cpu()
    quantiles = torch.quantile(similarities, torch.tensor(PERCENTILES, dtype=torch.float64) / 100)
    return {
        "mean": similarities.mean().item(),
        **{f"{percent}%": value for percent, value in zip(PERCENTILES, quantiles.tolist(), strict=True)},
        "max": similarities.max().item(),
    }


def draw_pairs(
    pairs: Sequence[tuple[PIL.Image.Image, str, PIL.Image.Image, str, float]],
    title: str,
    columns: int = 4,
    tile_size: int = 160,
) -> PIL.Image.Image:
    """
    A picture of pairs of images side by side, each image above its caption, each pair under its similarity.

    Args:
        pairs (sequence of `tuple`): left image and its caption, right image and its caption, and the similarity.
        title (`str`): what the picture shows.
        columns (`int`, defaults to 4): pairs in a row.
        tile_size (`int`, defaults to 160): side of an image, in pixels.
    """
    gap, line = 16, 20
    width, height = 2 * tile_size + gap, tile_size + 2 * line + gap
    rows = -(-len(pairs) // columns)
    columns = min(columns, len(pairs))
    sheet = PIL.Image.new("RGB", (columns * width + gap, rows * height + 2 * line + gap), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    draw.text((gap, gap // 2), title, fill="black", font_size=15)
    for number, (*tiles, similarity) in enumerate(pairs):
        left = gap + number % columns * width
        top = 2 * line + number // columns * height
        draw.text((left, top), f"similarity {similarity:.4f}", fill="black", font_size=13)
        for image, caption in (tiles[:2], tiles[2:]):
            tile = image.resize((tile_size, tile_size), PIL.Image.Resampling.BICUBIC)
            sheet.paste(tile, (left, top + line))
            while draw.textlength(caption, font_size=12) > tile_size - 4:
                caption = f"{caption.rstrip('…')[:-1]}…"
            draw.text((left, top + line + tile_size + 2), caption, fill="black", font_size=12)
            left += tile_size
    return sheet
