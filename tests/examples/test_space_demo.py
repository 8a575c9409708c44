# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""The Space without a browser: what it does with other pipelines than that of `test_space.py`, and with hostile images."""

import base64
import importlib.util
import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import gradio as gr
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipeline import make_bank, make_image_encoder, make_picture, make_pipeline, make_transformer

from diffusers_gmem import GMemMemoryBank
from diffusers_gmem.hub import push_memory_bank, push_pipeline


APP = Path(__file__).parents[2] / "examples/space/app.py"


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("space_app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def progress(*args, **kwargs):
    pass


def make_demo(app, bank, scheduler=None, **components):
    transformer = make_transformer(in_channels=3)
    return app.Demo(make_pipeline(transformer, scheduler, memory_bank=bank, **components), "tiny")


def tabs(page):
    """For each tab, whether it offers a button."""
    blocks = [block for block in page.blocks.values() if isinstance(block, gr.Tab)]

    def offers(block):
        children = getattr(block, "children", [])
        return isinstance(block, gr.Button | gr.Accordion) or any(map(offers, children))

    return {block.label: offers(block) for block in blocks}


@pytest.mark.parametrize(
    "scheduler", [None, FlowMatchEulerDiscreteScheduler()], ids=lambda scheduler: type(scheduler).__name__
)
def test_memories_without_thumbnails_are_previewed(app, scheduler):
    demo = make_demo(app, make_bank(), scheduler)
    kept = demo.pipe.scheduler
    shown = demo.explore(progress, show="all", count=3, page=2, preview=True)
    assert re.findall(r"<strong>(.*?)</strong>", shown) == ["Memory 3", "Memory 4", "Memory 5"]
    assert len(set(re.findall(r'<img src="(.*?)"', shown))) == 3 and "4 to 6 of 7." in shown
    assert demo.pipe.scheduler is kept
    assert shown == demo.explore(progress, show="all", count=3, page=2, preview=True)
    assert "<img" not in demo.explore(progress, show="all", count=3, page=2, preview=False)


def test_a_broken_thumbnail_is_left_out(app, caplog):
    content = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), "red").save(content, format="PNG")
    whole = content.getvalue()
    thumbnails = [whole, whole[:-30], b"no image", None, whole]
    bank = GMemMemoryBank(make_bank()[:5], metadata={"thumbnail": thumbnails})
    shown = make_demo(app, bank).explore(progress, show="all", count=5, page=1)
    assert shown.count("<img") == 2 and shown.count("no picture") == 3
    assert "memory 1" in caplog.text and "memory 2" in caplog.text and "memory 3" not in caplog.text


def test_a_bank_without_anything_beside_its_rows(app):
    demo = make_demo(app, GMemMemoryBank(make_bank()[:]))
    assert tabs(demo.build()) == {"Generate": True, "Explore": True, "Mix": True, "Your image": False, "About": True}
    shown = demo.generate(progress, source="bank", count=2, each=2, steps=2, seed=0)
    assert re.findall(r'<span class="details">(.*?)</span>', shown) == [f"seed {k}" for k in range(4)]
    assert {"label", "words"}.isdisjoint(demo.tabs["generate"]) and "image" not in demo.tabs["explore"]


def test_a_pipeline_without_a_bank(app):
    demo = make_demo(app, None, **make_image_encoder())
    page = demo.build()
    assert tabs(page) == {"Generate": False, "Explore": False, "Mix": False, "Your image": True, "About": False}
    shown = demo.vary(progress, image=make_picture(), count=2, steps=2, seed=0)
    assert shown.count("<figure>") == 2 and "nearest" not in shown


def test_a_pipeline_and_a_bank_of_the_hub_with_their_licences(app, hub):
    bank = make_bank()
    pipe = make_pipeline(make_transformer(in_channels=3), memory_bank=bank)
    push_pipeline(pipe, "me/model", bank_repo_id="me/snippets", card={"license": "mit"})
    push_memory_bank(bank, "me/snippets", license="cc0-1.0")
    about = app.open_pipeline("me/model").about()
    assert "| Model | me/model |" in about and bank.fingerprint in about
    assert "| Licence of the model | mit |" in about and "| Licence of the source | cc0-1.0 |" in about


def test_seeds_go_on_from_image_to_image(app):
    demo = make_demo(app, make_bank())
    images = [
        re.findall(
            r'<img src="(.*?)"', demo.generate(progress, source="bank", count=count, each=1, steps=2, seed=seed)
        )
        for count, seed in ((3, app.MAX_SEED), (1, 0))
    ]
    first, second, again = (
        np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))), dtype=int)
        for url in (*images[0][:2], *images[1])
    )
    assert np.abs(second - again).max() <= 1 < np.abs(first - second).max()


def test_a_path_of_two_opposite_memories_and_a_mixture_of_nothing(app):
    row = torch.randn(16)
    demo = make_demo(app, GMemMemoryBank(torch.stack([row, -row])))
    with pytest.raises(gr.Error, match="no path of the kind slerp"):
        demo.interpolate(progress, method="slerp", frames=3, memory_1=0, memory_2=1, steps=2, seed=0)
    memories = {f"memory_{k}": k % 2 for k in range(1, 5)}
    weights = {f"weight_{k}": 0.5 * (k < 3) for k in range(1, 5)}
    with pytest.raises(gr.Error, match="nothing is left of the memories"):
        demo.mix(progress, method="linear", frames=3, steps=2, seed=0, **memories, **weights)


# Uploads


def encoded(image, file_format, **options):
    content = io.BytesIO()
    image.save(content, file_format, **options)
    return content.getvalue()


def data_url(content):
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def claim(width, height):
    """A small PNG file that claims to be of this size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (encoded(make_picture(), "GIF"), "This is not a PNG, JPEG or WebP image"),
        (encoded(make_picture(), "TIFF"), "This is not a PNG, JPEG or WebP image"),
        (encoded(make_picture(), "PNG")[:200], "This is not a PNG, JPEG or WebP image"),
        (encoded(make_picture(), "JPEG")[:400], "This is not a PNG, JPEG or WebP image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "This is not a PNG, JPEG or WebP image"),
        (claim(4001, 4000), "The image has 4001 x 4000 pixels: up to 16 megapixels are accepted."),
        (claim(50_000, 50_000), "The image has too many pixels: up to 16 megapixels are accepted."),
        (bytes(5 * 2**20 + 16), "The image is too large: up to 5 MB are accepted."),
    ],
    ids=["gif", "tiff", "short-png", "short-jpeg", "svg", "pixels", "bomb", "bytes"],
)
def test_refused_uploads(app, content, sentence):
    with pytest.raises(gr.Error) as caught:
        app.decode_upload(data_url(content))
    assert caught.value.message.startswith(sentence)


def test_accepted_uploads(app):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # lies on its side
    for file_format in app.UPLOAD_FORMATS:
        image = app.decode_upload(data_url(encoded(make_picture(), file_format, exif=exif)))
        assert image.size == (30, 40)
    assert app.decode_upload("") is None


@pytest.mark.slow
def test_what_to_do_without_a_pipeline(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    for arguments, sentence in (
        ([], "run `make quickstart` first"),
        (["--model", "no-such-model/x"], "cannot be shown"),
    ):
        command = [sys.executable, APP, *arguments]
        process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 1 and sentence in process.stderr and "Traceback" not in process.stderr
