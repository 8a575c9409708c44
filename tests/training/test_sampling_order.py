import itertools

import pytest
import torch

from diffusers_gmem.training import TrainingBatchSampler, sample_generator


def samples(num_processes, batch_size, accumulation, num_steps=7, first_step=0, num_samples=10, seed=3):
    """The samples of each step, as sets, whoever takes them."""
    per_process = [
        list(
            TrainingBatchSampler(
                num_samples, batch_size, seed, first_step, num_steps, accumulation, num_processes, process_index
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


@pytest.mark.parametrize(("num_processes", "batch_size", "accumulation"), [(2, 2, 1), (1, 2, 2), (4, 1, 1), (2, 1, 2)])
def test_a_step_has_the_same_samples_however_it_is_shared_out(num_processes, batch_size, accumulation):
    assert samples(num_processes, batch_size, accumulation) == samples(1, 4, 1)


def test_every_epoch_has_each_sample_once_in_its_own_order():
    batches = list(TrainingBatchSampler(10, 4, seed=0, first_step=0, num_steps=15))
    sequence = list(itertools.chain.from_iterable(batches))
    epochs = [[index for epoch, index in sequence if epoch == wanted] for wanted in range(6)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 6


def test_starting_at_a_step_goes_on_with_the_same_batches():
    whole = list(TrainingBatchSampler(10, 4, seed=0, first_step=0, num_steps=9, gradient_accumulation_steps=2))
    rest = list(TrainingBatchSampler(10, 4, seed=0, first_step=5, num_steps=9, gradient_accumulation_steps=2))
    assert rest == whole[10:]
    assert len(TrainingBatchSampler(10, 4, seed=0, first_step=5, num_steps=9, gradient_accumulation_steps=2)) == 8


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
