import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_gmem.data import center_crop, image_to_tensor, paper_image_processor
from diffusers_gmem.data.image_processor import GMemImageProcessor


@pytest.fixture(scope="module")
def image():
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))


def reference(image, resolution):
    """As the public code writes it: crop, [-1, 1], back to [0, 1], normalise, interpolate."""
    pixels = (image_to_tensor(center_crop(image, resolution))[None] + 1) / 2
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (pixels - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    return torch.nn.functional.interpolate(pixels, 224 * (resolution // 256), mode="bicubic")


@pytest.mark.parametrize("resolution", [256, 512])
def test_it_is_the_papers_preprocessing(image, resolution):
    pixel_values = paper_image_processor(resolution)(images=[image, image], return_tensors="pt").pixel_values
    assert pixel_values.shape == (2, 3, 224 * (resolution // 256), 224 * (resolution // 256))
    torch.testing.assert_close(pixel_values[1:], reference(image, resolution))


def test_pictures_arrays_and_tensors_give_the_same(image):
    processor = paper_image_processor(256)
    expected = processor(images=image).pixel_values
    crop = torch.from_numpy(np.array(center_crop(image, 256))).permute(2, 0, 1)
    torch.testing.assert_close(processor(images=np.array(image)).pixel_values, expected)
    torch.testing.assert_close(processor(images=crop).pixel_values, expected)
    torch.testing.assert_close(processor(images=[crop / 255], do_rescale=False).pixel_values, expected)


def test_it_is_saved_and_loaded(image, tmp_path):
    processor = GMemImageProcessor(crop_size=32, size=28, image_mean=[0.5] * 3)
    processor.save_pretrained(tmp_path)
    loaded = GMemImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert torch.equal(loaded(images=image).pixel_values, processor(images=image).pixel_values)


def test_wrong_arguments_are_refused(image):
    with pytest.raises(ValueError, match="at least 256, got 128"):
        paper_image_processor(128)
    with pytest.raises(ValueError, match=r"\(3, 256, 256\), got \(3, 8, 8\)"):
        paper_image_processor(256)(images=torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="must be 'pt', got 'np'"):
        paper_image_processor(256)(images=image, return_tensors="np")
