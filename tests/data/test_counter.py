"""Tests counter.py: pinned values, and numbers that look independent along every word of the key."""

import numpy as np
import pytest
from scipy import stats

from crossbatch.data import counter

N = 20_000


def splitmix64(seed: int, count: int) -> list[int]:
    """Compute the published generator with its state, in plain Python integers."""
    state, outputs = seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        outputs.append(z ^ (z >> 31))
    return outputs


def test_one_word_is_random_access_into_splitmix64():
    assert counter.bits(np.arange(5)).tolist() == splitmix64(0, 5)
    assert splitmix64(0, 1) == [0xE220A8397B1DCDAF]  # the value every implementation publishes for seed 0


def test_words_chain():
    inner = splitmix64(splitmix64(0, 4)[3], 8)[7]
    assert int(counter.bits(3, 7)) == inner


def test_golden_values():
    """Changing these changes the data order and every augmentation of every run: checkpoints would not resume."""
    assert counter.bits(0, 1, 2, 3).tolist() == 9981920043123789943
    assert counter.uniform(1, 42, 7, np.arange(3), 1).tolist() == [
        0.5924327791450199,
        0.03147629519348727,
        0.23793615886641306,
    ]


def test_broadcasts_and_equals_the_scalar_call():
    table = counter.uniform(np.arange(4)[:, None], 9, np.arange(5))
    assert table.shape == (4, 5)
    assert table[3, 2] == counter.uniform(3, 9, 2)


def test_negative_and_large_words():
    assert counter.bits(-1) == counter.bits(np.array(-1)) == counter.bits(2**64 - 1)
    assert counter.bits(0, -1) != counter.bits(0, 1)


def test_uniform():
    u = counter.uniform(0, 1, 2, np.arange(N))
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 0.001
    assert abs(u.mean() - 0.5) < 4 * np.sqrt(1 / 12 / N)


@pytest.mark.parametrize("word", ["draw", "seed", "epoch", "index", "view"])
def test_neighbouring_keys_are_independent(word):
    """Pairs of numbers whose keys differ by one in one word fill the 16 x 16 squares of the unit square evenly."""
    index = np.arange(N)
    key = {"draw": 3, "seed": 0, "epoch": 5, "index": index, "view": 0}
    a = counter.uniform(*key.values())
    b = counter.uniform(*{**key, word: key[word] + 1}.values())
    cells = (a * 16).astype(int) * 16 + (b * 16).astype(int)
    assert stats.chisquare(np.bincount(cells, minlength=256)).pvalue > 0.001
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(N)


def test_every_bit_is_fair():
    words = counter.bits(0, 0, np.arange(N))
    ones = ((words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 4.5 * 0.5 / np.sqrt(N)
