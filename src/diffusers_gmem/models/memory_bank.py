# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import difflib
import hashlib
import json
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import convert_file_size_to_int
from diffusers.utils import logging
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..files import flush, flush_folder
from ..hub.locate import locate_memory_bank
from .approximate_index import ApproximateIndex
from .low_rank import low_rank_basis
from .memory_bank_files import (
    CLASS_NAME,
    CONFIG_NAME,
    FORMAT_VERSION,
    METADATA_NAME,
    TEMPORARY_CONFIG,
    TEMPORARY_FILE,
    BankFile,
    Manifest,
    check_sha256,
    check_size,
    dtype_name,
    first_nonfinite_row,
    metadata_alias,
    metadata_path,
    open_tensors,
    read_config,
    sha256_of_file,
    tidy,
)
from .snippet_mixing import INTERPOLATION_METHODS, interpolate_snippets, unit_sum
from .snippet_search import SEARCH_METRICS, nearest_snippets
from .snippet_sources import SnippetSources, attach_sources, sources_of
from .snippet_storage import STORED_DTYPES, SnippetCodec, SnippetStorage, StoredRows, encode_pieces
from .text_embedding import embed_text


if TYPE_CHECKING:
    import pyarrow


logger = logging.get_logger(__name__)

_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Edit(NamedTuple):
    """One step in the history of a bank. A parent is its fingerprint, or a bank whose fingerprint may never be needed."""

    record: dict[str, Any]
    parents: tuple["GMemMemoryBank | str", ...]


@dataclass(frozen=True, eq=False)
class _MetadataFile:
    """The `metadata.parquet` of an opened bank: read once, when it is first needed, for it and for all banks that edits
    made from it."""

    folder: Path
    entry: BankFile

    @cached_property
    def schema(self) -> "pyarrow.Schema":
        import pyarrow.parquet

        return pyarrow.parquet.read_schema(metadata_path(self.folder, self.entry))

    @cached_property
    def table(self) -> "pyarrow.Table":
        return self._read()

    @cached_property
    def plain_table(self) -> "pyarrow.Table":
        """The columns that are not large."""
        return self._read(_plain_columns(self.schema))

    def _read(self, columns: list[str] | None = None) -> "pyarrow.Table":
        import pyarrow.parquet

        path = metadata_path(self.folder, self.entry)
        check_size(path, self.entry)
        check_sha256(path, self.entry)
        table = pyarrow.parquet.read_table(path, columns=columns)
        if table.num_rows != self.entry.rows:
            raise ValueError(f"{path} has {table.num_rows} rows, but the bank has {self.entry.rows}.")
        return table


