# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import contextlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from tiny_pipeline import (
    MEMORY_DIM,
    make_image_encoder,
    make_picture,
    make_pipeline,
    make_transformer,
    quiet,
    run,
    seed,
)
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from diffusers_gmem import GMemImageProcessor, GMemMemoryBank, GMemPipeline
from diffusers_gmem.conversion import REFERENCE_ENCODER, convert_memory_bank
from diffusers_gmem.data import center_crop, load_bank_encoder
from diffusers_gmem.pipelines import image_inputs


@pytest.fixture
def pipe():
    return make_pipeline(make_transformer(in_channels=3), **make_image_encoder())


# Kinds of images


@pytest.fixture
def folder(tmp_path):
    make_picture(0).save(tmp_path / "mug.png")
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


@pytest.fixture
def url(folder):
    """A server of the folder."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            if self.path == "/slow.png":
                threading.Event().wait(1)
            if self.path == "/endless.png":
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    while True:
                        self.wfile.write(bytes(2**16))
            if self.path == "/away.png":
                self.send_response(302)
                self.send_header("Location", "ftp://localhost/mug.png")
                self.end_headers()
                return
            super().do_GET()

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_all_kinds_of_images_give_the_same(pipe, folder, url):
    picture = make_picture(0)
    pixels = np.array(picture)
    tensor = torch.tensor(pixels).permute(2, 0, 1)
    expected = pipe.encode_image(picture)
    kinds = [
        folder / "mug.png",
        str(folder / "mug.png"),
        f"{url}/mug.png",
        PIL.Image.open(folder / "mug.png"),
        pixels,
        pixels.astype(np.float32) / 255,
        pixels / 255,
        tensor,
        tensor.float() / 255,
        (tensor.float() / 255).requires_grad_(),
    ]
    for kind in kinds:
        assert torch.equal(pipe.encode_image(kind), expected), kind
        assert torch.equal(pipe.encode_image([kind]), expected)
    assert torch.equal(pipe.encode_image(kinds), expected.repeat(len(kinds), 1))


def test_batches_and_gray_images(pipe):
    pictures = [make_picture(0), make_picture(1)]
    expected = pipe.encode_image(pictures)
    batch = np.stack([np.array(picture) for picture in pictures])
    for kind in (batch, batch / 255, torch.tensor(batch).movedim(-1, 1), [batch[:1], pictures[1]]):
        torch.testing.assert_close(pipe.encode_image(kind), expected, rtol=0, atol=0)
    gray = pictures[0].convert("L")
    expected = pipe.encode_image(gray)
    for kind in (np.array(gray), np.array(gray)[..., None], torch.tensor(np.array(gray))[None]):
        assert torch.equal(pipe.encode_image(kind), expected)
    transparent = pictures[0].convert("RGBA")
    transparent.putalpha(100)
    assert torch.equal(pipe.encode_image(np.array(transparent)), pipe.encode_image(transparent))


def test_own_images_can_be_encoded(pipe):
    pil = run(pipe, memory=torch.ones(2, MEMORY_DIM), output_type="pil").images
    expected = pipe.encode_image(pil)
    for output_type in ("np", "pt"):
        images = run(pipe, memory=torch.ones(2, MEMORY_DIM), output_type=output_type).images
        torch.testing.assert_close(pipe.encode_image(images), expected, rtol=0, atol=0)


def test_photos_are_turned_upright(pipe, tmp_path):
    lying = make_picture().transpose(PIL.Image.Transpose.ROTATE_90)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying.save(tmp_path / "photo.png", exif=exif)
    expected = pipe.encode_image(make_picture())
    assert torch.equal(pipe.encode_image(tmp_path / "photo.png"), expected)
    assert torch.equal(pipe.encode_image(PIL.Image.open(tmp_path / "photo.png")), expected)


def test_names_in_the_sources(pipe, folder, url):
    images = [
        folder / "mug.png",
        f"{url.replace('://', '://me:secret@')}/mug.png?token=secret#here",
        f"{url}/",
        make_picture(),
    ]
    make_picture().save(folder / "index.html", format="PNG")
    sources = run(pipe, image=images).sources
    assert [source[0]["image"] for source in sources] == ["mug.png", "mug.png", None, None]


def test_explain_of_a_batch(pipe):
    pipe.memory_bank = GMemMemoryBank(torch.randn(4, MEMORY_DIM, generator=seed(0)))
    batch = np.array(make_picture())[None]
    assert pipe.explain(batch, k=2) == [pipe.explain(batch[0], k=2)] == pipe.explain([make_picture()], k=2)


def test_what_cannot_be_opened_is_named(pipe, folder, url, monkeypatch):
    monkeypatch.setattr(image_inputs, "REQUEST_TIMEOUT", 0.2)
    monkeypatch.setattr(image_inputs, "MAX_DOWNLOAD_BYTES", 2**20)
    mug = folder / "mug.png"
    for image, error, message in (
        (folder / "none.png", FileNotFoundError, "none.png' does not exist"),
        ([mug, "none.png"], FileNotFoundError, "'none.png' does not exist"),
        (folder / "text.png", ValueError, "text.png' is not an image that can be read"),
        (folder, ValueError, f"{folder}' is not an image"),
        (f"{url}/none.png", ConnectionError, f"'{url}/none.png' could not be fetched: 404"),
        (f"{url}/slow.png", ConnectionError, f"'{url}/slow.png' could not be fetched: .*timed out"),
        (f"{url}/away.png", ConnectionError, f"'{url}/away.png' could not be fetched"),
        (f"{url}/endless.png", ValueError, f"'{url}/endless.png' is larger than 1 MB"),
        (f"{url}/text.png", ValueError, f"'{url}/text.png' sent is not an image"),
        ("http://127.0.0.1:1/mug.png", ConnectionError, "'http://127.0.0.1:1/mug.png' could not be fetched"),
        (f"file://{mug}", ValueError, "only http and https"),
        ("ftp://localhost/mug.png", ValueError, "only http and https"),
    ):
        with pytest.raises(error, match=message):
            run(pipe, image=image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"png", "must be a PIL image, .* got b'png'"),
        ([make_picture(), None], "must be a PIL image, .* got None"),
        ((), r"must be a PIL image, .* got \(\)"),
        (np.zeros((2, 8, 8, 5), np.uint8), r"got shape \(2, 8, 8, 5\)"),
        (np.zeros((3, 8, 8), np.uint8), r"got shape \(3, 8, 8\)"),
        (torch.zeros(8, 8, 3), r"got shape \(8, 8, 3\)"),
        (torch.zeros(0, 3, 8, 8), r"got shape \(0, 3, 8, 8\)"),
        (np.zeros(8), r"got shape \(8,\)"),
        (torch.full((3, 8, 8), 255.0), r"in \[0, 1\], got 255.0 to 255.0; values in 0..255 must be uint8"),
        (torch.full((3, 8, 8), -0.1), r"in \[0, 1\]"),
        (torch.full((3, 8, 8), torch.nan), r"in \[0, 1\], got nan"),
        (np.zeros((8, 8, 3), np.int64), "must hold uint8 or floating-point numbers, got int64"),
    ],
)
def test_what_is_no_image_is_refused(pipe, image, message):
    with pytest.raises(ValueError, match=message):
        pipe.encode_image(image)


# The preprocessing of the bank


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A DINOv2 of few channels, as on the Hub: a table of 37x37 positions, and its own processor."""
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=MEMORY_DIM, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor().save_pretrained(folder)
    return str(folder)


