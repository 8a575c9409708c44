# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import difflib
import hashlib
import json
import operator
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import convert_file_size_to_int
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


if TYPE_CHECKING:
    import pyarrow


CONFIG_NAME = "config.json"
METADATA_NAME = "metadata.parquet"
FORMAT_VERSION = 1

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Everything that a save writes, `config.json` and `metadata.parquet` apart. The eight digits are the start of the file's
# SHA-256, so that a file never takes the name of another with other content.
_OWN_FILE = re.compile(
    r"memory_bank-((\d+-of-\d+|labels)-[0-9a-f]{8}\.safetensors|metadata-[0-9a-f]{8}\.parquet|(file|config)\.tmp)"
)
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")


class _File(NamedTuple):
    """One file of a saved bank, as `config.json` lists it."""

    file: str
    rows: int
    bytes: int
    sha256: str


class GMemMemoryBank:
    r"""
    An immutable bank of N memory snippets of dimension D, one row each, optionally with labels and metadata
    (GMem, https://huggingface.co/papers/2412.08781).

    The bank is not a module: casting, moving or offloading a pipeline never copies it. Its rows stay on the CPU, in RAM
    when it is made from a tensor, memory-mapped when it is opened with [`~GMemMemoryBank.from_pretrained`]; the caller
    moves the few rows that it gathers. `len(bank)` is N.

    Args:
        snippets (`torch.Tensor` of shape `(N, D)`):
            The rows, float32, float16 or bfloat16, finite, N and D at least 1. They are copied to the CPU.
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
    ):
        if not isinstance(snippets, torch.Tensor):
            raise TypeError(f"`snippets` has to be a torch.Tensor of shape (N, D), but is {type(snippets)}.")
        if snippets.ndim != 2 or snippets.numel() == 0:
            raise ValueError(
                f"`snippets` has to be of shape (N, D) with N and D at least 1, but is of shape {tuple(snippets.shape)}."
            )
        if snippets.dtype not in _DTYPES.values():
            raise ValueError(f"`snippets` has to be one of {', '.join(_DTYPES)}, but is {snippets.dtype}.")
        snippets = snippets.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        bad_row = _first_nonfinite_row(snippets)
        if bad_row is not None:
            raise ValueError(f"`snippets` has to be finite, but row {bad_row} holds NaN or infinity.")
        count = snippets.shape[0]

        if labels is not None:
            labels = torch.as_tensor(labels)
            if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
                raise TypeError(f"`labels` have to be integers, but are {labels.dtype}.")
            if labels.shape != (count,):
                raise ValueError(f"`labels` has to be of shape ({count},), but is of shape {tuple(labels.shape)}.")
            labels = labels.detach().to("cpu", torch.int64, copy=True).contiguous()

        if metadata is not None:
            import pyarrow

            if not isinstance(metadata, pyarrow.Table):
                metadata = pyarrow.table(dict(metadata))
            if metadata.num_rows != count:
                raise ValueError(f"`metadata` has to have {count} rows, but has {metadata.num_rows}.")

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
            _blocks=(snippets,),
            _labels=labels,
            metadata=metadata,
            _id2label=id2label,
            encoder=encoder,
            encoder_revision=encoder_revision,
            _preprocessing=preprocessing,
            source_dataset=source_dataset,
            normalized=bool(normalized),
            _folder=None,
            _files={},
        )

    def _set(self, **attributes) -> None:
        self.__dict__.update(attributes)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a GMemMemoryBank is immutable: `{name}` cannot be set.")

    # What the bank holds

    def __len__(self) -> int:
        return sum(block.shape[0] for block in self._blocks)

    @property
    def dim(self) -> int:
        """The dimension D of a snippet."""
        return self._blocks[0].shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, D)`."""
        return len(self), self.dim

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype, which is also that of every row that the bank returns."""
        return self._blocks[0].dtype

    @property
    def labels(self) -> torch.Tensor | None:
        """A copy of the labels, int64 of shape `(N,)`, or `None`."""
        return None if self._labels is None else self._labels.clone()

    @property
    def id2label(self) -> dict[int, str] | None:
        """A copy of the names of the labels, or `None`."""
        return None if self._id2label is None else dict(self._id2label)

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
        entry = self._files["metadata"]
        if entry is None:
            return None
        import pyarrow.parquet

        path = _metadata_path(self._folder, entry)
        _check_size(path, entry)
        _check_sha256(path, entry)
        table = pyarrow.parquet.read_table(path)
        if table.num_rows != len(self):
            raise ValueError(f"{path} has {table.num_rows} rows, but the bank has {len(self)}.")
        return table

    @cached_property
    def fingerprint(self) -> str:
        """`"sha256:"` and 64 hexadecimal digits over the dtype, the shape, the rows and the labels, in order.

        It does not depend on metadata, on the split into files or on the record of the encoder. Computed when first
        asked for; an opened bank takes it from its `config.json` (`verify` computes it anew).
        """
        return self._compute_fingerprint()

    def _compute_fingerprint(self) -> str:
        digest = hashlib.sha256(f"{_dtype_name(self.dtype)} {len(self)} {self.dim}\n".encode())
        for block in self._blocks:
            digest.update(block.view(torch.uint8).reshape(-1).numpy())
        if self._labels is not None:
            digest.update(self._labels.numpy())
        return f"sha256:{digest.hexdigest()}"

    def __repr__(self) -> str:
        parts = [f"{len(self)} snippets of dimension {self.dim}", _dtype_name(self.dtype)]
        if self._labels is not None:
            parts.append("with labels")
        if self.encoder is not None:
            parts.append(f"encoder {self.encoder!r}")
        if self._folder is not None:
            parts.append(f"memory-mapped from {str(self._folder)!r}")
        return f"{type(self).__name__}({', '.join(parts)})"

    # Rows

    def __getitem__(self, index: int | slice | Sequence[int] | torch.Tensor) -> torch.Tensor:
        """
        Gathers rows on the CPU, always as a copy in the stored dtype.

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
        if isinstance(index, slice):
            rows = range(*index.indices(len(self)))
            return self._gather(torch.arange(len(rows)) * rows.step + rows.start)
        # A tensor of one element also passes for an integer, but asks for a list of one row
        if getattr(index, "ndim", 0) == 0 and hasattr(index, "__index__"):
            return self._gather(self._row_numbers([operator.index(index)]))[0]
        return self._gather(self._row_numbers(index))

    def _row_numbers(self, index: Sequence[int] | torch.Tensor) -> torch.Tensor:
        count = len(self)
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

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        snippets = torch.empty(len(rows), self.dim, dtype=self.dtype)
        start = 0
        for block in self._blocks:
            here = (rows >= start) & (rows < start + block.shape[0])
            snippets[here] = block[rows[here] - start]
            start += block.shape[0]
        return snippets

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
        return self._gather(indices), indices

    # Files

    def save_pretrained(self, save_directory: str | os.PathLike, max_shard_size: int | str = "1GB") -> None:
        """
        Writes the bank into a folder: `config.json`, the rows in safetensors shards, and, where the bank has them, the
        labels in a safetensors file and `metadata.parquet`.

        A folder holds one bank. Saving over another one leaves, whatever the moment of a kill or a full disk, the old
        bank whole or the new one whole: the new files lie beside the old ones until renaming `config.json`, which
        lists them, puts the new bank in place. Only then are the old files deleted. One writer at a time.

        Args:
            save_directory (`str` or `os.PathLike`): The folder; made where it does not exist.
            max_shard_size (`int` or `str`, defaults to `"1GB"`):
                The most bytes of rows in one shard, as a number or like `"500MB"`. A shard holds at least one row.

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
        previous = _tidy(folder)
        try:
            self._write_files(folder, max_bytes)
            if previous["metadata"] is not None and (folder / METADATA_NAME).is_file():
                os.replace(folder / METADATA_NAME, folder / _metadata_alias(previous["metadata"]))
            _flush_folder(folder)
            # The commit: until this rename the folder holds the old bank, afterwards the new one.
            os.replace(folder / "memory_bank-config.tmp", folder / CONFIG_NAME)
        except (OSError, SafetensorError) as error:
            raise OSError(f"the memory bank cannot be saved in {folder}: {error}") from error
        finally:
            _tidy(folder)

    def _write_files(self, folder: Path, max_bytes: int) -> None:
        """Writes everything beside what the folder holds, with `config.json` still under a temporary name."""
        temporary = folder / "memory_bank-file.tmp"

        def finish(part: str, rows: int) -> dict[str, Any]:
            _flush(temporary)
            entry = _File("", rows, temporary.stat().st_size, _sha256(temporary))
            if part == "metadata":
                entry = entry._replace(file=METADATA_NAME)
                os.replace(temporary, folder / _metadata_alias(entry))
            else:
                entry = entry._replace(file=f"memory_bank-{part}-{entry.sha256[:8]}.safetensors")
                os.replace(temporary, folder / entry.file)
            return entry._asdict()

        count = len(self)
        rows_per_shard = max(1, max_bytes // (self.dim * self.dtype.itemsize))
        num_shards = -(-count // rows_per_shard)
        files = {"snippets": [], "labels": None, "metadata": None}
        for k in logging.tqdm(range(num_shards), desc=f"Saving {folder}", disable=num_shards == 1):
            start, stop = count * k // num_shards, count * (k + 1) // num_shards
            # One entry only: safetensors writes several in random order, and equal banks would get unequal files.
            header = {"shard": f"{k + 1} of {num_shards}"}
            save_file({"snippets": self._contiguous_rows(start, stop)}, temporary, metadata=header)
            files["snippets"].append(finish(f"{k + 1:05d}-of-{num_shards:05d}", stop - start))
        if self._labels is not None:
            save_file({"labels": self._labels}, temporary)
            files["labels"] = finish("labels", count)
        if self.metadata is not None:
            import pyarrow.parquet

            pyarrow.parquet.write_table(self.metadata, temporary)
            files["metadata"] = finish("metadata", count)

        config = {
            "_class_name": GMemMemoryBank.__name__,
            "format_version": FORMAT_VERSION,
            "count": count,
            "dim": self.dim,
            "dtype": _dtype_name(self.dtype),
            "fingerprint": self.fingerprint,
            "encoder": self.encoder,
            "encoder_revision": self.encoder_revision,
            "preprocessing": self._preprocessing,
            "normalized": self.normalized,
            "source_dataset": self.source_dataset,
            "id2label": self._id2label,
            "files": files,
        }
        config_path = folder / "memory_bank-config.tmp"
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _flush(config_path)

    def _contiguous_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop - 1`, without a copy where they lie in one block."""
        pieces, offset = [], 0
        for block in self._blocks:
            piece = block[max(start - offset, 0) : max(stop - offset, 0)]
            if len(piece):
                pieces.append(piece)
            offset += block.shape[0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None
    ) -> "GMemMemoryBank":
        """
        Opens a bank that [`~GMemMemoryBank.save_pretrained`] wrote. The rows are memory-mapped: opening is instant and
        takes no RAM until rows are gathered.

        Checked are the presence and size of every file, and the tensor name, dtype, shape and order of the shards;
        [`~GMemMemoryBank.verify`] checks the contents.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A local folder.
            subfolder (`str`, *optional*): The folder in it that holds the bank, such as `"bank"`.

        Raises:
            `FileNotFoundError`: there is no bank, or one of its files is missing.
            `ValueError`: a file is broken; the message names the file and the fault.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        config, files = _read_config(folder)

        dtype, dim = _DTYPES[config["dtype"]], config["dim"]
        blocks = []
        for k, entry in enumerate(files["snippets"]):
            shard = f"{k + 1} of {len(files['snippets'])}"
            blocks.append(_open_tensor(folder / entry.file, entry, "snippets", dtype, (entry.rows, dim), shard))
        labels = None
        if files["labels"] is not None:
            entry = files["labels"]
            labels = _open_tensor(folder / entry.file, entry, "labels", torch.int64, (entry.rows,))
        if files["metadata"] is not None:
            _check_size(_metadata_path(folder, files["metadata"]), files["metadata"])

        bank = cls.__new__(cls)
        bank._set(
            _blocks=tuple(blocks),
            _labels=labels,
            _id2label=config["id2label"],
            encoder=config["encoder"],
            encoder_revision=config["encoder_revision"],
            _preprocessing=config["preprocessing"],
            source_dataset=config["source_dataset"],
            normalized=config["normalized"],
            fingerprint=config["fingerprint"],
            _folder=folder,
            _files=files,
        )
        return bank

    def verify(self) -> None:
        """
        Reads every file of an opened bank and checks its SHA-256 and size, that all rows are finite, the number of rows
        of the metadata, and that the fingerprint is the one in `config.json`.

        A bank that was made from tensors was checked then and cannot have changed: nothing is left to verify.

        Raises:
            `FileNotFoundError`: a file is gone.
            `ValueError`: a file is broken; the message names the file and the fault.
        """
        if self._folder is None:
            return
        start = 0
        shards = zip(self._files["snippets"], self._blocks, strict=True)
        for entry, block in logging.tqdm(shards, total=len(self._blocks), desc=f"Verifying {self._folder}"):
            path = self._folder / entry.file
            _check_size(path, entry)  # first: reading a mapping beyond the end of its file kills the process
            bad_row = _first_nonfinite_row(block)
            if bad_row is not None:
                raise ValueError(f"{path} is not finite: row {start + bad_row} of the bank holds NaN or infinity.")
            _check_sha256(path, entry)
            start += entry.rows
        if self._files["labels"] is not None:
            path = self._folder / self._files["labels"].file
            _check_size(path, self._files["labels"])
            _check_sha256(path, self._files["labels"])
        if self._files["metadata"] is not None:
            import pyarrow.parquet

            path = _metadata_path(self._folder, self._files["metadata"])
            _check_size(path, self._files["metadata"])
            _check_sha256(path, self._files["metadata"])
            num_rows = pyarrow.parquet.read_metadata(path).num_rows
            if num_rows != len(self):
                raise ValueError(f"{path} has {num_rows} rows, but the bank has {len(self)}.")
        fingerprint = self._compute_fingerprint()
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{self._folder / CONFIG_NAME} gives the fingerprint {self.fingerprint}, but that of the rows and labels"
                f" is {fingerprint}."
            )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(values: list, limit: int = 8) -> str:
    """The first few values, for a message."""
    return ", ".join(repr(value) for value in values[:limit]) + (", ..." if len(values) > limit else "")


def _first_nonfinite_row(rows: torch.Tensor) -> int | None:
    step = max(1, 2**24 // rows.shape[1])  # in pieces, as the intermediate results are as large as the rows
    for start in range(0, len(rows), step):
        finite = rows[start : start + step].isfinite()
        if not finite.all():
            return start + int(finite.all(dim=1).logical_not().nonzero()[0])
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_size(path: Path, entry: _File) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, though {CONFIG_NAME} lists it.")
    size = path.stat().st_size
    if size != entry.bytes:
        fault = "is truncated" if size < entry.bytes else "is too long"
        raise ValueError(f"{path} {fault}: it has {size} bytes, but {CONFIG_NAME} says {entry.bytes}.")


def _check_sha256(path: Path, entry: _File) -> None:
    found = _sha256(path)
    if found != entry.sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is {found}, but {CONFIG_NAME} says {entry.sha256}.")


def _open_tensor(
    path: Path, entry: _File, tensor_name: str, dtype: torch.dtype, shape: tuple[int, ...], shard: str | None = None
) -> torch.Tensor:
    """Maps a tensor. What its header says is checked before the size, as the more telling fault."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, though {CONFIG_NAME} lists it.")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if names != [tensor_name]:
                raise ValueError(f"{path} has to hold the tensor {tensor_name!r} alone, but holds {names}.")
            tensor = file.get_tensor(tensor_name)
            found_shard = (file.metadata() or {}).get("shard", shard)
    except SafetensorError as error:
        _check_size(path, entry)
        raise ValueError(f"{path} is not a readable safetensors file: {error}.") from error
    if found_shard != shard:
        raise ValueError(f"{path} is out of order: it is shard {found_shard}, but {CONFIG_NAME} lists it as {shard}.")
    if tensor.dtype != dtype:
        raise ValueError(f"{path} has the wrong dtype: it holds {tensor.dtype}, but {CONFIG_NAME} says {dtype}.")
    if tensor.shape != shape:
        raise ValueError(
            f"{path} has the wrong shape: it holds {tuple(tensor.shape)}, but {CONFIG_NAME} says {shape}."
        )
    _check_size(path, entry)
    return tensor


