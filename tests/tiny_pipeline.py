# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Tiny components of a pipeline, and short runs."""

import PIL.Image
import torch
from diffusers import AutoencoderKL
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from diffusers_gmem import GMemFlowMatchScheduler, GMemMemoryBank, GMemPipeline, GMemTransformer2DModel


MEMORY_DIM = 16
LABELS = [0, 0, 1, 1, 2, 2, 2]
ID2LABEL = {0: "cat", 1: "dog", 2: "fish"}


def seed(number):
    return torch.Generator().manual_seed(number)


def make_transformer(cls=GMemTransformer2DModel, **config):
    torch.manual_seed(0)
    config = {"sample_size": 8, "in_channels": 4, "num_layers": 2, **config}
    return cls(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        memory_dim=MEMORY_DIM,
        alignment_layer=None,
        **config,
    )


def make_vae():
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[1.5, 0.5, 2.0, 0.7],
        scaling_factor=0.8,
    )


def make_bank(generator=2, dim=MEMORY_DIM):
    snippets = torch.randn(len(LABELS), dim, generator=seed(generator))
    return GMemMemoryBank(snippets, labels=LABELS, id2label=ID2LABEL)


def make_image_encoder():
    torch.manual_seed(3)
    config = Dinov2Config(
        hidden_size=MEMORY_DIM, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return {"image_encoder": Dinov2Model(config), "image_processor": processor}


def make_picture(number=0):
    pixels = torch.randint(256, (30, 40, 3), generator=seed(number), dtype=torch.uint8)
    return PIL.Image.fromarray(pixels.numpy())


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pipeline(transformer=None, scheduler=None, **components):
    """A pixel-space pipeline without a bank, unless the components say otherwise."""
    return quiet(GMemPipeline(transformer or make_transformer(), scheduler or GMemFlowMatchScheduler(), **components))


def run(pipe, **arguments):
    """A short run from seed 0, as an array (or what `output_type` says)."""
    arguments = {"num_inference_steps": 3, "generator": seed(0), "output_type": "np", **arguments}
    return pipe(**arguments)


def record_evaluations(pipe):
    """A list that fills with the arguments of each evaluation of the transformer."""
    evaluations = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: evaluations.append(kwargs), with_kwargs=True
    )
    return evaluations


def batch_sizes(evaluations):
    return [len(evaluation["hidden_states"]) for evaluation in evaluations]
