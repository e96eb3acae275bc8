"""Batches for the trainer.

`TrainLoader.epoch(epoch, start_step)` yields the rank's batches from a position. Underneath runs one endless stream of
pieces (pieces.py): (epoch 3, last step), (epoch 4, step 0), ... The stream does not know about epochs, so workers live for
the whole run and prefetching does not stop at their ends, where the ordinary loader drains and refills: at 4096 images
a batch that costs seconds per epoch. Asking for the position where the stream stands continues it; asking for any other
starts a new one there.

    GlobalBatchSampler.batch(epoch, step) -> cut into pieces -> open, make views -> put together -> Batch
                                                   in processes       in a thread
                                                   or DALI's threads

Nothing in a batch depends on the number of workers, on timing or on what was read before, except the count of broken
images, which is per run.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from crossbatch import RunStopped
from crossbatch.data import pieces
from crossbatch.data.augment.parameters import ViewAugmentation
from crossbatch.data.pieces import Broken, EvaluationPieces, Piece, TrainPieces
from crossbatch.data.sampler import GlobalBatchSampler
from crossbatch.data.sources import Source
from crossbatch.data.workers import Prefetcher, WorkerPool

_BATCHES_AHEAD = 2  # prefetched, in pieces, over all workers
_IMAGES_BEFORE_VERDICT = 1000  # or one epoch if that is less: no run stops because image number 3 was broken
_NAMED = 5  # broken images named in a message


@dataclass
class Batch:
    """One rank's share of one step."""

    views: torch.Tensor  # uint8 [v, n, 3, H, W], channels last; on the GPU with DALI, else pinned where there is one
    indices: np.ndarray  # int64 [n], of the images in `views`: where one was broken, of the one that replaces it
    skipped: list[str]  # names of the broken images met in this batch


