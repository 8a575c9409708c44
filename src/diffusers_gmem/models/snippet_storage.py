# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch


STORED_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
# Rows are worked on in pieces of about this many numbers, so that what is computed on the way stays small.
PIECE_ELEMENTS = 2**21


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows as they are stored: `codes` of shape `(n, W)` and, beside int8 codes only, `scales` of shape `(n,)`."""

    codes: torch.Tensor
    scales: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __getitem__(self, rows: slice | torch.Tensor) -> "StoredRows":
        return StoredRows(self.codes[rows], None if self.scales is None else self.scales[rows])

    def to(self, device: torch.device) -> "StoredRows":
        return StoredRows(self.codes.to(device), None if self.scales is None else self.scales.to(device))

    @property
    def numbers(self) -> torch.Tensor:
        """What the codes stand for."""
        return self.codes if self.scales is None else self.codes.float().mul_(self.scales[:, None])


@dataclass(frozen=True, eq=False)
class SnippetCodec:
    """
    How snippets of dimension D are stored.

    A row is the snippet itself (W = D) or, where there is a `basis`, r coefficients c of the snippet `basis @ c + mean`
    (W = r). Its numbers are of `dtype`; those of an int8 row are multiples of the row's scale, which is its largest
    absolute value divided by 127.

    Args:
        dtype (`torch.dtype`): One of `STORED_DTYPES`.
        basis (`torch.Tensor` of shape `(D, r)`, *optional*): float32.
        mean (`torch.Tensor` of shape `(D,)`, *optional*): float32; goes with `basis`.
    """

    dtype: torch.dtype
    basis: torch.Tensor | None = None
    mean: torch.Tensor | None = None

    @property
    def rank(self) -> int | None:
        return None if self.basis is None else self.basis.shape[1]

    @property
    def snippet_dtype(self) -> torch.dtype:
        """Of decoded snippets: the stored one where they are stored as they are, else float32."""
        return torch.float32 if self.basis is not None or self.dtype == torch.int8 else self.dtype

    def is_same(self, other: "SnippetCodec") -> bool:
        if self.dtype != other.dtype or self.rank != other.rank:
            return False
        return self.basis is None or (torch.equal(self.basis, other.basis) and torch.equal(self.mean, other.mean))

    @cached_property
    def _inverse_basis(self) -> torch.Tensor:
        return torch.linalg.pinv(self.basis.double()).float()

    def encode(self, snippets: torch.Tensor) -> StoredRows:
        """Stores snippets of shape `(n, D)`; low-rank, their orthogonal projection."""
        if self.basis is not None:
            snippets = (snippets.float() - self.mean) @ self._inverse_basis.T
        if self.dtype != torch.int8:
            return StoredRows(snippets.to(self.dtype))
        scales = snippets.abs().amax(dim=1).float().div(127).clamp(min=torch.finfo(torch.float32).tiny)
        return StoredRows((snippets / scales[:, None]).round().to(torch.int8), scales)

    def decode(self, rows: StoredRows, computed_in: torch.dtype = torch.float64) -> torch.Tensor:
        """The snippets of rows, of shape `(n, D)` and of `snippet_dtype`. In float32 the last digits of a snippet depend on
        the other rows of the product."""
        if self.basis is None:
            return rows.numbers
        return (rows.numbers.to(computed_in) @ self.basis.to(computed_in).T).float() + self.mean


@dataclass(frozen=True, eq=False)
class SnippetStorage:
    """
    N snippets: blocks of stored rows, and which of these rows they are. Nothing changes a storage; another one made from
    it shares its blocks.

    Args:
        codec (`SnippetCodec`): How they are stored.
        blocks (`tuple[StoredRows, ...]`): On the CPU, in RAM or memory-mapped.
        rows (`torch.Tensor` of shape `(N,)`, *optional*):
            The number of the stored row of each snippet, int64, counted through all blocks; all rows in order by default.
    """

    codec: SnippetCodec
    blocks: tuple[StoredRows, ...]
    rows: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.num_stored if self.rows is None else len(self.rows)

    @cached_property
    def _starts(self) -> torch.Tensor:
        """The number of the first stored row of each block, and of the row after the last."""
        return torch.tensor([0, *(len(block) for block in self.blocks)]).cumsum(0)

    @property
    def num_stored(self) -> int:
        return int(self._starts[-1])

    @property
    def dim(self) -> int:
        return self.blocks[0].codes.shape[1] if self.codec.basis is None else self.codec.basis.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        row = self.blocks[0][:1]
        return row.codes.nbytes + (0 if row.scales is None else row.scales.nbytes)

    def stored(self, rows: torch.Tensor) -> StoredRows:
        """A copy of some stored rows, `rows` of shape `(n,)` in 0 to N - 1."""
        if self.rows is not None:
            rows = self.rows[rows]
        like = self.blocks[0]
        codes = torch.empty(len(rows), like.codes.shape[1], dtype=like.codes.dtype)
        scales = None if like.scales is None else torch.empty(len(rows))
        block_of_row = torch.bucketize(rows, self._starts[1:], right=True)
        for k in block_of_row.unique().tolist():
            here = block_of_row == k
            picked = self.blocks[k][rows[here] - self._starts[k]]
            codes[here] = picked.codes
            if scales is not None:
                scales[here] = picked.scales
        return StoredRows(codes, scales)

    def stored_range(self, start: int, stop: int) -> StoredRows:
        """Stored rows `start` to `stop - 1`, without a copy where they lie in one block."""
        if self.rows is None:
            offset = 0
            for block in self.blocks:
                if offset <= start and stop <= offset + len(block):
                    return block[start - offset : stop - offset]
                offset += len(block)
        return self.stored(torch.arange(start, stop))

    def pieces(self, width: int | None = None) -> Iterator[tuple[int, StoredRows]]:
        """All stored rows in order, in pieces: the number of the first row, and the rows. `width` is how many numbers each
        row takes on the way, by default D."""
        step = max(1, PIECE_ELEMENTS // (width or self.dim))
        for start in range(0, len(self), step):
            yield start, self.stored_range(start, min(start + step, len(self)))

    def decoded_pieces(self) -> Iterator[torch.Tensor]:
        """All snippets in order, in pieces."""
        return (self.codec.decode(piece) for _, piece in self.pieces())

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The snippets of some rows, as a copy."""
        snippets = torch.empty(len(rows), self.dim, dtype=self.codec.snippet_dtype)
        step = max(1, PIECE_ELEMENTS // self.dim)
        for piece, numbers in zip(snippets.split(step), rows.split(step), strict=True):
            piece.copy_(self.codec.decode(self.stored(numbers)))
        return snippets

    def select(self, rows: torch.Tensor) -> "SnippetStorage":
        return SnippetStorage(self.codec, self.blocks, rows if self.rows is None else self.rows[rows])

    def append(self, other: "SnippetStorage") -> "SnippetStorage":
        """Both, one after the other; they have to have the same codec."""
        rows = None
        if self.rows is not None or other.rows is not None:
            parts = (torch.arange(len(part)) if part.rows is None else part.rows for part in (self, other))
            first, second = parts
            rows = torch.cat([first, second + self.num_stored])
        return SnippetStorage(self.codec, self.blocks + other.blocks, rows)


def encode_pieces(
    codec: SnippetCodec, pieces: Iterable[torch.Tensor], shape: tuple[int, int]
) -> tuple[SnippetStorage, dict[str, float]]:
    """
    Stores snippets of shape `(N, D)`, all pieces together, as a codec does.

    Returns:
        `tuple[SnippetStorage, dict[str, float]]`: the storage, and what is lost: `relative_error`, the length of all errors
        together by that of all snippets, and `largest_error`, of an entry.

    Raises:
        `ValueError`: a snippet is not within the range of the dtype.
    """
    codes = torch.empty(shape[0], codec.rank or shape[1], dtype=codec.dtype)
    scales = torch.empty(shape[0]) if codec.dtype == torch.int8 else None
    start, squared_error, squared_length, largest_error = 0, 0.0, 0.0, 0.0
    for snippets in pieces:
        stored = codec.encode(snippets)
        errors = codec.decode(stored, computed_in=torch.float32) - snippets
        largest_error = max(largest_error, errors.abs().max().item())
        if not math.isfinite(largest_error):
            raise ValueError(f"snippets reach {snippets.abs().max():.3g}, which is beyond the range of {codec.dtype}.")
        squared_error += _length(errors) ** 2
        squared_length += _length(snippets) ** 2
        stop = start + len(snippets)
        codes[start:stop] = stored.codes
        if scales is not None:
            scales[start:stop] = stored.scales
        start = stop
    relative_error = (squared_error / squared_length) ** 0.5 if squared_length else 0.0
    loss = {"relative_error": relative_error, "largest_error": largest_error}
    return SnippetStorage(codec, (StoredRows(codes, scales),)), loss


def _length(tensor: torch.Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)).item()
