"""Reads a few images, makes their views and replaces broken ones: what one worker process does at a time.

A worker batch is at most 64 images of one rank's batch. They are so small that all workers work on the batch that
the step waits for. If each made a whole batch, the first one of 4096 images would take minutes.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from crossbatch.data.augment.backends import augment_function, make_views
from crossbatch.data.augment.parameters import ImageSize, ViewAugmentation
from crossbatch.data.augment.pil import evaluation_image
from crossbatch.data.decode import (
    BrokenImage,
    Encoded,
    ImagesLost,
    decode_channels,
    decode_jpeg,
    decode_pixels,
    jpeg_size,
)
from crossbatch.data.sources import Source
from crossbatch.data.sources.subset import read_ahead

TrainKey = tuple[int, np.ndarray] | tuple[int, np.ndarray, np.ndarray]  # epoch, image indices, those of the next call
Opened = TypeVar("Opened")  # an image in the form that a backend takes

MAX_IMAGES = 64  # of a worker batch
MAX_TRIES = 16  # broken images in a row before a worker batch is given up


@dataclass(frozen=True)
class BrokenFile:
    """Names an image that could not be read, with the error that it raised."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@dataclass
class WorkerBatch:
    """Holds the views of a part of a batch, and the broken images found on the way."""

    views: torch.Tensor | None  # uint8 [v, m, 3, H, W], central ones [m, 3, H, W]; None: nothing could be read
    indices: np.ndarray  # int64 [m], of the images in `views`
    broken: list[BrokenFile]


class TrainDataset:
    """Makes the views of images, as a map-style dataset: its "index" is a `TrainKey`.

    In a worker process the views are in shared memory, which the `turns`-th worker batch after them overwrites: the kernel
    takes as long to provide new memory, page by page, as a sixth of a decode.
    """

    def __init__(
        self,
        source: Source,
        augmentations: Sequence[ViewAugmentation],
        seed: int,
        backend: str,
        scaled_decode: bool = True,
        turns: int = 1,
    ):
        self.source, self.augmentations, self.seed, self.scaled_decode = source, augmentations, seed, scaled_decode
        self.augment = augment_function(backend, augmentations[0].channels)
        self._memories: deque[torch.UntypedStorage] = deque(maxlen=turns)  # of this worker process
        self.decode = functools.partial(decode_pixels, by_pil=True) if backend == "torchvision" else decode_jpeg

    def describe(self, key: TrainKey) -> str:
        """Return the name of the first image of a key."""
        return self.source.name(int(key[1][0]))

    def __getitem__(self, key: TrainKey) -> WorkerBatch | ImagesLost:
        """Return the worker batch, or what is to be raised in the trainer.

        If a JPEG breaks while its views are made, all of them are decoded once more beforehand.
        """
        epoch, indices, *following = key
        memory = None if get_worker_info() is None else self._memory(len(key[1]))
        opener = functools.partial(open_encoded, channels=self.augmentations[0].channels)
        for coming in (indices, *following):
            read_ahead(self.source, coming)
        try:
            try:
                return self._batch(epoch, indices, memory, opener)
            except BrokenImage:
                return self._batch(epoch, indices, memory, functools.partial(opener, check=True))
        except ImagesLost as error:
            return error

    def _memory(self, images: int) -> torch.Tensor:
        """Return shared memory for the views of so many images."""
        num_bytes = images * len(self.augmentations) * math.prod(self.augmentations[0].shape)
        full = len(self._memories) == self._memories.maxlen
        memory = self._memories.popleft() if full else torch.UntypedStorage(0)
        if memory.nbytes() < num_bytes:
            memory = torch.UntypedStorage._new_shared(num_bytes)  # as torch's own default_collate does
        self._memories.append(memory)
        return torch.empty(0, dtype=torch.uint8).set_(memory)[:num_bytes]

    def _batch(self, epoch: int, indices: np.ndarray, memory: torch.Tensor | None, opener: Callable) -> WorkerBatch:
        read, images, broken = [], [], []
        for index in indices:
            found, failures = open_or_replace(self.source, int(index), functools.partial(opener, self.source))
            broken += failures
            if found is None:
                return WorkerBatch(None, indices[:0], broken)
            read.append(found[0])
            images.append(found[1])
        views = make_views(
            self.augment,
            images,
            self.augmentations,
            self.seed,
            epoch,
            indices,
            decode=self.decode,
            scaled_decode=self.scaled_decode,
            memory=memory,
        )
        return WorkerBatch(views, np.array(read, dtype=np.int64), broken)


