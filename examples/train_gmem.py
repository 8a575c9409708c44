# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

r"""
Trains a GMem on images, or on what `cache_latents.py` made of them, and saves a complete pipeline.

    accelerate launch examples/train_gmem.py --train_data_dir my_images --resolution 256 \
        --image_encoder facebook/dinov2-base --vae stabilityai/sd-vae-ft-ema \
        --model_config examples/configs/lightningdit_b2.json --mixed_precision bf16 --output_dir gmem-mine

On a CPU, in pixel space: see the `quickstart` target of the Makefile. From a million images on, encode them first; the
cache names its autoencoder, image encoder and memory bank:

    accelerate launch examples/cache_latents.py --train_data_dir my_images --resolution 256 --alignment \
        --image_encoder facebook/dinov2-base --vae stabilityai/sd-vae-ft-ema --output_dir my_latents
    accelerate launch examples/train_gmem.py --latents_dir my_latents --alignment cached --random_flip \
        --model_config examples/configs/lightningdit_xl2.json --train_batch_size 128 --mixed_precision bf16 \
        --torch_compile --dataloader_num_workers 4 --output_dir gmem-mine

With `--pretrained_model_name_or_path` a trained pipeline is adapted to the images; with `--use_lora`, by LoRA layers that
`pipe.load_lora_weights(output_dir)` adds to it:

    accelerate launch examples/train_gmem.py --pretrained_model_name_or_path gmem-mine --use_lora --rank 16 \
        --train_data_dir my_style --resolution 256 --max_train_steps 1000 --mixed_precision bf16 --output_dir my-lora

Without a cache, the images' snippets are computed first and make the memory bank (`output_dir/bank`). Every image trains
with its own snippet as the condition, with the loss of the paper (arXiv 2412.08781). The same command with
`--resume_from_checkpoint latest` goes on from the last checkpoint. At the end,
`GMemPipeline.from_pretrained(output_dir)` loads the result (that of `--use_lora` apart).

With `--push_to_hub --hub_model_id me/gmem-mine --hub_bank_id me/my-memory` the bank, every checkpoint and the result go to
the Hub, with cards. The training does not wait for it.
"""

import argparse
import copy
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, broadcast_object_list, set_seed
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import make_image_grid
from tqdm.auto import tqdm

from diffusers_gmem import (
    GMemFlowMatchScheduler,
    GMemImageEncoder,
    GMemMemoryBank,
    GMemPipeline,
    GMemTransformer2DModel,
)
from diffusers_gmem.data import (
    ImageSource,
    LatentCache,
    center_crop,
    compute_patch_features,
    compute_snippets,
    encode_images,
    load_autoencoder,
    resize_patch_features,
    thumbnail_column,
)
from diffusers_gmem.data.arguments import (
    add_image_arguments,
    add_thumbnail_argument,
    name_or_absolute_path,
    open_image_encoder,
)
from diffusers_gmem.data.shards import SKIPPED_NAME
from diffusers_gmem.evaluation import FeatureStatistics, frechet_distance
from diffusers_gmem.files import write_json, write_text
from diffusers_gmem.models.latent_normalization import (
    decode_latents,
    normalization_config,
    normalize_latents,
    spatial_compression_ratio,
)
from diffusers_gmem.training import (
    GMemEMAModel,
    GMemLatentTrainingDataset,
    GMemTrainingDataset,
    SampleDropout,
    TrainingBatchSampler,
    flow_matching_loss,
    model_flops_per_image,
    peak_flops,
)
from diffusers_gmem.training.checkpoints import (
    checkpoint_step,
    latest_checkpoint,
    list_checkpoints,
    remove_old_checkpoints,
    verify_checkpoint,
)
from diffusers_gmem.training.hub_pusher import HubPusher
from diffusers_gmem.training.online_evaluation import sample_statistics, snippet_statistics
from diffusers_gmem.training.run_checkpoints import load_checkpoint, save_checkpoint
from diffusers_gmem.training.sharding import check_sharding, configure_deepspeed
from diffusers_gmem.training.stopping import LONGEST_WAIT, StopRequest, TrainingStopped, ignore_stop_signals
from diffusers_gmem.training.training_state import gather_tensor
from diffusers_gmem.training.weights import gather_weights, save_weights, trained_parameters


logger = get_logger(__name__)

