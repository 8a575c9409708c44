# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
import torch.nn.functional as F

from diffusers_gmem.models.memory_bank import GMemMemoryBank


METHODS = ["linear", "slerp", "concat", "mask"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_bank(dtype=torch.float32, count=10, dim=7):
    return GMemMemoryBank((3 * torch.randn(count, dim, generator=generator())).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_interpolations_are_unit_snippets(method, dtype):
    bank = make_bank(dtype)
    snippets = bank.interpolate(3, -2, 5, method, generator())
    assert snippets.shape == (5, 7) and snippets.dtype == torch.float32
    torch.testing.assert_close(snippets.norm(dim=1), torch.ones(5))
    for first, second in ((bank[3], 8), (torch.tensor(3), bank[8].float()), (bank[3].double(), bank[8])):
        torch.testing.assert_close(bank.interpolate(first, second, 5, method, generator()), snippets)
    if method in ("linear", "slerp"):
        torch.testing.assert_close(snippets[0], F.normalize(bank[3].float(), dim=0))
        torch.testing.assert_close(snippets[-1], F.normalize(bank[8].float(), dim=0))
        torch.testing.assert_close(bank.interpolate(8, 3, 5, method), snippets.flip(0))
        torch.testing.assert_close(bank.interpolate(3, 8, 1, method)[0], snippets[0])


def test_slerp_has_constant_speed_whatever_the_lengths():
    bank = make_bank()
    snippets = bank.interpolate(0.1 * bank[0], 9 * bank[1], 11, "slerp")
    angle = F.cosine_similarity(bank[0], bank[1], dim=0).acos()
    steps = (snippets[1:] * snippets[:-1]).sum(dim=1).acos()
    torch.testing.assert_close(steps, (angle / 10).expand(10), rtol=1e-3, atol=0)


def test_slerp_of_neighbours():
    bank = make_bank()
    first = F.normalize(bank[0], dim=0)
    across = F.normalize(bank[1] - (bank[1] @ first) * first, dim=0)
    for angle in (0.0, 1e-30, 1e-7, 1e-5, 1e-3):
        snippets = bank.interpolate(first, first + math.tan(angle) * across, 5, "slerp")
        expected = first + torch.linspace(0, 1, 5)[:, None] * math.tan(angle) * across
        torch.testing.assert_close(snippets, F.normalize(expected, dim=1), rtol=0, atol=1e-7)


def test_concat_takes_the_smaller_half_of_the_first():
    bank = GMemMemoryBank(torch.tensor([[1.0] * 5, [2.0] * 5]))
    for snippet in bank.interpolate(0, 1, 3, "concat"):
        torch.testing.assert_close(snippet, F.normalize(torch.tensor([1.0, 1, 2, 2, 2]), dim=0))


def test_mask_is_drawn_anew_and_seeded():
    bank = GMemMemoryBank(torch.stack([torch.ones(500), -torch.ones(500)]))
    snippets = bank.interpolate(0, 1, 4, "mask", generator(3))
    assert torch.equal(snippets, bank.interpolate(0, 1, 4, "mask", generator(3)))
    assert not torch.equal(snippets, bank.interpolate(0, 1, 4, "mask", generator(4)))
    taken = snippets > 0
    assert len(taken.unique(dim=0)) == 4
    assert taken.float().mean().item() == pytest.approx(0.5, abs=0.05)  # standard deviation 0.011


def test_mix():
    bank = make_bank()
    expected = 0.2 * bank[1] + 0.5 * bank[4] + 0.3 * bank[-1]
    torch.testing.assert_close(bank.mix([1, 4, 9], [0.2, 0.5, 0.3], normalize=False), expected)
    unit = bank.mix([1, 4, 9], [0.2, 0.5, 0.3])
    torch.testing.assert_close(unit, F.normalize(expected, dim=0))
    for snippets in (torch.tensor([1, 4, 9]), bank[[1, 4, 9]], [1, bank[4].double(), torch.tensor(9)]):
        torch.testing.assert_close(bank.mix(snippets, torch.tensor([0.2, 0.5, 0.3])), unit)
    torch.testing.assert_close(bank.mix([0, 1], [0.75, 0.25]), bank.interpolate(0, 1, 5)[1])


def test_attribute_arithmetic():
    attribute = torch.tensor([0.0, 0, 1, 0, 0, 0, 0])
    bank = make_bank().extend(make_bank()[0] + attribute)
    # with the attribute - without it + another without it
    torch.testing.assert_close(bank.mix([10, 0, 5], [1, -1, 1], normalize=False), bank[5] + attribute)


def test_what_cancels_out_is_refused():
    bank = make_bank().extend(-make_bank()[2]).extend(torch.zeros(7))
    with pytest.raises(ValueError, match="cancel"):
        bank.interpolate(2, 10, 3)
    assert bank.interpolate(2, 10, 4).isfinite().all()  # beside the middle there is a direction
    with pytest.raises(ValueError, match="opposite"):
        bank.interpolate(2, 10, 4, "slerp")
    with pytest.raises(ValueError, match=r"\[0.5, 0.5\].*cancel"):
        bank.mix([2, 10], [0.5, 0.5])
    for method in METHODS:
        with pytest.raises(ValueError, match="cancel|zero"):
            bank.interpolate(11, 11, 2, method)


def test_a_row_of_a_batch_stands_for_a_snippet():
    bank = make_bank()
    assert torch.equal(bank.interpolate(bank[[1]], bank[2], 3), bank.interpolate(1, 2, 3))
    assert torch.equal(bank.mix([bank[[1]], 2], [0.5, 0.5]), bank.mix([1, 2], [0.5, 0.5]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda bank: bank.interpolate(0, 1, 3, "cubic"), ValueError, "method.*'cubic'.*'linear', 'slerp', 'concat', 'mask'"),
        (lambda bank: bank.interpolate(0, 1, 0), ValueError, "num.*0.*1 or more"),
        (lambda bank: bank.interpolate(0, 10, 3), IndexError, "row 10 "),
        (lambda bank: bank.interpolate(0, [1, 2], 3), ValueError, "one snippet each"),
        (lambda bank: bank.interpolate(torch.ones(6), 1, 3), ValueError, r"\(7,\).*\(6,\)"),
        (lambda bank: bank.interpolate(torch.full((7,), torch.nan), 1, 3), ValueError, "finite"),
        (lambda bank: bank.mix([0, 1], [1.0]), ValueError, r"weights.*\[1.0\].*\(2, 7\)"),
        (lambda bank: bank.mix([0, 1], [1.0, torch.inf]), ValueError, r"weights.*inf"),
        (lambda bank: bank.mix([], []), ValueError, "list of snippets"),
        (lambda bank: bank.mix([0, bank[:]], [1.0, 1.0]), ValueError, "list of snippets"),
        (lambda bank: bank.mix(3, [1.0]), ValueError, "weights"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(make_bank())