class GMemMemoryBank:
    r"""
    An immutable bank of N memory snippets of dimension D, one row each, optionally with labels and metadata
    (GMem, https://huggingface.co/papers/2412.08781).

    The bank is not a module: casting, moving or offloading a pipeline never copies it. Its rows stay on the CPU, in RAM
    when it is made from a tensor, memory-mapped when it is opened with [`~GMemMemoryBank.from_pretrained`]; the caller
    moves the few rows that it gathers. `len(bank)` is N.

    The rows are the snippets themselves, or, in a bank of low rank ([`~GMemMemoryBank.from_low_rank`],
    [`~GMemMemoryBank.compress`]), coefficients of a basis. Every method takes and returns snippets.

    Edits ([`~GMemMemoryBank.extend`], [`~GMemMemoryBank.without`], [`~GMemMemoryBank.select`],
    [`~GMemMemoryBank.merge`], [`~GMemMemoryBank.compress`]) return a new bank. It shares the rows of the old one, and
    remembers what it was made from ([`~GMemMemoryBank.history`]).

    A bank can have text keys ([`~GMemMemoryBank.with_text_keys`]): then its rows can be found by words
    ([`~GMemMemoryBank.search_text`]).

    Args:
        snippets (`torch.Tensor` of shape `(N, D)`):
            The rows, float32, float16 or bfloat16, finite, N and D at least 1. They are copied to the CPU (see `copy`).
        labels (`torch.Tensor` of shape `(N,)` or `list[int]`, *optional*):
            One integer class label per row.
        metadata (`dict[str, list]` or `pyarrow.Table`, *optional*):
            Columns of N entries each, such as the source file of each row. Saved as `metadata.parquet`.
        id2label (`dict[int, str]`, *optional*):
            Names of the labels. Several labels may share a name.
        encoder (`str`, *optional*):
            The image encoder that made the snippets, such as a repository id.
        encoder_revision (`str`, *optional*):
            The revision of the encoder.
        preprocessing (`dict[str, Any]`, *optional*):
            How an image is prepared for the encoder; anything that JSON can hold.
        source_dataset (`str`, *optional*):
            The data set that the snippets were made from.
        normalized (`bool`, defaults to `False`):
            Whether the rows have been scaled to unit length. A record: the bank itself never changes a row.
        copy (`bool`, defaults to `True`):
            `False` takes a contiguous tensor on the CPU as it is, such as one that is mapped from a file. Nobody may
            change it then.

    Raises:
        `TypeError`: `snippets` is not a tensor, `labels` are not integers, `id2label` does not map integers to names,
            or `preprocessing` does not fit into JSON.
        `ValueError`: a shape or dtype that is not accepted, a row that is not finite, or a length other than N.
    """

    def __init__(
        self,
        snippets: torch.Tensor,
        labels: torch.Tensor | Sequence[int] | None = None,
        metadata: "Mapping[str, Sequence] | pyarrow.Table | None" = None,
        id2label: Mapping[int, str] | None = None,
        *,
        encoder: str | None = None,
        encoder_revision: str | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        source_dataset: str | None = None,
        normalized: bool = False,
        copy: bool = True,
    ):
        snippets = _checked("snippets", snippets, ("N", "D"), copy=copy)
        self._initialize(
            SnippetStorage(SnippetCodec(snippets.dtype), (StoredRows(snippets),)),
            labels,
            metadata,
            id2label,
            encoder=encoder,
            encoder_revision=encoder_revision,
            preprocessing=preprocessing,
            source_dataset=source_dataset,
            normalized=normalized,
        )

    @classmethod
    def from_low_rank(
        cls, coefficients: torch.Tensor, basis: torch.Tensor, mean: torch.Tensor, *, copy: bool = True, **kwargs
    ) -> "GMemMemoryBank":
        """
        A bank of low rank r, whose snippet i is `basis @ coefficients[i] + mean`.

        Args:
            coefficients (`torch.Tensor` of shape `(N, r)`):
                The rows, float32, float16 or bfloat16, finite, N and r at least 1. They are copied to the CPU.
            basis (`torch.Tensor` of shape `(D, r)`): Its columns need not be orthogonal; kept in float32.
            mean (`torch.Tensor` of shape `(D,)`): Kept in float32.
            copy (`bool`, defaults to `True`): As of the class, of the coefficients.
            kwargs: `labels`, `metadata`, `id2label`, `encoder`, ... of the class.

        Raises:
            `TypeError`, `ValueError`: as the class, and shapes that do not fit each other.
        """
        coefficients = _checked("coefficients", coefficients, ("N", "r"), copy=copy)
        basis = _checked("basis", basis, ("D", "r")).float()
        mean = _checked("mean", mean, ("D",)).float()
        if basis.shape != (len(mean), coefficients.shape[1]):
            raise ValueError(
                f"`basis` has to be of shape {(len(mean), coefficients.shape[1])}, as `mean` and `coefficients` say, but is of"
                f" shape {tuple(basis.shape)}."
            )
        bank = cls.__new__(cls)
        codec = SnippetCodec(coefficients.dtype, basis, mean)
        bank._initialize(SnippetStorage(codec, (StoredRows(coefficients),)), **kwargs)
        return bank

    def _initialize(
        self,
        storage: SnippetStorage,
        labels: torch.Tensor | Sequence[int] | None = None,
        metadata: "Mapping[str, Sequence] | pyarrow.Table | None" = None,
        id2label: Mapping[int, str] | None = None,
        *,
        encoder: str | None = None,
        encoder_revision: str | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        source_dataset: str | None = None,
        normalized: bool = False,
    ) -> None:
        if id2label is not None:
            id2label = dict(id2label)
            for i, name in id2label.items():
                if not isinstance(i, int) or not isinstance(name, str):
                    raise TypeError(f"`id2label` has to map integers to names, but maps {i!r} to {name!r}.")
        try:
            preprocessing = json.loads(json.dumps(preprocessing))
        except (TypeError, ValueError) as error:
            raise TypeError(f"`preprocessing` has to fit into JSON, but does not: {error}.") from error

        self._set(
            _storage=storage,
            _labels=None if labels is None else _as_labels(labels, len(storage)),
            _metadata_parts=(len(storage) if metadata is None else _as_table(metadata, len(storage)),),
            _id2label=id2label,
            _text_keys=None,
            _text_model=None,
            _index=None,
            encoder=encoder,
            encoder_revision=encoder_revision,
            _preprocessing=preprocessing,
            source_dataset=source_dataset,
            normalized=bool(normalized),
            _history=(),
            _folder=None,
            _manifest=None,
        )

    def _set(self, **attributes) -> None:
        self.__dict__.update(attributes)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a GMemMemoryBank is immutable: `{name}` cannot be set.")

    # What the bank holds

    def __len__(self) -> int:
        return len(self._storage)

    @property
    def dim(self) -> int:
        """The dimension D of a snippet."""
        return self._storage.dim

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, D)`."""
        return len(self), self.dim

    @property
    def rank(self) -> int | None:
        """The number r of coefficients of a row, or `None` where the rows are the snippets themselves."""
        return self._storage.codec.rank

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype: float32, float16, bfloat16 or int8.

        It is also that of the snippets that the bank returns. Only those that it has to compute, from coefficients or
        from int8 numbers, are float32.
        """
        return self._storage.codec.dtype

    @property
    def coefficients(self) -> torch.Tensor | None:
        """A copy of all coefficients of a bank of low rank, float32 of shape `(N, r)`, or `None`."""
        if self.rank is None:
            return None
        return self._storage.stored(torch.arange(len(self))).numbers.float()

    @property
    def basis(self) -> torch.Tensor | None:
        """A copy of the basis of a bank of low rank, float32 of shape `(D, r)`, or `None`."""
        return None if self.rank is None else self._storage.codec.basis.clone()

    @property
    def mean(self) -> torch.Tensor | None:
        """A copy of the mean of a bank of low rank, float32 of shape `(D,)`, or `None`."""
        return None if self.rank is None else self._storage.codec.mean.clone()

    @property
    def labels(self) -> torch.Tensor | None:
        """A copy of the labels, int64 of shape `(N,)`, or `None`."""
        return None if self._labels is None else self._labels.clone()

    @property
    def id2label(self) -> dict[int, str] | None:
        """A copy of the names of the labels, or `None`."""
        return None if self._id2label is None else dict(self._id2label)

    @property
    def text_keys(self) -> torch.Tensor | None:
        """A copy of the text keys, of shape `(N, K)` in their stored dtype, or `None`."""
        return None if self._text_keys is None else self._text_keys.gather(torch.arange(len(self)))

    @property
    def text_model(self) -> dict[str, Any] | None:
        """What made the text keys, or `None` where there are none: its `name`, `revision` and `type` (each `None` where not
        recorded), and the dimension `dim` of a key."""
        return None if self._text_model is None else dict(self._text_model)

    @property
    def approximate_index(self) -> dict[str, Any] | None:
        """The approximate index ([`~GMemMemoryBank.with_index`]), or `None`: of its `num_lists` lists a search looks into
        `num_probes`, and finds the part `recall` of the exact `k` nearest."""
        if self._index is None:
            return None
        numbers = {name: getattr(self._index, name) for name in ("num_probes", "k", "recall")}
        return {"num_lists": len(self._index.centroids), **numbers}

    @property
    def has_additions(self) -> bool:
        """Whether the bank has text keys or an index that are not in the files it was opened from."""
        manifest = self._manifest or Manifest([])
        return (self._text_keys is not None and not manifest.text_keys) or (
            self._index is not None and manifest.index is None
        )

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """A copy of the preparation of images for the encoder, or `None`."""
        return json.loads(json.dumps(self._preprocessing))

    @cached_property
    def metadata(self) -> "pyarrow.Table | None":
        """The metadata, N rows, or `None`. Read from `metadata.parquet` when first asked for.

        Raises:
            `FileNotFoundError`, `ValueError`: the file is gone, or is not the one that the bank was opened with.
        """
        table = _joint_table(
            [part.table if isinstance(part, _MetadataFile) else part for part in self._metadata_parts]
        )
        rows = self._storage.rows
        return table if table is None or rows is None else _take_rows(table, rows)

    @cached_property
    def _plain_metadata(self) -> "pyarrow.Table | None":
        """The metadata of all stored rows, without the columns that may be large: they stay in their file."""
        parts = []
        for part in self._metadata_parts:
            if isinstance(part, _MetadataFile):
                part = part.plain_table
            elif not isinstance(part, int):
                part = part.select(_plain_columns(part.schema))
            parts.append(part)
        return _joint_table(parts)

    @cached_property
    def fingerprint(self) -> str:
        """`"sha256:"` and 64 hexadecimal digits over the dtype, the shape, the rows and the labels, in order; of a bank of
        low rank over the basis and the mean too.

        It does not depend on metadata, on text keys, on the split into files, on the record of the encoder or on the
        history. Computed when first asked for; an opened bank takes it from its `config.json` (`verify` computes it anew).
        """
        return self._compute_fingerprint()

    def _compute_fingerprint(self) -> str:
        codec = self._storage.codec
        rank = "" if self.rank is None else f" rank {self.rank}"
        digest = hashlib.sha256(f"{dtype_name(self.dtype)} {len(self)} {self.dim}{rank}\n".encode())
        for _, piece in self._storage.pieces():
            digest.update(_bytes(piece.codes))
        if self.dtype == torch.int8:
            for _, piece in self._storage.pieces():
                digest.update(_bytes(piece.scales))
        if self.rank is not None:
            digest.update(_bytes(codec.basis))
            digest.update(_bytes(codec.mean))
        if self._labels is not None:
            digest.update(_bytes(self._labels))
        return f"sha256:{digest.hexdigest()}"

    @property
    def history(self) -> list[dict[str, Any]]:
        """The edits that led to this bank, the oldest first.

        Each names its kind as `edit`, the fingerprints of the bank or banks that it was made to as `parents`, and the
        resulting number of rows as `count`; beside them what the method says. What was removed is counted, not named.
        Fingerprints of banks that were never saved are computed when they are first asked for.
        """
        return [
            {
                **edit.record,
                "parents": [parent if isinstance(parent, str) else parent.fingerprint for parent in edit.parents],
            }
            for edit in self._history
        ]

    def descends_from(self, fingerprint: str) -> bool:
        """Whether a fingerprint is that of this bank or of one that edits made it from."""
        banks = [self, *(parent for edit in self._history for parent in edit.parents)]
        # Those whose fingerprint is known come first: to compute one takes a pass over the rows
        banks.sort(key=lambda bank: not isinstance(bank, str) and "fingerprint" not in vars(bank))
        return any(fingerprint == (bank if isinstance(bank, str) else bank.fingerprint) for bank in banks)

    @property
    def reconstruction_error(self) -> float | None:
        """How much the last [`~GMemMemoryBank.compress`] lost, relative to the bank before it, or `None`."""
        errors = [edit.record["reconstruction_error"] for edit in self._history if edit.record["edit"] == "compress"]
        return errors[-1] if errors else None

    def __repr__(self) -> str:
        parts = [f"{len(self)} snippets of dimension {self.dim}", dtype_name(self.dtype)]
        if self.rank is not None:
            parts.append(f"rank {self.rank}")
        if self._labels is not None:
            parts.append("with labels")
        if self._text_keys is not None:
            parts.append("with text keys")
        if self.encoder is not None:
            parts.append(f"encoder {self.encoder!r}")
        if self._folder is not None:
            parts.append(f"memory-mapped from {str(self._folder)!r}")
        return f"{type(self).__name__}({', '.join(parts)})"

    # Rows

    def __getitem__(self, index: int | slice | Sequence[int] | torch.Tensor) -> torch.Tensor:
        """
        Gathers snippets on the CPU, always as a copy.

        Args:
            index (`int`, `slice`, `list[int]` or `torch.Tensor`):
                One row number, or several: a slice, a list or 1-D tensor of integers, or a boolean mask of shape
                `(N,)`. Negative numbers count from the end.

        Returns:
            `torch.Tensor`: of shape `(D,)` for one row number, else of shape `(n, D)`.

        Raises:
            `IndexError`: a row number outside `-N` to `N - 1`, or a mask of another shape.
            `TypeError`: anything but integers.
        """
        snippets = self._storage.gather(self._row_numbers(index))
        return snippets[0] if _is_row_number(index) else snippets

    def _row_numbers(self, index: int | slice | Sequence[int] | torch.Tensor) -> torch.Tensor:
        count = len(self)
        if isinstance(index, slice):
            rows = range(*index.indices(count))
            return torch.arange(len(rows)) * rows.step + rows.start
        if _is_row_number(index):
            index = [operator.index(index)]
        rows = torch.as_tensor(index, device="cpu")
        if rows.dtype == torch.bool:
            if rows.shape != (count,):
                raise IndexError(f"a mask has to be of shape ({count},), but is of shape {tuple(rows.shape)}.")
            return rows.nonzero().flatten()
        if rows.ndim != 1:
            raise IndexError(f"row numbers have to be a list or a 1-D tensor, but are of shape {tuple(rows.shape)}.")
        if rows.numel() and (rows.is_floating_point() or rows.is_complex()):
            raise TypeError(f"row numbers have to be integers, but are {rows.dtype}.")
        rows = rows.to(torch.int64)
        outside = rows[(rows < -count) | (rows >= count)]
        if outside.numel():
            raise IndexError(f"row {outside[0]} is not in the bank: accepted are {-count} to {count - 1}.")
        return torch.where(rows < 0, rows + count, rows)

    def indices_of(self, class_labels: int | str | Sequence[int | str]) -> torch.Tensor:
        """
        The numbers of the rows that carry one of the labels, in ascending order.

        Args:
            class_labels (`int`, `str` or a list of them):
                Labels, or names from `id2label`; a name stands for every label that has it.

        Returns:
            `torch.Tensor`: of shape `(n,)`, int64, n at least 1.

        Raises:
            `ValueError`: the bank has no labels, `class_labels` is empty, a name is not in `id2label`, or no row
                carries a label.
        """
        if self._labels is None:
            raise ValueError(f"`class_labels` is {class_labels!r}, but this bank has no labels.")
        wanted = [class_labels] if isinstance(class_labels, (int, str)) else list(class_labels)
        if not wanted:
            raise ValueError("`class_labels` is empty: at least one label is needed.")

        chosen = torch.zeros(len(self), dtype=torch.bool)
        for label in wanted:
            ids = self._ids_of_name(label) if isinstance(label, str) else [operator.index(label)]
            rows = torch.zeros_like(chosen)
            for i in ids:
                rows |= self._labels == i  # many times as fast as torch.isin
            if not rows.any():
                present = self._labels.unique().tolist()
                raise ValueError(
                    f"`class_labels` holds {label!r}, but no row of this bank carries it: its {len(present)} labels are"
                    f" {_some(present)}."
                )
            chosen |= rows
        return chosen.nonzero().flatten()

    def describe_rows(self, indices: int | slice | Sequence[int] | torch.Tensor) -> list[dict[str, Any]]:
        """
        What the bank knows of rows.

        Args:
            indices (`int`, `slice`, `list[int]` or `torch.Tensor`): Rows, as in `bank[indices]`.

        Returns:
            `list[dict]`: for each row its number as `index`, its entries in the columns of the metadata (binary and nested
            ones, such as thumbnails, left out), and, where the bank has them, its `label` and the `label_name` of it.

        Raises:
            `IndexError`, `TypeError`: as `bank[indices]` does.
        """
        rows = self._row_numbers(indices)
        described = [{} for _ in rows]
        if self._plain_metadata is not None and self._plain_metadata.num_columns:
            stored_rows = rows if self._storage.rows is None else self._storage.rows[rows]
            described = self._plain_metadata.take(stored_rows.numpy()).to_pylist()
        for row, entry in zip(rows.tolist(), described, strict=True):
            entry["index"] = row
            if self._labels is not None:
                entry["label"] = self._labels[row].item()
                if self._id2label is not None and entry["label"] in self._id2label:
                    entry["label_name"] = self._id2label[entry["label"]]
        return described

    def _ids_of_name(self, name: str) -> list[int]:
        if self._id2label is None:
            raise ValueError(
                f"`class_labels` holds the name {name!r}, but this bank has no `id2label`: give integers."
            )
        ids = [i for i, known in self._id2label.items() if known == name]
        if not ids:
            names = list(self._id2label.values())
            close = difflib.get_close_matches(name, names, n=3)
            hint = f"close to it are {_some(close)}" if close else f"its {len(names)} names are {_some(names)}"
            raise ValueError(f"`class_labels` holds {name!r}, which is not in this bank's `id2label`: {hint}.")
        return ids

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        class_labels: int | str | Sequence[int | str] | None = None,
        replacement: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draws rows uniformly from the bank, or from the rows that carry one of `class_labels`.

        For one bank and one set of arguments the draw depends on the generator alone (its device included), or on
        torch's global CPU generator where none is given.

        Args:
            n (`int`): How many rows, at least 1.
            generator (`torch.Generator`, *optional*): On any device.
            class_labels (`int`, `str` or a list of them, *optional*): See [`~GMemMemoryBank.indices_of`].
            replacement (`bool`, defaults to `True`): Whether a row may be drawn more than once.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the snippets, of shape `(n, D)` in the stored dtype, and the numbers of
            their rows, int64 of shape `(n,)`; both on the CPU.

        Raises:
            `ValueError`: `n` is below 1 or, without replacement, above the number of rows to draw from; or a label
                that [`~GMemMemoryBank.indices_of`] refuses.
        """
        rows = None if class_labels is None else self.indices_of(class_labels)
        available = len(self) if rows is None else len(rows)
        if n < 1 or (not replacement and n > available):
            accepted = "1 or more" if replacement else f"1 to {available} without replacement"
            raise ValueError(f"`n` is {n}, but accepted is {accepted}.")
        device = "cpu" if generator is None else generator.device
        if replacement:
            drawn = torch.randint(available, (n,), generator=generator, device=device).cpu()
        else:
            drawn = torch.randperm(available, generator=generator, device=device)[:n].cpu()
        indices = drawn if rows is None else rows[drawn]
        return self._storage.gather(indices), indices

    # New snippets from those of the bank

    def interpolate(
        self,
        i: int | torch.Tensor,
        j: int | torch.Tensor,
        num: int,
        method: str = "linear",
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """
        Snippets between two snippets, for `pipe(memory=...)`, whose output names the two as their sources, each with its
        share.

        The k-th has the weight alpha = k / (num - 1) of the second: the first of `num` stands for the first snippet and the
        last for the second. All are scaled to unit length.

        Args:
            i, j (`int` or `torch.Tensor` of shape `(D,)` or `(1, D)`): Row numbers, or snippets themselves.
            num (`int`): How many, at least 1.
            method (`str`, defaults to `"linear"`):
                - `"linear"`: (1 - alpha) a + alpha b, of a and b as they are.
                - `"slerp"`: along the great circle between the directions of a and b, at constant speed.
                - `"concat"`: the first half of the entries (rounded down) of a, the others of b, whatever alpha.
                - `"mask"`: each entry of a or b by the toss of a coin, anew for each of `num`, whatever alpha.
            generator (`torch.Generator`, *optional*): Draws the masks; on any device.

        Returns:
            `torch.Tensor` of shape `(num, D)`, float32, on the CPU.

        Raises:
            `IndexError`, `ValueError`: a row that is not in the bank, a snippet of another shape, an unknown method,
                `"slerp"` of opposite snippets, or a result that is the zero vector.
        """
        if method not in INTERPOLATION_METHODS:
            raise ValueError(f"`method` is {method!r}, but accepted are {_some(list(INTERPOLATION_METHODS))}.")
        if num < 1:
            raise ValueError(f"`num` is {num}, but accepted is 1 or more.")
        first, second = self._snippets([i, j]).double()
        take_first = None
        if method == "mask":
            device = "cpu" if generator is None else generator.device
            take_first = torch.rand(num, self.dim, generator=generator, device=device).cpu() > 0.5
        alphas = torch.linspace(0, 1, num, dtype=torch.float64)
        snippets = interpolate_snippets(first, second, alphas, method, take_first).float()
        shares = alphas.tolist()
        if method == "concat":
            shares = [1 - self.dim // 2 / self.dim] * num
        elif method == "mask":
            shares = (~take_first).double().mean(dim=1).tolist()
        weighted = [self._weighted_parts([i, j], [1 - share, share]) for share in shares]
        return attach_sources(snippets, SnippetSources(weighted, self))

    def mix(
        self, snippets: Sequence[int | torch.Tensor] | torch.Tensor, weights: Sequence[float], normalize: bool = True
    ) -> torch.Tensor:
        """
        The weighted sum of snippets, for `pipe(memory=...)`, whose output names them and their weights as its sources.
        Negative weights take away: `bank.mix([a, b, c], [1, -1, 1])` is a - b + c.

        Args:
            snippets (`list[int | torch.Tensor]` or `torch.Tensor`):
                Row numbers and snippets of shape `(D,)` or `(1, D)`, also mixed, or snippets of shape `(n, D)`. They enter the sum as
                they are, not scaled to unit length.
            weights (`list[float]` or `torch.Tensor` of shape `(n,)`): Finite; used as given.
            normalize (`bool`, defaults to `True`):
                Whether the sum is scaled to unit length. A model scales it anyway; a sum that is to be added to the bank
                keeps the length of its like without.

        Returns:
            `torch.Tensor` of shape `(D,)`, float32, on the CPU.

        Raises:
            `IndexError`, `ValueError`: a row that is not in the bank, a snippet of another shape, as many weights as there
                are not snippets, or a sum that is the zero vector.
        """
        chosen = self._snippets(snippets).double().cpu()
        weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
        if chosen.ndim != 2 or weights.shape != chosen.shape[:1] or not weights.isfinite().all():
            raise ValueError(
                f"`weights` has to be one finite number for each snippet, but is {weights.tolist()} for snippets of shape"
                f" {tuple(chosen.shape)}."
            )
        unit = unit_sum(chosen, weights[None])[0]
        mixed = (unit if normalize else weights @ chosen).float()
        parts = self._weighted_parts(snippets, weights.tolist())
        return attach_sources(mixed, SnippetSources([parts], self))

    def _weighted_parts(
        self, snippets: Sequence[int | torch.Tensor] | torch.Tensor, weights: Sequence[float]
    ) -> list[tuple[int | dict[str, Any], float]]:
        """The parts of a weighted sum; those of a part that is a sum itself, or comes from an image, if they are known."""
        if not isinstance(snippets, (list, tuple)) and not _is_floating(snippets):
            snippets = self._row_numbers(snippets).tolist()
        parts = []
        for snippet, weight in zip(snippets, weights, strict=True):
            inner = [({"index": None}, 1.0)]
            if not _is_floating(snippet):
                inner = [(self._row_numbers(snippet).item(), 1.0)]
            elif (sources := sources_of(snippet)) is not None and sources.bank in (None, self):
                (inner,) = sources.parts
            parts += [(part, weight * share) for part, share in inner]
        return parts

    def nearest(
        self, query: int | Sequence[int] | torch.Tensor, k: int, metric: str = "cosine", approximate: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The rows with the highest scores, by an exact search that streams over the rows in pieces: it takes little memory
        beside the (mapped) rows themselves. Or some of these rows, faster, by an approximate one.

        Args:
            query (`torch.Tensor`, `int` or `list[int]`):
                A snippet of shape `(D,)` or several of shape `(q, D)`, or row numbers of the bank. The device of a tensor
                is the one that searches: the rows pass over it piece by piece.
            k (`int`): How many rows, 1 to N.
            metric (`str`, defaults to `"cosine"`):
                `"cosine"` of the angle between query and row (0 for a row that is the zero vector), or `"dot"` product.
            approximate (`bool`, defaults to `False`):
                Whether to look only into that part of the rows in which an index expects the nearest, by the cosine
                ([`~GMemMemoryBank.with_index`]). The scores are exact; rows with higher ones may be missed. Queries are
                searched one by one: for many at a time the exact search can be as fast.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: scores, float32, and row numbers, int64, both on the CPU and of shape
            `(k,)` for one query, else `(q, k)`; the highest score first, and of equal scores the lowest row number.

        Raises:
            `IndexError`, `ValueError`: a row that is not in the bank, a query of another shape or, for the cosine, of length
                zero, a `k` beyond the bank, or an unknown metric; an approximate search without an index, or not by the
                cosine.
        """
        if metric not in SEARCH_METRICS:
            raise ValueError(f"`metric` is {metric!r}, but accepted are {_some(list(SEARCH_METRICS))}.")
        if not 1 <= k <= len(self):
            raise ValueError(f"`k` is {k}, but accepted is 1 to {len(self)}.")
        queries = self._snippets(query)
        single = queries.ndim == 1
        if single:
            queries = queries[None]
        if metric == "cosine" and not queries.norm(dim=1).all():
            raise ValueError("`query` holds the zero vector, which has no direction: its cosine is undefined.")
        if not approximate:
            scores, rows = nearest_snippets(self._storage, queries, k, metric)
        elif self._index is None or metric != "cosine":
            has = "no index: make one with `with_index`" if self._index is None else "an index for the cosine alone"
            raise ValueError(f"`approximate` is True and `metric` is {metric!r}, but this bank has {has}.")
        else:
            scores, rows = self._index.nearest(self._storage, queries, k)
        return (scores[0], rows[0]) if single else (scores, rows)

    def search_text(
        self, text: str | Sequence[str], k: int, text_encoder: torch.nn.Module, tokenizer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The rows whose text keys are closest to a text, by an exact search as in [`~GMemMemoryBank.nearest`].

        Args:
            text (`str` or `list[str]`): One text or several. What a model has no room for is cut off, with a warning.
            k (`int`): How many rows, 1 to N.
            text_encoder (`torch.nn.Module`):
                The text half of the model that made the keys ([`~GMemMemoryBank.text_model`]), of transformers:
                `CLIPModel`, `CLIPTextModelWithProjection`, `SiglipModel`, `SiglipTextModel` or their like. The search
                runs on its device.
            tokenizer: Its tokenizer, of transformers.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: cosines, float32, and row numbers, int64, both on the CPU and of shape `(k,)`
            for one text, else `(n, k)`; the highest cosine first, and of equal ones the lowest row number.

        Raises:
            `TypeError`: `text` is not text.
            `ValueError`: the bank has no text keys, `text` is an empty list, a `k` beyond the bank, or a text encoder of
                another type or dimension than the model that made the keys, or whose outputs cannot be compared with
                images.
        """
        if self._text_keys is None:
            raise ValueError(
                "this bank has no text keys, with which its rows could be found by words: add them with"
                " `examples/build_memory_bank.py --text_keys <model>` (a CLIP or SigLIP model) or `with_text_keys`."
            )
        if not 1 <= k <= len(self):
            raise ValueError(f"`k` is {k}, but accepted is 1 to {len(self)}.")
        queries, model_type = embed_text([text] if isinstance(text, str) else text, text_encoder, tokenizer)
        found = {"type": model_type, "dim": queries.shape[1]}
        expected = {name: self._text_model[name] for name in found}
        if found["dim"] != expected["dim"] or expected["type"] not in (None, found["type"]):
            raise ValueError(
                f"`text_encoder`, a {type(text_encoder).__name__}, is of {found}, but the text keys of this bank are of"
                f" {expected}: it needs that of {self._text_model['name'] or 'the model that made them'}."
            )
        scores, rows = nearest_snippets(self._text_keys, queries, k, "cosine")
        return (scores[0], rows[0]) if isinstance(text, str) else (scores, rows)

    def _snippets(self, value: int | Sequence[int | torch.Tensor] | torch.Tensor) -> torch.Tensor:
        """Snippets that are given by row numbers or as they are, of shape `(D,)` or `(n, D)`, in float32."""
        if isinstance(value, (list, tuple)):
            snippets = [torch.atleast_2d(self._snippets(item).cpu()) for item in value]
            if not snippets or any(len(snippet) != 1 for snippet in snippets):
                raise ValueError(
                    "a list of snippets has to hold one snippet each: row numbers and tensors of shape "
                    f"({self.dim},) or (1, {self.dim}) only."
                )
            return torch.cat(snippets)
        snippets = value if _is_floating(value) else self[value]
        if snippets.ndim not in (1, 2) or snippets.shape[-1] != self.dim or not snippets.numel():
            raise ValueError(
                f"snippets have to be of shape ({self.dim},) or (n, {self.dim}), but are of shape {tuple(snippets.shape)}."
            )
        if not snippets.isfinite().all():
            raise ValueError("snippets have to be finite, but hold NaN or infinity.")
        return snippets.float()

    # Edits: each returns a new bank, which shares the rows of this one

    def with_text_keys(
        self,
        text_keys: torch.Tensor,
        model: str | None = None,
        revision: str | None = None,
        model_type: str | None = None,
    ) -> "GMemMemoryBank":
        """
        The same bank with text keys: of each row, the embedding of its image by a model that embeds texts in the same space,
        such as CLIP or SigLIP ([`~diffusers_gmem.data.load_text_key_encoder`]). Edits keep them aligned with the rows; files
        of their own hold them. Rows, fingerprint and history stay what they are. Keys that the bank has are replaced.

        Args:
            text_keys (`torch.Tensor` of shape `(N, K)`): float32, float16 or bfloat16, finite. They are copied to the CPU.
            model (`str`, *optional*): The model that made them, such as a repository id.
            revision (`str`, *optional*): Its revision.
            model_type (`str`, *optional*):
                Its `config.model_type`, such as `"clip"` or `"siglip"`. [`~GMemMemoryBank.search_text`] then refuses text
                encoders of another type.

        Raises:
            `TypeError`: `text_keys` is not a tensor.
            `ValueError`: a shape or dtype that is not accepted, or a row that is not finite.
        """
        text_keys = _checked("text_keys", text_keys, ("N", "K"))
        if len(text_keys) != len(self):
            raise ValueError(f"`text_keys` has to have {len(self)} rows, but has {len(text_keys)}.")
        bank = type(self).__new__(type(self))
        bank._set(**vars(self))
        bank._set(
            _text_keys=SnippetStorage(SnippetCodec(text_keys.dtype), (StoredRows(text_keys),)),
            _text_model={"name": model, "revision": revision, "type": model_type, "dim": text_keys.shape[1]},
            _manifest=self._manifest and self._manifest._replace(text_keys=()),
        )
        return bank

    def with_index(self, recall: float = 0.95, k: int = 10, seed: int = 0) -> "GMemMemoryBank":
        """
        The same bank with an index for `nearest(..., approximate=True)`; a file of its own holds it. It puts the rows into
        about sqrt(N) lists by their direction, and a search looks into a few of these. Edits drop it, as it is of these very
        rows; text keys are searched without it. The same arguments give the same index on the same machine.

        Args:
            recall (`float`, defaults to 0.95):
                Which part of the exact `k` nearest rows to find, in the mean over up to 256 rows of the bank (each of which
                is left out of its own neighbours). It decides into how many lists a search looks. What is reached with as
                many other rows is measured and recorded: [`~GMemMemoryBank.approximate_index`].
            k (`int`, defaults to 10): Of how many neighbours the recall is.
            seed (`int`, defaults to 0): Of the choice of rows, and of the clustering.

        Raises:
            `ImportError`: faiss is not installed (the extra "index").
            `ValueError`: a recall that is not above 0 and at most 1, a `k` that is not in 1 to N - 1, or less than two rows
                other than the zero vector.
        """
        if not 0 < recall <= 1:
            raise ValueError(f"`recall` is {recall}, but has to be above 0 and at most 1.")
        if not 1 <= k < len(self):
            raise ValueError(f"`k` is {k}, but accepted is 1 to {len(self) - 1}.")
        bank = type(self).__new__(type(self))
        bank._set(**vars(self))
        bank._set(
            _index=ApproximateIndex.build(self._storage, recall, k, seed),
            _manifest=self._manifest and self._manifest._replace(index=None),
        )
        return bank

    def extend(
        self,
        snippets: torch.Tensor,
        labels: torch.Tensor | Sequence[int] | None = None,
        metadata: "Mapping[str, Sequence] | pyarrow.Table | None" = None,
        text_keys: torch.Tensor | None = None,
    ) -> "GMemMemoryBank":
        """
        A bank with more rows at its end.

        The new rows are stored as those of the bank: exactly where the bank holds full rows of their dtype, else rounded,
        and projected on the basis of a bank of low rank. What that loses is logged and recorded in the history
        (`relative_error`, of the length of all new rows; `largest_error`, of an entry).

        Args:
            snippets (`torch.Tensor` of shape `(n, D)` or `(D,)`): Floating point and finite. They are copied.
            labels (`torch.Tensor` of shape `(n,)` or `list[int]`, *optional*): Needed if, and only if, the bank has labels.
            metadata (`dict[str, list]` or `pyarrow.Table`, *optional*):
                Columns of n entries each. A column that the bank or `metadata` lacks is filled up with nulls.
            text_keys (`torch.Tensor` of shape `(n, K)` or `(K,)`, *optional*):
                Needed if, and only if, the bank has text keys. They are cast to the dtype of these.

        Raises:
            `TypeError`: `snippets` or `text_keys` is not a tensor, or `labels` are not integers.
            `ValueError`: a shape that does not fit, a row that is not finite or not within the range of the bank's dtype,
                or labels or text keys for a bank without, or none for a bank with them.
        """
        if isinstance(snippets, torch.Tensor) and snippets.ndim == 1:
            snippets = snippets[None]
        snippets = _checked("snippets", snippets, ("n", "D"), (*_FLOAT_DTYPES, torch.float64))
        if snippets.shape[1] != self.dim:
            raise ValueError(f"`snippets` has to be of dimension {self.dim}, but is of {snippets.shape[1]}.")
        if (labels is None) != (self._labels is None):
            has = "has labels" if labels is None else "has no labels"
            raise ValueError(f"`labels` is {labels!r}, but this bank {has}.")
        if labels is not None:
            labels = torch.cat([self._labels, _as_labels(labels, len(snippets))])
        if (text_keys is None) != (self._text_keys is None):
            has = "has text keys: give those of the new rows" if text_keys is None else "has none"
            raise ValueError(f"`text_keys` is {text_keys!r}, but this bank {has}.")
        stored_keys = None
        if text_keys is not None:
            stored_keys = self._text_keys.append(self._encode_text_keys(text_keys, len(snippets)))
        metadata_part = len(snippets) if metadata is None else _as_table(metadata, len(snippets))
        metadata_parts = (*self._metadata_parts, metadata_part)
        _joint_schema(metadata_parts)
        stored, loss = encode_pieces(self._storage.codec, [snippets], snippets.shape)
        self._log_loss(len(snippets), loss)
        has_unit_length = bool(((snippets.double().norm(dim=1) - 1).abs() < 1e-2).all())
        return self._edited(
            {"edit": "extend", "added": len(snippets), **loss},
            (self,),
            _storage=self._storage.append(stored),
            _labels=labels,
            _metadata_parts=metadata_parts,
            _text_keys=stored_keys,
            normalized=self.normalized and has_unit_length,
        )

    def _encode_text_keys(self, text_keys: torch.Tensor, count: int) -> SnippetStorage:
        if isinstance(text_keys, torch.Tensor) and text_keys.ndim == 1:
            text_keys = text_keys[None]
        text_keys = _checked("text_keys", text_keys, ("n", "K"), (*_FLOAT_DTYPES, torch.float64))
        shape = (count, self._text_model["dim"])
        if text_keys.shape != shape:
            raise ValueError(f"`text_keys` has to be of shape {shape}, but is of shape {tuple(text_keys.shape)}.")
        return encode_pieces(self._text_keys.codec, [text_keys], shape)[0]

    def without(
        self,
        indices: int | Sequence[int] | torch.Tensor | None = None,
        labels: int | str | Sequence[int | str] | None = None,
    ) -> "GMemMemoryBank":
        """
        A bank with fewer rows, in the old order. What is removed is in none of the files that the new bank is saved in:
        neither rows, labels, metadata and text keys, nor the names of labels that no row carries any more.

        Args:
            indices (`int`, `list[int]` or `torch.Tensor`, *optional*): Rows, as in `bank[indices]`.
            labels (`int`, `str` or a list of them, *optional*):
                Or: all rows that carry one of these; see [`~GMemMemoryBank.indices_of`].

        Raises:
            `IndexError`: a row that is not in the bank.
            `ValueError`: both arguments or neither, a label that no row carries, or nothing would be left.
        """
        if (indices is None) == (labels is None):
            raise ValueError(f"one of `indices` and `labels` is needed, but they are {indices!r} and {labels!r}.")
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[self.indices_of(labels) if indices is None else self._row_numbers(indices)] = False
        rows = kept.nonzero().flatten()
        return self._selected(rows, {"edit": "without", "removed": len(self) - len(rows)})

    def select(self, indices: slice | Sequence[int] | torch.Tensor) -> "GMemMemoryBank":
        """
        A bank of some of the rows, in the order of `indices`, which are those of `bank[indices]`. As with
        [`~GMemMemoryBank.without`], nothing else gets into its files.

        Raises:
            `IndexError`: a row that is not in the bank.
            `ValueError`: no row at all.
        """
        return self._selected(self._row_numbers(indices), {"edit": "select"})

    def merge(self, other: "GMemMemoryBank") -> "GMemMemoryBank":
        """
        A bank with the rows of this one and then those of another.

        Where both are stored in the same way (dtype, basis), the new bank shares the rows of both; else those of `other`
        are stored as this bank stores its own, with a loss that is logged and recorded as by
        [`~GMemMemoryBank.extend`]. A column of metadata that only one of them has is filled up with nulls.

        Raises:
            `TypeError`: `other` is not a bank.
            `ValueError`: the two differ in dimension, encoder, its revision or preprocessing, or the model of their text
                keys, only one has labels or text keys, or they give one label two names.
        """
        if not isinstance(other, GMemMemoryBank):
            raise TypeError(f"`other` has to be a {CLASS_NAME}, but is {type(other)}.")
        for name in ("dim", "encoder", "encoder_revision", "preprocessing", "text_model"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"`other` has the {name} {getattr(other, name)!r}, but this bank has {getattr(self, name)!r}."
                )
        if (self._labels is None) != (other._labels is None):
            raise ValueError(f"only {'`other`' if self._labels is None else 'this bank, not `other`,'} has labels.")
        id2label = (self._id2label or {}) | (other._id2label or {})
        for i, name in (self._id2label or {}).items():
            if id2label[i] != name:
                raise ValueError(
                    f"label {i} is {id2label[i]!r} in the `id2label` of `other`, but {name!r} in this bank's."
                )

        metadata_parts = self._metadata_parts + other._metadata_parts
        _joint_schema(metadata_parts)
        stored, loss = other._storage, {}
        if not self._storage.codec.is_same(stored.codec):
            stored, loss = encode_pieces(self._storage.codec, stored.decoded_pieces(), other.shape)
            metadata_parts = self._metadata_parts + other._joined_metadata()
            self._log_loss(len(other), loss)
        text_keys = self._text_keys
        if text_keys is not None:
            other_keys = other._text_keys
            if not text_keys.codec.is_same(other_keys.codec):
                shape = (len(other), other_keys.dim)
                other_keys, _ = encode_pieces(text_keys.codec, other_keys.decoded_pieces(), shape)
            text_keys = text_keys.append(other_keys)
        return self._edited(
            {"edit": "merge", "added": len(other), **loss},
            (self, other),
            _storage=self._storage.append(stored),
            _labels=None if self._labels is None else torch.cat([self._labels, other._labels]),
            _metadata_parts=metadata_parts,
            _id2label=id2label or None,
            _text_keys=text_keys,
            source_dataset=", ".join(dict.fromkeys(filter(None, (self.source_dataset, other.source_dataset)))) or None,
            normalized=self.normalized and other.normalized,
        )

    def compress(self, rank: int | None = None, dtype: str | torch.dtype | None = None) -> "GMemMemoryBank":
        r"""
        A bank that takes less room: of low rank, of a smaller dtype, or both.

        With the thin SVD $U S V^T$ of the snippets less their mean, the basis is $V_r \sqrt{S_r}$ and the coefficients are
        $U_r \sqrt{S_r}$. It is computed from the Gram matrix, in float64, in pieces of the rows. An int8 row has a scale
        of its own: its largest absolute value divided by 127. [`~GMemMemoryBank.reconstruction_error`] tells the loss.

        Args:
            rank (`int`, *optional*): The number of coefficients of a row; by default what it is now.
            dtype (`str` or `torch.dtype`, *optional*):
                Of the rows, `"float32"`, `"float16"`, `"bfloat16"` or `"int8"`; by default what it is now. Basis and mean
                stay float32.

        Raises:
            `ValueError`: neither is given, a rank above the number of directions in which the snippets vary, an unknown
                dtype, or a row that is not within its range.
        """
        if rank is None and dtype is None:
            raise ValueError("at least one of `rank` and `dtype` is needed.")
        stored_dtype = self.dtype if dtype is None else STORED_DTYPES.get(str(dtype).removeprefix("torch."))
        if stored_dtype is None:
            raise ValueError(f"`dtype` is {dtype!r}, but accepted are {', '.join(STORED_DTYPES)}.")
        codec = self._storage.codec
        basis, mean = (codec.basis, codec.mean) if rank is None else low_rank_basis(self._storage, rank)
        codec = SnippetCodec(stored_dtype, basis, mean)
        stored, loss = encode_pieces(codec, self._storage.decoded_pieces(), self.shape)
        record = {"rank": codec.rank, "dtype": dtype_name(codec.dtype), "reconstruction_error": loss["relative_error"]}
        bank = self._edited(
            {"edit": "compress", **record},
            (self,),
            _storage=stored,
            _metadata_parts=self._joined_metadata(),
        )
        bank._set(_history=_as_edits(bank.history))  # without the parents, whose rows can then be freed
        return bank

    def _selected(self, rows: torch.Tensor, record: dict[str, Any]) -> "GMemMemoryBank":
        if not len(rows):
            raise ValueError("no row would be left, but a bank has at least one.")
        labels, id2label = self._labels, self._id2label
        if labels is not None:
            labels = labels[rows]
            gone = set(self._labels.unique().tolist()) - set(labels.unique().tolist())
            id2label = id2label and {i: name for i, name in id2label.items() if i not in gone}
        return self._edited(
            record,
            (self,),
            _storage=self._storage.select(rows),
            _labels=labels,
            _id2label=id2label,
            _text_keys=self._text_keys and self._text_keys.select(rows),
        )

    def _edited(self, record: dict[str, Any], parents: tuple["GMemMemoryBank", ...], **changes) -> "GMemMemoryBank":
        bank = type(self).__new__(type(self))
        computed_from_rows = ("metadata", "fingerprint")
        bank._set(**{name: value for name, value in vars(self).items() if name not in computed_from_rows})
        bank._set(_folder=None, _manifest=None, _index=None, **changes)
        # In this order, so that a pickle never nests deeply: a bank's history comes after those of its parents
        edits = [edit for parent in parents for edit in parent._history]
        edit = _Edit({**record, "count": len(bank)}, parents)
        bank._set(_history=(*{id(edit): edit for edit in edits}.values(), edit))
        return bank

    def _joined_metadata(self) -> tuple:
        return (len(self) if self.metadata is None else self.metadata,)

    def _log_loss(self, count: int, loss: dict[str, float]) -> None:
        if loss["largest_error"]:
            stored_as = (
                dtype_name(self.dtype) if self.rank is None else f"{dtype_name(self.dtype)} of rank {self.rank}"
            )
            logger.warning(
                f"{count} new snippets, stored as {stored_as}, lost {loss['relative_error']:.2g} of their length; the largest"
                f" error of an entry is {loss['largest_error']:.3g}."
            )

    # Files

    def save_pretrained(self, save_directory: str | os.PathLike, max_shard_size: int | str = "1GB") -> None:
        """
        Writes the bank into a folder: `config.json`, the rows in safetensors shards, and, where the bank has them, the
        labels and the index in a safetensors file each, `metadata.parquet`, and the text keys in as many shards as the
        rows.

        A folder holds one bank. Saving over another one leaves, whatever the moment of a kill or a full disk, the old
        bank whole or the new one whole: the new files lie beside the old ones until renaming `config.json`, which
        lists them, puts the new bank in place. Only then are the old files deleted. One writer at a time.

        Args:
            save_directory (`str` or `os.PathLike`): The folder; made where it does not exist.
            max_shard_size (`int` or `str`, defaults to `"1GB"`):
                The most bytes of rows, or of text keys, in one shard, as a number or like `"500MB"`. A shard holds at least one row.

        Raises:
            `ValueError`: `max_shard_size` is not a size, or the folder has a `config.json` that is not a memory bank's.
            `OSError`: a file cannot be written.
        """
        try:
            max_bytes = convert_file_size_to_int(max_shard_size)
        except ValueError:
            max_bytes = 0
        if max_bytes < 1:
            raise ValueError(
                f"`max_shard_size` is {max_shard_size!r}, but accepted is a positive number of bytes or a text like '1GB'."
            )

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        previous = tidy(folder)
        try:
            self._write_files(folder, max_bytes)
            if previous.metadata is not None and (folder / METADATA_NAME).is_file():
                os.replace(folder / METADATA_NAME, folder / metadata_alias(previous.metadata))
            flush_folder(folder)
            # The commit: until this rename the folder holds the old bank, afterwards the new one.
            os.replace(folder / TEMPORARY_CONFIG, folder / CONFIG_NAME)
        except (OSError, SafetensorError) as error:
            raise OSError(f"the memory bank cannot be saved in {folder}: {error}") from error
        finally:
            tidy(folder)

    def _write_files(self, folder: Path, max_bytes: int) -> None:
        """Writes everything beside what the folder holds, with `config.json` still under a temporary name."""
        temporary = folder / TEMPORARY_FILE

        def finish(part: str, rows: int) -> dict[str, Any]:
            flush(temporary)
            entry = BankFile("", rows, temporary.stat().st_size, sha256_of_file(temporary))
            if part == "metadata":
                entry = entry._replace(file=METADATA_NAME)
                os.replace(temporary, folder / metadata_alias(entry))
            else:
                entry = entry._replace(file=f"memory_bank-{part}-{entry.sha256[:8]}.safetensors")
                os.replace(temporary, folder / entry.file)
            return entry._asdict()

        count, storage = len(self), self._storage
        row_bytes = max(part.row_bytes for part in (storage, self._text_keys) if part is not None)
        rows_per_shard = max(1, max_bytes // row_bytes)
        num_shards = -(-count // rows_per_shard)
        files = Manifest([], text_keys=[])._asdict()
        for k in logging.tqdm(range(num_shards), desc=f"Saving {folder}", disable=num_shards == 1):
            start, stop = count * k // num_shards, count * (k + 1) // num_shards
            shard = storage.stored_range(start, stop)
            tensors = {"snippets" if self.rank is None else "coefficients": shard.codes}
            if shard.scales is not None:
                tensors["scales"] = shard.scales
            # One entry only: safetensors writes several in random order, and equal banks would get unequal files.
            header = {"shard": f"{k + 1} of {num_shards}"}
            save_file(tensors, temporary, metadata=header)
            files["snippets"].append(finish(f"{k + 1:05d}-of-{num_shards:05d}", stop - start))
            if self._text_keys is not None:
                save_file({"text_keys": self._text_keys.stored_range(start, stop).codes}, temporary, metadata=header)
                files["text_keys"].append(finish(f"text_keys-{k + 1:05d}-of-{num_shards:05d}", stop - start))
        if self.rank is not None:
            save_file({"basis": storage.codec.basis, "mean": storage.codec.mean}, temporary)
            files["basis"] = finish("basis", self.dim)
        if self._labels is not None:
            save_file({"labels": self._labels}, temporary)
            files["labels"] = finish("labels", count)
        if self._index is not None:
            save_file({name: getattr(self._index, name) for name in ("centroids", "rows", "starts")}, temporary)
            files["index"] = finish("index", count)
        if self.metadata is not None:
            import pyarrow.parquet

            pyarrow.parquet.write_table(self.metadata, temporary)
            files["metadata"] = finish("metadata", count)

        config = {
            "_class_name": CLASS_NAME,
            "format_version": FORMAT_VERSION,
            "count": count,
            "dim": self.dim,
            "rank": self.rank,
            "dtype": dtype_name(self.dtype),
            "fingerprint": self.fingerprint,
            "history": self.history,
            "encoder": self.encoder,
            "encoder_revision": self.encoder_revision,
            "preprocessing": self._preprocessing,
            "normalized": self.normalized,
            "source_dataset": self.source_dataset,
            "id2label": self._id2label,
            "text_model": self._text_keys and {**self._text_model, "dtype": dtype_name(self._text_keys.codec.dtype)},
            "index": self._index and {**self.approximate_index, "fingerprint": self.fingerprint},
            "files": files,
        }
        config_path = folder / TEMPORARY_CONFIG
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        flush(config_path)

    def push_to_hub(self, repo_id: str, **kwargs) -> CommitInfo:
        """
        Puts the bank and a card into a data set repository of the Hub, with one commit.

        Args:
            repo_id (`str`): Such as `"me/my-memory"`; made where it does not exist.
            kwargs: `private`, `revision`, `create_pr`, `commit_message`, `token`, `max_shard_size`, `license` and `card` of
                [`~diffusers_gmem.hub.push_memory_bank`].

        Returns:
            `CommitInfo`: `oid` is the revision that stands for this very bank.
        """
        from ..hub.push import push_memory_bank

        return push_memory_bank(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        *,
        indices: int | slice | Sequence[int] | torch.Tensor | None = None,
        class_labels: int | str | Sequence[int | str] | None = None,
        repo_type: str = "dataset",
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "GMemMemoryBank":
        """
        Opens a bank that [`~GMemMemoryBank.save_pretrained`] wrote or [`~GMemMemoryBank.push_to_hub`] uploaded. The rows are
        memory-mapped: opening is instant and takes no RAM until rows are gathered.

        Checked are the presence and size of every file, and the tensor name, dtype, shape and order of the shards;
        [`~GMemMemoryBank.verify`] checks the contents. Those of a download are checked at once, and once only.

        With `indices` or `class_labels` it is the bank `select` would make of these rows. Only the shards that hold them are
        downloaded and need to be there.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A local folder, or the id of a repository of the Hub.
            subfolder (`str`, *optional*): The folder in it that holds the bank, such as `"bank"`.
            indices (`int`, `slice`, `list[int]` or `torch.Tensor`, *optional*): Rows, as in `bank[indices]`.
            class_labels (`int`, `str` or a list of them, *optional*):
                Or: all rows that carry one of these; see [`~GMemMemoryBank.indices_of`].
            repo_type (`str`, defaults to `"dataset"`): `"model"` for the bank in the repository of a pipeline.
            revision (`str`, *optional*): A branch, a tag or a commit; the main branch by default.
            cache_dir (`str` or `os.PathLike`, *optional*): Of the downloads; that of huggingface_hub by default.
            token (`str` or `bool`, *optional*): That of `hf auth login` by default; `False` for none.
            local_files_only (`bool`, defaults to `False`): Whether to take files from the cache alone.

        Raises:
            `FileNotFoundError`: there is no bank, or one of its files is missing.
            `IndexError`: a row that is not in the bank.
            `ValueError`: a file is broken, and the message names the file and the fault; both `indices` and `class_labels`,
                or a label that no row carries.
            `PermissionError`, `ConnectionError`, `OSError`: see [`~diffusers_gmem.hub.HubRepo.download`].
        """
        if indices is not None and class_labels is not None:
            raise ValueError(
                f"only one of `indices` and `class_labels` can be given, but they are {indices!r} and {class_labels!r}."
            )
        folder, fetch = locate_memory_bank(
            pretrained_model_name_or_path,
            subfolder,
            repo_type=repo_type,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        config, manifest = read_config(folder)
        fetch(entry for entry in (manifest.basis, manifest.labels, manifest.metadata) if entry is not None)

        dtype, dim, rank = STORED_DTYPES[config["dtype"]], config["dim"], config["rank"]
        codec = SnippetCodec(dtype)
        if rank is not None:
            expected = {"basis": (torch.float32, (dim, rank)), "mean": (torch.float32, (dim,))}
            codec = SnippetCodec(dtype, **open_tensors(folder / manifest.basis.file, manifest.basis, expected))
        labels, metadata = None, config["count"]
        if manifest.labels is not None:
            entry = manifest.labels
            labels = open_tensors(folder / entry.file, entry, {"labels": (torch.int64, (entry.rows,))})["labels"]
        if manifest.metadata is not None:
            check_size(metadata_path(folder, manifest.metadata), manifest.metadata)
            metadata = _MetadataFile(folder, manifest.metadata)
        # A shard that is not opened is a block without contents, so that the rows keep their numbers
        blocks, key_blocks, text_model = [], [], config["text_model"]
        for entry in manifest.snippets:
            codes = torch.empty(entry.rows, rank or dim, dtype=dtype, device="meta")
            blocks.append(StoredRows(codes, torch.empty(entry.rows, device="meta") if dtype == torch.int8 else None))
        if text_model is not None:
            key_dtype, key_dim = STORED_DTYPES[text_model.pop("dtype")], text_model["dim"]
            for entry in manifest.text_keys:
                key_blocks.append(StoredRows(torch.empty(entry.rows, key_dim, dtype=key_dtype, device="meta")))

        bank = cls.__new__(cls)
        bank._set(
            _storage=SnippetStorage(codec, tuple(blocks)),
            _labels=labels,
            _metadata_parts=(metadata,),
            _id2label=config["id2label"],
            _text_keys=None,
            _text_model=text_model,
            _index=None,
            encoder=config["encoder"],
            encoder_revision=config["encoder_revision"],
            _preprocessing=config["preprocessing"],
            source_dataset=config["source_dataset"],
            normalized=config["normalized"],
            fingerprint=config["fingerprint"],
            _history=_as_edits(config["history"]),
            _folder=folder,
            _manifest=manifest,
        )
        rows, opened = None, range(len(blocks))
        if indices is not None or class_labels is not None:
            rows = bank._row_numbers(indices) if class_labels is None else bank.indices_of(class_labels)
            stops = torch.tensor([entry.rows for entry in manifest.snippets]).cumsum(0)
            opened = torch.bucketize(rows, stops, right=True).unique().tolist()

        fetch(entry for k in opened for entry in (manifest.snippets[k], *manifest.text_keys[k : k + 1]))
        for k in opened:
            shard = f"{k + 1} of {len(blocks)}"
            entry, name = manifest.snippets[k], "snippets" if rank is None else "coefficients"
            expected = {name: (dtype, (entry.rows, rank or dim))}
            if dtype == torch.int8:
                expected["scales"] = (torch.float32, (entry.rows,))
            tensors = open_tensors(folder / entry.file, entry, expected, shard)
            blocks[k] = StoredRows(tensors[name], tensors.get("scales"))
            if text_model is not None:
                entry, expected = manifest.text_keys[k], {"text_keys": (key_dtype, (entry.rows, key_dim))}
                key_blocks[k] = StoredRows(open_tensors(folder / entry.file, entry, expected, shard)["text_keys"])
        bank._set(_storage=SnippetStorage(codec, tuple(blocks)))
        if text_model is not None:
            bank._set(_text_keys=SnippetStorage(SnippetCodec(key_dtype), tuple(key_blocks)))
        if rows is not None:
            bank._set(_manifest=manifest._replace(index=None))  # not fetched, so not to be verified
            return bank.select(rows)
        if manifest.index is not None:
            fetch([manifest.index])
            bank._set(_index=_open_index(folder, manifest.index, config["index"], bank.shape))
        return bank

    def verify(self) -> None:
        """
        Reads every file of an opened bank and checks its SHA-256 and size, that all rows are finite, the number of rows
        of the metadata, and that the fingerprint is the one in `config.json`. Where only some shards were opened, these
        alone are checked, and not the fingerprint.

        An edited bank checks the opened banks that it shares rows with. A bank that was made from tensors was checked then
        and cannot have changed: nothing is left to verify.

        Raises:
            `FileNotFoundError`: a file is gone.
            `ValueError`: a file is broken; the message names the file and the fault.
        """
        if self._folder is None:
            opened = {
                id(parent): parent for edit in self._history for parent in edit.parents if not isinstance(parent, str)
            }
            for parent in opened.values():
                if parent._folder is not None:
                    parent.verify()
            return
        shards = list(zip(self._manifest.snippets, self._storage.blocks, strict=True))
        if self._manifest.text_keys:
            shards += zip(self._manifest.text_keys, self._text_keys.blocks, strict=True)
        start = 0
        for entry, block in logging.tqdm(shards, desc=f"Verifying {self._folder}"):
            if not block.codes.is_meta:
                path = self._folder / entry.file
                check_size(path, entry)  # first: reading a mapping beyond the end of its file kills the process
                bad_row = first_nonfinite_row(block.codes if block.scales is None else block.scales)
                if bad_row is not None:
                    raise ValueError(f"{path} is not finite: row {start + bad_row} of the bank holds NaN or infinity.")
                check_sha256(path, entry)
            start = (start + entry.rows) % len(self)  # the text keys start anew
        for entry in (self._manifest.basis, self._manifest.labels, self._manifest.index):
            if entry is not None:
                check_size(self._folder / entry.file, entry)
                check_sha256(self._folder / entry.file, entry)
        if self.rank is not None and not (self.basis.isfinite().all() and self.mean.isfinite().all()):
            raise ValueError(f"{self._folder / self._manifest.basis.file} is not finite: it holds NaN or infinity.")
        if self._manifest.metadata is not None:
            import pyarrow.parquet

            path = metadata_path(self._folder, self._manifest.metadata)
            check_size(path, self._manifest.metadata)
            check_sha256(path, self._manifest.metadata)
            num_rows = pyarrow.parquet.read_metadata(path).num_rows
            if num_rows != len(self):
                raise ValueError(f"{path} has {num_rows} rows, but the bank has {len(self)}.")
        if any(block.codes.is_meta for block in self._storage.blocks):
            return
        fingerprint = self._compute_fingerprint()
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{self._folder / CONFIG_NAME} gives the fingerprint {self.fingerprint}, but that of the rows and labels"
                f" is {fingerprint}."
            )


def _is_row_number(index: Any) -> bool:
    # A tensor of one element also passes for an integer, but stands for a list of one row
    return hasattr(index, "__index__") and getattr(index, "ndim", 0) == 0


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _some(values: list, limit: int = 8) -> str:
    """The first few values, for a message."""
    return ", ".join(repr(value) for value in values[:limit]) + (", ..." if len(values) > limit else "")


def _as_edits(history: list[dict[str, Any]]) -> tuple[_Edit, ...]:
    return tuple(
        _Edit({name: value for name, value in edit.items() if name != "parents"}, tuple(edit["parents"]))
        for edit in history
    )


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).reshape(-1).numpy().data


def _checked(
    name: str,
    rows: torch.Tensor,
    shape: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...] = _FLOAT_DTYPES,
    copy: bool = True,
) -> torch.Tensor:
    """On the CPU, contiguous."""
    shape_name = str(shape).replace("'", "")
    if not isinstance(rows, torch.Tensor):
        raise TypeError(f"`{name}` has to be a torch.Tensor of shape {shape_name}, but is {type(rows)}.")
    if rows.ndim != len(shape) or rows.numel() == 0:
        raise ValueError(
            f"`{name}` has to be of shape {shape_name}, all sides at least 1, but is of shape {tuple(rows.shape)}."
        )
    if rows.dtype not in dtypes:
        raise ValueError(f"`{name}` has to be one of {', '.join(map(dtype_name, dtypes))}, but is {rows.dtype}.")
    rows = rows.detach().to("cpu", copy=copy, memory_format=torch.contiguous_format).contiguous()
    bad_row = first_nonfinite_row(rows)
    if bad_row is not None:
        raise ValueError(f"`{name}` has to be finite, but row {bad_row} holds NaN or infinity.")
    return rows


def _as_labels(labels: torch.Tensor | Sequence[int], count: int) -> torch.Tensor:
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"`labels` have to be integers, but are {labels.dtype}.")
    if labels.shape != (count,):
        raise ValueError(f"`labels` has to be of shape ({count},), but is of shape {tuple(labels.shape)}.")
    return labels.detach().to("cpu", torch.int64, copy=True).contiguous()


def _as_table(metadata: "Mapping[str, Sequence] | pyarrow.Table", count: int) -> "pyarrow.Table":
    import pyarrow

    if not isinstance(metadata, pyarrow.Table):
        metadata = pyarrow.table(dict(metadata))
    if metadata.num_rows != count:
        raise ValueError(f"`metadata` has to have {count} rows, but has {metadata.num_rows}.")
    return metadata


def _open_index(folder: Path, entry: BankFile, numbers: dict[str, Any], shape: tuple[int, int]) -> ApproximateIndex:
    num_lists = numbers["num_lists"]
    expected = {
        "centroids": (torch.float32, (num_lists, shape[1])),
        "rows": (torch.int64, (shape[0],)),
        "starts": (torch.int64, (num_lists + 1,)),
    }
    tensors = open_tensors(folder / entry.file, entry, expected)
    return ApproximateIndex(**tensors, **{name: numbers[name] for name in ("num_probes", "k", "recall")})


def _joint_schema(parts: Sequence["pyarrow.Table | _MetadataFile | int"]) -> "pyarrow.Schema | None":
    """The columns of metadata that is put together from parts; those that are a number have that many rows without any."""
    schemas = [part.schema for part in parts if not isinstance(part, int)]
    if not schemas:
        return None
    import pyarrow

    try:
        return pyarrow.unify_schemas(schemas, promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise ValueError(f"the columns of the metadata do not go together: {error}.") from error


def _joint_table(parts: Sequence["pyarrow.Table | int"]) -> "pyarrow.Table | None":
    """The parts below each other; those that are a number are that many empty rows."""
    if all(isinstance(part, int) for part in parts):
        return None
    import pyarrow

    if len(parts) > 1:
        schema = _joint_schema(parts)
        parts = [_null_table(schema, part) if isinstance(part, int) else part for part in parts]
    return pyarrow.concat_tables(parts, promote_options="permissive")


def _plain_columns(schema: "pyarrow.Schema") -> list[str]:
    """The names of the columns of numbers and texts; images and embeddings may be in the others."""
    from pyarrow import types

    return [field.name for field in schema if not (types.is_nested(field.type) or "binary" in str(field.type))]


def _null_table(schema: "pyarrow.Schema", count: int) -> "pyarrow.Table":
    import pyarrow

    return pyarrow.table([pyarrow.nulls(count, field.type) for field in schema], schema=schema)


def _take_rows(table: "pyarrow.Table", rows: torch.Tensor) -> "pyarrow.Table":
    """Rows of a table. The dictionaries of its columns are made anew: the old ones would keep the values of all rows."""
    import pyarrow

    table = table.take(pyarrow.array(rows.numpy()))
    for k, field in enumerate(table.schema):
        if pyarrow.types.is_dictionary(field.type):
            values = table.column(k).cast(field.type.value_type)
            table = table.set_column(k, field, values.dictionary_encode().cast(field.type))
    return table