DEFAULT_IMAGE_ENCODER = "facebook/dinov2-base"
# Arguments that may differ between a run and its continuation without a word, or are nobody's business
ARGUMENTS_OF_A_START = ("resume_from_checkpoint", "output_dir", "cache_dir", "hub_token")
DEFAULT_RESOLUTION = 256
DEFAULT_BLOCK_SIZE = 16
# How images become latents and snippets
ENCODING_ARGUMENTS = (
    "image_encoder",
    "image_encoder_revision",
    "image_preprocessing",
    "snippet_dim",
    "vae",
    "vae_revision",
)
WEIGHT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a GMem: a memory-conditioned image generator.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    add_thumbnail_argument(add_image_arguments(parser))
    data = parser.add_argument_group("training data")
    data.add_argument("--latents_dir", type=str, help="Folder that `cache_latents.py` wrote, instead of images.")
    data.add_argument(
        "--latents_block_size",
        type=int,
        help="Cached samples are drawn in blocks of so many neighbours, which are read fastest. Default: "
        f"{DEFAULT_BLOCK_SIZE}, as the cache is in random order and neighbours have nothing in common; of a stream, which "
        "is in the order of its files, 1.",
    )
    data.add_argument(
        "--resolution",
        type=int,
        help=f"Side of the square training images, in pixels. Default: {DEFAULT_RESOLUTION}, or that of the cache.",
    )
    data.add_argument(
        "--random_flip", action="store_true", help="Mirror half of the images, snippet and picture together."
    )
    data.add_argument(
        "--independent_flips",
        action="store_true",
        help="With --random_flip: draw separately for latents, snippet and cached alignment features, as the public "
        "reference does.",
    )
    data.add_argument(
        "--cache_images", action="store_true", help="Keep the cropped images in memory: for data that fits."
    )
    data.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="Processes that read training data, per device."
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path",
        type=str,
        help="A GMemPipeline, by name or folder, to start from. It brings its own image encoder and VAE.",
    )
    model.add_argument("--revision", type=str, help="Its revision.")
    model.add_argument(
        "--image_encoder",
        type=str,
        help="Vision model of transformers, by name or folder, whose `pooler_output` is an image's snippet; or the built-in "
        f"'efficientnet-lite0', which needs no download. Default, without a pretrained model: {DEFAULT_IMAGE_ENCODER}.",
    )
    model.add_argument("--image_encoder_revision", type=str, help="Its revision.")
    model.add_argument(
        "--image_preprocessing",
        type=str,
        choices=["paper", "own"],
        help="paper: center crop at --resolution, then bicubic to 7/8 of it (256 -> 224). own: the image processor that "
        "comes with the encoder. Default: paper for DINOv2 at a resolution of at least 256, else own.",
    )
    model.add_argument(
        "--snippet_dim",
        type=int,
        help="Project the encoder's features on this many principal components of the training images, see "
        "GMemImageEncoder. For small data and short runs. Default: the snippet is the `pooler_output` itself.",
    )
    model.add_argument(
        "--snippet_layers",
        type=int,
        nargs="+",
        default=[],
        help="With --snippet_dim: hidden states of the encoder that take part, averaged over a 2 x 2 grid.",
    )
    model.add_argument(
        "--snippet_whitening",
        type=float,
        default=0.5,
        help="With --snippet_dim: 0 keeps the variances of the components, 1 makes them equal.",
    )
    model.add_argument(
        "--vae",
        type=str,
        help="Autoencoder of diffusers for images, by name or folder. Without one, the model works on pixels.",
    )
    model.add_argument("--vae_revision", type=str, help="Its revision.")
    model.add_argument(
        "--model_config",
        type=str,
        help="JSON file with arguments of GMemTransformer2DModel. Sample size, channels and memory dimension follow from "
        "the data. Without one, it is LightningDiT-XL/1.",
    )
    model.add_argument(
        "--gradient_checkpointing", action="store_true", help="Recompute activations: less memory, more time."
    )

    lora = parser.add_argument_group("LoRA")
    lora.add_argument(
        "--use_lora", action="store_true", help="Train LoRA layers of the pretrained transformer, and nothing else."
    )
    lora.add_argument("--rank", type=int, default=4, help="Rank of the LoRA layers.")
    lora.add_argument("--lora_alpha", type=int, default=4, help="Their scale is alpha / rank.")
    lora.add_argument("--lora_dropout", type=float, default=0.0, help="Dropout of their input.")
    lora.add_argument(
        "--lora_layers",
        type=str,
        default="to_q,to_k,to_v,to_out.0",
        help="Names of the linear layers that get one, or endings of the names, with commas between.",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--output_dir", type=str, default="gmem-model", help="Where everything is written.")
    training.add_argument("--seed", type=int, default=0, help="Seed of the initial weights, the order and all draws.")
    training.add_argument("--train_batch_size", type=int, default=16, help="Images per device and micro-batch.")
    training.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="Micro-batches per optimizer step."
    )
    training.add_argument("--num_train_epochs", type=int, default=100, help="Passes through the data.")
    training.add_argument("--max_train_steps", type=int, help="Optimizer steps; overrides --num_train_epochs.")
    training.add_argument("--learning_rate", type=float, default=2e-4, help="The paper's, for a batch of 1024.")
    training.add_argument(
        "--lr_scheduler",
        type=str,
        default="constant",
        choices=[kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT],
        help="Schedule.",
    )
    training.add_argument("--lr_warmup_steps", type=int, default=0, help="Optimizer steps of linear warm-up.")
    training.add_argument("--adam_beta1", type=float, default=0.9, help="AdamW's beta1.")
    training.add_argument("--adam_beta2", type=float, default=0.95, help="AdamW's beta2.")
    training.add_argument("--adam_weight_decay", type=float, default=0.0, help="AdamW's weight decay.")
    training.add_argument("--adam_epsilon", type=float, default=1e-8, help="AdamW's epsilon.")
    training.add_argument("--max_grad_norm", type=float, default=1.0, help="Norm to which gradients are clipped.")
    training.add_argument(
        "--mixed_precision", type=str, choices=["no", "fp16", "bf16"], help="Default: accelerate's configuration."
    )
    training.add_argument(
        "--torch_compile",
        action="store_true",
        help="Compile the transformer's block, once for all of them: faster from the second step on.",
    )
    training.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on an NVIDIA GPU.")

    objective = parser.add_argument_group("objective")
    objective.add_argument(
        "--memory_drop_prob",
        type=float,
        default=0.0,
        help="Probability with which a snippet becomes the null memory, beside the model's element-wise "
        "`memory_dropout`: without it, the null memory that guidance steers away from is never trained.",
    )
    objective.add_argument("--cosine_weight", type=float, default=1.0, help="Weight of the cosine term.")
    objective.add_argument(
        "--alignment",
        type=str,
        default="none",
        choices=["none", "online", "cached"],
        help="The tokens after block `alignment_layer` predict the encoder's patch features (REPA): computed online, or "
        "those of the cache.",
    )
    objective.add_argument("--alignment_weight", type=float, default=0.5, help="Weight of the alignment term.")
    objective.add_argument("--timestep_mean", type=float, default=0.0, help="Mean of the logit-normal times.")
    objective.add_argument("--timestep_std", type=float, default=1.0, help="Standard deviation of the same.")

    ema = parser.add_argument_group("moving average of the weights")
    ema.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=True, help="Keep one, and save it as the pipeline."
    )
    ema.add_argument("--ema_decay", type=float, default=0.9999, help="Its decay.")
    ema.add_argument(
        "--ema_warmup",
        type=str,
        default="ratio",
        choices=["ratio", "none"],
        help="ratio: the decay after n steps is at most (1 + n) / (10 + n). none: constant, as in the public reference.",
    )

    saving = parser.add_argument_group("checkpoints, validation, logs")
    saving.add_argument("--checkpointing_steps", type=int, default=5000, help="Steps between checkpoints.")
    saving.add_argument("--checkpoints_total_limit", type=int, help="How many checkpoints to keep; the newest stay.")
    saving.add_argument(
        "--resume_from_checkpoint", type=str, help="Folder of a checkpoint, or 'latest' for the newest in output_dir."
    )
    saving.add_argument(
        "--validation_steps", type=int, help="Steps between validation grids. Default: only at the end."
    )
    saving.add_argument("--num_validation_images", type=int, default=8, help="Images in a validation grid.")
    saving.add_argument("--validation_inference_steps", type=int, default=50, help="Sampling steps for it.")
    saving.add_argument(
        "--fd_steps",
        type=int,
        help="Steps between Fréchet distances of generated images and training images in the features of the image "
        "encoder. Default: none is computed.",
    )
    saving.add_argument(
        "--fd_num_images",
        type=int,
        default=5000,
        help="Images for each, which the main process generates with --validation_inference_steps while the others wait.",
    )
    saving.add_argument("--logging_steps", type=int, default=50, help="Steps between lines in the log.")
    saving.add_argument("--logging_dir", type=str, default="logs", help="Folder of tracker files in output_dir.")
    saving.add_argument(
        "--report_to",
        type=str,
        default="none",
        help="Trackers with commas between: tensorboard, wandb, trackio, ...; all or none.",
    )

    hub = parser.add_argument_group("the Hub")
    hub.add_argument(
        "--push_to_hub", action="store_true", help="Push checkpoints, in the background, and the result to the Hub."
    )
    hub.add_argument("--hub_model_id", type=str, help="Model repository. Default: the name of output_dir.")
    hub.add_argument(
        "--hub_bank_id",
        type=str,
        help="Data set repository for the bank of the training images, to which the pipeline then points. Default: the "
        "pipeline's repository holds the bank.",
    )
    hub.add_argument("--hub_token", type=str, help="Default: that of `hf auth login`.")
    hub.add_argument(
        "--hub_private_repo", action="store_true", help="Make the repositories private, where they do not exist."
    )

    args = parser.parse_args(input_args)
    check_data_arguments(parser, args)
    if args.pretrained_model_name_or_path is not None:
        for name in (*ENCODING_ARGUMENTS, "model_config"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} does not go with --pretrained_model_name_or_path, which brings its own.")
        if Path(args.pretrained_model_name_or_path).resolve() == Path(args.output_dir).resolve():
            parser.error("--output_dir must be another folder than the pretrained pipeline's.")
    elif args.use_lora:
        parser.error("--use_lora needs --pretrained_model_name_or_path.")
    else:
        args.image_encoder = args.image_encoder or DEFAULT_IMAGE_ENCODER
    if args.lr_scheduler == "constant" and args.lr_warmup_steps > 0:
        parser.error(
            "--lr_scheduler constant has no warm-up: --lr_warmup_steps needs constant_with_warmup, or another."
        )
    for name in ("hub_model_id", "hub_bank_id", "hub_token", "hub_private_repo"):
        if getattr(args, name) and not args.push_to_hub:
            parser.error(f"--{name} needs --push_to_hub.")
    for name in (
        "resolution",
        "latents_block_size",
        "train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "max_train_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "validation_steps",
        "num_validation_images",
        "validation_inference_steps",
        "fd_steps",
        "logging_steps",
        "snippet_dim",
        "thumbnail_size",
        "rank",
        "lora_alpha",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}.")
    if args.fd_num_images < 2:
        parser.error(f"--fd_num_images must be at least 2, got {args.fd_num_images}.")
    for name in ("memory_drop_prob", "lora_dropout", "ema_decay"):
        if not 0.0 <= getattr(args, name) <= 1.0:
            parser.error(f"--{name} must be in [0, 1], got {getattr(args, name)}.")
    return args


