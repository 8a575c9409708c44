# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

r"""
Shows what can be done with the memory of a trained pipeline, without training: each command writes one labelled PNG.

    python examples/edit_memory.py variations --model quickstart/pipeline --images quickstart/data/held_out \
        --output variations.png
    python examples/edit_memory.py interpolate --model quickstart/pipeline --first_dir quickstart/data/held_out/animals \
        --second_dir quickstart/data/held_out/flags --output interpolation.png
    python examples/edit_memory.py remove --model quickstart/pipeline --labels flags --save_bank bank_without_flags \
        --output removed.png

`variations`: images that the model never saw become memories, and these become images. `interpolate`: strips from the
images of one folder to those of another. `remove`: what a class was drawn as, that it cannot be drawn any more when it is
taken out of the bank, and what the nearest memories that are left make of it.

With --save_images every generated image is also written as a file of its own, which says how it was made
(`diffusers_gmem.read_provenance`).
"""

import argparse
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from accelerate import PartialState
from accelerate.logging import get_logger

from diffusers_gmem import GMemPipeline, GMemPipelineOutput
from diffusers_gmem.data import center_crop
from diffusers_gmem.files import atomic_path
from diffusers_gmem.pipelines.image_inputs import open_image_inputs


logger = get_logger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# A row of the picture: its heading, and tiles with captions. A tile without an image is blank.
Row = tuple[str, list[tuple[PIL.Image.Image | None, str]]]


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate from new, mixed and removed memories.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(name: str, description: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, description=description, help=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.add_argument(
            "--model", type=str, required=True, help="GMemPipeline, by its name on the Hub or folder."
        )
        command.add_argument("--revision", type=str, help="Branch, tag or commit of the model on the Hub.")
        command.add_argument("--output", type=str, default=f"{name}.png", help="PNG to write.")
        command.add_argument("--save_images", type=str, help="Folder for the generated images as single files.")
        command.add_argument("--num_inference_steps", type=int, default=50, help="Sampling steps.")
        command.add_argument("--guidance_scale", type=float, default=1.0, help="Guidance.")
        command.add_argument("--seed", type=int, default=0, help="Seed of the noise.")
        command.add_argument("--dtype", choices=list(DTYPES), default="float32", help="In which the models compute.")
        command.add_argument("--tile_size", type=int, default=96, help="Side of an image in the picture, in pixels.")
        return command

    command = add_command("variations", "Variations of images that the model never saw.")
    command.add_argument("--images", nargs="+", required=True, help="Images, folders of images, or URLs.")
    command.add_argument("--num_images", type=int, default=6, help="How many of them, evenly spaced.")
    command.add_argument("--num_variations", type=int, default=6, help="Images of each.")

    command = add_command("interpolate", "Strips from the images of one folder to those of another.")
    command.add_argument("--first_dir", type=str, required=True, help="Folder of the images on the left.")
    command.add_argument("--second_dir", type=str, required=True, help="Folder of the images on the right.")
    command.add_argument("--num_pairs", type=int, default=5, help="Strips; of each folder as many, evenly spaced.")
    command.add_argument("--num_steps", type=int, default=7, help="Generated images of a strip, both ends included.")
    command.add_argument(
        "--method", choices=["linear", "slerp", "concat", "mask"], default="slerp", help="How to mix."
    )

    command = add_command("remove", "What becomes of a class that is removed from the memory.")
    command.add_argument("--labels", nargs="+", required=True, help="Names or numbers of the classes to remove.")
    command.add_argument("--num_images", type=int, default=8, help="Images of each row.")
    command.add_argument("--save_bank", type=str, help="Folder for the bank without them.")
    args = parser.parse_args(input_args)
    for name in ("num_inference_steps", "tile_size", "num_images", "num_variations", "num_pairs", "num_steps"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}.")
    return args


def make_grid(rows: list[Row], tile_size: int) -> PIL.Image.Image:
    """Rows of square images under their headings, with a caption below each image."""
    gap, heading_height, caption_height = 6, 26, 18
    columns = max(len(tiles) for _, tiles in rows)
    row_height = heading_height + tile_size + caption_height
    width = columns * (tile_size + gap) + gap
    grid = PIL.Image.new("RGB", (width, len(rows) * row_height + gap), "white")
    draw = PIL.ImageDraw.Draw(grid)
    heading_font, caption_font = PIL.ImageFont.load_default(size=14), PIL.ImageFont.load_default(size=11)

    def write(x: int, y: int, text: str, font: PIL.ImageFont.FreeTypeFont, width: int, fill: str) -> None:
        shortened = text
        while draw.textlength(shortened, font=font) > width:
            text = text[:-1]
            shortened = f"{text}..."
        draw.text((x, y), shortened, font=font, fill=fill)

    for row, (heading, tiles) in enumerate(rows):
        top = row * row_height
        write(gap, top + 7, heading, heading_font, width - 2 * gap, "black")
        for column, (image, caption) in enumerate(tiles):
            left = gap + column * (tile_size + gap)
            if image is not None:
                # Pixels of small images stay pixels
                enlarged = image.width < tile_size
                resample = PIL.Image.Resampling.NEAREST if enlarged else PIL.Image.Resampling.LANCZOS
                grid.paste(image.resize((tile_size, tile_size), resample), (left, top + heading_height))
            write(left, top + heading_height + tile_size + 2, caption, caption_font, tile_size, "dimgray")
    return grid


def choose_images(places: list[str], count: int) -> list[str]:
    """At most `count` of the images in folders, of files and of URLs, evenly spaced, in the order of their names."""
    extensions = PIL.Image.registered_extensions()
    images = []
    for place in places:
        if Path(place).is_dir():
            found = sorted(str(path) for path in Path(place).rglob("*") if path.suffix.lower() in extensions)
            if not found:
                raise ValueError(f"There are no images in the folder {place!r}.")
            images += found
        else:
            images.append(place)
    count = min(count, len(images))
    return [images[k * len(images) // count] for k in range(count)]


class PipelineRunner:
    """The pipeline, with what is the same in all its calls."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args = args
        self.pipe = GMemPipeline.from_pretrained(args.model, revision=args.revision, dtype=DTYPES[args.dtype])
        self.pipe.to(device)
        self.bank = self.pipe.load_memory_bank()
        if self.bank is None:
            raise ValueError(f"{args.model} has no memory bank.")
        self.image_size = self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor

    def __call__(self, name: str, count: int, same_noise: bool = False, **what) -> GMemPipelineOutput:
        """`count` images; the k-th always begins with the k-th noise, or all of them with the first."""
        args = self.args
        self.pipe.set_progress_bar_config(desc=name)
        output = self.pipe(
            **what,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(args.seed + (0 if same_noise else k)) for k in range(count)],
        )
        if args.save_images is not None:
            output.save_images(args.save_images, prefix=name)
        return output

    def open(self, image: str) -> PIL.Image.Image:
        return center_crop(open_image_inputs(image)[0][0], self.image_size)


def describe(row: dict) -> str:
    """What a bank knows of a row, in a few words."""
    name = row.get("image") or row.get("label_name") or row.get("label")
    return f"memory {row['index']}" if name is None else str(name)


def variations(generate: PipelineRunner, args: argparse.Namespace) -> list[Row]:
    rows = []
    for number, image in enumerate(choose_images(args.images, args.num_images)):
        name = Path(image).name
        (nearest,) = generate.pipe.explain(image, k=1)
        output = generate(
            f"variations{number}", args.num_variations, image=image, num_images_per_memory=args.num_variations
        )
        rows.append(
            (
                f"{name}; its nearest memory: {describe(nearest)} (cosine {nearest['score']:.2f})",
                [(generate.open(image), "given")]
                + [(picture, f"seed {args.seed + k}") for k, picture in enumerate(output.images)],
            )
        )
    return rows


def interpolate(generate: PipelineRunner, args: argparse.Namespace) -> list[Row]:
    firsts, seconds = (choose_images([folder], args.num_pairs) for folder in (args.first_dir, args.second_dir))
    if len(firsts) != len(seconds):
        logger.warning(
            f"{args.first_dir} has {len(firsts)} images for pairs and {args.second_dir} has {len(seconds)}: "
            f"{min(len(firsts), len(seconds))} strips."
        )
    rows = []
    for number, (first, second) in enumerate(zip(firsts, seconds, strict=False)):
        snippets = [generate.pipe.encode_image(image) for image in (first, second)]
        memory = generate.bank.interpolate(
            *snippets, args.num_steps, args.method, torch.Generator().manual_seed(args.seed)
        )
        output = generate(f"strip{number}", args.num_steps, same_noise=True, memory=memory)
        shares = [source[1]["weight"] for source in output.sources]
        rows.append(
            (
                f"{Path(first).name} to {Path(second).name}, {args.method}",
                [(generate.open(first), "given")]
                + [(picture, f"{share:.0%}") for picture, share in zip(output.images, shares, strict=True)]
                + [(generate.open(second), "given")],
            )
        )
    return rows


def remove(generate: PipelineRunner, args: argparse.Namespace) -> list[Row]:
    labels = [int(label) if label.isdecimal() else label for label in args.labels]
    names, count, before = ", ".join(args.labels), args.num_images, generate.bank
    after = before.without(labels=labels)
    removed = len(before) - len(after)
    logger.info(f"{removed} of {len(before)} memories are of {names}; {len(after)} are left.")

    wanted = [labels[k % len(labels)] for k in range(count)]
    drawn = generate("before", count, class_labels=wanted)
    rows = [
        (
            f"Before: {names}, drawn from the {len(before)} memories of the bank",
            [(image, describe(source)) for image, (source,) in zip(drawn.images, drawn.sources, strict=True)],
        )
    ]

    generate.pipe.memory_bank = after
    for label in labels:
        try:
            generate.pipe(class_labels=label)
        except ValueError as error:
            logger.info(f"A request for {label!r} now says: {error}")
    any_draw = generate("after", count, num_images=count)
    rows.append(
        (
            f"After: without these {removed}, a request for {names} is refused; drawn from all {len(after)} that are left",
            [(image, describe(source)) for image, (source,) in zip(any_draw.images, any_draw.sources, strict=True)],
        )
    )

    scores, nearest = after.nearest(before[drawn.memory_indices], 1)
    substitutes = generate("substitutes", count, memory_indices=nearest[:, 0].tolist())
    rows.append(
        (
            "The nearest memories that are left to those of the first row, with the same noise (cosine)",
            [
                (image, f"{score:.2f} {describe(source)}")
                for image, (source,), score in zip(
                    substitutes.images, substitutes.sources, scores[:, 0].tolist(), strict=True
                )
            ],
        )
    )
    if args.save_bank is not None:
        after.save_pretrained(args.save_bank)
        logger.info(f"The bank without {names}: {args.save_bank}")
    return rows


def main(args: argparse.Namespace) -> None:
    generate = PipelineRunner(args, PartialState().device)
    rows = {"variations": variations, "interpolate": interpolate, "remove": remove}[args.command](generate, args)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(args.output) as temporary:
        make_grid(rows, args.tile_size).save(temporary, format="PNG", optimize=True)
    logger.info(f"Picture: {args.output}")


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    main(parse_args())