class TrainLoader:
    """Augmented views of every image, in `order`: v of them, by v recipes (two to contrast, one to classify).

    Args:
        source: the images; must pickle if `workers` > 0.
        order: which of them this rank reads, and when.
        recipes: one per view.
        seed: of the augmentation.
        workers: processes (with DALI: threads); 0 works in this one.
        max_skipped_fraction: a larger share of broken ones among the images read so far stops the run.
        backend: who decodes and augments, one of `backends.BACKENDS`.
        device: of the training, where DALI works.

    Raises (from the iterators):
        RunStopped: too many broken images, or 16 in a row.
        RuntimeError: a worker died (out of memory, or of shared memory).
    """

    def __init__(
        self,
        source: Source,
        order: GlobalBatchSampler,
        recipes: Sequence[ViewAugmentation],
        seed: int,
        workers: int,
        max_skipped_fraction: float = 0.001,
        backend: str = "torchvision",
        device: torch.device | None = None,
    ):
        if len({recipe.image_size for recipe in recipes}) != 1:
            raise ValueError(f"recipes must share one image_size, got {[recipe.image_size for recipe in recipes]}")
        self.order = order
        self.images_read = 0
        self.images_skipped = 0
        self._broken: dict[str, Broken] = {}  # by name
        self._source, self._recipes, self._seed, self._backend = source, tuple(recipes), seed, backend
        self._device = device or torch.device("cpu")
        self._workers, self._max_skipped_fraction = workers, max_skipped_fraction
        self._pieces: Any = None
        self._batches: Iterator[tuple[Batch, list[Broken]]] | None = None
        self._position: tuple[int, int] | None = None  # (epoch, step) that the stream yields next

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from `start_step` on (counted inside the epoch)."""
        if not 0 <= start_step <= self.order.steps_per_epoch:
            raise ValueError(f"start_step (={start_step}) must be in [0, {self.order.steps_per_epoch}]")
        for step in range(start_step, self.order.steps_per_epoch):
            yield self._batch(epoch, step)

    def close(self):
        """Stop the workers. The loader can be used again; it starts new ones."""
        if isinstance(self._batches, Prefetcher):
            self._batches.close()
        if self._pieces is not None:
            self._pieces.close()
        self._pieces = self._batches = self._position = None

    def _batch(self, epoch: int, step: int) -> Batch:
        if self._position != (epoch, step):
            self.close()
            self._start(epoch, step)
        assert self._batches is not None
        self._position = None  # should a piece raise, the stream is not where it says
        batch, broken = next(self._batches)
        if batch.views.is_cuda:
            batch.views.record_stream(torch.cuda.current_stream())  # it came into being on the stream of another thread
        self._judge(self.order.local_batch, broken)
        last = step + 1 == self.order.steps_per_epoch
        self._position = (epoch + 1, 0) if last else (epoch, step + 1)
        return batch

    def _start(self, epoch: int, step: int) -> None:
        if self._backend == "dali":
            from crossbatch.data.augment.dali import MAX_PIECE, DaliPieces

            keys = _Keys(self.order, epoch, step, 0, MAX_PIECE)
            self._pieces = DaliPieces(self._source, self._recipes, self._seed, keys, self._workers, self._device)
        else:
            keys = _Keys(self.order, epoch, step, self._workers, pieces.MAX_PIECE)
            pieces_per_batch = len(keys.cut(np.arange(self.order.local_batch)))
            ahead = math.ceil(_BATCHES_AHEAD * pieces_per_batch / max(self._workers, 1))
            dataset = TrainPieces(self._source, self._recipes, self._seed, self._backend)
            self._pieces = WorkerPool(dataset, keys, self._workers, max(2, ahead))
        batches = self._put_together(self._pieces)
        self._batches = Prefetcher(batches, self._device) if self._workers or self._backend == "dali" else batches

    def _put_together(self, stream: Iterator[Piece]) -> Iterator[tuple[Batch, list[Broken]]]:
        """Runs of n images of the stream, each in one tensor, which is pinned so that its transfer can overlap."""
        n, size = self.order.local_batch, self._recipes[0].image_size
        on_gpu = self._backend == "dali" and self._device.type == "cuda"
        where: dict = {"device": self._device} if on_gpu else {"pin_memory": torch.cuda.is_available()}
        while True:
            views = torch.empty((len(self._recipes), n, size, size, 3), dtype=torch.uint8, **where).permute(
                0, 1, 4, 2, 3
            )
            indices, broken, filled = [], [], 0
            while filled < n:
                piece = next(stream)
                broken += piece.broken
                if piece.views is None:
                    raise RunStopped(_verdict("no readable image to replace a broken one", piece.broken))
                views[:, filled : filled + len(piece.indices)] = piece.views
                indices.append(piece.indices)
                filled += len(piece.indices)
            if on_gpu:
                torch.cuda.current_stream().synchronize()
            yield Batch(views, np.concatenate(indices), [image.name for image in broken]), broken

    def _judge(self, images: int, broken: list[Broken]):
        """Stop the run if too many different images are broken, of the different images read. Whole images, rounded up:
        one broken file in a small data set must not stop a run, however many epochs meet it again.
        """
        self.images_read += images
        self.images_skipped += len(broken)
        self._broken.update({image.name: image for image in broken})
        read = min(self.images_read, self.order.size)
        allowed = math.ceil(self._max_skipped_fraction * read)
        ripe = self.images_read >= min(_IMAGES_BEFORE_VERDICT, self.order.steps_per_epoch * self.order.local_batch)
        if ripe and len(self._broken) > allowed:
            what = (
                f"{len(self._broken)} of {read} images were broken, more than the {allowed} that "
                f"crossbatch.data.max_skipped_fraction = {self._max_skipped_fraction} allows"
            )
            raise RunStopped(_verdict(what, list(self._broken.values())))


class EvaluationLoader:
    """The central views of `indices` of `source`, in order, once per iteration: (uint8 [m, 3, H, W], int64 [m]).

    A broken image is left out: its index does not come back, and its name is in `skipped` after the iteration.
    (Replaced, it would be counted twice in an accuracy.) Raises RunStopped if not one image could be read.
    """

    def __init__(self, source: Source, image_size: int, indices: np.ndarray, batch_size: int, workers: int):
        self.skipped: list[str] = []
        self._dataset = EvaluationPieces(source, image_size)
        self._keys = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        self._workers = workers

    def __iter__(self) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        broken: list[Broken] = []
        some = False
        stream = WorkerPool(self._dataset, self._keys, self._workers, prefetch=2)
        try:
            for piece in stream:
                broken += piece.broken
                self.skipped = [image.name for image in broken]
                if piece.views is not None:
                    some = True
                    yield piece.views, piece.indices
        finally:
            stream.close()
        if broken and not some:
            raise RunStopped(_verdict(f"none of the {len(broken)} evaluation images could be read", broken))


class _Keys:
    """The endless sequence of (epoch, image indices), one per piece, from a position on. Runs in the trainer."""

    def __init__(self, order: GlobalBatchSampler, epoch: int, step: int, workers: int, most: int):
        self.order, self.epoch, self.step, self.workers, self.most = order, epoch, step, workers, most

    def cut(self, indices: np.ndarray) -> list[np.ndarray]:
        return pieces.cut(indices, self.workers, self.most)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        epoch, step = self.epoch, self.step
        while True:
            for indices in self.cut(self.order.batch(epoch, step)):
                yield epoch, indices
            step += 1
            if step == self.order.steps_per_epoch:
                epoch, step = epoch + 1, 0


def _verdict(what: str, broken: list[Broken]) -> str:
    shown = "; ".join(f"{image.name} ({image.reason})" for image in broken[-_NAMED:])
    return f"data: {what}; the last ones: {shown}. Repair or remove them, or raise the limit, and resume"