def check_data_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    sources = ("train_data_dir", "dataset_name", "webdataset", "latents_dir")
    if sum(getattr(args, name) is not None for name in sources) != 1:
        parser.error("give one of --train_data_dir, --dataset_name, --webdataset and --latents_dir.")
    if args.independent_flips and not args.random_flip:
        parser.error("--independent_flips needs --random_flip.")
    if args.latents_dir is None:
        args.resolution = DEFAULT_RESOLUTION if args.resolution is None else args.resolution
        if args.streaming:
            parser.error(
                "--streaming: training takes images by number, which a stream does not have. Encode the stream with "
                "examples/cache_latents.py, and train with --latents_dir."
            )
        if args.alignment == "cached":
            parser.error("--alignment cached needs --latents_dir.")
        return
    for name in (*ENCODING_ARGUMENTS, "resolution", "thumbnail_size"):
        if getattr(args, name) is not None:
            parser.error(f"--{name} does not go with --latents_dir: the cache says what it was made with.")
    for name in ("streaming", "skip_bad_images", "cache_images"):
        if getattr(args, name):
            parser.error(f"--{name} does not go with --latents_dir, which holds no images.")
    if args.alignment == "online":
        parser.error("--alignment online does not go with --latents_dir, which holds no images: use cached.")


def open_images(args: argparse.Namespace, accelerator: Accelerator) -> ImageSource:
    """The images that the arguments name; with --skip_bad_images, those that can be read."""
    names = ("train_data_dir", "dataset_name", "dataset_config_name", "split", "image_column", "label_column")
    with accelerator.main_process_first():  # who brings the data set into its cache
        source = ImageSource(**{name: getattr(args, name) for name in (*names, "cache_dir", "webdataset")})
    if not args.skip_bad_images:
        return source
    broken = [source.find_broken() if accelerator.is_main_process else None]
    broken = broadcast_object_list(broken)[0]
    if broken and accelerator.is_main_process:
        path = Path(args.output_dir, SKIPPED_NAME)
        write_text(path, "".join(message.replace("\n", " ") + "\n" for message in broken.values()))
        logger.warning(f"{len(broken)} images could not be read and are left out: {path}")
    if len(broken) == len(source):
        raise ValueError(
            f"None of the {len(source)} images can be read, the first because: {next(iter(broken.values()))}"
        )
    return source.select([index for index in range(len(source)) if index not in broken])


