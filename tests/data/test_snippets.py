import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from diffusers_gmem.data import ImageSource, compute_snippets, load_image_encoder


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=7
    )
    Dinov2Model(config).save_pretrained(folder)
    processor = BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(5):
        PIL.Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return ImageSource(str(folder), cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_a_snippet_is_the_normalised_class_token(encoder_folder, source):
    encoder, processor = load_image_encoder(str(encoder_folder))
    assert not encoder.training
    snippets = compute_snippets(source, encoder, processor, batch_size=2)
    assert snippets.shape == (5, 16)
    for index in range(5):
        pixel_values = processor(images=source[index], return_tensors="pt").pixel_values
        with torch.no_grad():
            class_token = encoder(pixel_values).last_hidden_state[0, 0]
        torch.testing.assert_close(snippets[index], class_token)


def test_flipped_snippets_are_those_of_the_mirrored_images(encoder_folder, source):
    encoder, processor = load_image_encoder(str(encoder_folder))
    flipped = compute_snippets(source, encoder, processor, flip=True)
    pixel_values = processor(images=PIL.ImageOps.mirror(source[3]), return_tensors="pt").pixel_values
    with torch.no_grad():
        torch.testing.assert_close(flipped[3], encoder(pixel_values).pooler_output[0])
    assert not torch.allclose(flipped, compute_snippets(source, encoder, processor))


def test_the_built_in_encoder_has_no_revisions():
    with pytest.raises(ValueError, match="has no revisions, got 'v2'"):
        load_image_encoder("efficientnet-lite0", revision="v2")


def test_the_built_in_encoder_needs_no_download(source):
    encoder, processor = load_image_encoder("efficientnet-lite0")
    snippets = compute_snippets(source, encoder, processor)
    assert snippets.shape == (5, 1280)
    assert snippets.isfinite().all()
    # A real, pretrained network: the same picture a little smaller stays nearest to itself
    image = source[1]
    pixel_values = processor(images=image.resize((24, 32)), return_tensors="pt").pixel_values
    with torch.no_grad():
        query = encoder(pixel_values).pooler_output
    assert torch.nn.functional.cosine_similarity(query, snippets).argmax() == 1
