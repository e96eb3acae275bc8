"""Loads batches of augmented views for training, and central views for evaluation.

`TrainLoader.epoch(epoch, start_step)` yields the rank's batches from a position. Underneath runs one endless stream of
worker batches: (epoch 3, last step), (epoch 4, step 0), ... It does not know about epochs, so workers live for the whole run
and prefetching does not stop at their ends, where torch's DataLoader drains and refills: at 4096 images a batch that costs
seconds per epoch. If the next position asked for is the one where the stream stands, it goes on; any other starts a new one.

    GlobalBatchSampler.batch(epoch, step) -> split for workers -> open, make views -> collate -> Batch
                                                                  in processes,       in a thread
                                                                  or DALI's threads

Nothing in a batch depends on the number of workers, on timing or on what was read before.
"""

import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch

from crossbatch.data import worker_batches
from crossbatch.data.augment.backends import choose_backend
from crossbatch.data.augment.parameters import ImageSize, ViewAugmentation, height_width, moco_v3_augmentations
from crossbatch.data.sampler import GlobalBatchSampler
from crossbatch.data.sources import Source
from crossbatch.data.worker_batches import (
    BrokenFile,
    EvaluationDataset,
    TrainDataset,
    TrainKey,
    WorkerBatch,
    split_for_workers,
)
from crossbatch.data.workers import AHEAD, WAIT_S, ImagesLost, WorkerPool, prefetched

_BATCHES_AHEAD = 2  # prefetched over all workers, as worker batches
_IMAGES_BEFORE_CHECK = 1000  # or one epoch if that is less: image number 3 must not stop a run because it is broken
_NUM_NAMED = 5  # broken images named in a message


class SkipLimitExceeded(ImagesLost):
    """Raised when too many images are broken: more than `max_skipped_fraction`, 16 in a row, or all of an evaluation."""


@dataclass
class Batch:
    """Holds one rank's n images of one step, in v views each."""

    views: torch.Tensor  # uint8 [v, n, 3, H, W], channels last; on the loader's device, pinned in host memory
    labels: torch.Tensor | None  # int64 [n], of the images in `views`, on the CPU; None if the source has no labels
    indices: np.ndarray  # int64 [n], of the images in `views`: where one was broken, of the one that replaces it
    skipped: list[str]  # names of the broken images found in this batch


