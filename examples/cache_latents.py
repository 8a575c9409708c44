# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

r"""
Encodes images once, for training on them many times: latents, snippets and, if asked for, alignment features, each of
the images as they are and of their mirror images; and the memory bank.

    accelerate launch examples/cache_latents.py --train_data_dir my_images --resolution 256 \
        --image_encoder facebook/dinov2-base --vae stabilityai/sd-vae-ft-ema --output_dir my_latents

Run it with any number of processes, on any number of machines that share `output_dir`; kill it, and start it again with
more or fewer: the files are the same, byte for byte (on the same kind of device). `diffusers_gmem.data.LatentCache` opens
the folder and describes what is in it.
"""

import argparse
import datetime
import hashlib
import logging
from pathlib import Path

import PIL.Image
import PIL.ImageOps
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.logging import get_logger
from safetensors import safe_open

from diffusers_gmem.data import center_crop, encode_images, encode_pixel_values, image_to_tensor, load_autoencoder
from diffusers_gmem.data.arguments import (
    DTYPES,
    add_encoder_arguments,
    add_image_arguments,
    add_work_arguments,
    check_arguments,
    describe_images,
    name_or_absolute_path,
    open_image_encoder,
    open_images,
)
from diffusers_gmem.data.latent_cache import BANK_SUBFOLDER, FORMAT_VERSION
from diffusers_gmem.data.shards import (
    SKIPPED_NAME,
    Shard,
    compute_shards,
    memory_bank_of_shards,
    open_folder,
    write_skipped_images,
)
from diffusers_gmem.files import write_json


logger = get_logger(__name__)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Encode images into latents, snippets and alignment features.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_image_arguments(parser)
    encoder = add_encoder_arguments(parser)
    encoder.add_argument(
        "--vae", type=str, required=True, help="Autoencoder of diffusers for images, by name or folder, of any class."
    )
    encoder.add_argument("--vae_subfolder", type=str, help="Its folder in a pipeline's, such as 'vae'.")
    encoder.add_argument("--vae_revision", type=str, help="Its revision.")
    encoder.add_argument(
        "--alignment", action="store_true", help="Also keep the encoder's patch features, in bfloat16: much disk."
    )
    work = add_work_arguments(parser)
    work.add_argument("--seed", type=int, default=0, help="Seed of the order of the images.")
    work.add_argument(
        "--latents_dtype",
        type=str,
        default="float16",
        choices=list(DTYPES),
        help="In which the latents are kept. Half precision rounds them by 1/2000, far less than the autoencoder's own "
        "posterior spreads.",
    )
    args = parser.parse_args(input_args)
    check_arguments(parser, args)
    return args


