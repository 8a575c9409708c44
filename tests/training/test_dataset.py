import math

import PIL.Image
import PIL.ImageOps
import pytest
import torch

from diffusers_gmem import GMemMemoryBank
from diffusers_gmem.data import ImageSource, center_crop, image_to_tensor
from diffusers_gmem.training import GMemTrainingDataset


NUM_IMAGES = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(NUM_IMAGES):
        image = PIL.Image.new("RGB", (8, 8), "white")
        image.putpixel((number, 0), (255, 0, 0))
        image.save(folder / f"{number}.png")
    return ImageSource(str(folder), cache_dir=str(tmp_path_factory.mktemp("cache")))


def make_dataset(source, **arguments):
    bank = GMemMemoryBank(torch.arange(1.0, NUM_IMAGES + 1).unsqueeze(1).repeat(1, 50))
    arguments = {"resolution": 8, "latent_shape": (4, 2, 2), "seed": 0, "memory_dropout": 0.4} | arguments
    return GMemTrainingDataset(source, bank, **arguments)


def test_a_sample_is_an_image_with_its_own_snippet(source):
    dataset = make_dataset(source)
    assert len(dataset) == NUM_IMAGES
    for index in range(NUM_IMAGES):
        sample = dataset[0, index]
        torch.testing.assert_close(sample["pixel_values"], image_to_tensor(center_crop(source[index], 8)))
        assert (sample["memory"] == index + 1).all()
        assert sample["noise"].shape == sample["posterior_noise"].shape == (4, 2, 2)
        assert 0 < sample["timestep"] < 1


def test_draws_are_a_function_of_seed_epoch_and_index(source):
    def draws(dataset, key):
        sample = dataset[key]
        return {name: sample[name] for name in ("noise", "posterior_noise", "timestep", "memory_dropout_mask")}

    dataset = make_dataset(source)
    reference = draws(dataset, (2, 3))
    dataset[0, 0]
    torch.manual_seed(99)
    for name, tensor in draws(make_dataset(source), (2, 3)).items():
        assert torch.equal(tensor, reference[name])
    for other in (draws(dataset, (1, 3)), draws(dataset, (2, 4)), draws(make_dataset(source, seed=1), (2, 3))):
        assert not torch.equal(other["noise"], reference["noise"])
        assert not torch.equal(other["timestep"], reference["timestep"])
    # One setting does not move the draws of another
    torch.testing.assert_close(draws(make_dataset(source, memory_drop_prob=0.5), (2, 3)), reference)


def test_the_dropout_mask_drops_entries_at_its_rate(source):
    dataset = make_dataset(source)
    masks = torch.stack([dataset[epoch, 0]["memory_dropout_mask"] for epoch in range(200)])
    n = masks.numel()
    assert abs(masks.float().mean().item() - 0.6) < 5 * math.sqrt(0.4 * 0.6 / n)


def test_whole_snippets_become_the_null_memory_at_their_rate(source):
    dataset = make_dataset(source, memory_drop_prob=0.25)
    memories = torch.stack([dataset[epoch, 1]["memory"] for epoch in range(400)])
    dropped = (memories == 0).all(dim=1)
    assert (dropped | (memories == 2).all(dim=1)).all()
    assert abs(dropped.float().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 400)


def test_a_mirrored_image_has_the_snippet_of_the_mirrored_image(source):
    flipped_bank = GMemMemoryBank(-torch.arange(1.0, NUM_IMAGES + 1).unsqueeze(1).repeat(1, 50))
    dataset = make_dataset(source, flipped_memory_bank=flipped_bank)
    seen = set()
    for epoch in range(40):
        sample = dataset[epoch, 2]
        flipped = bool(sample["memory"][0] < 0)
        image = PIL.ImageOps.mirror(source[2]) if flipped else source[2]
        torch.testing.assert_close(sample["pixel_values"], image_to_tensor(image))
        seen.add(flipped)
    assert seen == {True, False}


def test_a_bank_of_another_size_is_refused(source):
    with pytest.raises(ValueError, match="6 images, got 2"):
        GMemTrainingDataset(source, GMemMemoryBank(torch.ones(2, 3)), 8, (4, 2, 2), 0, 0.4)


def test_cached_images_are_the_same(source):
    plain, cached = make_dataset(source), make_dataset(source, cache_images=True)
    for key in [(0, 1), (1, 1), (0, 4)]:
        torch.testing.assert_close(cached[key], plain[key], rtol=0, atol=0)
    assert sorted(cached.cache) == [1, 4]
