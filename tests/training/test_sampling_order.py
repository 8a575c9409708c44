import itertools

import pytest
import torch

from diffusers_gmem.training import TrainingBatchSampler, sample_generator
from diffusers_gmem.training.sampling_order import BlockOrder


def samples(
    num_processes, batch_size, accumulation, num_steps=7, first_step=0, num_samples=10, seed=3, block_size=None
):
    """The samples of each step, as sets, whoever takes them."""
    per_process = [
        list(
            TrainingBatchSampler(
                num_samples,
                batch_size,
                seed,
                first_step,
                num_steps,
                accumulation,
                num_processes,
                process_index,
                block_size,
            )
        )
        for process_index in range(num_processes)
    ]
    steps = []
    for step in range(num_steps - first_step):
        micro_batches = [
            batch for batches in per_process for batch in batches[step * accumulation : (step + 1) * accumulation]
        ]
        assert all(len(batch) == batch_size for batch in micro_batches)
        steps.append(set(itertools.chain.from_iterable(micro_batches)))
    return steps


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize(("num_processes", "batch_size", "accumulation"), [(2, 2, 1), (1, 2, 2), (4, 1, 1), (2, 1, 2)])
def test_a_step_has_the_same_samples_however_it_is_shared_out(num_processes, batch_size, accumulation, block_size):
    shared = samples(num_processes, batch_size, accumulation, block_size=block_size)
    assert shared == samples(1, 4, 1, block_size=block_size)
    # Every process has samples of its own
    assert all(len(step) == 4 for step in shared)


@pytest.mark.parametrize("block_size", [None, 3])
def test_every_epoch_has_each_sample_once_in_its_own_order(block_size):
    batches = list(TrainingBatchSampler(10, 4, seed=0, first_step=0, num_steps=15, block_size=block_size))
    sequence = list(itertools.chain.from_iterable(batches))
    epochs = [[index for epoch, index in sequence if epoch == wanted] for wanted in range(6)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 6


def test_starting_at_a_step_goes_on_with_the_same_batches():
    whole = list(TrainingBatchSampler(10, 4, seed=0, first_step=0, num_steps=9, gradient_accumulation_steps=2))
    rest = list(TrainingBatchSampler(10, 4, seed=0, first_step=5, num_steps=9, gradient_accumulation_steps=2))
    assert rest == whole[10:]
    assert len(TrainingBatchSampler(10, 4, seed=0, first_step=5, num_steps=9, gradient_accumulation_steps=2)) == 8


@pytest.mark.parametrize(("num_samples", "block_size"), [(1, 4), (3, 4), (10, 3), (64, 8), (100, 1), (101, 16)])
def test_blocks_of_neighbours_are_kept_together(num_samples, block_size):
    order = list(BlockOrder(num_samples, block_size, seed=0, epoch=5))
    assert sorted(order) == list(range(num_samples))
    for start in range(0, num_samples, block_size):
        block = order[start : start + block_size]
        assert block == [(block[0] + k) % num_samples for k in range(len(block))]


def test_blocks_are_a_function_of_seed_and_epoch_and_are_cut_elsewhere_in_each():
    def order(seed, epoch):
        return list(BlockOrder(1000, 10, seed, epoch))

    assert order(0, 1) == order(0, 1)
    orders = [order(seed, epoch) for seed in range(2) for epoch in range(10)]
    assert len({tuple(each) for each in orders}) == 20
    assert len({min(each[::10]) for each in orders}) > 5


def test_the_blocks_of_a_batch_come_from_anywhere():
    # The mean distance of two random places on a circle of 10,000 is 2,500, with a standard deviation of 1,443
    order = list(BlockOrder(10_000, 10, seed=0, epoch=0))
    distances = [abs(first - second) for first, second in itertools.pairwise(order[::10])]
    distances = [min(distance, 10_000 - distance) for distance in distances]
    assert abs(sum(distances) / len(distances) - 2500) < 5 * 1443 / len(distances) ** 0.5


def test_a_batch_may_be_larger_than_the_data():
    (batch,) = TrainingBatchSampler(3, 8, seed=0, first_step=0, num_steps=1)
    assert len(batch) == 8
    assert len(set(batch)) == 8


def test_generators_depend_on_seed_epoch_and_index_alone():
    def draw(*key):
        return tuple(torch.randn(4, generator=sample_generator(*key)).tolist())

    assert draw(0, 1, 2) == draw(0, 1, 2)
    keys = list(itertools.product(range(3), range(3), range(-1, 3)))
    assert len({draw(*key) for key in keys}) == len(keys)


def test_the_samples_of_a_step_are_those_of_its_micro_batches_on_all_processes():
    options = {"num_samples": 10, "batch_size": 2, "seed": 3, "gradient_accumulation_steps": 2, "num_processes": 3}
    samplers = [TrainingBatchSampler(**options, first_step=0, num_steps=4, process_index=k) for k in range(3)]
    batches = [list(sampler) for sampler in samplers]
    for step in range(4):
        expected = [
            key for micro_batch in (2 * step, 2 * step + 1) for k in range(3) for key in batches[k][micro_batch]
        ]
        assert samplers[1].samples_of_step(step) == expected