def latent_moments(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums of the sampled latents and of their squares, as they are to be expected: `(views, 2, channels)`, float64."""
    mean = tensors["latents_mean"]
    moments = torch.zeros(mean.shape[1], 2, mean.shape[2], dtype=torch.float64)
    for k in range(len(mean)):
        latents = mean[k].double()
        squares = latents.square()
        if "latents_logvar" in tensors:
            squares += tensors["latents_logvar"][k].double().exp()
        moments += torch.stack([latents.sum(dim=(2, 3)), squares.sum(dim=(2, 3))], dim=1)
    return {"latent_moments": moments}


def latent_statistics(folder: Path, shards: list[Shard]) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation per channel of the latents of the plain images and of the flipped ones."""
    moments, count = 0.0, 0
    for shard in shards:
        with safe_open(folder / shard.file, framework="pt") as file:
            moments = moments + file.get_tensor("latent_moments")
            rows, _, _, height, width = file.get_slice("latents_mean").get_shape()
        count += rows * height * width
    mean = moments[:, 0] / count
    std = ((moments[:, 1] - count * mean.square()) / (count - 1)).sqrt()
    return {
        view: {"latents_mean": mean[k].tolist(), "latents_std": std[k].tolist()}
        for k, view in enumerate(("plain", "flipped"))
    }


def main(args: argparse.Namespace) -> None:
    # A process that is done waits for the others, however long they take
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    torch.set_num_threads(args.num_threads)
    torch.backends.cudnn.deterministic = True
    folder = Path(args.output_dir)
    views_dtype = DTYPES[args.latents_dtype]

    # 1. Images, encoder and autoencoder
    with accelerator.main_process_first():
        images = open_images(args)
        encoder, processor = open_image_encoder(args)
        autoencoder = load_autoencoder(
            args.vae, args.vae_subfolder, args.vae_revision, args.cache_dir, DTYPES[args.model_dtype]
        )
    encoder.to(accelerator.device, DTYPES[args.model_dtype])
    autoencoder.to(accelerator.device)

    provenance = {
        "encoder": name_or_absolute_path(args.image_encoder),
        "encoder_revision": args.image_encoder_revision,
        "preprocessing": processor.to_dict(),
    }
    settings = {
        "_class_name": "LatentCache",
        "format_version": FORMAT_VERSION,
        **describe_images(images),
        "skip_bad_images": args.skip_bad_images,
        "resolution": args.resolution,
        "image_encoder": provenance,
        "autoencoder": {
            "name_or_path": name_or_absolute_path(args.vae),
            "subfolder": args.vae_subfolder,
            "revision": args.vae_revision,
        },
        "alignment": args.alignment,
        "latents_dtype": args.latents_dtype,
        "model_dtype": args.model_dtype,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "shard_size": args.shard_size,
        "num_threads": args.num_threads,
    }
    with accelerator.main_process_first():
        config = open_folder(folder, settings)
    if "shards" in config:
        logger.info(f"{folder} is complete: {config['count']} images.")
        return

    # 2. What is computed from each image
    def prepare(image: PIL.Image.Image) -> dict[str, torch.Tensor]:
        views = [image, PIL.ImageOps.mirror(image)]
        return {
            "pixel_values": image_to_tensor(center_crop(image, args.resolution)),
            "encoder_pixel_values": processor(images=views, return_tensors="pt").pixel_values,
        }

    def encode(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pixel_values = inputs["pixel_values"].to(accelerator.device, non_blocking=True)
        encoder_pixel_values = inputs["encoder_pixel_values"].to(accelerator.device, non_blocking=True)
        views = []
        for k, view in enumerate((pixel_values, pixel_values.flip(-1))):
            mean, logvar = encode_images(autoencoder, view)
            snippets, patches = encode_pixel_values(encoder, encoder_pixel_values[:, k], args.alignment)
            row = {"latents_mean": mean.to(views_dtype), "snippets": snippets}
            if logvar is not None:
                row["latents_logvar"] = logvar.to(views_dtype)
            if patches is not None:
                row["alignment_features"] = patches.to(torch.bfloat16)
            views.append(row)
        return {name: torch.stack([row[name] for row in views], dim=1).cpu() for name in views[0]}

    shards = compute_shards(
        accelerator,
        folder,
        "latents",
        images,
        prepare,
        encode,
        args.shard_size,
        args.batch_size,
        args.seed,
        args.skip_bad_images,
        args.dataloader_num_workers,
        summarize=latent_moments,
    )

    # 3. The bank, and what all shards together say
    if accelerator.is_main_process:
        bank = memory_bank_of_shards(folder, shards, images, **provenance)
        bank.save_pretrained(folder / BANK_SUBFOLDER)
        num_skipped = write_skipped_images(folder / SKIPPED_NAME, folder, shards)
        config |= {
            "count": len(bank),
            "num_skipped": num_skipped,
            "statistics": latent_statistics(folder, shards),
            "memory_bank_fingerprint": bank.fingerprint,
            "fingerprint": "sha256:" + hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest(),
            "shards": [list(shard) for shard in shards],
        }
        write_json(folder / "config.json", config)
        logger.info(f"{folder}: {len(bank)} images in {len(shards)} shards, and their {bank}.")
        if num_skipped > 0:
            logger.warning(f"{num_skipped} images could not be read and were left out: {folder / SKIPPED_NAME}")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