class TrainLoader:
    """Loads augmented views of every image, in an order that depends on the seed alone, from any position.

        with TrainLoader(open_source("synthetic://1000"), batch_size=256) as loader:
            for batch in loader.epoch(0):
                batch.views, batch.labels

    A `Batch` holds the rank's n = batch_size / world_size images. `views` is uint8 [v, n, 3, H, W], view v by
    `augmentations[v]`: two views for contrastive learning, one for classification; `crossbatch.data.normalize` turns them into
    normalised floats. `labels` is int64 [n] on the CPU, or None if the source has none. A broken image is replaced by the next
    one that can be read.

    Args:
        source: the images, as `open_source` returns them; it must be picklable if `workers` > 0.
        batch_size: images of one step over all ranks; each rank gets an equal part, and the batch does not depend on the
            number of ranks. Ranks are those of torch.distributed if it is initialised at the first batch, else there is one.
        image_size: side of a view in pixels, or (height, width), for the two views of MoCo v3; 224 if neither it nor
            `augmentations` is given.
        sampler: says which images this rank reads, and when; instead of `batch_size`.
        augmentations: one per view, with one image size; instead of `image_size`.
        seed: the seed of the order (without a `sampler`) and of the augmentation, the same on all ranks.
        workers: processes that read and augment (with DALI: threads); 0 works in this process. As with torch's DataLoader, a
            script that uses processes needs `if __name__ == "__main__":`.
        max_skipped_fraction: the largest share of broken images among those read so far, 0 to 1.
        backend: what decodes and augments: "dali" (NVIDIA DALI, on the GPU if `device` is one), "opencv", "torchvision" (PIL,
            the reference), or "auto": DALI where it is installed and `device` is a GPU, else OpenCV.
        device: where the training runs and the views arrive: DALI makes them there, other backends copy them from pinned
            memory while the step before is computed. If it is None they stay in host memory, pinned where there is a GPU.
        scaled_decode: decode JPEGs with sides of 900 px and more at a half, a quarter or an eighth of their resolution where
            all crops stay at least twice as large as the views; the pixels differ a little.
        wait_s: seconds to wait at most for the next images; 300 by default.

    Raises:
        TypeError: `source` is no `Source`.
        ValueError: an argument is wrong.
        SkipLimitExceeded: raised during iteration: too many images are broken, or 16 in a row.
        ImagesLost: raised during iteration: a worker died, /dev/shm is full, or nothing came for `wait_s`; the base of
            SkipLimitExceeded, and a RuntimeError.
        RuntimeError: raised during iteration: torch.distributed was initialised with other ranks after the first use.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int | None = None,
        image_size: ImageSize | None = None,
        *,
        sampler: GlobalBatchSampler | None = None,
        augmentations: Sequence[ViewAugmentation] | None = None,
        seed: int = 0,
        workers: int = 0,
        max_skipped_fraction: float = 0.001,
        backend: str = "auto",
        device: torch.device | str | None = None,
        scaled_decode: bool = True,
        wait_s: float = WAIT_S,
    ):
        if not isinstance(source, Source):
            raise TypeError(
                f"`source` is a {type(source).__name__}; it must be a Source: give open_source(path), or wrap your own data "
                f"set in a class with labels, class_names, has_labels, __len__, name, read and open (docs/data.md shows one)"
            )
        if (batch_size is None) == (sampler is None):
            raise ValueError("give exactly one of `batch_size` and `sampler`")
        if batch_size is not None and not 1 <= batch_size <= len(source):
            raise ValueError(f"`batch_size` (={batch_size}) must be in [1, {len(source)}], the number of images")
        if image_size is not None and augmentations is not None:
            raise ValueError(
                "give `image_size` or `augmentations`, not both: each augmentation has an image_size of its own"
            )
        if image_size is not None and min(height_width(image_size)) < 1:
            raise ValueError(f"`image_size` (={image_size}) must be at least 1 pixel")
        if augmentations is None:
            augmentations = moco_v3_augmentations(224 if image_size is None else image_size)
        sizes = [(augmentation.image_size, augmentation.channels) for augmentation in augmentations]
        if not sizes:
            raise ValueError("`augmentations` is empty; give one for each view")
        if len(set(sizes)) > 1:
            raise ValueError(f"`augmentations` must share one image_size and number of channels, got {sizes}")
        if workers < 0:
            raise ValueError(f"`workers` (={workers}) must be at least 0; 0 loads in this process")
        if not 0 <= max_skipped_fraction <= 1:
            raise ValueError(f"`max_skipped_fraction` (={max_skipped_fraction}) must be in [0, 1]")
        if sampler is not None:
            self.sampler = sampler
        self.images_read = 0
        self.images_skipped = 0
        self.broken: dict[str, BrokenFile] = {}  # by name, all so far, with the reason
        self.source, self._batch_size, self._seed, self._workers = source, batch_size, seed, workers
        self._augmentations = tuple(augmentations)
        self._device = torch.device(device or "cpu")
        needs_pil = any(augmentation.needs_pil for augmentation in augmentations)
        self._backend, _ = choose_backend(backend, "cpu" if needs_pil else self._device.type, augmentations[0].channels)
        if needs_pil and self._backend == "dali":
            raise ValueError(
                f"`backend` (={backend!r}) has neither bicubic interpolation nor automatic augmentation; use opencv"
            )
        self._scaled_decode = scaled_decode
        self._max_skipped_fraction, self._wait_s = max_skipped_fraction, wait_s
        self._worker_batches: Any = None
        self._batches: Generator[tuple[Batch, list[BrokenFile]], None, None] | None = None
        self._position: tuple[int, int] | None = None  # (epoch, step) of the batch that comes next

    @cached_property
    def sampler(self) -> GlobalBatchSampler:
        """Return the sampler, which says in which order this rank reads; unless given, it is built at the first use."""
        assert self._batch_size is not None
        world_size, rank = _world_size_and_rank()
        if self._batch_size % world_size:
            raise ValueError(
                f"`batch_size` (={self._batch_size}) must be divisible by the number of ranks (={world_size})"
            )
        return GlobalBatchSampler(self._seed, len(self.source), self._batch_size, world_size, rank)

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of batches in one epoch; images that do not fill the last batch are left out."""
        return self.sampler.steps_per_epoch

    @property
    def shared_bytes(self) -> int:
        """Return how many bytes of images the workers hold in shared memory, at most."""
        if not self._workers or self._backend == "dali":
            return 0
        images = len(split_for_workers(np.arange(self.sampler.local_batch), self._workers)[0])
        view = math.prod(self._augmentations[0].shape)
        return self._workers * (self._ahead + 1) * images * len(self._augmentations) * view

    @property
    def _ahead(self) -> int:
        """Return how many worker batches a worker makes ahead."""
        per_batch = len(split_for_workers(np.arange(self.sampler.local_batch), self._workers))
        return max(AHEAD, math.ceil(_BATCHES_AHEAD * per_batch / max(self._workers, 1)))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of epoch number `epoch`, from 0, starting at step `start_step` of the epoch."""
        if self._batch_size is not None and _world_size_and_rank() != (self.sampler.world_size, self.sampler.rank):
            raise RuntimeError(
                "the ranks of torch.distributed have changed since the first use; build a new TrainLoader"
            )
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"`start_step` (={start_step}) must be in [0, {self.steps_per_epoch}]")
        for step in range(start_step, self.steps_per_epoch):
            yield self._batch(epoch, step)

    def close(self) -> None:
        """Stop the workers. The loader can be used again; it starts new ones."""
        if self._batches is not None:
            self._batches.close()
        if self._worker_batches is not None:
            self._worker_batches.close()
        self._worker_batches = self._batches = self._position = None

    def __enter__(self) -> "TrainLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _batch(self, epoch: int, step: int) -> Batch:
        if self._position != (epoch, step):
            self.close()
            self._start(epoch, step)
        assert self._batches is not None
        self._position = None  # if this raises, the stream is not where it says
        batch, broken = self._on_device(next(self._batches))  # nothing is left to copy if there is a thread
        if batch.views.is_cuda:
            batch.views.record_stream(torch.cuda.current_stream(self._device))  # its memory is that of another stream
        self._check_skip_limit(self.sampler.local_batch, broken)
        self._position = self._next_position(epoch, step)
        return batch

    def _start(self, epoch: int, step: int) -> None:
        if self._backend == "dali":
            from crossbatch.data.augment.dali import MAX_IMAGES, DaliPipeline

            keys = self._keys(epoch, step, 0, MAX_IMAGES)
            arguments = self.source, self._augmentations, self._seed, keys, self._workers, self._device
            self._worker_batches = DaliPipeline(*arguments, self._scaled_decode)
        else:
            keys = _with_following(self._keys(epoch, step, self._workers, worker_batches.MAX_IMAGES), self._workers)
            turns = self._ahead + 1  # those ahead, and the one that `_collate` copies
            dataset = TrainDataset(
                self.source, self._augmentations, self._seed, self._backend, self._scaled_decode, turns
            )
            self._worker_batches = WorkerPool(dataset, keys, self._workers, self._ahead, self._wait_s)
        batches = self._collate(self._worker_batches)
        in_thread = self._workers or self._backend == "dali"
        wait_s = self._wait_s if self._backend == "dali" else math.inf  # else the pool waits, for parts of a batch
        self._batches = prefetched(batches, self._on_device, self._device, wait_s) if in_thread else batches

    def _on_device(self, collated: tuple[Batch, list[BrokenFile]]) -> tuple[Batch, list[BrokenFile]]:
        batch, broken = collated
        return replace(batch, views=batch.views.to(self._device, non_blocking=True)), broken

    def _keys(self, epoch: int, step: int, workers: int, max_images: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (epoch, image indices) of one worker batch after the other, endlessly, from a position on."""
        while True:
            for indices in split_for_workers(self.sampler.batch(epoch, step), workers, max_images):
                yield epoch, indices
            epoch, step = self._next_position(epoch, step)

    def _next_position(self, epoch: int, step: int) -> tuple[int, int]:
        return (epoch + 1, 0) if step + 1 == self.steps_per_epoch else (epoch, step + 1)

    def _collate(self, stream: Iterator[WorkerBatch]) -> Generator[tuple[Batch, list[BrokenFile]], None, None]:
        """Join worker batches into batches of n images, each in one tensor, pinned so that its transfer can overlap."""
        n = self.sampler.local_batch
        # What the workers write to in turns stays mapped, or the kernel would map its pages for every worker batch anew: 9 of
        # 12 page faults, and 0.05 of 0.16 ms of CPU time in the trainer, for an image of two views of 224 px.
        mapped: deque[torch.Tensor] = deque(maxlen=0 if self._backend == "dali" else self._workers * (self._ahead + 1))
        on_gpu = self._backend == "dali" and self._device.type == "cuda"
        where: dict = {"device": self._device} if on_gpu else {"pin_memory": torch.cuda.is_available()}
        while True:
            shape = len(self._augmentations), n, *self._augmentations[0].shape
            views = torch.empty(shape, dtype=torch.uint8, **where).permute(0, 1, 4, 2, 3)
            read, broken, filled = [], [], 0
            while filled < n:
                part = next(stream)
                broken += part.broken
                if part.views is None:
                    raise SkipLimitExceeded(_with_names("no readable image to replace a broken one", part.broken))
                mapped.append(part.views)
                _copy(part.views, views[:, filled : filled + len(part.indices)])
                read.append(part.indices)
                filled += len(part.indices)
            indices = np.concatenate(read)
            labels = torch.from_numpy(self.source.labels[indices]) if self.source.has_labels else None
            yield Batch(views, labels, indices, [image.name for image in broken]), broken

    def _check_skip_limit(self, images: int, broken: list[BrokenFile]) -> None:
        """Raise SkipLimitExceeded if too many different images are broken, of the different images read.

        The limit is rounded up to whole images: one broken file in a small data set must not stop a run, however many epochs
        meet it again.
        """
        self.images_read += images
        self.images_skipped += len(broken)
        self.broken.update({image.name: image for image in broken})
        read = min(self.images_read, self.sampler.num_images)
        allowed = math.ceil(self._max_skipped_fraction * read)
        enough = self.images_read >= min(_IMAGES_BEFORE_CHECK, self.steps_per_epoch * self.sampler.local_batch)
        if enough and len(self.broken) > allowed:
            what = (
                f"{len(self.broken)} of {read} images were broken, more than the {allowed} that max_skipped_fraction "
                f"(={self._max_skipped_fraction}) allows"
            )
            raise SkipLimitExceeded(_with_names(what, list(self.broken.values())) + ", or raise max_skipped_fraction")


