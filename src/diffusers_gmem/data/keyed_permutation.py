# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import hashlib


class KeyedPermutation:
    """
    A random order of the numbers 0 to n - 1 that is computed number by number and never stored: `permutation[k]` is
    the k-th number. It depends on n and the key alone.

    A Feistel network of eight rounds, with keyed BLAKE2b as its round function, permutes the smallest 4^h >= n numbers;
    a number outside 0..n - 1 is permuted again until it falls inside, which happens less than four times on average
    (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
        n (`int`): how many numbers, at least 1.
        key (`str`): which of the orders.
    """

    num_rounds = 8

    def __init__(self, n: int, key: str):
        if n < 1:
            raise ValueError(f"`n` must be at least 1, got {n}.")
        self.n = n
        self.half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self.key = hashlib.blake2b(key.encode(), digest_size=32).digest()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, k: int) -> int:
        if not 0 <= k < self.n:
            raise IndexError(f"{k} is not in 0..{self.n - 1}.")
        while True:
            k = self._permute(k)
            if k < self.n:
                return k

    def _permute(self, k: int) -> int:
        mask = (1 << self.half_bits) - 1
        left, right = k >> self.half_bits, k & mask
        for number in range(self.num_rounds):
            digest = hashlib.blake2b(b"%d/%d" % (number, right), digest_size=8, key=self.key).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        return left << self.half_bits | right
