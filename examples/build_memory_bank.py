# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

r"""
Builds a memory bank from images, or from embeddings that are there already.

    accelerate launch examples/build_memory_bank.py --train_data_dir my_images \
        --image_encoder facebook/dinov2-base --output_dir my_bank
    python examples/build_memory_bank.py --embeddings clip.npy --embedding_labels labels.npy --output_dir my_bank
    python examples/build_memory_bank.py --embeddings clip.parquet --embedding_column embedding --output_dir my_bank
    python examples/build_memory_bank.py --dataset_name org/embeddings --embedding_column embedding --output_dir my_bank

With `--text_keys openai/clip-vit-base-patch32` (or another CLIP or SigLIP model) each row also gets the embedding of its image
by that model, with which `bank.search_text` and `pipe(prompt=...)` find it by words. Where there is a bank in `output_dir`
already, the keys alone are computed and added to it, by the names of its images.

Row k is image k of the source (less the skipped ones). Run it with any number of processes, on any number of machines that
share `output_dir`; kill it, and start it again with more or fewer: the bank is the same, byte for byte (on the same kind of
device). `GMemMemoryBank.from_pretrained` opens it.
"""

import argparse
import datetime
import logging
import shutil
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.logging import get_logger
from tqdm.auto import tqdm

from diffusers_gmem import GMemMemoryBank
from diffusers_gmem.data import center_crop, encode_pixel_values, encode_text_keys, load_text_key_encoder
from diffusers_gmem.data.arguments import (
    DTYPES,
    add_encoder_arguments,
    add_image_arguments,
    add_thumbnail_argument,
    add_work_arguments,
    check_arguments,
    describe_images,
    name_or_absolute_path,
    open_image_encoder,
    open_images,
)
from diffusers_gmem.data.shards import (
    SKIPPED_NAME,
    compute_shards,
    memory_bank_of_shards,
    open_folder,
    read_shards,
    write_skipped_images,
)


logger = get_logger(__name__)

PARTS_FOLDER = "parts"


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Build a memory bank from images or embeddings.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_image_arguments(parser)
    embeddings = parser.add_argument_group("embeddings, instead of images")
    embeddings.add_argument("--embeddings", type=str, help="Array (N, D) in a .npy file, or a .parquet file.")
    embeddings.add_argument(
        "--embedding_column", type=str, help="Column of the vectors, in the .parquet file or the data set."
    )
    embeddings.add_argument("--embedding_labels", type=str, help="For .npy: integers (N,) in another .npy file.")
    encoder = add_encoder_arguments(parser)
    add_thumbnail_argument(encoder)
    words = parser.add_argument_group("text keys")
    words.add_argument(
        "--text_keys",
        type=str,
        help="Model of images and texts of transformers, such as CLIP or SigLIP, by name or folder, whose embeddings of the "
        "images are kept as text keys. Default: none.",
    )
    words.add_argument("--text_keys_revision", type=str, help="Its revision.")
    work = add_work_arguments(parser)
    work.add_argument(
        "--bank_dtype",
        type=str,
        default="float32",
        choices=list(DTYPES),
        help="In which the snippets and the text keys are kept.",
    )
    # So that embeddings are not said to be of an encoder that nobody named
    parser.set_defaults(image_encoder=None)
    args = parser.parse_args(input_args)
    check_arguments(parser, args)
    if args.embeddings is not None and (args.train_data_dir or args.dataset_name or args.webdataset):
        parser.error("give either --embeddings or a source of images.")
    if args.embeddings is not None and (args.embedding_column is None) != (Path(args.embeddings).suffix == ".npy"):
        parser.error(f"--embedding_column goes with a .parquet file, got --embeddings {args.embeddings}.")
    if args.embedding_column is not None and args.embeddings is None and args.dataset_name is None:
        parser.error("--embedding_column goes with --embeddings of a .parquet file, or with --dataset_name.")
    for name in ("streaming", "skip_bad_images"):
        if getattr(args, name) and (args.embeddings is not None or args.embedding_column is not None):
            parser.error(f"--{name} is for images, not embeddings.")
    if args.embedding_labels is not None and not str(args.embeddings).endswith(".npy"):
        parser.error("--embedding_labels goes with --embeddings of a .npy file.")
    if args.text_keys is not None and (args.embeddings is not None or args.embedding_column is not None):
        parser.error("--text_keys needs images, not embeddings.")
    if args.thumbnail_size is not None and (args.embeddings is not None or args.embedding_column is not None):
        parser.error("--thumbnail_size needs images, not embeddings.")
    if args.thumbnail_size is not None and args.thumbnail_size < 1:
        parser.error(f"--thumbnail_size must be at least 1, got {args.thumbnail_size}.")
    return args


