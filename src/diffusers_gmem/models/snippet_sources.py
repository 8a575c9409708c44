# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from .memory_bank import GMemMemoryBank


@dataclass(frozen=True, eq=False)
class SnippetSources:
    """
    Where each of n snippets comes from.

    Args:
        parts (`list[list[tuple[int | dict, float]]]`):
            For each snippet its parts: a row number of the bank, or what is known of anything else, and a weight.
        bank ([`GMemMemoryBank`], *optional*): Whose rows the numbers are.
    """

    parts: list[list[tuple[int | dict[str, Any], float]]]
    bank: "GMemMemoryBank | None" = None

    def describe(self) -> list[list[dict[str, Any]]]:
        """Each part as a dict, with what the bank knows of a row (see [`GMemMemoryBank.describe_rows`])."""
        rows = list({part for parts in self.parts for part, _ in parts if isinstance(part, int)})
        known = dict(zip(rows, self.bank.describe_rows(rows), strict=True)) if rows else {}
        return [
            [{**(known[part] if isinstance(part, int) else part), "weight": weight} for part, weight in parts]
            for parts in self.parts
        ]


def attach_sources(snippets: torch.Tensor, sources: SnippetSources) -> torch.Tensor:
    """
    Notes the sources of snippets of shape `(n, D)` or `(D,)` on the tensor itself, for [`sources_of`]. They are not passed
    on to what is computed from it.
    """
    snippets._sources = (sources, snippets.clone())
    return snippets


def sources_of(snippets: torch.Tensor) -> SnippetSources | None:
    """The sources that were noted on a tensor; `None` where there are none, or its values were changed since."""
    sources, original = getattr(snippets, "_sources", (None, None))
    return sources if sources is not None and torch.equal(snippets, original) else None
