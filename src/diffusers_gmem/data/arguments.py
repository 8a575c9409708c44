# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""The arguments that `cache_latents.py`, `build_memory_bank.py` and `train_gmem.py` in `examples/` share."""

import argparse
from pathlib import Path
from typing import Any

import torch

from .images import ImageSource, ImageStream
from .snippets import load_image_encoder, paper_image_processor


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_image_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds what says which images to read, see [`open_images`]."""
    group = parser.add_argument_group("images")
    group.add_argument("--train_data_dir", type=str, help="Folder of images, with or without a sub-folder per class.")
    group.add_argument("--dataset_name", type=str, help="Data set on the Hub or on disk, for `datasets.load_dataset`.")
    group.add_argument("--dataset_config_name", type=str, help="Configuration of the data set.")
    group.add_argument("--split", type=str, default="train", help="Split of the data set.")
    group.add_argument(
        "--webdataset",
        type=str,
        nargs="+",
        help="WebDataset tar files: paths, URLs or patterns. Name the columns by the extensions of the files in them, as "
        "in --image_column jpg --label_column cls.",
    )
    group.add_argument("--image_column", type=str, default="image", help="Column of the images.")
    group.add_argument(
        "--label_column", type=str, default="label", help="Column of the class labels, if there are any."
    )
    group.add_argument(
        "--streaming",
        action="store_true",
        help="Read a data set or tar files over the network file by file, without a copy on this machine. Each file keeps "
        "its order.",
    )
    group.add_argument("--cache_dir", type=str, help="Where `datasets` and the encoders keep their files.")
    group.add_argument(
        "--skip_bad_images",
        action="store_true",
        help="Leave out images that cannot be read, count them and list them in skipped_images.txt. Default: stop.",
    )
    return group


def add_encoder_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds what says how images become snippets, see [`open_image_encoder`]."""
    group = parser.add_argument_group("encoder")
    group.add_argument(
        "--image_encoder",
        type=str,
        default="facebook/dinov2-base",
        help="Vision model of transformers, by name or folder, whose `pooler_output` is an image's snippet; or the built-in "
        "'efficientnet-lite0', which needs no download.",
    )
    group.add_argument("--image_encoder_revision", type=str, help="Its revision.")
    group.add_argument(
        "--image_preprocessing",
        type=str,
        choices=["paper", "own"],
        help="paper: center crop at --resolution, then bicubic to 7/8 of it (256 -> 224). own: the image processor that "
        "comes with the encoder. Default: paper for DINOv2 at a resolution of at least 256, else own.",
    )
    group.add_argument("--resolution", type=int, default=256, help="Side of the square images, in pixels.")
    return group


def add_thumbnail_argument(group: argparse._ArgumentGroup) -> None:
    """Adds whether the bank holds its images in small."""
    group.add_argument(
        "--thumbnail_size",
        type=int,
        help="Keep each image, cropped and shrunk to so many pixels, as a PNG in the column 'thumbnail' of the bank's metadata, "
        "where `examples/space` shows it. Whoever gets the bank gets these copies. Default: none.",
    )


def add_work_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds how the work is done."""
    group = parser.add_argument_group("work")
    group.add_argument("--output_dir", type=str, required=True, help="Where everything is written.")
    group.add_argument("--batch_size", type=int, default=64, help="Images per device at a time.")
    group.add_argument("--shard_size", type=int, default=2048, help="Images in a file.")
    group.add_argument(
        "--model_dtype", type=str, default="float32", choices=list(DTYPES), help="In which the models compute."
    )
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that read images, per device.")
    group.add_argument(
        "--num_threads",
        type=int,
        default=1,
        help="Threads that compute in each process, on a CPU: another number gives other last digits, so it does not "
        "follow the machine.",
    )
    return group


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("resolution", "batch_size", "shard_size", "num_threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}.")


def open_images(args: argparse.Namespace) -> ImageSource | ImageStream:
    """The images that the arguments name."""
    names = ("train_data_dir", "dataset_name", "dataset_config_name", "split", "image_column", "label_column")
    options = {name: getattr(args, name) for name in (*names, "cache_dir", "webdataset")}
    return ImageStream(**options) if args.streaming else ImageSource(**options)


def open_image_encoder(args: argparse.Namespace) -> tuple[torch.nn.Module, Any]:
    """The image encoder and the image processor that the arguments name."""
    encoder, processor = load_image_encoder(args.image_encoder, args.image_encoder_revision, args.cache_dir)
    preprocessing = args.image_preprocessing
    if preprocessing is None:
        preprocessing = "paper" if "dinov2" in encoder.config.model_type and args.resolution >= 256 else "own"
    if preprocessing == "paper":
        processor = paper_image_processor(args.resolution)
    return encoder.requires_grad_(False), processor


def name_or_absolute_path(name: str) -> str:
    """A name on the Hub as it is; of a folder, its absolute path, which holds wherever the next script is started."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def describe_images(images: ImageSource | ImageStream) -> dict[str, Any]:
    """What a folder of shards records of its images."""
    return {
        "source_dataset": images.name,
        "split": str(images.dataset.split),
        "num_images": None if isinstance(images, ImageStream) else len(images),
        "num_files": images.num_files if isinstance(images, ImageStream) else None,
        "id2label": images.id2label and {str(label): name for label, name in images.id2label.items()},
    }
