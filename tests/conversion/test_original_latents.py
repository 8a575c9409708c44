# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from diffusers import AutoencoderKL
from reference_cases import REFERENCE_DIR, assert_matches, case_tensors, reference_cases
from safetensors.torch import load_file, save_file

from diffusers_gmem.conversion import OriginalLatents, load_checkpoint
from diffusers_gmem.models.latent_normalization import normalize_latents


DATASETS = reference_cases("dataset")


def write_shard(path, count, start=0, leave_out=()):
    rows = torch.arange(start, start + count, dtype=torch.float32)
    tensors = {"labels": rows.to(torch.int64) % 3}
    for number, (name, shape) in enumerate(
        {"latents": (2, 1, 1), "representations": (4, 3), "cls_tokens": (3,)}.items()
    ):
        values = rows.view(-1, *[1] * len(shape)).expand(count, *shape) + 100 * number
        tensors |= {name: values.contiguous(), f"{name}_flip": -values}
    save_file({name: tensor for name, tensor in tensors.items() if name not in leave_out}, path)


@pytest.mark.parametrize("case", DATASETS, ids=lambda case: case["id"])
def test_reference(case):
    folder, tensors, options = REFERENCE_DIR / case["folder"], case_tensors(case), case["options"]
    stats = load_checkpoint(folder / "latents_stats.pt")
    statistics = {
        f"latents_{name}": stats[name].flatten().tolist() for name in ("mean", "std") if options["latent_norm"]
    }
    vae_config = AutoencoderKL(
        block_out_channels=(32,), scaling_factor=options["latent_multiplier"], **statistics
    ).config

    data = OriginalLatents(folder)
    assert len(data) == case["length"]
    for item in options["items"]:
        kinds = ("latents", "representations", "cls_tokens")
        stem = f"item_{item['index']}_{''.join(item[kind][0] for kind in kinds)}"
        latents, features, snippet = (
            data[item["index"]][kind + ("_flip" if item[kind] == "flip" else "")] for kind in kinds
        )
        torch.testing.assert_close(
            normalize_latents(latents[None], vae_config)[0], tensors[f"{stem}/latent"], rtol=1e-5, atol=1e-6
        )
        assert torch.equal(features, tensors[f"{stem}/representation"])
        assert torch.equal(snippet, tensors[f"{stem}/cls"])
        assert data[item["index"]]["labels"] == tensors[f"{stem}/label"]


@pytest.mark.parametrize("case", reference_cases("latents_stats"), ids=lambda case: case["id"])
def test_reference_statistics(case):
    tensors, stats = case_tensors(case), load_checkpoint(REFERENCE_DIR / case["pt"])
    assert stats.keys() == {"mean", "std"}
    data = OriginalLatents((REFERENCE_DIR / case["pt"]).parent)
    latents = torch.stack([data[index]["latents"] for index in range(len(data))])
    computed = {"mean": latents.mean(dim=(0, 2, 3), keepdim=True), "std": latents.std(dim=(0, 2, 3), keepdim=True)}
    for name in ("mean", "std"):
        assert_matches(case, name, stats[name], tensors[name])
        assert_matches(case, name, computed[name], tensors[name])


@pytest.mark.parametrize("case", DATASETS, ids=lambda case: case["id"])
def test_bank_of_the_snippets(case):
    folder = REFERENCE_DIR / case["folder"]
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    bank = OriginalLatents(folder).memory_bank(encoder="some/encoder")
    assert torch.equal(bank[:], torch.cat([shard["cls_tokens"] for shard in shards]))
    assert torch.equal(bank.labels, torch.cat([shard["labels"] for shard in shards]))
    assert bank.encoder == "some/encoder"


def test_every_item_comes_from_its_shard(tmp_path):
    write_shard(tmp_path / "latents_rank01_shard000.safetensors", 2, start=4)
    write_shard(tmp_path / "latents_rank00_shard001.safetensors", 1, start=3)
    write_shard(tmp_path / "latents_rank00_shard000.safetensors", 3)
    (tmp_path / "latents_stats.pt").touch()
    data = OriginalLatents(tmp_path)
    assert len(data) == 6
    for index in range(6):
        item = data[index]
        assert item["latents"].tolist() == [[[index]], [[index]]]
        assert item["cls_tokens_flip"].tolist() == [-200.0 - index] * 3
        assert item["representations"].shape == (4, 3) and item["labels"].shape == ()
        assert item["labels"] == index % 3
    for index in (6, -1):
        with pytest.raises(IndexError, match=rf"`index` must be in 0..5, got {index}"):
            data[index]
    assert len(list(data)) == 6


def test_folders_that_are_not_latent_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="no latent shards"):
        OriginalLatents(tmp_path)
    write_shard(tmp_path / "a.safetensors", 2, leave_out=("labels", "cls_tokens_flip"))
    with pytest.raises(ValueError, match=r"a\.safetensors is not a latent shard: it has no cls_tokens_flip, labels"):
        OriginalLatents(tmp_path)
    write_shard(tmp_path / "a.safetensors", 2)
    save_file(load_file(tmp_path / "a.safetensors") | {"labels": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors has different numbers of rows: .*'labels': 3"):
        OriginalLatents(tmp_path)
