# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""
Computing something from every image with any number of processes, in shards that do not depend on how many.

The images are cut into parts: of an [`ImageSource`], fixed ranges of image numbers in a seeded random order; of an
[`ImageStream`], its files. A part is done by one process and written as one shard (of a large file, several), batch by
batch, and no batch crosses a shard. What has been written is never done again, so a run may be killed and restarted at any
time.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..files import atomic_path, write_json, write_text
from ..models.memory_bank import GMemMemoryBank
from .images import BrokenImageError, ImageSource, ImageStream, thumbnail_column
from .keyed_permutation import KeyedPermutation


CONFIG_NAME = "config.json"
SKIPPED_NAME = "skipped_images.txt"


class Shard(NamedTuple):
    """A finished shard."""

    file: str
    rows: int
    bytes: int
    sha256: str


class _Batch(NamedTuple):
    part: int
    inputs: dict[str, torch.Tensor]
    names: list[str]
    labels: list[int]
    skipped: list[str]
    ends: Literal["shard", "part"] | None


class _PartReader(torch.utils.data.IterableDataset):
    """Reads the images of some parts, batch by batch; after the last batch of a shard or part, one that says so."""

    def __init__(
        self,
        images: ImageSource | ImageStream,
        parts: list[int],
        shard_size: int,
        batch_size: int,
        seed: int | None,
        prepare: Callable[[PIL.Image.Image], dict[str, torch.Tensor]],
        skip_bad_images: bool,
    ):
        self.images = images
        self.parts = parts
        self.shard_size = shard_size
        self.batch_size = batch_size
        self.prepare = prepare
        self.skip_bad_images = skip_bad_images
        self.order = None
        if isinstance(images, ImageSource):
            self.order = range(len(images)) if seed is None else KeyedPermutation(len(images), f"{seed}/images")

    def __iter__(self) -> Iterator[_Batch]:
        batches = self._batches()
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            # The data loader takes from its workers in turn
            batches = islice(batches, worker.id, None, worker.num_workers)
        for part, units, ends in batches:
            yield self._read(part, units, ends)

    def _units(self, part: int) -> Iterator[Any]:
        if self.order is None:
            return self.images.records(part)
        start = part * self.shard_size
        return (self.order[k] for k in range(start, min(start + self.shard_size, len(self.order))))

    def _batches(self) -> Iterator[tuple[int, list, Literal["shard", "part"] | None]]:
        for part in self.parts:
            units, shard_rows = [], 0
            for unit in self._units(part):
                if shard_rows == self.shard_size:
                    yield part, [], "shard"
                    shard_rows = 0
                units.append(unit)
                shard_rows += 1
                if len(units) == self.batch_size or shard_rows == self.shard_size:
                    yield part, units, None
                    units = []
            if units:
                yield part, units, None
            yield part, [], "part"

    def _read(self, part: int, units: list, ends: Literal["shard", "part"] | None) -> _Batch:
        inputs, names, labels, skipped = [], [], [], []
        for unit in units:
            try:
                image, name, label = self.images.read(unit)
            except BrokenImageError as error:
                if not self.skip_bad_images:
                    raise
                skipped.append(str(error))
                continue
            inputs.append(self.prepare(image))
            names.append(name)
            labels.append(label)
        stacked = {key: torch.stack([tensors[key] for tensors in inputs]) for key in (inputs[0] if inputs else ())}
        return _Batch(part, stacked, names, labels, skipped, ends)


