# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""What tests of the training scripts share: real images, tiny models saved to disk, and a way to run a script."""

import importlib.util
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderRAE, AutoencoderTiny
from sklearn.datasets import load_digits
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model


EXAMPLES = Path(__file__).parents[1] / "examples"


def load_script(name):
    """A script of `examples` as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(script, command):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script.main(script.parse_args(command))


def command_line(values):
    """`{"resolution": 8, "random_flip": True, "vae": None}` as `["--resolution", "8", "--random_flip"]`."""
    command = []
    for name, value in values.items():
        if value is not None:
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return command


def save_digits(folder, num_images):
    """Scikit-learn's digits, 8 x 8 pixels, in a folder per class."""
    digits = load_digits()
    for number in range(num_images):
        path = folder / str(digits.target[number]) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray((digits.images[number] * 15.9).astype(np.uint8)).save(path)


def save_image_encoder(folder, num_hidden_layers=1, patch_size=14):
    """A DINOv2 for 28 x 28 pixels, of width 16, with its image processor."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=28,
        patch_size=patch_size,
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)


def make_autoencoder(kind="AutoencoderKL", **config):
    torch.manual_seed(0)
    if kind == "AutoencoderKL":
        return AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=2,
            norm_num_groups=4,
            mid_block_add_attention=False,  # quadratic in the pixels
            **config,
        )
    if kind == "AutoencoderDC":
        channels = {f"{half}_block_out_channels": (8, 8) for half in ("encoder", "decoder")}
        layers = {f"{half}_layers_per_block": (1, 1) for half in ("encoder", "decoder")}
        scales = {f"{half}_qkv_multiscales": ((), ()) for half in ("encoder", "decoder")}
        return AutoencoderDC(latent_channels=4, attention_head_dim=4, **channels, **layers, **scales, **config)
    if kind == "AutoencoderTiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            **config,
        )
    return AutoencoderRAE(
        encoder_hidden_size=64,
        encoder_num_hidden_layers=1,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        patch_size=4,
        encoder_input_size=28,
        **config,
    )
