"""What a worker process does: read a few images, make their views, replace the broken ones (those that raise OSError).

A piece is at most 64 images of one rank's batch. Workers take pieces, not batches, so that all of them work on the
batch that the step waits for; one worker per batch would deliver the first batch of 4096 images after minutes.
"""

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
import torch

from crossbatch.data.augment import opencv as opencv_backend
from crossbatch.data.augment import pil as torchvision_backend
from crossbatch.data.augment.parameters import ViewAugmentation
from crossbatch.data.augment.pil import evaluation_image
from crossbatch.data.sources import Source

Opened = TypeVar("Opened")  # an image as a backend wants it

MAX_PIECE = 64
_MAX_TRIES = 16  # broken images in a row before a piece is given up


@dataclass(frozen=True)
class Broken:
    """An image that could not be read, and what was raised."""

    name: str
    reason: str


@dataclass
class Piece:
    """`views` is uint8 [v, m, 3, H, W] (training) or [m, 3, H, W] (evaluation), and None if nothing could be read."""

    views: torch.Tensor | None
    indices: np.ndarray  # int64 [m], of the images in `views`
    broken: list[Broken]


class TrainPieces:
    """A map-style dataset whose "index" is (epoch, image indices): the views of these images."""

    def __init__(self, source: Source, recipes: Sequence[ViewAugmentation], seed: int, backend: str):
        self.source, self.recipes, self.seed, self.backend = source, recipes, seed, backend

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Piece:
        epoch, indices = key
        backend = opencv_backend if self.backend == "opencv" else torchvision_backend
        read, images, broken = [], [], []
        for index in indices:
            found, failures = open_or_replace(self.source, int(index), backend.open_image)
            broken += failures
            if found is None:
                return Piece(None, indices[:0], broken)
            read.append(found[0])
            images.append(found[1])
        views = backend.make_views(images, self.recipes, self.seed, epoch, indices)
        return Piece(views, np.array(read, dtype=np.int64), broken)


class EvaluationPieces:
    """A map-style dataset whose "index" is an array of image indices: their central views, broken images left out."""

    def __init__(self, source: Source, image_size: int):
        self.source, self.image_size = source, image_size

    def __getitem__(self, indices: np.ndarray) -> Piece:
        views, kept, broken = [], [], []
        for index in indices:
            try:
                image = self.source.open(int(index))
            except OSError as error:
                broken.append(_describe(self.source, int(index), error))
                continue
            views.append(evaluation_image(image, self.image_size))
            kept.append(index)
        return Piece(torch.stack(views) if views else None, np.array(kept, dtype=np.int64), broken)


def open_or_replace(
    source: Source, index: int, open_image: Callable[[Source, int], Opened]
) -> tuple[tuple[int, Opened] | None, list[Broken]]:
    """The first image from `index` on that `open_image` can read, with its index (None after 16 tries), and the broken ones
    before it.

    The next index, not a random one: any rule serves that depends on the index alone, and this one can be checked by
    hand.
    """
    broken = []
    for offset in range(min(_MAX_TRIES, len(source))):
        candidate = (index + offset) % len(source)
        try:
            return (candidate, open_image(source, candidate)), broken
        except OSError as error:
            broken.append(_describe(source, candidate, error))
    return None, broken


def _describe(source: Source, index: int, error: OSError) -> Broken:
    return Broken(source.name(index), f"{type(error).__name__}: {error}")


def cut(indices: np.ndarray, workers: int, most: int = MAX_PIECE) -> list[np.ndarray]:
    """`indices` in pieces: at most `most` images each, and where that would leave workers idle, down to 8."""
    share = math.ceil(len(indices) / max(workers, 1))
    count = math.ceil(len(indices) / min(most, max(8, share)))
    return np.array_split(indices, count)


def start_worker(worker_id: int):
    """Runs first in every worker process.

    One thread (OpenCV has its own), because the workers are the parallelism. Interrupts are left to the trainer, and so
    is a SIGTERM that the trainer did not send: a preempted job gets it in every process at once, and workers that died
    of it would fail the step that the trainer still wants to save.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    for left_to_the_trainer in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(left_to_the_trainer, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    if trainer is not None and hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in the threads started from here on, too
        threading.Thread(target=_end_for, args=(trainer.pid,), daemon=True).start()
    if trainer is not None:
        threading.Thread(target=_end_with, args=(trainer,), daemon=True).start()


def _end_with(trainer: Any):
    """End when the trainer has ended in any way, SIGKILL included. DataLoader's workers watch their parent process, but
    under forkserver that is the server, which lives for as long as its workers do: both would stay for ever.
    """
    trainer.join()
    os._exit(1)


def _end_for(trainer_pid: int | None):
    """Take SIGTERMs, and end at the first from the trainer: were it ignored too, a trainer that fails without closing
    its loader would wait for its workers for ever (multiprocessing terminates them at exit and joins them without a
    timeout).
    """
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer_pid:
        pass
    os._exit(0)


def unchanged(piece: Any) -> Any:
    """The collate function: a piece is what it should be already."""
    return piece
