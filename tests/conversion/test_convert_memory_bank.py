# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from reference_cases import REFERENCE_DIR, assert_matches, case_tensors, reference_cases

from diffusers_gmem import GMemMemoryBank
from diffusers_gmem.conversion import REFERENCE_ENCODER, convert_memory_bank, load_checkpoint


def low_rank_bank(count=7, dim=5, rank=3):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(count, dim), full_matrices=False)
    parts = {"C": u[:, :rank] * s[:rank].sqrt(), "M": v.T[:, :rank] * s[:rank].sqrt(), "S": s[:rank]}
    return parts | {"mean": torch.randn(dim), "latent_dim": rank, "feature_dim": dim}


@pytest.mark.parametrize("case", reference_cases("banks"), ids=lambda case: case["id"])
def test_reference(case, tmp_path):
    tensors = case_tensors(case)
    full = convert_memory_bank(load_checkpoint(REFERENCE_DIR / case["full"]))
    assert torch.equal(full[:], tensors["full"])
    assert full.encoder is None and full.preprocessing is None

    low_rank = convert_memory_bank(load_checkpoint(REFERENCE_DIR / case["dmd"]))
    assert low_rank.dim == case["options"]["feature_dim"]
    assert low_rank.rank == min(case["options"]["latent_dim"], *tensors["full"].shape)
    assert_matches(case, "dmd_reconstruction", low_rank[:], tensors["dmd_reconstruction"])

    low_rank.save_pretrained(tmp_path)
    again = GMemMemoryBank.from_pretrained(tmp_path)
    assert again.rank == low_rank.rank and torch.equal(again[:], low_rank[:])


@pytest.mark.parametrize("bank", [torch.randn(4, 3), low_rank_bank()], ids=["full", "low rank"])
def test_what_the_file_does_not_say(bank):
    labels = list(range(len(bank) if isinstance(bank, torch.Tensor) else len(bank["C"])))
    converted = convert_memory_bank(bank, labels=labels, source_dataset="imagenet", **REFERENCE_ENCODER)
    assert converted.labels.tolist() == labels
    assert (converted.encoder, converted.source_dataset) == (REFERENCE_ENCODER["encoder"], "imagenet")
    assert converted.preprocessing == REFERENCE_ENCODER["preprocessing"]
    assert not converted.normalized


def test_a_rank_above_the_possible_is_what_the_tensors_have():
    assert convert_memory_bank(low_rank_bank(rank=3) | {"latent_dim": 64}).rank == 3


def test_other_files_are_refused():
    with pytest.raises(TypeError, match="must be a tensor or a dict of a low-rank bank, got <class 'list'>"):
        convert_memory_bank([torch.zeros(3)])
    with pytest.raises(ValueError, match="has the entries C, M, S, mean, latent_dim, feature_dim, got C, M, extra"):
        convert_memory_bank({"C": torch.zeros(2, 1), "M": torch.zeros(3, 1), "extra": 1})
    for name, value in {
        "C": torch.zeros(7, 2),
        "M": torch.zeros(4, 3),
        "S": torch.zeros(2),
        "mean": torch.zeros(4),
        "feature_dim": 6,
    }.items():
        with pytest.raises(ValueError, match="parts of the low-rank bank do not fit together"):
            convert_memory_bank(low_rank_bank() | {name: value})