def compute_shards(
    accelerator: Accelerator,
    folder: Path,
    stem: str,
    images: ImageSource | ImageStream,
    prepare: Callable[[PIL.Image.Image], dict[str, torch.Tensor]],
    encode: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    shard_size: int,
    batch_size: int,
    seed: int | None = None,
    skip_bad_images: bool = False,
    num_workers: int = 0,
    summarize: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda tensors: {},
) -> list[Shard]:
    """
    Computes what is missing of the shards in a folder, on all processes. Prints how much disk and time that will take,
    and shows its progress.

    Args:
        accelerator (`Accelerator`): the processes.
        folder (`Path`): where the shards are, on a disk that all processes see.
        stem (`str`): first part of their names.
        images ([`ImageSource`] or [`ImageStream`]): the images.
        prepare (`Callable`): from an RGB image to named tensors. Runs in the worker processes.
        encode (`Callable`):
            From a batch of these to named tensors of the same batch size, on the CPU: the rows of the shards.
        shard_size (`int`): images in a shard.
        batch_size (`int`): images in a batch.
        seed (`int`, *optional*): of the order of an [`ImageSource`]. Default: the order of the source.
        skip_bad_images (`bool`, defaults to `False`):
            Leave out images that cannot be read, and note them in the shard, see [`write_skipped_images`].
        num_workers (`int`, defaults to 0): worker processes that read images, per process; of a stream, at most one.
        summarize (`Callable`, *optional*): from the tensors of a whole shard to further ones that are stored with it.

    Returns:
        `list[Shard]`: all shards in order, on every process.

    Raises:
        BrokenImageError: if an image cannot be read and `skip_bad_images` is not set.
        ValueError: if a result is not finite.
    """
    stream = isinstance(images, ImageStream)
    num_parts = images.num_files if stream else -(-len(images) // shard_size)
    if accelerator.is_main_process:
        for path in folder.glob(f"{stem}-*.tmp"):  # of a run that was killed while it wrote
            path.unlink()
    # One process looks: what the others see of a shared disk may be old
    missing = [None]
    if accelerator.is_main_process:
        missing = [[part for part in range(num_parts) if not _is_complete(folder, stem, part, num_parts)]]
    missing = broadcast_object_list(missing)[0]
    parts = missing[accelerator.process_index :: accelerator.num_processes]

    options = {"images": images, "shard_size": shard_size, "batch_size": batch_size, "seed": seed, "prepare": prepare}
    blank = prepare(PIL.Image.new("RGB", (512, 512)))
    blank = {name: torch.stack([tensor] * batch_size) for name, tensor in blank.items()}
    encoded = encode(blank)
    empty = {name: tensor[:0].clone() for name, tensor in encoded.items()}

    num_images = None
    if missing and (not stream or images.num_images is not None):
        total = images.num_images if stream else len(images)
        num_images = total if len(missing) == num_parts else min(total, len(missing) * -(-total // num_parts))
    if missing and accelerator.is_main_process:
        start = time.perf_counter()
        next(iter(_PartReader(parts=missing[:1], skip_bad_images=skip_bad_images, **options)))
        reading = time.perf_counter() - start
        start = time.perf_counter()
        encode(blank)
        encoding = time.perf_counter() - start
        seconds = max(reading / num_workers, encoding) if num_workers > 0 else reading + encoding
        rate = batch_size * accelerator.num_processes / seconds
        print(_estimate(encoded, batch_size, num_images, rate, shutil.disk_usage(folder).free), flush=True)

    reader = _PartReader(parts=parts, skip_bad_images=skip_bad_images, **options)
    loader = torch.utils.data.DataLoader(
        reader, batch_size=None, num_workers=min(num_workers, 1) if stream else num_workers
    )
    # The main process counts for the others: parts are dealt out evenly
    progress_bar = tqdm(
        total=num_images, unit="images", desc="Encoding", smoothing=0.05, disable=not accelerator.is_main_process
    )
    rows, names, labels, skipped, shard = [], [], [], [], 0
    for batch in loader:
        if batch.names:
            rows.append(encode(batch.inputs))
        names += batch.names
        labels += batch.labels
        skipped += batch.skipped
        read = (len(batch.names) + len(batch.skipped)) * accelerator.num_processes
        progress_bar.update(read if num_images is None else min(read, num_images - progress_bar.n))
        if batch.ends is None:
            continue
        tensors = {name: torch.cat([row[name] for row in rows]) if rows else empty[name] for name in empty}
        for name, tensor in tensors.items():
            finite = tensor.flatten(1).isfinite().all(dim=1)
            if not finite.all():
                raise ValueError(f"The {name} of {names[int(finite.int().argmin())]} are not finite.")
        tensors |= summarize(tensors)
        if images.label_column is not None:
            tensors["labels"] = torch.tensor(labels, dtype=torch.int64)
        header = {"names": names, "skipped": skipped, "last": batch.ends == "part"}
        _save(tensors, header, folder / _shard_name(stem, batch.part, num_parts, shard))
        rows, names, labels, skipped = [], [], [], []
        shard = shard + 1 if batch.ends == "shard" else 0
    progress_bar.close()
    accelerator.wait_for_everyone()

    finished = []
    for part in range(accelerator.process_index, num_parts, accelerator.num_processes):
        if not _is_complete(folder, stem, part, num_parts):
            raise RuntimeError(f"Part {part + 1} of {num_parts} is missing in {folder}.")
        finished += [(part, k, _describe(path)) for k, path in enumerate(_part_files(folder, stem, part, num_parts))]
    return [shard for _, _, shard in sorted(gather_object(finished))]


def open_folder(folder: Path, settings: dict[str, Any], name: str = CONFIG_NAME) -> dict[str, Any]:
    """
    Begins, or goes on with, a folder of shards: writes the settings into its `config.json`, or compares them with those
    that are there.

    Args:
        folder (`Path`): made where it does not exist.
        settings (`dict`): what decides the content of the shards.
        name (`str`, defaults to `"config.json"`): of the file.

    Returns:
        `dict`: the content of the file.

    Raises:
        ValueError: if the folder was begun with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings))
    path = folder / name
    if not path.exists():
        write_json(path, settings)
        return settings
    config = json.loads(path.read_text(encoding="utf-8"))
    differences = [
        f"{key}: {config.get(key)!r} there, {value!r} now"
        for key, value in settings.items()
        if config.get(key) != value
    ]
    if differences:
        raise ValueError(
            f"{folder} was begun with other settings: " + "; ".join(differences) + ". Take them, or another folder."
        )
    return config


def write_skipped_images(path: Path, folder: Path, shards: list[Shard]) -> int:
    """Lists the images that were left out of the shards, in order, in a text file; returns how many they are."""
    skipped = [message for shard in shards for message in read_header(folder / shard.file)["skipped"]]
    if skipped:
        write_text(path, "".join(message.replace("\n", " ") + "\n" for message in skipped))
    return len(skipped)


def memory_bank_of_shards(
    folder: Path, shards: list[Shard], images: ImageSource | ImageStream, **provenance
) -> GMemMemoryBank:
    """
    The bank of the `snippets` `(n, D)`, or `(n, v, D)` of which the first view counts, in the shards, in their order. RGB
    `thumbnails` `(n, size, size, 3)`, uint8, become PNG files in the column `thumbnail` of its metadata.

    Args:
        folder (`Path`), shards (`list[Shard]`): what [`compute_shards`] made.
        images ([`ImageSource`] or [`ImageStream`]): of what.
        provenance: `encoder`, `encoder_revision` and `preprocessing` of [`GMemMemoryBank`].

    Raises:
        ValueError: if there is not a single image.
    """
    snippets, labels, names, thumbnails = [], [], [], []
    for shard in shards:
        with safe_open(folder / shard.file, framework="pt") as file:
            rows = file.get_tensor("snippets")
            snippets.append(rows if rows.ndim == 2 else rows[:, 0])
            labels += file.get_tensor("labels").tolist() if images.label_column is not None else []
            names += json.loads(file.metadata()["images"])["names"]
            if "thumbnails" in file.keys():
                thumbnails += map(PIL.Image.fromarray, file.get_tensor("thumbnails").numpy())
    if not names:
        raise ValueError(f"There is not a single image that can be read in {images.name}.")
    return GMemMemoryBank(
        torch.cat(snippets),
        labels=labels or None,
        id2label=images.id2label,
        metadata={"image": names, **({"thumbnail": thumbnail_column(thumbnails)} if thumbnails else {})},
        source_dataset=images.name,
        copy=False,
        **provenance,
    )


def read_shards(folder: Path, shards: list[Shard], name: str) -> tuple[torch.Tensor, list[str]]:
    """A tensor of all shards, one after the other, and the names of the images that its rows are of."""
    rows, names = [], []
    for shard in shards:
        with safe_open(folder / shard.file, framework="pt") as file:
            rows.append(file.get_tensor(name))
        names += read_header(folder / shard.file)["names"]
    return torch.cat(rows), names


def read_header(path: Path) -> dict[str, Any]:
    """What is beside the tensors in a shard: the `names` of its images, and which were `skipped`."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["images"])


def _shard_name(stem: str, part: int, num_parts: int, shard: int) -> str:
    further = f"-{shard + 1:05d}" if shard > 0 else ""
    return f"{stem}-{part + 1:05d}-of-{num_parts:05d}{further}.safetensors"


def _part_files(folder: Path, stem: str, part: int, num_parts: int) -> list[Path]:
    """The shards of a part, as many as there are without a gap."""
    files = []
    while (path := folder / _shard_name(stem, part, num_parts, len(files))).is_file():
        files.append(path)
    return files


def _is_complete(folder: Path, stem: str, part: int, num_parts: int) -> bool:
    files = _part_files(folder, stem, part, num_parts)
    return len(files) > 0 and read_header(files[-1])["last"]


def _save(tensors: dict[str, torch.Tensor], header: dict[str, Any], path: Path) -> None:
    # One entry only: safetensors writes several in random order
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"images": json.dumps(header)})


def _describe(path: Path) -> Shard:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(path.name, len(read_header(path)["names"]), path.stat().st_size, sha256)


def _estimate(
    encoded: dict[str, torch.Tensor], batch_size: int, num_images: int | None, images_per_second: float, free: int
) -> str:
    bytes_of = {name: tensor.numel() * tensor.itemsize / batch_size for name, tensor in encoded.items()}
    per_image = sum(bytes_of.values())
    kinds = ", ".join(f"{name} {number / 1e3:.1f}" for name, number in bytes_of.items())
    text = f"Each image takes {per_image / 1e3:.1f} kB of disk ({kinds}); {images_per_second:.1f} images/s."
    if num_images is None:
        return f"{text} How many images there are is not known. {free / 1e9:.1f} GB are free."
    minutes = num_images / images_per_second / 60
    text = f"{num_images} images to encode: about {num_images * per_image / 1e9:.2f} GB of disk, and " + (
        f"{minutes / 60:.1f} hours. {text}" if minutes > 90 else f"{minutes:.1f} minutes. {text}"
    )
    if num_images * per_image > free:
        text += f" WARNING: only {free / 1e9:.2f} GB are free."
    return text
