# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0
"""The reference's banks and interpolations. Where it is wrong, the tests say what is right instead."""

import pytest
import torch
from reference_cases import case_tensors, reference_cases

from diffusers_gmem.models.memory_bank import GMemMemoryBank
from diffusers_gmem.models.snippet_mixing import interpolate_snippets


def by_id(kind):
    return pytest.mark.parametrize("case", reference_cases(kind), ids=lambda case: case["id"])


def assert_close(case, actual, expected, tolerance="reconstruction"):
    torch.testing.assert_close(actual, expected, **case["tolerance"][tolerance])


def interpolations(case, bank):
    """The reference's bank weighs the first snippet with alpha."""
    return [
        bank.mix([item["i"], item["j"]], [item["alpha"], 1 - item["alpha"]], normalize=False)
        for item in case["options"]["interpolate"]
    ]


@by_id("memory_bank")
def test_full_bank(case):
    expected = case_tensors(case)
    bank = GMemMemoryBank(expected["bank"])
    assert_close(case, torch.stack(interpolations(case, bank)), expected["full_get_interpolated"])
    extended = bank.extend(expected["snippets"][: len(expected["full_add_exact"])])
    assert torch.equal(extended[len(bank) :], expected["full_add_exact"])
    assert len(extended) == case["full_capacity_after"]


@by_id("memory_bank")
def test_low_rank_bank(case):
    expected = case_tensors(case)
    bank = GMemMemoryBank.from_low_rank(expected["C"], expected["M"], expected["mean"])
    assert bank.shape == expected["bank"].shape and bank.rank == expected["C"].shape[1]
    assert_close(case, bank[:], expected["reconstruction"])
    assert_close(case, bank[case["options"]["get"]], expected["get"])
    # Snippets, where the reference returns coefficients
    mixed = torch.stack(interpolations(case, bank))
    assert_close(case, mixed, expected["get_interpolated_snippet"])

    extended = bank.extend(expected["snippets"])
    assert_close(case, extended[len(bank) :], expected["add_exact"])
    coefficients = extended.coefficients[len(bank) :]
    assert_close(case, coefficients, expected["add_exact_coeff"], "C, M, coefficients (after fixing signs)")
    extended = extended.extend(mixed)
    assert_close(case, extended[-len(mixed) :], expected["add_interpolated"])
    assert len(extended) == case["capacity_after"]


@by_id("memory_bank")
def test_compress(case):
    expected = case_tensors(case)
    # The reference also accepts more directions than the snippets vary in; the others are rounding noise
    rank = min(expected["C"].shape[1], len(expected["bank"]) - 1)
    bank = GMemMemoryBank(expected["bank"]).compress(rank=rank)
    assert bank.rank == rank and bank.shape == expected["bank"].shape
    assert_close(case, bank[:], expected["reconstruction"])
    assert_close(case, bank.mean, expected["mean"])
    assert_close(case, bank.basis.square().sum(dim=0), expected["S"][:rank], "S")
    signs = (bank.basis * expected["M"][:, :rank]).sum(dim=0).sign()
    for actual, name in ((bank.basis, "M"), (bank.coefficients, "C")):
        assert_close(case, actual * signs, expected[name][:, :rank], "C, M, coefficients (after fixing signs)")
    assert bank.reconstruction_error == pytest.approx(case["reconstruction_error"], rel=1e-4)


@by_id("interpolation")
def test_interpolation(case):
    expected = case_tensors(case)
    a, b, out = expected["a"], expected["b"], expected["out"]
    method = {"spherical": "slerp"}.get(case["options"]["method"], case["options"]["method"])
    torch.testing.assert_close(torch.linspace(0, 1, len(out)), expected["alphas"])
    bank = GMemMemoryBank(torch.stack([b, a]))
    if method == "mask":
        first, second, alphas = (tensor.double() for tensor in (a, b, expected["alphas"]))
        actual = interpolate_snippets(first, second, alphas, method, expected["mask"].bool()).float()
    elif method == "slerp" and (a + b).norm() < 1e-6 * a.norm():
        with pytest.raises(ValueError, match="opposite"):
            bank.interpolate(1, 0, len(out), method)
        return
    else:
        actual = bank.interpolate(1, 0, len(out), method)
        assert torch.equal(bank.interpolate(a, b, len(out), method), actual)
    if method == "slerp" and torch.equal(a, b):
        out = (a / a.norm()).expand_as(out)  # the zero vector in the reference
    assert_close(case, actual, out, "out")
