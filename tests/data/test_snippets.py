import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from transformers import BitImageProcessorPil, CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from diffusers_gmem.data import (
    ImageSource,
    compute_snippets,
    encode_pixel_values,
    load_image_encoder,
    resize_patch_features,
)


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


def test_patch_features_are_the_patches_hidden_states(encoder_folder):
    encoder, _ = load_image_encoder(str(encoder_folder))
    pixel_values = torch.randn(2, 3, 28, 35)
    snippets, features = encode_pixel_values(encoder, pixel_values, patch_features=True)
    with torch.no_grad():
        output = encoder(pixel_values)
    torch.testing.assert_close(snippets, output.pooler_output)
    torch.testing.assert_close(features, output.last_hidden_state[:, 1:])  # after the class token
    assert features.shape == (2, 4 * 5, 16)
    assert encode_pixel_values(encoder, pixel_values)[1] is None


def test_of_a_model_of_images_and_texts_the_vision_half_is_taken(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1},
        vision_config=sizes | {"image_size": 28, "patch_size": 7},
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    BitImageProcessorPil(size={"shortest_edge": 28}).save_pretrained(tmp_path)
    encoder, _ = load_image_encoder(str(tmp_path))
    pixel_values = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = model.vision_model(pixel_values).pooler_output
    torch.testing.assert_close(encode_pixel_values(encoder, pixel_values)[0], expected)


def test_missing_weights_are_named(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=28, patch_size=7), add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"partly random.*pooler\.dense"):
        load_image_encoder(str(tmp_path))


def test_features_are_needed(source):
    encoder, processor = load_image_encoder("efficientnet-lite0")
    pixel_values = processor(images=source[0], return_tensors="pt").pixel_values
    assert encode_pixel_values(encoder, pixel_values)[0].shape == (1, 1280)
    with pytest.raises(ValueError, match="need a vision transformer, got EfficientNetModel"):
        encode_pixel_values(encoder, pixel_values, patch_features=True)


def test_patch_features_are_brought_to_another_grid():
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    features = torch.stack([row.flatten(), column.flatten()], dim=-1)[None]
    assert resize_patch_features(features, 16) is features
    resized = resize_patch_features(features, 4)
    # The middles of the four quarters
    torch.testing.assert_close(resized[0], torch.tensor([[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]))
