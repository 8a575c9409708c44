# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""
Loads a trained pipeline and shows what it makes, as one PNG: training images above images generated from their snippets,
images that neither training nor bank has seen above images generated from theirs, and fresh draws from the bank. Prints
how often the bank row nearest to a generated image is the one that it was made from.

    python examples/quickstart/show_results.py --pipeline quickstart/pipeline --train_data_dir quickstart/data/train \
        --held_out_dir quickstart/data/held_out --output quickstart/pictures.png
"""

import argparse
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import torch
import torch.nn.functional as F

from diffusers_gmem import GMemPipeline
from diffusers_gmem.data import ImageSource, center_crop


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Show what a trained pipeline makes.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pipeline", type=str, required=True, help="Folder of the pipeline.")
    parser.add_argument("--train_data_dir", type=str, required=True, help="The images that it was trained on.")
    parser.add_argument("--held_out_dir", type=str, required=True, help="Images that it has not seen.")
    parser.add_argument("--output", type=str, default="pictures.png", help="PNG to write.")
    parser.add_argument("--num_images", type=int, default=10, help="Images in a row of the picture.")
    parser.add_argument("--num_retrievals", type=int, default=100, help="Generated images whose source is looked up.")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="Sampling steps.")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="Guidance.")
    parser.add_argument("--cache_dir", type=str, help="Where `datasets` keeps its files.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the choice of images, and of the sampling.")
    return parser.parse_args(input_args)


def make_sheet(rows: list[tuple[str, list[PIL.Image.Image]]], tile_size: int = 96) -> PIL.Image.Image:
    """Rows of square images under their captions."""
    gap, caption_height = 4, 24
    columns = max(len(images) for _, images in rows)
    row_height = caption_height + tile_size + gap
    sheet = PIL.Image.new("RGB", (gap + columns * (tile_size + gap), len(rows) * row_height + gap), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for row, (caption, images) in enumerate(rows):
        draw.text((gap, row * row_height + 5), caption, fill="black", font_size=14)
        for column, image in enumerate(images):
            tile = image.resize((tile_size, tile_size), PIL.Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + column * (tile_size + gap), row * row_height + caption_height))
    return sheet


def count_retrieved(pipe: GMemPipeline, images: list[PIL.Image.Image], memory_indices: list[int]) -> int:
    """For how many images the nearest snippet of the bank (cosine, among all rows) is the one they were made from."""
    bank = F.normalize(pipe.memory_bank[:].float(), dim=-1)
    queries = F.normalize(pipe.encode_image(images).cpu(), dim=-1)
    nearest = (queries @ bank.T).argmax(dim=-1)
    return int((nearest == torch.tensor(memory_indices)).sum())


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = GMemPipeline.from_pretrained(args.pipeline).to(device)
    train_source = ImageSource(args.train_data_dir, cache_dir=args.cache_dir)
    held_out_source = ImageSource(args.held_out_dir, cache_dir=args.cache_dir)
    resolution = pipe.transformer.config.sample_size * (1 if pipe.vae is None else pipe.vae_scale_factor)
    sampling = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}

    def sources_and_generated(source: ImageSource, indices: list[int], desc: str, **what) -> tuple[list, list]:
        generator = torch.Generator().manual_seed(args.seed)
        pipe.set_progress_bar_config(desc=desc)
        generated = pipe(**what, **sampling, generator=generator).images
        return [center_crop(source[index], resolution) for index in indices], generated

    choice = torch.Generator().manual_seed(args.seed)
    retrieval_indices = pipe.memory_bank.sample(args.num_retrievals, generator=choice)[1].tolist()
    held_out_indices = torch.randperm(len(held_out_source), generator=choice)[: args.num_images].tolist()

    originals, generated = sources_and_generated(
        train_source, retrieval_indices, "From training snippets", memory_indices=retrieval_indices
    )
    held_out, from_held_out = sources_and_generated(
        held_out_source,
        held_out_indices,
        "From held-out images",
        image=[held_out_source[index] for index in held_out_indices],
    )
    pipe.set_progress_bar_config(desc="Draws from the bank")
    draws = pipe(num_images=2 * args.num_images, **sampling, generator=choice).images

    sheet = make_sheet(
        [
            ("Training images", originals[: args.num_images]),
            ("Generated from their snippets", generated[: args.num_images]),
            ("Images held out of training and bank", held_out),
            ("Generated from their snippets", from_held_out),
            ("Drawn from the bank", draws[: args.num_images]),
            ("Drawn from the bank", draws[args.num_images :]),
        ]
    )
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output)

    retrieved = count_retrieved(pipe, generated, retrieval_indices)
    attainable = count_retrieved(pipe, originals, retrieval_indices)
    print(
        f"\nThe nearest of the bank's {len(pipe.memory_bank)} snippets is the one that a generated image was made from "
        f"for {retrieved} of {args.num_retrievals} images; by chance, for {args.num_retrievals / len(pipe.memory_bank):.2f} "
        f"(1/{len(pipe.memory_bank)} each).\nThe training images themselves, shrunk to {resolution}x{resolution} pixels, "
        f"find their own snippet for {attainable}.\n"
        f"\nPictures: {args.output}\nPipeline: {args.pipeline}\nMemory bank: {Path(args.pipeline, 'bank')}\n"
        "\nNext, generate from a picture of your own:\n"
        f'  python -c "from diffusers_gmem import GMemPipeline; import PIL.Image; '
        f"GMemPipeline.from_pretrained('{args.pipeline}')(image=PIL.Image.open('mine.png').convert('RGB'))"
        ".images[0].save('made.png')\""
    )


if __name__ == "__main__":
    main(parse_args())