def load_embeddings(args: argparse.Namespace) -> GMemMemoryBank:
    """The bank of vectors that are there already, row by row."""
    provenance = {"encoder": args.image_encoder, "encoder_revision": args.image_encoder_revision}
    dtype = DTYPES[args.bank_dtype]
    if args.embedding_column is None:
        array = np.load(args.embeddings, mmap_mode="c")
        if array.ndim != 2 or array.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(
                f"{args.embeddings} must hold numbers of shape (N, D), got {array.dtype} of shape {array.shape}."
            )
        labels = None if args.embedding_labels is None else torch.from_numpy(np.load(args.embedding_labels))
        return GMemMemoryBank(
            torch.from_numpy(array).to(dtype),
            labels,
            source_dataset=Path(args.embeddings).name,
            copy=False,
            **provenance,
        )

    if args.embeddings is not None:
        dataset = datasets.load_dataset("parquet", data_files=args.embeddings, split="train", cache_dir=args.cache_dir)
    else:
        dataset = datasets.load_dataset(
            args.dataset_name, args.dataset_config_name, split=args.split, cache_dir=args.cache_dir
        )
    if args.embedding_column not in dataset.column_names:
        raise ValueError(f"There is no column {args.embedding_column!r}: there are {dataset.column_names}.")
    column = dataset.select_columns(args.embedding_column).with_format("numpy")
    width = len(column[0][args.embedding_column])
    snippets = torch.empty(len(column), width, dtype=dtype)
    for start in tqdm(range(0, len(column), 4096), desc="Embeddings"):
        rows = column[start : start + 4096][args.embedding_column]
        if rows.dtype == object or rows.shape[1:] != (width,):
            raise ValueError(
                f"The vectors of {args.embedding_column!r} must all have the length {width} of the first."
            )
        snippets[start : start + len(rows)] = torch.from_numpy(rows)
    labels, id2label = None, None
    if args.label_column in dataset.column_names:
        labels = list(dataset[args.label_column])
        names = getattr(dataset.features[args.label_column], "names", None)
        id2label = None if names is None else dict(enumerate(names))
    source = args.dataset_name or Path(args.embeddings).name
    return GMemMemoryBank(snippets, labels, id2label=id2label, source_dataset=source, copy=False, **provenance)


def rows_of_images(wanted: list[str], names: list[str], source: str) -> list[int]:
    """For each wanted image its place among the images of a source."""
    places = {name: place for place, name in enumerate(names)}
    if len(places) < len(names):
        raise ValueError(
            f"The names of the images in {source} are not unique: they do not say which row is which image."
        )
    missing = [name for name in wanted if name not in places]
    if missing:
        raise ValueError(
            f"{len(missing)} images of the bank are not in {source}, or cannot be read, the first being {missing[0]!r}."
        )
    return [places[name] for name in wanted]


def check_present_bank(bank: GMemMemoryBank, args: argparse.Namespace) -> None:
    """Only text keys are added to a bank: what is said about its snippets has to be true of them."""
    if args.thumbnail_size is not None:
        raise ValueError(f"--thumbnail_size goes with a new bank, but there is a {bank}: take another --output_dir.")
    encoder = None if args.image_encoder is None else name_or_absolute_path(args.image_encoder)
    for name, given in {"encoder": encoder, "encoder_revision": args.image_encoder_revision}.items():
        if None not in (given, bank.encoder) and given != getattr(bank, name):
            raise ValueError(
                f"--image_{name} is {given!r}, but the snippets of the {bank} that is there were made with "
                f"{getattr(bank, name)!r}: leave it out to add text keys, or take another --output_dir."
            )