class EvaluationLoader:
    """Loads views for evaluation, in worker processes that live until `close`.

        with EvaluationLoader(EvaluationDataset([train, evaluation], 224), batch_size=64, workers=8) as loader:
            for images, indices in loader.read(evaluation, np.arange(1000)):

    Views are central ones, or those that `augmentations` and `seed` of the data set make, the same in every `read`. Between
    two `read`s the workers wait, without any images in memory.
    """

    def __init__(self, dataset: EvaluationDataset, batch_size: int, workers: int, wait_s: float = WAIT_S):
        self.skipped: list[str] = []  # in the last `read`: name and reason
        self._dataset, self._batch_size, self._workers, self._wait_s = dataset, batch_size, workers, wait_s
        self._pool: WorkerPool | None = None

    @property
    def shared_bytes(self) -> int:
        """Return how many bytes of images the workers hold in shared memory, at most."""
        images = min(self._workers * AHEAD * self._batch_size, max(len(source) for source in self._dataset.sources))
        return (
            images * self._dataset.channels * math.prod(height_width(self._dataset.image_size)) if self._workers else 0
        )

    def images_at_once(self, augmented: bool = False) -> int:
        """Return how many images `read` yields at once; augmented ones in several views take no more memory than others."""
        return max(1, self._batch_size // len(self._dataset.augmentations)) if augmented else self._batch_size

    def read(
        self, source: Source, indices: np.ndarray, augmented: bool = False
    ) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """Yield the images `indices` of one of the sources, in order: (uint8 [m, 3, H, W], int64 [m]).

        With `augmented`, the first tensor holds v views of each image: [v, m, 3, H, W].

        A broken image is left out: its index does not come back, and name and reason are in `skipped` after the iteration. (A
        replacement would count twice in an accuracy.) An iteration that is abandoned ends the workers, as `close` does.

        Raises:
            SkipLimitExceeded: if not one image could be read.
            ImagesLost: if no images come for `wait_s`, or a worker died.
        """
        number = next(number for number, candidate in enumerate(self._dataset.sources) if candidate is source)
        size = self.images_at_once(augmented)
        keys = [(number, indices[start:][:size], augmented) for start in range(0, len(indices), size)]
        self.skipped, broken, some, done = [], [], False, False
        if self._pool is None:
            self._pool = WorkerPool(self._dataset, keys, self._workers, AHEAD, self._wait_s)
        else:
            self._pool.restart(keys)
        try:
            for part in self._pool:
                broken += part.broken
                self.skipped = [str(image) for image in broken]
                if part.views is not None:
                    some = True
                    yield part.views, part.indices
            done = True
        finally:
            if not done:
                self.close()
        if broken and not some:
            raise SkipLimitExceeded(_with_names(f"no evaluation image could be read, of {len(broken)}", broken))

    def close(self) -> None:
        """End the workers; the next `read` starts new ones."""
        if self._pool is not None:
            self._pool.close()
        self._pool = None

    def __enter__(self) -> "EvaluationLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy views with channels last; in host memory by this thread alone.

    torch's threads would wait for more work on the cores of the training: with two views of 224 px, 0.33 instead of 0.16 ms of
    CPU time an image on two cores.
    """
    if target.is_cuda:
        target.copy_(source)
    else:
        np.copyto(target.permute(0, 1, 3, 4, 2).numpy(), source.permute(0, 1, 3, 4, 2).numpy())


def _with_following(keys: Iterator[tuple[int, np.ndarray]], workers: int) -> Iterator[TrainKey]:
    """Add to each key the indices of the key that the same worker gets next: DataLoader deals keys out in turns."""
    ahead = deque(islice(keys, max(workers, 1)))
    for key in keys:
        ahead.append(key)
        yield *ahead.popleft(), key[1]


def _world_size_and_rank() -> tuple[int, int]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1, 0
    return torch.distributed.get_world_size(), torch.distributed.get_rank()


def _with_names(what: str, broken: list[BrokenFile]) -> str:
    """Return a message that says what was found, names the last broken images, and says what to do about them."""
    shown = "; ".join(map(str, broken[-_NUM_NAMED:]))
    return f"{what}; the last ones: {shown}. Repair or remove them"
