"""Computes random numbers from a key instead of drawing them from a state (a counter-based generator).

With an ordinary generator, what an image gets depends on earlier draws, on the worker, on the rank, and on where the run was
resumed. Here a random number is a *function* of its key: `uniform(draw, seed, epoch, index)` is the same float on every
machine, in any order, for one index or a million.

Splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) seeded with s gives as its
k-th output `mix(s + k * GAMMA)`: no state is needed to jump to k. We chain that over the words of the key: the output that the
first word selects seeds the generator in which the second word selects, and so on. All arithmetic is on integers modulo 2^64,
so the values depend neither on numpy's version nor on the machine; numpy's Generator does not promise that.

The first word, `draw`, says what the number is for. Its ranges are assigned here, so that no two uses overlap.
"""

from typing import TypeAlias

import numpy as np

Word: TypeAlias = int | np.ndarray  # any integer dtype; negative values wrap

AUGMENTATION_DRAWS = 0  # augmentation parameters, which augment/parameters numbers from here
AUTO_AUGMENT = 900  # the seed of the generators that timm's automatic augmentation draws from
EPOCH_ORDER = 1000  # the permutation of an epoch
RUN_ORDER = 1001  # the permutation of an epoch's runs, with a shuffle window
SYNTHETIC_DRAWS = 2000  # pixels of synthetic:// images
SHAPES_DRAWS = 3000  # drawings of shapes://
SHARD_ORDER = 4000  # the order of images in tar shards
SUBSET = 5000  # which images of a class are in a subset

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: k * GAMMA visits every state once
_ONE = np.uint64(1)


def bits(draw: Word, *key: Word) -> np.ndarray:
    """Return 64 random bits (uint64) for every key; the words broadcast against each other like numpy operands.

    Put the scalar words first: a word costs one mix of the shape reached so far.
    """
    state = np.uint64(0)
    with np.errstate(over="ignore"):  # wrapping modulo 2^64 is the point; numpy warns about it for scalars only
        for word in (draw, *key):
            state = _mix(state + _GAMMA * (_as_word(word) + _ONE))
    return np.asarray(state)


def uniform(draw: Word, *key: Word) -> np.ndarray:
    """Return a uniform float64 in [0, 1) for every key: the top 53 bits, as many as a float64 holds."""
    return (bits(draw, *key) >> np.uint64(11)) * 2.0**-53


def _as_word(word: Word) -> np.ndarray | np.uint64:
    if isinstance(word, np.ndarray):
        return word.astype(np.uint64)
    return np.uint64(int(word) & 0xFFFFFFFFFFFFFFFF)


def _mix(z):
    """Apply splitmix64's output function (Stafford's variant 13 of the MurmurHash3 finaliser): every bit moves every bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