def open_latent_cache(args: argparse.Namespace, pretrained: GMemPipeline | None) -> LatentCache:
    """
    The cache.

    Raises:
        ValueError: if the pretrained pipeline is of another autoencoder or image encoder.
    """
    cache = LatentCache.from_pretrained(args.latents_dir)
    if pretrained is None:
        return cache
    where = f"The latent cache in {args.latents_dir} does not fit {args.pretrained_model_name_or_path}"
    bank, trained_with = cache.load_memory_bank(), (pretrained.config.memory_bank_source or {}).get("trained_with", {})
    for name in ("encoder", "preprocessing", "dim"):
        value, expected = getattr(bank, name), trained_with.get(name)
        if expected is not None and value != expected:
            raise ValueError(f"{where}: the `{name}` of its snippets is {value!r}, but {expected!r} in the pipeline.")
    if not have_same_weights(cache.load_autoencoder(args.cache_dir), pretrained.vae):
        raise ValueError(f"{where}: {cache.config['autoencoder']['name_or_path']} is not the pipeline's autoencoder.")
    return cache


def have_same_weights(model: torch.nn.Module, other: torch.nn.Module | None) -> bool:
    """Whether two models are the same, up to the rounding of weights that were saved in half precision."""
    if type(model) is not type(other):
        return False
    state_dict, other_state_dict = model.state_dict(), other.state_dict()
    return state_dict.keys() == other_state_dict.keys() and all(
        tensor.shape == other_state_dict[name].shape
        and torch.allclose(tensor, other_state_dict[name], rtol=2**-7, atol=1e-6)
        for name, tensor in state_dict.items()
    )


def prepare_encoder_and_banks(
    args: argparse.Namespace, accelerator: Accelerator, source: ImageSource, pretrained: GMemPipeline | None
) -> tuple[torch.nn.Module, Any, GMemMemoryBank, GMemMemoryBank | None]:
    """
    The image encoder, its processor, the bank of the training images in `output_dir/bank` and, with --random_flip, that of
    the mirrored ones. A run that resumes opens what the interrupted one wrote.
    """
    encoder_folder = Path(args.output_dir, "image_encoder")
    folders = {False: Path(args.output_dir, "bank")}
    if args.random_flip:
        folders[True] = Path(args.output_dir, "cache", "flipped_bank")

    if pretrained is not None:
        encoder, processor = pretrained.image_encoder, pretrained.image_processor
        if encoder is None or processor is None:
            raise ValueError(f"{args.pretrained_model_name_or_path} has no image encoder to make snippets with.")
        encoder_record = {"encoder": args.pretrained_model_name_or_path, "encoder_revision": args.revision}
        preprocessing = processor.to_dict()
        known = pretrained.load_memory_bank()
        if known is not None:
            encoder_record = {"encoder": known.encoder, "encoder_revision": known.encoder_revision}
            preprocessing = known.preprocessing
    else:
        encoder, processor = open_image_encoder(args)
        encoder_record = {
            "encoder": name_or_absolute_path(args.image_encoder),
            "encoder_revision": args.image_encoder_revision,
        }
        preprocessing = processor.to_dict()
    if args.snippet_dim is not None:
        encoder = GMemImageEncoder.from_backbone(encoder, args.snippet_layers)
        preprocessing["snippet"] = {
            "dim": args.snippet_dim,
            "hidden_layers": args.snippet_layers,
            "whitening": args.snippet_whitening,
        }

    image_names = [source.image_name(index) for index in range(len(source))]
    resuming = args.resume_from_checkpoint is not None
    if accelerator.is_main_process and not (
        resuming and all((folder / "config.json").is_file() for folder in folders.values())
    ):
        for flip, folder in folders.items():
            snippets = compute_snippets(
                source, encoder, processor, args.train_batch_size, accelerator.device, flip=flip
            )
            if args.snippet_dim is not None and not flip:
                encoder.fit_projection(snippets, args.snippet_dim, args.snippet_whitening)
                encoder.save_pretrained(encoder_folder)
                snippets = encoder.project(snippets.to(encoder.device)).cpu()
            metadata = {"image": image_names}
            if args.thumbnail_size is not None and not flip:
                pictures = (center_crop(source[index], args.thumbnail_size) for index in range(len(source)))
                metadata["thumbnail"] = thumbnail_column(pictures)
            GMemMemoryBank(
                snippets,
                labels=source.labels,
                id2label=source.id2label,
                metadata=metadata,
                preprocessing=preprocessing,
                source_dataset=source.name,
                **encoder_record,
            ).save_pretrained(folder)
    accelerator.wait_for_everyone()

    if args.snippet_dim is not None:
        encoder = GMemImageEncoder.from_pretrained(encoder_folder)
    encoder.requires_grad_(False)
    banks = {flip: GMemMemoryBank.from_pretrained(folder) for flip, folder in folders.items()}
    for flip, bank in banks.items():
        same_images = bank.metadata["image"].to_pylist() == image_names
        same_encoder = {name: getattr(bank, name) for name in encoder_record} == encoder_record
        if not same_images or not same_encoder or bank.preprocessing != json.loads(json.dumps(preprocessing)):
            raise ValueError(
                f"The bank in {folders[flip]} ({len(bank)} rows) is not that of these {len(source)} images and this encoder: "
                "remove the folder to build it anew, and the checkpoints that were trained with it."
            )
    return encoder, processor, banks[False], banks.get(True)


def build_transformer(
    args: argparse.Namespace, latent_shape: tuple[int, int, int], memory_dim: int, alignment_dim: int | None
) -> GMemTransformer2DModel:
    """A new transformer."""
    config = json.loads(Path(args.model_config).read_text()) if args.model_config is not None else {}
    config |= {"in_channels": latent_shape[0], "sample_size": latent_shape[1], "memory_dim": memory_dim}
    if alignment_dim is None:
        config["alignment_layer"] = None
    else:
        config["alignment_dim"] = alignment_dim
    return GMemTransformer2DModel(**config)