def _planes(source: Source, index: int, channels: int) -> list[Image.Image]:
    """Return an image in RGB, or as one gray image of each channel where there are not three. Raises OSError."""
    if channels == 3:
        opened = open_encoded(source, index)
        return [Image.fromarray(decode_jpeg(opened.data) if isinstance(opened, Encoded) else opened)]
    pixels = decode_channels(source.read(index), channels)
    return [Image.fromarray(np.ascontiguousarray(pixels[..., channel])) for channel in range(channels)]


def open_encoded(source: Source, index: int, check: bool = False, channels: int = 3) -> Encoded | np.ndarray:
    """Return image `index` as a file if that is an ordinary JPEG, else decoded, in RGB. Raises OSError.

    With `check`, a JPEG that cannot be decoded raises here, not later. A source without `has_files` opens its images itself.
    With other than three `channels`, every image comes decoded by PIL: uint8 [h, w, channels].
    """
    if channels != 3:
        return decode_channels(source.read(index), channels)
    if not getattr(source, "has_files", False):
        return np.array(source.open(index))
    data = source.read(index)
    size = jpeg_size(data)
    if size is None:
        return decode_pixels(data, by_pil=True)
    if check:
        decode_pixels(data, by_pil=True)
    return Encoded(data, *size)


@dataclass
class EvaluationDataset:
    """Makes central or augmented views, as a map-style dataset. Broken images are left out.

    Its "index" is (number of a source, indices, whether to augment). Augmented views are made by PIL, the same each time.
    """

    sources: Sequence[Source]
    image_size: ImageSize
    interpolation: str = "bilinear"
    channels: int = 3
    augmentations: Sequence[ViewAugmentation] = ()
    seed: int = 0

    def describe(self, key: tuple[int, np.ndarray, bool]) -> str:
        """Return the name of the first image of a key."""
        return self.sources[key[0]].name(int(key[1][0]))

    def __getitem__(self, key: tuple[int, np.ndarray, bool]) -> WorkerBatch | ImagesLost:
        number, indices, augmented = key
        source, views, kept, broken = self.sources[number], [], [], []
        read_ahead(source, indices)
        for index in indices:
            try:
                planes = _planes(source, int(index), self.channels)
            except ImagesLost as error:
                return error
            except OSError as error:
                broken.append(_describe(source, int(index), error))
                continue
            views.append(self._augmented(planes, index) if augmented else self._central(planes))
            kept.append(index)
        joined = torch.stack(views, dim=1 if augmented else 0) if views else None
        return WorkerBatch(joined, np.array(kept, dtype=np.int64), broken)

    def _central(self, planes: list[Image.Image]) -> torch.Tensor:
        return torch.cat([evaluation_image(plane, self.image_size, self.interpolation) for plane in planes])

    def _augmented(self, planes: list[Image.Image], index: int) -> torch.Tensor:
        pixels = np.dstack([np.asarray(plane) for plane in planes])
        augment = augment_function("torchvision", self.channels)
        return make_views(augment, [pixels], self.augmentations, self.seed, 0, np.array([index]))[:, 0]


def open_or_replace(
    source: Source, index: int, open_image: Callable[[int], Opened]
) -> tuple[tuple[int, Opened] | None, list[BrokenFile]]:
    """Open the first image of `source` from `index` on that can be read, by `open_image`.

    A broken image is replaced by the one at the next index, not by a random one: any rule that depends on the index alone
    would do, and this one can be checked by hand.

    Returns:
        The image with its index, or None after 16 tries, and the broken ones before it (those that raise OSError).
    """
    broken = []
    for offset in range(min(MAX_TRIES, len(source))):
        candidate = (index + offset) % len(source)
        try:
            return (candidate, open_image(candidate)), broken
        except OSError as error:
            broken.append(_describe(source, candidate, error))
    return None, broken


def _describe(source: Source, index: int, error: OSError) -> BrokenFile:
    return BrokenFile(source.name(index), f"{type(error).__name__}: {error}")


def split_for_workers(indices: np.ndarray, workers: int, max_images: int = MAX_IMAGES) -> list[np.ndarray]:
    """Cut `indices` into worker batches of at most `max_images`, and of as few as 8 if workers would be idle otherwise."""
    share = math.ceil(len(indices) / max(workers, 1))
    count = math.ceil(len(indices) / min(max_images, max(8, share)))
    return np.array_split(indices, count)
