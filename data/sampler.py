"""Says which rank reads which image when: `GlobalBatchSampler` maps (seed, epoch, step, rank) to image indices.

The epoch's permutation is a function of (seed, epoch, num_images) alone. Global batch number `step` is the `step`-th run of
`global_batch` entries of it, and rank r of w takes the r-th of the w equal runs inside that batch:

    permutation   | . . . . . . . . | . . . . . . . . | . . . . . . . . | . . .
                    global batch 0    global batch 1    global batch 2    dropped this epoch
    world size 2  | rank 0 | rank 1 |
    world size 4  | r0| r1 | r2| r3 |

So the global batch, and the place of each image in it (by which BatchFormer's groups and the keys of the contrastive loss
count), is the same at every world size. A position in the data is (epoch, step), and resuming needs nothing else. (torch's
DistributedSampler deals indices round-robin, so that the global batch has another order at each world size.) Images that do
not fill the last batch are dropped; the next epoch's permutation drops others.

With a shuffle window, images that are neighbours in the source stay near each other in the order, so that a network disk
reads long pieces of few places instead of single images all over. The source is cut into runs of about sqrt(window)
neighbours, the runs are shuffled, and the images of each `window` images' worth of runs are shuffled among themselves:

    source   | run 0 | run 1 | run 2 | run 3 | run 4 | run 5 |
    order    | 4 and 1 shuffled | 0 and 5 shuffled | 3 and 2 shuffled |      (a window of two runs)

A window then holds images from sqrt(window) places, which for class folders means that few classes: use it on tar shards,
which are written in random order.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from crossbatch.data import counter


@dataclass(frozen=True)
class GlobalBatchSampler:
    """Gives one rank its image indices in every step; the global batch does not depend on the number of ranks.

    Args:
        seed: the seed of the order, the same on all ranks.
        num_images: number of training images.
        global_batch: images per step over all ranks.
        world_size, rank: the number of ranks, and this process's number among them, from 0.
        shuffle_window: size in images of the window inside which the order is shuffled; 0 shuffles all images.

    Raises:
        ValueError: there are fewer images than one global batch, the ranks cannot share a global batch equally, or the window
            is smaller than a global batch.
    """

    seed: int
    num_images: int
    global_batch: int
    world_size: int = 1
    rank: int = 0
    shuffle_window: int = 0

    def __post_init__(self):
        if self.global_batch < 1:
            raise ValueError(f"`global_batch` (={self.global_batch}) must be at least 1")
        if self.num_images < self.global_batch:
            raise ValueError(
                f"`num_images` (={self.num_images}) is smaller than `global_batch` (={self.global_batch}), so there is not one "
                f"full batch; use a global batch of at most {self.num_images}, or more images"
            )
        if self.global_batch % self.world_size:
            multiple = (self.global_batch // self.world_size + 1) * self.world_size
            raise ValueError(
                f"`global_batch` (={self.global_batch}) must be divisible by `world_size` (={self.world_size}), as all ranks "
                f"get equal parts; use a multiple such as {multiple}"
            )
        if self.shuffle_window and self.shuffle_window < self.global_batch:
            raise ValueError(
                f"`shuffle_window` (={self.shuffle_window}) is smaller than `global_batch` (={self.global_batch}), so a batch "
                f"would come from one place in the data; use 0 (all images) or several batches, such as {4 * self.global_batch}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"`rank` (={self.rank}) must be in [0, {self.world_size})")

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of full global batches in one epoch."""
        return self.num_images // self.global_batch

    @property
    def local_batch(self) -> int:
        """Return the number of images of this rank in one step."""
        return self.global_batch // self.world_size

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Return this rank's image indices (int64 [local_batch]) in `step`, counted inside the epoch, of `epoch`."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"`step` (={step}) must be in [0, {self.steps_per_epoch}), the steps of one epoch")
        start = step * self.global_batch + self.rank * self.local_batch
        permutation = _permutation(self.seed, self.num_images, self.shuffle_window, epoch)
        return permutation[start : start + self.local_batch].copy()


@functools.lru_cache(maxsize=4)  # prefetching reaches the next epoch while the trainer may still ask about this one
def _permutation(seed: int, num_images: int, shuffle_window: int, epoch: int) -> np.ndarray:
    """Return every index once, sorted by its own random number: 10 MB and 0.3 s at ImageNet's size."""
    numbers = counter.bits(counter.EPOCH_ORDER, seed, epoch, np.arange(num_images))
    if not shuffle_window:
        return np.argsort(numbers, kind="stable")
    run_length = math.isqrt(shuffle_window)
    of_runs = counter.bits(counter.RUN_ORDER, seed, epoch, np.arange(math.ceil(num_images / run_length)))
    places = np.empty(len(of_runs), dtype=np.int64)
    places[np.argsort(of_runs, kind="stable")] = np.arange(len(of_runs))
    windows = np.repeat(places // (shuffle_window // run_length), run_length)[:num_images]  # that each image falls into
    return np.lexsort((numbers, windows))


def evaluation_share(size: int, world_size: int, rank: int) -> np.ndarray:
    """Return the indices (int64) that `rank` evaluates: contiguous, every index on exactly one rank, no padding.

    Shares differ by at most one image, so an evaluation that runs collectives per batch must not assume equal lengths.
    """
    return np.arange(size * rank // world_size, size * (rank + 1) // world_size, dtype=np.int64)