def main(args: argparse.Namespace) -> None:
    # A process that is done waits for the others, however long they take
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    torch.set_num_threads(args.num_threads)
    torch.backends.cudnn.deterministic = True
    folder = Path(args.output_dir)
    present = None
    if (folder / "config.json").exists():
        present = GMemMemoryBank.from_pretrained(folder)
        if args.text_keys is None or present.text_model is not None:
            raise ValueError(f"There is a {present} already: take another --output_dir.")
        if present.metadata is None or "image" not in present.metadata.column_names:
            raise ValueError(f"{present} has no column 'image' in its metadata that says which image each row is of.")
        check_present_bank(present, args)
    accelerator.wait_for_everyone()

    if args.embeddings is not None or args.embedding_column is not None:
        if accelerator.is_main_process:
            bank = load_embeddings(args)
            bank.save_pretrained(folder)
            logger.info(f"{folder}: {bank}.")
        accelerator.end_training()
        return

    # 1. Images and encoders
    settings = {
        "skip_bad_images": args.skip_bad_images,
        "bank_dtype": args.bank_dtype,
        "model_dtype": args.model_dtype,
        "batch_size": args.batch_size,
        "shard_size": args.shard_size,
        "num_threads": args.num_threads,
    }
    provenance, text_model = {}, {}
    with accelerator.main_process_first():
        images = open_images(args)
        if present is None:
            args.image_encoder = args.image_encoder or "facebook/dinov2-base"
            encoder, processor = open_image_encoder(args)
            encoder.to(accelerator.device, DTYPES[args.model_dtype])
            provenance = {
                "encoder": name_or_absolute_path(args.image_encoder),
                "encoder_revision": args.image_encoder_revision,
                "preprocessing": processor.to_dict(),
            }
        if args.text_keys is not None:
            key_encoder, key_processor = load_text_key_encoder(args.text_keys, args.text_keys_revision, args.cache_dir)
            key_encoder.to(accelerator.device, DTYPES[args.model_dtype])
            text_model = {
                "model": name_or_absolute_path(args.text_keys),
                "revision": args.text_keys_revision,
                "model_type": key_encoder.config.model_type,
            }
    settings |= describe_images(images) | provenance
    settings |= {"text_keys": text_model or None, "thumbnail_size": args.thumbnail_size}
    parts = folder / PARTS_FOLDER
    with accelerator.main_process_first():
        open_folder(parts, settings)

    # 2. The snippets and the text keys
    def prepare(image: PIL.Image.Image) -> dict[str, torch.Tensor]:
        inputs = {}
        if present is None:
            inputs["snippets"] = processor(images=image, return_tensors="pt").pixel_values[0]
        if args.text_keys is not None:
            inputs["text_keys"] = key_processor(images=image, return_tensors="pt").pixel_values[0]
        if args.thumbnail_size is not None:
            inputs["thumbnails"] = torch.from_numpy(np.array(center_crop(image, args.thumbnail_size)))
        return inputs

    def encode(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        thumbnails = {name: inputs[name] for name in inputs.keys() & {"thumbnails"}}
        inputs = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in inputs.items()}
        rows = {}
        if present is None:
            rows["snippets"], _ = encode_pixel_values(encoder, inputs["snippets"])
        if args.text_keys is not None:
            rows["text_keys"] = encode_text_keys(key_encoder, inputs["text_keys"])
        return {name: tensor.to(DTYPES[args.bank_dtype]).cpu() for name, tensor in rows.items()} | thumbnails

    shards = compute_shards(
        accelerator,
        parts,
        "snippets" if present is None else "text_keys",
        images,
        prepare,
        encode,
        args.shard_size,
        args.batch_size,
        skip_bad_images=args.skip_bad_images,
        num_workers=args.dataloader_num_workers,
    )

    # 3. The bank
    if accelerator.is_main_process:
        bank = memory_bank_of_shards(parts, shards, images, **provenance) if present is None else present
        if args.text_keys is not None:
            text_keys, names = read_shards(parts, shards, "text_keys")
            if present is not None:
                text_keys = text_keys[rows_of_images(bank.metadata["image"].to_pylist(), names, images.name)]
            bank = bank.with_text_keys(text_keys, **text_model)
        num_skipped = write_skipped_images(folder / SKIPPED_NAME, parts, shards)
        bank.save_pretrained(folder)
        shutil.rmtree(parts)
        logger.info(f"{folder}: {bank}.")
        if num_skipped > 0:
            logger.warning(f"{num_skipped} images could not be read and were left out: {folder / SKIPPED_NAME}")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
