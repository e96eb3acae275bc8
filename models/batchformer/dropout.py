"""Computes dropout masks that depend on an image's position in the global batch, not on the rank or chunk that holds it.

A mask element is a hash of (seed, step, stream, view, place in the layer, row, column), where the row is the position of an
image in the global batch. So every split of the batch into ranks and chunks drops the same elements, a second pass over a chunk
repeats the first, a resumed run continues with the same masks, and nothing has to be stored for the backward pass or in a
checkpoint.

The hash is `triple32` (Chris Wellons, "Prospecting for hash functions", 2018; public domain), chained over the parts of the
key. It needs only 32-bit integers, so kernels can recompute the same bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ATTENTION, AFTER_ATTENTION, INSIDE_MLP, AFTER_MLP = range(4)  # the four places of dropout
NUM_PLACES = 4

# `triple32`: three times xor with the word shifted right, times an odd number; then one more such xor.
ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
LAST_SHIFT = 14


def hash_word(word: int) -> int:
    """Compute `triple32` of one 32-bit word, in Python integers."""
    for shift, factor in ROUNDS:
        word ^= word >> shift
        word = word * factor & 0xFFFFFFFF
    return word ^ word >> LAST_SHIFT


def hash_words(words: Tensor) -> Tensor:
    """Compute `triple32` elementwise on int32 tensors, whose bits are read as unsigned; products wrap."""
    for shift, factor in ROUNDS:
        words = words ^ (words >> shift & (1 << (32 - shift)) - 1)
        words = words * signed(factor)
    return words ^ (words >> LAST_SHIFT & (1 << (32 - LAST_SHIFT)) - 1)


def signed(word: int) -> int:
    """Return the int32 that has the 32 bits of `word`."""
    return word - (1 << 32) if word >= 1 << 31 else word


@dataclass(frozen=True)
class DropoutKey:
    """Hold what a mask depends on besides view, place, row and column; the parts are hashed in this order."""

    seed: int
    step: int
    stream: int = 0  # 0 online, 1 momentum encoder

    def dropout_seed(self, view: int, place: int) -> int:
        """Return the 32-bit seed of the masks of one view at one place of the layer."""
        word = 0
        for part in (self.seed & 0xFFFFFFFF, self.seed >> 32, self.step, self.stream, view, place):
            word = hash_word(word ^ part & 0xFFFFFFFF)
        return word

    def dropout_seeds(self, views: int, device: torch.device) -> Tensor:
        """Return all seeds of one pass, int32 [NUM_PLACES, views], on `device`. The copy to a GPU blocks nothing."""
        seeds = [[signed(self.dropout_seed(view, place)) for view in range(views)] for place in range(NUM_PLACES)]
        host = torch.tensor(seeds, dtype=torch.int32)
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def random_seeds(views: int, device: torch.device) -> Tensor:
    """Draw seeds of one pass, int32 [NUM_PLACES, views], from torch's generator of `device`."""
    return torch.randint(-(1 << 31), 1 << 31, (NUM_PLACES, views), dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Mask:
    """Describe dropout at one place of the layer, for S sequences: the A groups of this rank of view 0, those of view 1, ...

    Row i and column j of a sequence stand at consecutive global positions: in group a, at first_row + a * rows + i and at
    first_column + a * columns + j. In the attention, row (i, head h) has the number position * heads + h and columns are
    positions; elsewhere rows are positions and columns features.
    """

    seeds_V: Tensor  # int32, of this place
    probability: float
    first_row: int = 0
    first_column: int = 0

    def rows(self, sequences: int, rows: int) -> Tensor:
        """Return the global positions of rows, int32 [S, rows]."""
        return self._positions(self.first_row, sequences, rows)

    def columns(self, sequences: int, columns: int) -> Tensor:
        """Return the global positions of columns, int32 [S, columns]."""
        return self._positions(self.first_column, sequences, columns)

    def attention_rows(self, sequences: int, heads: int, rows: int) -> Tensor:
        """Return the numbers of the attention's rows, int32 [S, heads, rows]."""
        head = torch.arange(heads, dtype=torch.int32, device=self.seeds_V.device)
        return self.rows(sequences, rows).unsqueeze(1) * heads + head.unsqueeze(-1)

    def seeds(self, sequences: int) -> Tensor:
        """Return each sequence's seed, that of its view, int32 [S]."""
        return self.seeds_V.repeat_interleave(sequences // len(self.seeds_V), output_size=sequences)

    def _positions(self, first: int, sequences: int, length: int) -> Tensor:
        groups = sequences // len(self.seeds_V)
        one_view = torch.arange(first, first + groups * length, dtype=torch.int32, device=self.seeds_V.device)
        return one_view.view(groups, length).repeat(len(self.seeds_V), 1)


def threshold(probability: float) -> int:
    """Return probability * 2^32 - 2^31 as an int32: a hash, read as a signed integer, survives if it is at least this."""
    return min(round(probability * 2**32), 2**32 - 1) - 2**31


def keep_mask(seed: int | Tensor, rows: Tensor, columns: Tensor, probability: float) -> Tensor:
    """Tell which elements survive dropout: those with a hash of at least `threshold`.

    Args:
        seed: `DropoutKey.dropout_seed` of the mask, or int32 seeds [...].
        rows: int32 [..., R], distinct numbers of the rows.
        columns: int32 [..., K], distinct numbers of the columns.
        probability: share of elements to drop, in [0, 1).

    Returns:
        bool [..., R, K].
    """
    seed = signed(seed) if isinstance(seed, int) else seed.unsqueeze(-1)
    row_words = hash_words(hash_words(rows) ^ seed)
    words = hash_words(row_words.unsqueeze(-1) ^ hash_words(columns).unsqueeze(-2))
    return words >= threshold(probability)