def photo(number=0):
    return PIL.Image.fromarray(np.random.default_rng(number).integers(0, 256, (300, 400, 3), dtype=np.uint8))


@torch.no_grad()
def reference_snippet(folder, picture):
    """What the reference does: crop, normalise, 256 -> 224 without antialiasing, timm's position table, class token."""
    pixels = torch.tensor(np.array(center_crop(picture, 256)) / 255, dtype=torch.float32).permute(2, 0, 1)[None]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = F.interpolate((pixels - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1), 224, mode="bicubic")
    model = Dinov2Model.from_pretrained(folder).eval()
    table = model.embeddings.position_embeddings
    patches = table[:, 1:].reshape(1, 37, 37, MEMORY_DIM).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(16, 16), mode="bicubic", antialias=True)
    table = torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).reshape(1, 256, MEMORY_DIM)], dim=1)
    tokens = torch.cat([model.embeddings.cls_token, model.embeddings.patch_embeddings(pixels)], dim=1) + table
    for block in model.encoder.layer:
        tokens = block(tokens)
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens
    return model.layernorm(tokens)[:, 0]


def make_reference_pipeline(**components):
    bank = convert_memory_bank(torch.randn(5, MEMORY_DIM, generator=seed(5)), **REFERENCE_ENCODER)
    return make_pipeline(make_transformer(in_channels=3), **{"memory_bank": bank, **components})