def adapt_transformer(
    args: argparse.Namespace,
    transformer: GMemTransformer2DModel,
    latent_shape: tuple[int, int, int],
    dropout_seeds: dict[str, torch.Tensor],
) -> GMemTransformer2DModel:
    """The pretrained transformer, with LoRA layers if asked for; what is not to be trained is frozen. See SampleDropout for the seeds."""
    expected_shape = (transformer.config.in_channels, transformer.config.sample_size, transformer.config.sample_size)
    if latent_shape != expected_shape:
        raise ValueError(
            f"With --resolution {args.resolution} the transformer would get inputs of shape {latent_shape}, but the "
            f"pretrained one takes {expected_shape}."
        )
    if args.use_lora:
        from peft import LoraConfig

        transformer.add_adapter(  # which freezes the rest
            LoraConfig(
                r=args.rank,
                lora_alpha=args.lora_alpha,
                lora_dropout=args.lora_dropout,
                init_lora_weights="gaussian",
                target_modules=[layer.strip() for layer in args.lora_layers.split(",")],
            )
        )
        cast_training_params(transformer, dtype=torch.float32)
        layers = [module for module in transformer.modules() if hasattr(module, "lora_dropout")]
        for number, layer in enumerate(layers):
            layer.lora_dropout["default"] = SampleDropout(args.lora_dropout, number, dropout_seeds)
    elif args.alignment == "none" and transformer.alignment_projector is not None:
        transformer.alignment_projector.requires_grad_(False)
    return transformer


def original_images(
    args: argparse.Namespace, source: ImageSource | LatentCache, pipeline: GMemPipeline, indices: list[int]
) -> list[PIL.Image.Image]:
    """Training images as the transformer learns them; those of a cache are decoded."""
    if isinstance(source, ImageSource):
        return [center_crop(source[index], args.resolution) for index in indices]
    latents = source.read("latents_mean", torch.tensor(indices), torch.zeros(len(indices), dtype=torch.bool))
    latents = normalize_latents(latents.float().to(pipeline.vae.device), normalization_config(pipeline.vae))
    return pipeline.vae_image_processor.postprocess(decode_latents(pipeline.vae, latents))


@torch.no_grad()
def log_validation(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: GMemPipeline,
    source: ImageSource | LatentCache,
    step: int,
) -> None:
    """Writes a row of training images above a row generated from their snippets, with fixed memories and noise."""
    num_images = min(args.num_validation_images, len(source))
    indices = [round(k * (len(source) - 1) / max(num_images - 1, 1)) for k in range(num_images)]
    generators = [torch.Generator().manual_seed(args.seed + k) for k in range(num_images)]
    generated = pipeline(
        memory_indices=indices, generator=generators, num_inference_steps=args.validation_inference_steps
    ).images
    originals = original_images(args, source, pipeline, indices)
    grid = make_image_grid(originals + generated, rows=2, cols=num_images)
    folder = Path(args.output_dir, "samples")
    folder.mkdir(exist_ok=True)
    grid.save(folder / f"step-{step:07d}.png")
    logger.info(f"Validation: {folder / f'step-{step:07d}.png'}")
    log_image(accelerator, "validation", grid, step)


def log_frechet_distance(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: GMemPipeline,
    reference: FeatureStatistics,
    step: int,
) -> None:
    samples = sample_statistics(
        pipeline, args.fd_num_images, args.train_batch_size, args.validation_inference_steps, args.seed
    )
    distance = frechet_distance(samples, reference)
    logger.info(f"Fréchet distance of {args.fd_num_images} images after {step} steps: {distance:.4f}")
    accelerator.log({"frechet_distance": distance}, step=step)


