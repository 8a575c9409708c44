import collections
import itertools

import pytest

from diffusers_gmem.data.keyed_permutation import KeyedPermutation


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 17, 100, 1025])
def test_it_is_a_permutation(n):
    permutation = KeyedPermutation(n, "key")
    assert len(permutation) == n
    assert sorted(permutation[k] for k in range(n)) == list(range(n))


def test_it_depends_on_size_and_key_alone():
    def order(n, key):
        permutation = KeyedPermutation(n, key)
        return [permutation[k] for k in range(n)]

    assert order(50, "a") == order(50, "a")
    assert order(50, "a") != order(50, "b")


def test_all_orders_are_about_equally_likely():
    counts = collections.Counter(tuple(KeyedPermutation(4, str(key))[k] for k in range(4)) for key in range(6000))
    assert set(counts) == set(itertools.permutations(range(4)))
    chi_squared = sum((count - 250) ** 2 / 250 for count in counts.values())
    assert chi_squared < 52  # 23 degrees of freedom: exceeded with probability 5e-4


@pytest.mark.parametrize("k", [-1, 5])
def test_numbers_outside_are_refused(k):
    with pytest.raises(IndexError, match=r"not in 0\.\.4"):
        KeyedPermutation(5, "key")[k]


def test_no_numbers_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        KeyedPermutation(0, "key")
