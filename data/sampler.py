"""Who reads what: pure integers.

The epoch's permutation is a function of (seed, epoch, size) alone. Global batch number `step` is the `step`-th run of
`global_batch` entries of it, and rank r of w takes the r-th of the w equal runs inside that batch:

    permutation   | . . . . . . . . | . . . . . . . . | . . . . . . . . | . . .
                    global batch 0    global batch 1    global batch 2    dropped this epoch
    world size 2  | rank 0 | rank 1 |
    world size 4  | r0| r1 | r2| r3 |

So the global batch, and the place of each image in it (which is what BatchFormer's groups and the keys of the
contrastive loss count in), is the same at every world size, and a position in the data is the pair of numbers (epoch,
step): resuming needs nothing else. This differs from torch's DistributedSampler, which deals indices round-robin over
the ranks (the global batch then has another order at each world size) and pads the end with repeated images.

Images that do not fill the last batch are dropped; the next epoch's permutation drops others.

With a shuffle window, images that are neighbours in the source stay near each other in the order, so that a network disk
reads long pieces of few places instead of single images all over. The source is cut into runs of about sqrt(window)
neighbours, the runs are shuffled, and the images of each `window` images' worth of runs are shuffled among themselves:

    source   | run 0 | run 1 | run 2 | run 3 | run 4 | run 5 |
    order    | 4 and 1 shuffled | 0 and 5 shuffled | 3 and 2 shuffled |      (a window of two runs)

A window then holds images from sqrt(window) places, which for class folders means that few classes: use it on tar shards,
which are written in random order.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from crossbatch import InputError
from crossbatch.data import counter


@dataclass(frozen=True)
class GlobalBatchSampler:
    """The reading order of one rank.

    Args:
        seed: of the run; the same on all ranks.
        size: number of training images.
        global_batch: images per optimizer step over all ranks (`train_batch_size`).
        world_size, rank: of this process.
        shuffle_window: images that are shuffled among each other; 0 for all of them.

    Raises:
        InputError: fewer images than one global batch, a global batch that the ranks cannot share equally, or a window
            smaller than a global batch.
    """

    seed: int
    size: int
    global_batch: int
    world_size: int = 1
    rank: int = 0
    shuffle_window: int = 0
    _permutations: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.global_batch < 1:
            raise InputError(f"train_batch_size is {self.global_batch}; it must be at least 1")
        if self.size < self.global_batch:
            raise InputError(
                f"train_batch_size is {self.global_batch} but there are only {self.size} training images, not one "
                f"full batch; set train_batch_size to at most {self.size} or give crossbatch.data.path more images"
            )
        if self.global_batch % self.world_size:
            multiple = (self.global_batch // self.world_size + 1) * self.world_size
            raise InputError(
                f"train_batch_size is {self.global_batch}, which {self.world_size} ranks cannot share equally; "
                f"set it to a multiple of {self.world_size}, such as {multiple}"
            )
        if self.shuffle_window and self.shuffle_window < self.global_batch:
            raise InputError(
                f"crossbatch.data.shuffle_window is {self.shuffle_window}, less than train_batch_size = "
                f"{self.global_batch}: a batch would be one piece of the data; set it to 0 (all images), or to several "
                f"batches, such as {4 * self.global_batch}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank (={self.rank}) must be in [0, {self.world_size})")

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in one epoch."""
        return self.size // self.global_batch

    @property
    def local_batch(self) -> int:
        """Images of this rank in one step."""
        return self.global_batch // self.world_size

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """This rank's image indices (int64 [local_batch]) in step `step`, counted inside the epoch, of `epoch`."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step (={step}) must be in [0, {self.steps_per_epoch}), the steps of one epoch")
        start = step * self.global_batch + self.rank * self.local_batch
        return self._permutation(epoch)[start : start + self.local_batch].copy()

    def _permutation(self, epoch: int) -> np.ndarray:
        """Every index once, sorted by its own random number. 10 MB and 0.3 s at ImageNet's size.

        Two epochs are kept: prefetching is in the next one while the trainer may still ask about this one.
        """
        if epoch not in self._permutations:
            while len(self._permutations) > 1:
                self._permutations.pop(next(iter(self._permutations)))  # the oldest
            numbers = counter.bits(counter.ORDER_DRAW, self.seed, epoch, np.arange(self.size))
            if self.shuffle_window:
                permutation = np.lexsort((numbers, self._windows(epoch)))
            else:
                permutation = np.argsort(numbers, kind="stable")
            self._permutations[epoch] = permutation
        return self._permutations[epoch]

    def _windows(self, epoch: int) -> np.ndarray:
        """The number of the window that each image falls into (int64 [size])."""
        run_length = math.isqrt(self.shuffle_window)
        runs_per_window = self.shuffle_window // run_length
        numbers = counter.bits(counter.RUNS_DRAW, self.seed, epoch, np.arange(math.ceil(self.size / run_length)))
        places = np.empty(len(numbers), dtype=np.int64)
        places[np.argsort(numbers, kind="stable")] = np.arange(len(numbers))
        return np.repeat(places // runs_per_window, run_length)[: self.size]


def evaluation_share(size: int, world_size: int, rank: int) -> np.ndarray:
    """The indices (int64) that `rank` evaluates: contiguous, every index on exactly one rank, no padding.

    Shares differ by at most one image, so an evaluation that runs collectives per batch must not assume equal lengths.
    """
    return np.arange(size * rank // world_size, size * (rank + 1) // world_size, dtype=np.int64)
