# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""
Randomness that is a function of (seed, epoch, sample) alone. Which samples make up step k, and what is drawn for each of
them, depends neither on the state of a generator nor on how many processes, workers or micro-batches share the work, so
a run that is stopped and resumed is the run that was not.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from ..data.keyed_permutation import KeyedPermutation


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The generator of everything that is drawn for sample `index` of the data set in epoch `epoch`."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class BlockOrder(Sequence[int]):
    """
    An order of the samples 0 to n - 1 in an epoch that keeps blocks of neighbours together, for data that is read fastest
    in contiguous pieces. It is computed sample by sample from (seed, epoch) and never stored.

    The samples are cut into blocks of `block_size`, from a random first one on, and the blocks are put in random order;
    the rest of fewer samples comes last. How good a shuffle that is: every epoch has each sample once, and any batch takes
    its blocks from anywhere in the data; but neighbours meet in most epochs (blocks are cut elsewhere in each), in their
    order. A batch of b samples is as random as b / block_size independent draws of groups of neighbours, which is as
    good as b draws where neighbours have nothing in common, as in a [`~diffusers_gmem.data.LatentCache`].

    Args:
        num_samples (`int`): size of the data set.
        block_size (`int`): samples in a block.
        seed (`int`), epoch (`int`): which of the orders.
    """

    def __init__(self, num_samples: int, block_size: int, seed: int, epoch: int):
        self.num_samples = num_samples
        self.block_size = block_size
        # -1 is no sample's index: the order has a generator of its own
        self.first = int(torch.randint(num_samples, (1,), generator=sample_generator(seed, epoch, -1)))
        self.num_blocks = num_samples // block_size
        if self.num_blocks > 0:
            blocks = KeyedPermutation(self.num_blocks, f"{seed}/{epoch}/blocks")
            self.block_at = lru_cache(maxsize=1)(blocks.__getitem__)  # asked for each sample of the block

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.num_samples:
            raise IndexError(f"{position} is not in 0..{self.num_samples - 1}.")
        block, offset = divmod(position, self.block_size)
        if block < self.num_blocks:
            block = self.block_at(block)
        return (self.first + block * self.block_size + offset) % self.num_samples


class TrainingBatchSampler:
    """
    A batch sampler that yields one process's micro-batches as lists of (epoch, index), from a given step on.

    The samples of all epochs, each epoch in an order of its own, form one endless sequence. Step k (an optimizer step)
    takes the k-th run of `global_batch_size` of it, which may span two epochs; within the step, micro-batch m of
    process p takes the (m * num_processes + p)-th run of `batch_size`.

    Args:
        num_samples (`int`): size of the data set.
        batch_size (`int`): size of a micro-batch of one process.
        seed (`int`): seed of the orders.
        first_step (`int`): the first step to yield, counted from 0.
        num_steps (`int`): the step before which to end.
        gradient_accumulation_steps (`int`): micro-batches of one process in a step.
        num_processes (`int`): number of processes.
        process_index (`int`): which of them this is.
        block_size (`int`, *optional*): draw the samples in blocks of neighbours, see [`BlockOrder`]. Default: one by one.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        first_step: int,
        num_steps: int,
        gradient_accumulation_steps: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        block_size: int | None = None,
    ):
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.first_step = first_step
        self.num_steps = num_steps
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.num_processes = num_processes
        self.process_index = process_index
        self.block_size = block_size
        self._order = lru_cache(maxsize=1)(self._make_order)

    def __len__(self) -> int:
        return (self.num_steps - self.first_step) * self.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for micro_batch in range(
            self.first_step * self.gradient_accumulation_steps, self.num_steps * self.gradient_accumulation_steps
        ):
            start = (micro_batch * self.num_processes + self.process_index) * self.batch_size
            yield self._samples(start, start + self.batch_size)

    def samples_of_step(self, step: int) -> list[tuple[int, int]]:
        """The samples of a step in all its micro-batches and on all processes, as (epoch, index)."""
        size = self.batch_size * self.num_processes * self.gradient_accumulation_steps
        return self._samples(step * size, (step + 1) * size)

    def _samples(self, start: int, stop: int) -> list[tuple[int, int]]:
        samples = []
        for position in range(start, stop):
            epoch, offset = divmod(position, self.num_samples)
            samples.append((epoch, int(self._order(epoch)[offset])))
        return samples

    def _make_order(self, epoch: int) -> Sequence[int] | torch.Tensor:
        if self.block_size is not None:
            return BlockOrder(self.num_samples, self.block_size, self.seed, epoch)
        # -1 is no sample's index: the order has a generator of its own
        return torch.randperm(self.num_samples, generator=sample_generator(self.seed, epoch, -1))
