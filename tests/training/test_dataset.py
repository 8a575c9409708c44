import json
import math

import PIL.Image
import PIL.ImageOps
import pytest
import torch
from safetensors.torch import save_file

from diffusers_gmem import GMemMemoryBank
from diffusers_gmem.data import ImageSource, LatentCache, center_crop, image_to_tensor
from diffusers_gmem.data.latent_cache import FORMAT_VERSION
from diffusers_gmem.training import GMemTrainingDataset, TrainingBatchSampler
from diffusers_gmem.training.dataset import GMemLatentTrainingDataset


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


def test_flips_are_independent_where_asked_for(source):
    flipped_bank = GMemMemoryBank(-torch.arange(1.0, NUM_IMAGES + 1).unsqueeze(1).repeat(1, 50))
    paired = make_dataset(source, flipped_memory_bank=flipped_bank)
    independent = make_dataset(source, flipped_memory_bank=flipped_bank, independent_flips=True)
    seen = set()
    for epoch in range(60):
        sample, other = paired[epoch, 2], independent[epoch, 2]
        torch.testing.assert_close(sample["noise"], other["noise"])
        torch.testing.assert_close(sample["pixel_values"], other["pixel_values"])
        seen.add((torch.equal(other["pixel_values"], image_to_tensor(source[2])), bool(other["memory"][0] > 0)))
    assert len(seen) == 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """10 images in 3 shards: entry (row, view) of every tensor is 10 * row + view."""
    folder = tmp_path_factory.mktemp("cache")
    shards = []
    for start, stop in ((0, 4), (4, 9), (9, 10)):
        values = 10.0 * torch.arange(start, stop)[:, None] + torch.arange(2)
        tensors = {
            "latents_mean": values[..., None, None, None].repeat(1, 1, 3, 2, 2).half(),
            "latents_logvar": torch.full((stop - start, 2, 3, 2, 2), -2.0).half(),
            "snippets": values[..., None].repeat(1, 1, 5) + 1000,
            "alignment_features": values[..., None, None].repeat(1, 1, 4, 6).bfloat16(),
        }
        path = folder / f"latents-{start}.safetensors"
        save_file(tensors, path)
        shards.append([path.name, stop - start, path.stat().st_size, ""])
    config = {"_class_name": "LatentCache", "format_version": FORMAT_VERSION, "shards": shards}
    (folder / "config.json").write_text(json.dumps(config))
    return LatentCache.from_pretrained(folder)


def latent_dataset(cache, **arguments):
    return GMemLatentTrainingDataset(cache, **({"seed": 0, "memory_dropout": 0.4} | arguments))


def test_a_batch_of_latents_is_sampled_from_the_posterior(cache):
    keys = [(0, 9), (0, 3), (1, 3), (0, 4)]
    batch = latent_dataset(cache).__getitems__(keys)
    assert batch["latents"].dtype == batch["memory"].dtype == torch.float32
    draws = latent_dataset(cache).draws
    for k, (epoch, index) in enumerate(keys):
        expected = 10 * index + math.exp(-1) * draws(epoch, index).posterior_noise
        torch.testing.assert_close(batch["latents"][k], expected)
        assert (batch["memory"][k] == 1000 + 10 * index).all()
        assert torch.equal(batch["noise"][k], draws(epoch, index).noise)
        assert torch.equal(batch["timestep"][k], draws(epoch, index).timestep)
        assert torch.equal(batch["memory_dropout_mask"][k], draws(epoch, index).memory_dropout_mask)
    assert "alignment_features" not in batch


def test_a_sample_is_the_same_in_any_batch(cache):
    dataset = latent_dataset(cache, random_flip=True, memory_drop_prob=0.3, alignment=True)
    keys = [(epoch, index) for epoch in range(2) for index in range(10)]
    batch = dataset.__getitems__(keys)
    for k, key in enumerate(keys):
        for name, tensor in dataset[key].items():
            assert torch.equal(tensor, batch[name][k]), name


def test_draws_are_those_of_training_on_images(cache, source):
    arguments = {"memory_drop_prob": 0.2, "timestep_mean": 0.1, "timestep_std": 0.9}
    from_images = GMemTrainingDataset(
        source, GMemMemoryBank(torch.ones(NUM_IMAGES, 5)), 8, (3, 2, 2), 7, 0.4, **arguments
    )
    from_latents = latent_dataset(cache, seed=7, **arguments)
    dropped = set()
    for key in [(epoch, index) for epoch in range(5) for index in range(NUM_IMAGES)]:
        one, other = from_images[key], from_latents[key]
        for name in ("noise", "timestep", "memory_dropout_mask"):
            assert torch.equal(one[name], other[name])
        assert (one["memory"] == 0).all() == (other["memory"] == 0).all()
        dropped.add(bool((other["memory"] == 0).all()))
    assert dropped == {True, False}


@pytest.mark.parametrize("independent_flips", [False, True])
def test_views_are_paired_unless_asked_for(cache, independent_flips):
    dataset = latent_dataset(cache, random_flip=True, independent_flips=independent_flips, alignment=True)
    batch = dataset.__getitems__([(epoch, 5) for epoch in range(200)])
    views = torch.stack(
        [(batch["memory"][:, 0] - 1050).long(), (batch["alignment_features"][:, 0, 0].float() - 50).long()], dim=1
    )
    assert set(views.flatten().tolist()) == {0, 1}
    assert (views[:, 0] == views[:, 1]).all() != independent_flips
    for column in views.T:
        assert abs(column.float().mean() - 0.5) < 5 * 0.5 / math.sqrt(200)
    # The view of the latents: their mean less the noise that was added
    noise = torch.stack([dataset.draws(epoch, 5).posterior_noise for epoch in range(200)]) * math.exp(-1)
    latent_views = (batch["latents"] - noise - 50).mean(dim=(1, 2, 3)).round().long()
    assert (latent_views == views[:, 0]).all() != independent_flips


def test_workers_do_not_change_the_batches(cache):
    def batches(num_workers):
        dataset = latent_dataset(cache, random_flip=True)
        sampler = TrainingBatchSampler(10, 4, seed=0, first_step=0, num_steps=6, block_size=3)
        loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=dataset.collate
        )
        return list(loader)

    for one, other in zip(batches(0), batches(2), strict=True):
        assert one["latents"].shape == (4, 3, 2, 2)
        for name in one:
            assert torch.equal(one[name], other[name])


def test_missing_alignment_features_are_named(cache, tmp_path):
    tensors = {"latents_mean": torch.zeros(1, 2, 3, 2, 2), "snippets": torch.zeros(1, 2, 5)}
    save_file(tensors, tmp_path / "a.safetensors")
    shards = [["a.safetensors", 1, (tmp_path / "a.safetensors").stat().st_size, ""]]
    config = {"_class_name": "LatentCache", "format_version": FORMAT_VERSION, "shards": shards}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = LatentCache.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no alignment features"):
        latent_dataset(plain, alignment=True)
    # A deterministic autoencoder has no posterior to sample from
    assert (latent_dataset(plain)[0, 0]["latents"] == 0).all()