def log_image(accelerator: Accelerator, name: str, image: PIL.Image.Image, step: int) -> None:
    """Shows an image in the trackers that can."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.array(image)[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({name: wandb.Image(image)}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(image)}, step=step)


def find_checkpoint(args: argparse.Namespace, accelerator: Accelerator) -> Path | None:
    """The checkpoint to resume from, if there is one. Raises if the one asked for by name is damaged."""
    if args.resume_from_checkpoint is None:
        return None
    folder = None if args.resume_from_checkpoint == "latest" else Path(args.resume_from_checkpoint)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(
            f"--resume_from_checkpoint must be 'latest' or the folder of a checkpoint, got {folder}."
        )
    found = [folder]
    if accelerator.is_main_process:
        if folder is None:
            found = [latest_checkpoint(args.output_dir)]
        else:
            verify_checkpoint(folder)
    folder = broadcast_object_list(found)[0]
    if folder is None:
        logger.info(f"There is no checkpoint in {args.output_dir} to resume from: starting from the beginning.")
    return folder


def main(args: argparse.Namespace) -> None:
    with StopRequest() as stop:
        try:
            train(args, stop)
        except TrainingStopped:
            logger.info("Stopped: the same command with --resume_from_checkpoint latest goes on.")


def train(args: argparse.Namespace, stop: StopRequest) -> None:
    check_sharding()
    trackers = [] if args.report_to == "none" else [name.strip() for name in args.report_to.split(",")]
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=trackers or None,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    missing = set(trackers) - {"all", *(tracker.value for tracker in accelerator.log_with)}
    if missing:
        raise ValueError(f"--report_to {args.report_to}: {', '.join(sorted(missing))} is not installed.")
    check_sharding(accelerator)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for name in ("accelerate.accelerator", "accelerate.checkpointing", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not accelerator.is_local_main_process:
        diffusers.utils.logging.set_verbosity_error()
        transformers.utils.logging.set_verbosity_error()
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    checkpoints = list_checkpoints(args.output_dir)
    if args.resume_from_checkpoint is None and checkpoints:
        raise ValueError(
            f"{args.output_dir} holds checkpoints of another run (of step {checkpoint_step(checkpoints[-1])}): go on "
            "with it by --resume_from_checkpoint latest, remove them, or take another --output_dir."
        )
    set_seed(args.seed)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    hub = None
    if args.push_to_hub and accelerator.is_main_process:
        hub = HubPusher(
            args.hub_model_id or Path(args.output_dir).resolve().name,
            args.hub_bank_id,
            base_model=args.pretrained_model_name_or_path if args.use_lora else None,
            private=args.hub_private_repo or None,
            token=args.hub_token,
        )

    # 1. The training data, their snippets, and what the transformer sees of them
    with accelerator.main_process_first():
        pretrained, vae, scheduler = None, None, GMemFlowMatchScheduler()
        if args.pretrained_model_name_or_path is not None:
            # Weights that stay as they are need no more digits than they are computed with
            mixed_precision = accelerator.mixed_precision if args.use_lora else "no"
            pretrained = GMemPipeline.from_pretrained(
                args.pretrained_model_name_or_path,
                revision=args.revision,
                cache_dir=args.cache_dir,
                dtype={
                    "transformer": WEIGHT_DTYPES.get(mixed_precision, torch.float32),
                    "default": torch.float32,
                },
            )
            vae, scheduler = pretrained.vae, pretrained.scheduler
        elif args.vae is not None:
            vae = load_autoencoder(args.vae, revision=args.vae_revision, cache_dir=args.cache_dir)
        if args.latents_dir is not None:
            source = open_latent_cache(args, pretrained)
            args.resolution = source.config["resolution"]
            if args.latents_block_size is None:
                args.latents_block_size = DEFAULT_BLOCK_SIZE if source.in_random_order else 1
            memory_bank, flipped_memory_bank = source.load_memory_bank(), None
            if pretrained is None:
                vae = source.load_autoencoder(args.cache_dir)
                encoder, processor = source.load_image_encoder(args.cache_dir)
            else:
                encoder, processor = pretrained.image_encoder, pretrained.image_processor
    if args.latents_dir is None:
        source = open_images(args, accelerator)
        encoder, processor, memory_bank, flipped_memory_bank = prepare_encoder_and_banks(
            args, accelerator, source, pretrained
        )
    for model in (vae, encoder):
        if model is not None:
            model.requires_grad_(False).to(accelerator.device)

    if args.fd_steps is not None and encoder is None:
        raise ValueError(f"--fd_steps needs an image encoder, {args.pretrained_model_name_or_path} has none.")
    reference = snippet_statistics(memory_bank) if args.fd_steps is not None and accelerator.is_main_process else None

    latent_shape, alignment_dim = (3, args.resolution, args.resolution), None
    if args.latents_dir is not None:
        latent_shape = source.shape("latents_mean")
    elif vae is not None:
        ratio = spatial_compression_ratio(vae)
        if args.resolution % ratio != 0:
            raise ValueError(f"--resolution must be a multiple of the autoencoder's {ratio}, got {args.resolution}.")
        latents = encode_images(vae, torch.zeros(1, *latent_shape, device=accelerator.device))[0]
        latent_shape = tuple(latents.shape[1:])
        if ratio * latent_shape[1] != args.resolution:
            raise ValueError(
                f"{type(vae).__name__} makes images of {ratio * latent_shape[1]} pixels, whatever it encodes: give that as "
                f"--resolution, got {args.resolution}."
            )
    alignment_encoder = encoder.backbone if isinstance(encoder, GMemImageEncoder) else encoder
    if args.alignment == "online":
        if not hasattr(alignment_encoder.config, "patch_size"):
            raise ValueError(
                f"--alignment online needs a vision transformer as the encoder, got {type(alignment_encoder).__name__}."
            )
        alignment_dim = alignment_encoder.config.hidden_size
    elif args.alignment == "cached":
        alignment_dim = source.shape("alignment_features")[1]

    # 2. Model, optimizer, moving average
    dropout_seeds: dict[str, torch.Tensor] = {}
    if pretrained is not None:
        transformer = adapt_transformer(args, pretrained.transformer, latent_shape, dropout_seeds)
    else:
        transformer = build_transformer(args, latent_shape, memory_bank.dim, alignment_dim)
    config = transformer.config
    if alignment_dim is not None and (config.alignment_layer is None or config.alignment_dim != alignment_dim):
        raise ValueError(
            f"--alignment {args.alignment} needs a transformer that predicts features of {alignment_dim} dimensions, but its "
            f"`alignment_layer` is {config.alignment_layer}, and its `alignment_dim` {config.alignment_dim}."
        )
    # What pictures, pipelines and checkpoints are made of: in one piece, on the CPU, and never trained itself
    template = copy.deepcopy(transformer).eval() if accelerator.is_main_process else None
    transformer.train()
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.torch_compile:
        transformer.compile_repeated_blocks(fullgraph=not args.use_lora)
    optimizer = torch.optim.AdamW(
        trained_parameters(transformer),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True,
    )
    global_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(source) / global_batch_size)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    if accelerator.distributed_type == "DEEPSPEED":
        configure_deepspeed(accelerator, args.train_batch_size, args.gradient_accumulation_steps, args.max_grad_norm)
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    ema = None
    if args.ema:
        ema = GMemEMAModel(
            trained_parameters(transformer),
            decay=args.ema_decay,
            min_decay=args.ema_decay if args.ema_warmup == "none" else 0.0,
            update_after_step=-1 if args.ema_warmup == "none" else 0,
            foreach=True,
        )
    data_order = {
        "seed": args.seed,
        "num_images": len(source),
        "global_batch_size": global_batch_size,
        "block_size": None if args.latents_dir is None else args.latents_block_size,
    }
    first_step, sums = 0, {}
    folder = find_checkpoint(args, accelerator)
    if folder is not None:
        first_step, sums = load_checkpoint(
            folder, accelerator, transformer, optimizer, lr_scheduler, ema, data_order, vars(args)
        )

    # 3. Order of the samples
    draws = {
        "seed": args.seed,
        "memory_dropout": accelerator.unwrap_model(transformer).config.memory_dropout,
        "memory_drop_prob": args.memory_drop_prob,
        "timestep_mean": args.timestep_mean,
        "timestep_std": args.timestep_std,
        "independent_flips": args.independent_flips,
    }
    if args.latents_dir is not None:
        dataset = GMemLatentTrainingDataset(
            source, random_flip=args.random_flip, alignment=args.alignment == "cached", **draws
        )
    else:
        dataset = GMemTrainingDataset(
            source,
            memory_bank,
            args.resolution,
            latent_shape,
            flipped_memory_bank=flipped_memory_bank,
            cache_images=args.cache_images,
            **draws,
        )
    batch_sampler = TrainingBatchSampler(
        len(source),
        args.train_batch_size,
        args.seed,
        first_step,
        args.max_train_steps,
        args.gradient_accumulation_steps,
        accelerator.num_processes,
        accelerator.process_index,
        block_size=data_order["block_size"],
    )
    # Not given to `accelerator.prepare`: the sampler already says which process takes what
    dataloader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=dataset.collate if args.latents_dir is not None else None,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),  # or it would draw from the global one
    )

    num_parameters = sum(parameter.numel() for parameter in transformer.parameters())
    num_trained = sum(parameter.numel() for parameter in trained_parameters(transformer))
    logger.info(
        f"A transformer of {num_parameters / 1e6:.1f} million parameters, of which {num_trained / 1e6:.1f} million are "
        f"trained, {memory_bank}.\n"
        f"  Global batch: {global_batch_size} images = {args.train_batch_size} per device x {accelerator.num_processes} "
        f"processes x {args.gradient_accumulation_steps} accumulation steps.\n"
        f"  {args.max_train_steps} optimizer steps = {args.max_train_steps * global_batch_size / len(source):.1f} epochs "
        f"of {len(source)} images; {first_step} steps done."
    )
    if trackers:
        # TensorBoard takes no lists, and the token is nobody's business
        settings = {name: str(value) if isinstance(value, list) else value for name, value in vars(args).items()}
        del settings["hub_token"]
        logging_dir = Path(args.output_dir, args.logging_dir)
        logging_dir.mkdir(exist_ok=True)
        accelerator.init_trackers("gmem", config=settings, init_kwargs={"wandb": {"dir": str(logging_dir)}})

    num_tokens = (latent_shape[1] // config.patch_size) ** 2
    flops_per_image = model_flops_per_image(config, alignment=args.alignment != "none")
    # LoRA needs less arithmetic, and full precision has another peak
    peak = None
    if accelerator.mixed_precision in WEIGHT_DTYPES and not args.use_lora:
        peak = peak_flops(accelerator.device)

    @torch.no_grad()
    def prepare_batch(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the transformer learns to make, and the features that its tokens predict, where asked for."""
        if args.latents_dir is not None:
            latents, features = batch["latents"], batch.get("alignment_features")
        else:
            latents, features = batch["pixel_values"], None
            if args.alignment == "online":
                features = compute_patch_features(alignment_encoder, processor, latents)
            if vae is not None:
                latents, logvar = encode_images(vae, latents)
                if logvar is not None:
                    latents = latents + (0.5 * logvar).exp() * batch["posterior_noise"]
        if vae is not None:
            latents = normalize_latents(latents, normalization_config(vae))
        return latents, None if features is None else resize_patch_features(features.float(), num_tokens)

    def make_pipeline() -> GMemPipeline | None:
        """The pipeline so far, on the main process; all must call it. The next call changes its weights."""
        weights = gather_weights(accelerator, transformer, ema)
        if not accelerator.is_main_process:
            return None
        template.load_state_dict(weights, strict=not args.use_lora)
        return GMemPipeline(
            template, scheduler, vae=vae, memory_bank=memory_bank, image_encoder=encoder, image_processor=processor
        )

    def validate(step: int, draw_grid: bool, measure_distance: bool) -> None:
        pipeline = make_pipeline()
        if pipeline is not None:
            pipeline.set_progress_bar_config(disable=True)
            try:
                with stop.interruptible():
                    template.to(accelerator.device)
                    if draw_grid:
                        log_validation(args, accelerator, pipeline, source, step)
                    if measure_distance:
                        log_frechet_distance(args, accelerator, pipeline, reference, step)
            except TrainingStopped:
                logger.info("The validation is given up.")
            template.to("cpu")

    def snapshot(pipeline: GMemPipeline, step: int) -> tuple[GMemPipeline, dict[str, Any], PIL.Image.Image | None]:
        """A pipeline that further training does not change, how it was trained, and what it draws."""
        pipeline.transformer = copy.deepcopy(pipeline.transformer)
        grid = None
        grids = sorted(Path(args.output_dir, "samples").glob("step-*.png"))
        if grids:  # the lower row, which was generated: the training images are not ours to publish
            with PIL.Image.open(grids[-1]) as image:
                grid = image.crop((0, image.height // 2, image.width, image.height))
        training = {
            "steps": step,
            "global_batch_size": global_batch_size,
            "num_images": len(source),
            "epochs": step * global_batch_size / len(source),
            "resolution": args.resolution,
            "started from": args.pretrained_model_name_or_path or "random weights",
            "optimizer": f"AdamW, betas ({args.adam_beta1}, {args.adam_beta2}), weight decay {args.adam_weight_decay}",
            "learning rate": f"{args.learning_rate}, {args.lr_scheduler}, {args.lr_warmup_steps} steps of warm-up",
            "moving average of the weights": f"decay {args.ema_decay}, warm-up {args.ema_warmup}" if ema else "none",
            "weight of the alignment term": args.alignment_weight if args.alignment != "none" else 0,
            "null memory": f"with probability {args.memory_drop_prob}",
            "mirrored images": "half" if args.random_flip else "none",
            "mixed precision": accelerator.mixed_precision,
            "seed": args.seed,
        }
        return pipeline, training, grid

    def checkpoint(step: int, name: str = "checkpoint") -> Path:
        log_sums = sums | {"num_batches": torch.tensor(num_batches)}
        folder = Path(args.output_dir, f"{name}-{step}")
        arguments = {name: value for name, value in vars(args).items() if name not in ARGUMENTS_OF_A_START}
        save_checkpoint(
            folder, accelerator, template, transformer, optimizer, ema, step, data_order, log_sums, arguments
        )
        return folder

    def stop_before_bad_step(loss: float, grad_norm: float) -> None:
        """Ends a run whose next step is not finite, with all that is needed to look into it."""
        folder = Path(args.output_dir, f"failed-{step}")
        where = f"The state before it is in {folder}"
        if accelerator.distributed_type == "DEEPSPEED":
            where = "DeepSpeed has taken it into the weights, which are not saved"
            folder.mkdir(exist_ok=True)
        else:
            checkpoint(step, "failed")
        keys = batch_sampler.samples_of_step(step)
        names = memory_bank.metadata["image"].take([index for _, index in keys]).to_pylist()
        if accelerator.is_main_process:
            samples = [
                {"epoch": epoch, "index": index, "image": name}
                for (epoch, index), name in zip(keys, names, strict=True)
            ]
            write_json(folder / "samples.json", {"step": step + 1, "samples": samples})
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise RuntimeError(
            f"Step {step + 1} is not finite: its loss is {loss} and the norm of its gradient {grad_norm}. {where}; its "
            f"samples are in {folder / 'samples.json'}: {shown}. Resume from a checkpoint with a lower --learning_rate, "
            "or without --mixed_precision fp16."
        )

    # 4. Training
    step = first_step
    progress_bar = tqdm(
        total=args.max_train_steps, initial=first_step, desc="Training", disable=not accelerator.is_local_main_process
    )
    stop.begin()
    num_batches = int(sums.pop("num_batches", 0))
    step_sums: dict[str, torch.Tensor] = {}
    start_step, start_time = first_step, time.perf_counter()
    for batch in dataloader:
        batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        latents, alignment_features = prepare_batch(batch)
        dropout_seeds["dropout_seed"] = batch["dropout_seed"]
        with accelerator.accumulate(transformer):
            terms = flow_matching_loss(
                transformer,
                latents,
                batch["memory"],
                batch["noise"],
                batch["timestep"],
                alignment_features,
                cosine_weight=args.cosine_weight,
                alignment_weight=args.alignment_weight,
                memory_dropout_mask=batch["memory_dropout_mask"],
            )
            accelerator.backward(terms["loss"])
            for name, term in terms.items():
                step_sums[name] = step_sums.get(name, 0.0) + term.detach().mean()
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(transformer.parameters(), args.max_grad_norm)
                grad_norm = float(gather_tensor(torch.as_tensor(grad_norm)))
                # Asked before the weights take it in; to wait for the device costs it the launch of the optimizer. A scaled
                # gradient may overflow: the scaler then leaves out the step.
                loss = accelerator.reduce(step_sums["loss"] / args.gradient_accumulation_steps, "mean").item()
                if not math.isfinite(loss) or (accelerator.scaler is None and not math.isfinite(grad_norm)):
                    stop_before_bad_step(loss, grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        num_batches += 1
        if not accelerator.sync_gradients:
            continue

        lr_scheduler.step()
        if ema is not None:
            ema.step(trained_parameters(transformer))
        sums = {name: total + sums.get(name, 0.0) for name, total in step_sums.items()}
        step_sums = {}
        step += 1
        progress_bar.update()

        last_step = step == args.max_train_steps
        if step % args.logging_steps == 0 or last_step:
            logs = {name: accelerator.reduce(total / num_batches, "mean").item() for name, total in sums.items()}
            rate = (step - start_step) * global_batch_size / (time.perf_counter() - start_time)
            logs |= {"lr": lr_scheduler.get_last_lr()[0], "grad_norm": grad_norm, "images_per_second": rate}
            if peak is not None:
                logs["mfu"] = rate * flops_per_image / (accelerator.num_processes * peak)
            accelerator.log(logs, step=step)
            progress_bar.set_postfix(
                loss=f"{logs['loss']:.4f}",
                lr=f"{logs['lr']:.1e}",
                images_per_s=f"{rate:.0f}",
                **({"mfu": f"{logs['mfu']:.1%}"} if peak is not None else {}),
            )
            sums, num_batches = {}, 0
            start_step, start_time = step, time.perf_counter()
        if step % args.checkpointing_steps == 0:
            newest = checkpoint(step)
            if args.checkpoints_total_limit is not None and accelerator.is_main_process:
                remove_old_checkpoints(newest, args.checkpoints_total_limit)
        draw_grid = last_step or (args.validation_steps is not None and step % args.validation_steps == 0)
        measure_distance = args.fd_steps is not None and (last_step or step % args.fd_steps == 0)
        if draw_grid or measure_distance:
            validate(step, draw_grid, measure_distance)
            start_step, start_time = step, time.perf_counter()
        if args.push_to_hub and step % args.checkpointing_steps == 0 and not last_step:
            pipeline = make_pipeline()
            if hub is not None:
                hub.push_in_background(*snapshot(pipeline, step))
        if not last_step and stop.agreed():
            if step % args.checkpointing_steps != 0:
                checkpoint(step)
            if hub is not None:
                hub.waiting.clear()
            progress_bar.close()
            accelerator.end_training()
            raise TrainingStopped
    progress_bar.close()

    # 5. A complete pipeline, or LoRA layers for the pretrained one
    pipeline = make_pipeline()
    if pipeline is not None:
        if args.use_lora:
            save_weights(pipeline.transformer, args.output_dir)
            if args.latents_dir is not None:
                memory_bank.save_pretrained(Path(args.output_dir, "bank"))
        else:
            pipeline.save_pretrained(args.output_dir)
        logger.info(f"Saved the {'LoRA layers' if args.use_lora else 'pipeline'} in {args.output_dir}")
    accelerator.end_training()
    if hub is not None:
        with stop.interruptible():
            hub.finish(*snapshot(pipeline, step))


if __name__ == "__main__":
    main(parse_args())