def _read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of `config.json` and its manifest, both checked."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"there is no memory bank in {folder}: looked for the file {path}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken: it is not JSON ({error}).") from error
    if not isinstance(config, dict) or config.get("_class_name") != GMemMemoryBank.__name__:
        raise ValueError(f"{path} does not describe a {GMemMemoryBank.__name__}.")
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has the format version {config.get('format_version')!r}, but this version of diffusers_gmem reads"
            f" {FORMAT_VERSION}."
        )
    try:
        count, dim, dtype = config["count"], config["dim"], config["dtype"]
        if dtype not in _DTYPES:
            raise ValueError(f"`dtype` is {dtype!r}, but accepted are {', '.join(_DTYPES)}")
        if count < 1 or dim < 1:
            raise ValueError(f"`count` is {count} and `dim` is {dim}, but both have to be at least 1")
        if not _FINGERPRINT.fullmatch(config["fingerprint"]):
            raise ValueError(f"`fingerprint` is {config['fingerprint']!r}, but has to be 'sha256:' and 64 digits")
        for name in ("encoder", "encoder_revision", "preprocessing", "normalized", "source_dataset"):
            config[name]
        if config["id2label"] is not None:
            config["id2label"] = {int(i): name for i, name in config["id2label"].items()}

        snippets = [_File(**entry) for entry in config["files"]["snippets"]]
        labels, metadata = config["files"]["labels"], config["files"]["metadata"]
        labels = None if labels is None else _File(**labels)
        metadata = None if metadata is None else _File(**metadata)
        for entry in [*snippets, *([labels] if labels else [])]:
            if not _OWN_FILE.fullmatch(entry.file):
                raise ValueError(f"{entry.file!r} is not a file name of a memory bank")
        for name, rows in (
            ("the shards together", sum(entry.rows for entry in snippets)),
            ("the labels", labels.rows if labels else count),
            ("the metadata", metadata.rows if metadata else count),
        ):
            if rows != count:
                raise ValueError(f"`count` is {count}, but {name} have {rows} rows")
    except KeyError as error:
        raise ValueError(f"{path} is broken: {error} is missing.") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is broken: {error}.") from error
    return config, {"snippets": snippets, "labels": labels, "metadata": metadata}


