"""Opens the images of a run and checks that all ranks have the same ones.

Rank 0 prepares the images, every rank opens them, and all must have found the same. Nodes may have copies of their own. One
file less on one of them gives all images another order there, so that one image would be its own negative and another would
never be seen, without any error.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch.distributed as dist

from crossbatch import InputError, RunStopped
from crossbatch.data import SkipLimitExceeded, Source, has_evaluation_split, open_source, prepare
from crossbatch.engine.config import user_input
from crossbatch.engine.config.schema import PATH
from crossbatch.engine.runtime.distributed import on_every_rank, on_main

_KEY = "crossbatch.data.path"
_NOT_GIVEN = f"{_KEY}: not given; allowed: a {PATH}; give it with --data DIR"

Evaluation = TypeVar("Evaluation", bound=Source | None)


@contextmanager
def stop_on_lost_images() -> Iterator[None]:
    """Raise a SkipLimitExceeded of a loader as RunStopped, which ends the run and says how to resume it."""
    try:
        yield
    except SkipLimitExceeded as error:
        raise RunStopped(f"crossbatch.data: {error}, and resume") from error


def training_images(path: str | None, cache: Path) -> tuple[Source, Source | None]:
    """Open the training images of `crossbatch.data.path`, and those to evaluate on if there are any; every rank calls it.

    Raises InputError if there are none, or not the same ones on all ranks.
    """
    if path is None:
        raise InputError(_NOT_GIVEN)

    def opened() -> tuple[Source, Source | None]:
        with user_input(_KEY):
            evaluation = open_source(path, "eval", cache=cache) if has_evaluation_split(path) else None
            return open_source(path, "train", cache=cache), evaluation

    return _alike(path, cache, opened)


def labelled_images(path: str | None, cache: Path) -> tuple[Source, Source]:
    """Open training and evaluation images as `training_images` does; both are needed, with labels: see `labelled_sources`."""
    return _alike(path, cache, lambda: labelled_sources(path, cache))


def labelled_sources(path: str | None, cache: Path | None = None) -> tuple[Source, Source]:
    """Open the training and evaluation images of `crossbatch.data.path`, after `prepare`.

    Raises InputError if one is missing or empty, or if a label has no class.
    """
    if path is None:
        raise InputError(_NOT_GIVEN)
    with user_input(_KEY):
        train = open_source(path, "train", cache=cache)
        if not has_evaluation_split(path):
            raise InputError(f"{_KEY}: {path} has no val/ and no test/ with images to evaluate on; add one")
        evaluation = open_source(path, "eval", cache=cache)
    for split, source in (("training", train), ("evaluation", evaluation)):
        _check_labels(source, len(train.class_names), f"{_KEY}: {path}: the {split} images")
    return train, evaluation


def _check_labels(source: Source, num_classes: int, where: str) -> None:
    """Raise InputError if no image has a label, or a label has no class."""
    labels = source.labels
    if not (labels >= 0).any():
        raise InputError(f"{where}: none that has a label; add some")
    wrong = np.flatnonzero((labels < -1) | (labels >= num_classes))  # -1: cannot be read, and is left out
    if len(wrong):
        first = int(wrong[0])
        raise InputError(
            f"{where}: {len(wrong)} labels out of range, the first {int(labels[first])} of {source.name(first)}; allowed: "
            f"0 to {num_classes - 1}, as there are {num_classes} classes"
        )


def _alike(path: str | None, cache: Path, opened: Callable[[], tuple[Source, Evaluation]]) -> tuple[Source, Evaluation]:
    """Open images with `opened` on every rank, after rank 0 has prepared them, and check that all ranks found the same."""
    if path is not None:
        on_main(lambda: _prepare(path, cache))
    sources, errors = on_every_rank(opened, InputError)
    if sources is None or errors:
        raise InputError(errors[0])
    mine = [_facts(source) for source in sources if source is not None]
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            counts = [" + ".join(str(images) for images, _ in facts) for facts in (theirs, found[0])]
            how = (
                f"{counts[0]} images, and rank 0 {counts[1]}" if counts[0] != counts[1] else "other labels than rank 0"
            )
            raise InputError(f"{_KEY}: {path}: rank {rank} finds {how}; give every node the same files")
    return sources


def _prepare(path: str, cache: Path) -> None:
    with user_input(_KEY):
        prepare(path, cache=cache)


def _facts(source: Source) -> tuple[int, int]:
    """Return how many images there are, and a checksum of labels and class names."""
    labels = np.ascontiguousarray(source.labels, dtype=np.int64)
    return len(source), zlib.crc32("\n".join(source.class_names).encode(), zlib.crc32(labels.tobytes()))