def test_a_converted_bank_prepares_images_as_the_reference_does(dinov2, tmp_path):
    pictures = [photo(0), photo(1).resize((256, 256)), photo(2).resize((600, 700))]
    expected = torch.cat([reference_snippet(dinov2, picture) for picture in pictures])
    pipe = make_reference_pipeline()
    encoder, processor = load_bank_encoder(pipe.memory_bank, dinov2)
    pipe.register_modules(image_encoder=encoder, image_processor=processor)
    torch.testing.assert_close(pipe.encode_image(pictures), expected)

    # transformers' own position table, or its own processor, would give other snippets
    pipe.save_pretrained(tmp_path / "saved")
    loaded = quiet(GMemPipeline.from_pretrained(tmp_path / "saved"))
    torch.testing.assert_close(loaded.encode_image(pictures), expected)
    own = Dinov2Model.from_pretrained(dinov2).eval()
    with torch.no_grad():
        other = own(processor(images=pictures).pixel_values).pooler_output
    assert (other - expected).abs().max() > 1e-3
    assert loaded.image_encoder.config.image_size == 224


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ({"image_processor": GMemImageProcessor()}, "position table of 16x16 .* images of 518 pixels"),
        ({"image_processor": BitImageProcessor()}, "`crop_size` is .*, not 256; .*BitImageProcessor.*, not GMem"),
        ({"image_processor": GMemImageProcessor(crop_size=512)}, "`crop_size` is 512, not 256"),
        (
            {"image_processor": GMemImageProcessor(image_std=[0.5] * 3)},
            r"`image_std` is \[0.5, 0.5, 0.5\], not \[0.229",
        ),
    ],
    ids=["table", "other class", "crop", "std"],
)
def test_another_preprocessing_than_the_banks_is_refused(dinov2, components, message, tmp_path):
    pipe = make_reference_pipeline(image_encoder=Dinov2Model.from_pretrained(dinov2), **components)
    with pytest.raises(ValueError, match=message):
        run(pipe, image=photo())
    with pytest.raises(ValueError, match="load_bank_encoder"):
        pipe.explain(photo())
    pipe.save_pretrained(tmp_path / "saved")  # what the training used is known without its bank, too
    loaded = GMemPipeline.from_pretrained(tmp_path / "saved", memory_bank=None)
    with pytest.raises(ValueError, match=message):
        loaded.encode_image(photo())


def make_recorded_bank(preprocessing, encoder="org/dino"):
    return GMemMemoryBank(torch.randn(3, MEMORY_DIM), encoder=encoder, preprocessing=preprocessing)


def test_the_preprocessing_of_transformers_is_compared(pipe):
    recorded = pipe.image_processor.to_dict()
    for kind in (recorded["image_processor_type"].removesuffix("Pil") + suffix for suffix in ("", "Pil", "Fast")):
        pipe.memory_bank = make_recorded_bank({**recorded, "image_processor_type": kind, "snippet": {"dim": 16}})
        pipe.encode_image(make_picture())
    pipe.memory_bank = make_recorded_bank({**recorded, "resample": 2})
    with pytest.raises(ValueError, match="`resample` is 3, not 2"):
        pipe.encode_image(make_picture())


def test_what_cannot_be_compared_is_said_once(pipe, warnings):
    pipe.memory_bank = make_recorded_bank({"resize": "to 256 pixels"})
    for _ in range(2):
        pipe.encode_image(make_picture())
    assert warnings.text.count("it cannot be told: {'resize': 'to 256 pixels'}") == 1


def test_the_encoder_that_a_bank_records(dinov2):
    recorded = {**BitImageProcessor(size={"shortest_edge": 32}).to_dict(), "do_center_crop": False}
    encoder, processor = load_bank_encoder(make_recorded_bank(recorded, encoder=dinov2))
    assert encoder.config.image_size == 518 and not encoder.training
    assert processor.to_dict() == recorded
    assert processor(images=photo(), return_tensors="pt").pixel_values.shape[-2:] == (32, 42)


@pytest.mark.parametrize(
    ("bank", "message"),
    [
        (make_recorded_bank(None), "does not record its encoder"),
        (
            make_recorded_bank({"image_processor_type": "BitImageProcessor"}, encoder=None),
            "does not record its encoder",
        ),
        (make_recorded_bank({"image_processor_type": "BitImageProcessor", "snippet": {"dim": 4}}), "are projections"),
    ],
)
def test_banks_whose_encoder_cannot_be_loaded(bank, message):
    with pytest.raises(ValueError, match=message):
        load_bank_encoder(bank)


def test_the_name_of_the_references_encoder(monkeypatch):
    asked = []

    def load(*arguments):
        asked.append(arguments)
        return Dinov2Model(
            Dinov2Config(hidden_size=2, num_hidden_layers=1, num_attention_heads=1, image_size=28)
        ), None

    monkeypatch.setattr("diffusers_gmem.data.snippets.load_image_encoder", load)
    bank = convert_memory_bank(torch.randn(5, 2), **REFERENCE_ENCODER)
    load_bank_encoder(bank)
    assert asked == [("facebook/dinov2-base", None, None)]