# `metadata.parquet` keeps its name, so that data set readers find it, but a rename over it could not be committed together
# with `config.json`. Around the commit the old file and the new one therefore have names of their own, which readers know.


def _metadata_alias(entry: _File) -> str:
    return f"memory_bank-metadata-{entry.sha256[:8]}.parquet"


def _metadata_path(folder: Path, entry: _File) -> Path:
    alias = folder / _metadata_alias(entry)
    return alias if alias.is_file() else folder / METADATA_NAME


def _tidy(folder: Path) -> dict[str, Any]:
    """Completes or undoes what a save left, ended or cut short, as the `config.json` that is there says. Returns the
    manifest."""
    _flush_folder(folder)
    files = {"snippets": [], "labels": None, "metadata": None}
    if (folder / CONFIG_NAME).exists():
        _, files = _read_config(folder)
    if files["metadata"] is not None and (folder / _metadata_alias(files["metadata"])).is_file():
        os.replace(folder / _metadata_alias(files["metadata"]), folder / METADATA_NAME)
    in_use = {entry.file for entry in (*files["snippets"], files["labels"]) if entry is not None}
    for path in list(folder.iterdir()):
        if _OWN_FILE.fullmatch(path.name) and path.name not in in_use:
            path.unlink()
    return files


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """Makes renames in a folder last; Windows neither needs nor allows it."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
