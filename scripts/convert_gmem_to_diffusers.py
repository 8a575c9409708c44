# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""
Converts files of the public reference implementation (LINs-lab/GMem) into a complete pipeline.

    python scripts/convert_gmem_to_diffusers.py --checkpoint 0200000.pt --config gmem_sde_xl.yaml \
        --bank in1k256_bank.pth --bank_encoder dinov2_vitb14 --image_encoder facebook/dinov2-base \
        --vae vavae-imagenet256-f16d32-dinov2.pt --latents_stats latents_stats.pt --output_dir gmem-xl

`GMemPipeline.from_pretrained("gmem-xl")` loads the result; the log ends with the arguments to call it with. The Python
functions behind it are in `diffusers_gmem.conversion`. No code in the files is run, and the output folder appears as a
whole or not at all.
"""

import argparse
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffusers_gmem import GMemMemoryBank, GMemPipeline
from diffusers_gmem.conversion import (
    FIRST_VERSION_CONFIG,
    REFERENCE_ENCODER,
    OriginalLatents,
    convert_memory_bank,
    convert_pipeline,
    load_checkpoint,
    sampling_arguments,
    select_weights,
)
from diffusers_gmem.data import load_bank_encoder
from diffusers_gmem.files import flush


logger = logging.getLogger(__name__)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert a GMem checkpoint, its bank and its tokenizer into one GMemPipeline."
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="The transformer: a training checkpoint (.pt) of LightningDiT or SiT with memory conditioning, or a state dict.",
    )
    parser.add_argument(
        "--config", type=Path, help="YAML configuration. Default: the one that is stored in the checkpoint."
    )
    parser.add_argument(
        "--weights", choices=["ema", "model"], default="ema", help="Which weights of the checkpoint. Default: ema."
    )
    parser.add_argument(
        "--num_attention_heads",
        type=int,
        help="Only needed where neither the weights nor the configuration's model_type tell it.",
    )
    parser.add_argument(
        "--bank",
        type=Path,
        help="Memory bank (.pth), full or low-rank; or a folder of latent shards, whose snippets and labels are taken.",
    )
    parser.add_argument(
        "--bank_encoder",
        choices=["dinov2_vitb14"],
        help="Record this encoder in the bank, with the preprocessing of the reference's own scripts. Only for banks that "
        "they built. Default: nothing is recorded.",
    )
    parser.add_argument(
        "--image_encoder",
        type=str,
        help="Add this encoder, for generating from images: with --bank_encoder dinov2_vitb14 the DINOv2 of transformers, "
        "facebook/dinov2-base or a folder of it, which gets the reference's position table. Default: none.",
    )
    parser.add_argument("--vae", type=Path, help="The tokenizer: an LDM-style KL autoencoder such as VA-VAE.")
    parser.add_argument("--latents_stats", type=Path, help="Mean and standard deviation of its latents.")
    parser.add_argument("--output_dir", type=Path, required=True, help="New or empty folder.")
    return parser.parse_args(input_args)


def load_config(path: Path | None, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    if path is not None:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{path} is not a configuration: it holds {type(config).__name__} instead of a mapping.")
        return config
    if "network" in checkpoint:
        logger.info("A file of the paper's first version: the settings are those of its scripts.")
        return FIRST_VERSION_CONFIG
    if isinstance(checkpoint.get("config"), Mapping):
        logger.info("Using the configuration that is stored in the checkpoint.")
        return checkpoint["config"]
    raise ValueError("The checkpoint has no configuration: pass `--config`.")


def load_bank(path: Path | None, encoder: str | None, checkpoint: Mapping[str, Any]) -> GMemMemoryBank | None:
    if path is None and "memorybank" not in checkpoint:
        return None
    record = {} if encoder is None else REFERENCE_ENCODER
    if encoder is None:
        logger.warning("The bank's encoder is not recorded, as `--bank_encoder` was not given.")
    if path is None:
        if "memoryfreq" in checkpoint:
            logger.warning(
                "The frequencies in `memoryfreq` are left out: the pipeline draws all snippets equally often."
            )
        return convert_memory_bank(checkpoint["memorybank"], **record)
    if path.is_dir():
        return OriginalLatents(path).memory_bank(**record)
    return convert_memory_bank(load_checkpoint(path), **record)


def save_as_a_whole(pipe: GMemPipeline, output_dir: Path) -> None:
    """Writes beside the output folder, waits for the disk, and renames."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=output_dir.parent) as folder:
        pipe.save_pretrained(Path(folder, "pipeline"))
        for path in Path(folder, "pipeline").rglob("*"):
            if path.is_file():
                flush(path)
        os.rename(Path(folder, "pipeline"), output_dir)


def main(args: argparse.Namespace) -> None:
    output_dir = args.output_dir.resolve()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"`--output_dir` must be a new or an empty folder, but {args.output_dir} is not.")

    checkpoint = load_checkpoint(args.checkpoint)
    state_dict = select_weights(checkpoint, args.weights)
    config = load_config(args.config, checkpoint)
    pipe = convert_pipeline(
        state_dict,
        config,
        memory_bank=load_bank(args.bank, args.bank_encoder, checkpoint),
        autoencoder=None if args.vae is None else load_checkpoint(args.vae),
        latents_stats=None if args.latents_stats is None else load_checkpoint(args.latents_stats),
        num_attention_heads=args.num_attention_heads,
    )
    if args.image_encoder is not None:
        if pipe.memory_bank is None:
            raise ValueError("`--image_encoder` is that of the bank: pass `--bank`, too.")
        encoder, processor = load_bank_encoder(pipe.memory_bank, args.image_encoder)
        pipe.register_modules(image_encoder=encoder, image_processor=processor)
    call = ", ".join(f"{name}={value}" for name, value in sampling_arguments(config).items())
    save_as_a_whole(pipe, output_dir)
    logger.info(f"Saved {args.output_dir}. As configured, it is called with {call}.")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    main(parse_args())
