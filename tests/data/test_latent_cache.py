import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusers_gmem.data import LatentCache
from diffusers_gmem.data.latent_cache import FORMAT_VERSION


SIZES = (5, 3, 6)


def write_cache(folder, sizes=SIZES, latent_size=2, **more):
    """Every entry of a tensor is the number of its image, negative for the flipped view."""
    shards, start = [], 0
    for size in sizes:
        numbers = torch.arange(start, start + size)
        values = torch.stack([numbers, -numbers], dim=1)
        tensors = {
            "latents_mean": values[:, :, None, None, None].repeat(1, 1, 3, latent_size, latent_size).half(),
            "snippets": values[:, :, None].repeat(1, 1, 4).float(),
            "alignment_features": values[:, :, None, None].repeat(1, 1, 2, 3).bfloat16(),
            "labels": numbers % 3,
            "latent_moments": torch.zeros(2, 2, 3, dtype=torch.float64),
        }
        path = folder / f"latents-{len(shards)}.safetensors"
        save_file(tensors, path)
        shards.append([path.name, size, path.stat().st_size, ""])
        start += size
    config = {"_class_name": "LatentCache", "format_version": FORMAT_VERSION, "shards": shards} | more
    (folder / "config.json").write_text(json.dumps(config))


def test_any_rows_are_read_in_any_order(tmp_path):
    write_cache(tmp_path)
    cache = LatentCache.from_pretrained(tmp_path)
    assert len(cache) == sum(SIZES)
    assert sorted(cache.tensor_names) == ["alignment_features", "latents_mean", "snippets"]
    assert cache.labels.tolist() == [number % 3 for number in range(14)]
    indices = torch.tensor([13, 0, 4, 5, 5, 8, 7])
    flipped = torch.tensor([False, True, False, True, False, True, False])
    expected = [13, 0, 4, -5, 5, -8, 7]
    for name, dtype, shape in (
        ("latents_mean", torch.float16, (3, 2, 2)),
        ("snippets", torch.float32, (4,)),
        ("alignment_features", torch.bfloat16, (2, 3)),
    ):
        rows = cache.read(name, indices, flipped)
        assert rows.dtype == dtype
        assert rows.shape == (7, *shape) and cache.shape(name) == shape
        assert rows.flatten(1).float().unique(dim=1).flatten().tolist() == expected


def test_a_shard_may_be_empty(tmp_path):
    write_cache(tmp_path, sizes=(0, 2, 0, 1))
    cache = LatentCache.from_pretrained(tmp_path)
    rows = cache.read("snippets", torch.arange(3), torch.zeros(3, dtype=torch.bool))
    assert rows[:, 0].tolist() == [0, 1, 2]


def test_reading_needs_no_memory_of_the_size_of_the_cache(tmp_path):
    def anonymous_bytes():
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["RssAnon"].split()[0]) * 1024

    write_cache(tmp_path, sizes=(16,) * 8, latent_size=256)  # 100 MB
    before = anonymous_bytes()
    cache = LatentCache.from_pretrained(tmp_path)
    most = 0
    for start in range(0, len(cache), 4):
        cache.read("latents_mean", torch.arange(start, start + 4), torch.zeros(4, dtype=torch.bool))
        most = max(most, anonymous_bytes() - before)
    assert most < 20e6


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no latent cache in"):
        LatentCache.from_pretrained(tmp_path)

    write_cache(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    shard = tmp_path / "latents-1.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"latents-1\.safetensors has {len(content) - 1} bytes"):
        LatentCache.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"latents-1\.safetensors is missing"):
        LatentCache.from_pretrained(tmp_path)
    shard.write_bytes(content)

    def write_config(**changes):
        changed = {name: value for name, value in (config | changes).items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(changed))

    write_config(shards=[["latents-1.safetensors", 4, len(content), ""]])
    with pytest.raises(ValueError, match="has 3 rows, but config.json says 4"):
        LatentCache.from_pretrained(tmp_path)
    write_config(shards=None)
    with pytest.raises(ValueError, match="is not complete"):
        LatentCache.from_pretrained(tmp_path)
    write_config(_class_name="GMemMemoryBank")
    with pytest.raises(ValueError, match="does not describe a LatentCache"):
        LatentCache.from_pretrained(tmp_path)
