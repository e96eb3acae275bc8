"""Dropout masks that depend on where an image stands in the global batch, not on the rank or chunk that holds it.

A mask element is a hash of (seed, step, stream, view, place in the layer, row, column), where the row is the position of an
image in the global batch. So any split of the batch into ranks and chunks drops the same elements, a second pass over a chunk
repeats the first, a resumed run continues with the same masks, and nothing has to be stored for the backward pass or in a
checkpoint.

The hash is `triple32` (Chris Wellons, "Prospecting for hash functions", 2018; public domain), chained over the words of the
key. It needs only 32-bit integers, so kernels can recompute the same bits.
"""

from dataclasses import dataclass

import torch


def hash_word(word: int) -> int:
    """`triple32` of one 32-bit word, in Python integers."""
    for shift, factor in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
        word ^= word >> shift
        word = word * factor & 0xFFFFFFFF
    return word ^ word >> 14


def hash_words(words: torch.Tensor) -> torch.Tensor:
    """`triple32` elementwise on int32 tensors, whose bits are read as unsigned; products wrap."""
    for shift, factor in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
        words = words ^ (words >> shift & (1 << (32 - shift)) - 1)
        words = words * _signed(factor)
    return words ^ (words >> 14 & (1 << 18) - 1)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


@dataclass(frozen=True)
class DropoutKey:
    """What a mask depends on besides its row and column: the words are hashed in this order."""

    seed: int
    step: int
    stream: int = 0  # 0 online, 1 momentum encoder

    def word(self, view: int, place: int) -> int:
        """One 32-bit word for the masks of one view at one place of the layer."""
        word = 0
        for part in (self.seed & 0xFFFFFFFF, self.seed >> 32, self.step, self.stream, view, place):
            word = hash_word(word ^ part & 0xFFFFFFFF)
        return word


def keep_mask(word: int, rows: torch.Tensor, columns: torch.Tensor, probability: float) -> torch.Tensor:
    """Which elements survive dropout: those whose word, read as a signed integer, is at least probability * 2^32 - 2^31.

    Args:
        word: `DropoutKey.word` of the mask.
        rows: int32 [..., R], distinct numbers of the rows.
        columns: int32 [..., K], distinct numbers of the columns.
        probability: share of elements to drop, in [0, 1).

    Returns:
        bool [..., R, K].
    """
    row_words = hash_words(hash_words(rows) ^ _signed(word))
    words = hash_words(row_words.unsqueeze(-1) ^ hash_words(columns).unsqueeze(-2))
    threshold = min(round(probability * 2**32), 2**32 - 1) - 2**31
    return words >= threshold
