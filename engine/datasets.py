"""The images of a run: rank 0 prepares them, every rank opens them, and all must have found the same.

Nodes may have copies of their own. One file less on one of them is another order of all images there, so that one image
would be its own negative and another never seen, without a word.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch.distributed as dist

from crossbatch import InputError
from crossbatch.data import Source, has_evaluation_split, open_source, prepare
from crossbatch.engine.evaluation.features import labelled_sources
from crossbatch.engine.runtime.distributed import on_every_rank, on_main

_KEY = "crossbatch.data.path"

Evaluation = TypeVar("Evaluation", bound=Source | None)


def training_images(path: str | None, cache: Path) -> tuple[Source, Source | None]:
    """Training images of `crossbatch.data.path`, and those to evaluate on if there are any; every rank must call it.

    Raises InputError if there are none, or not the same ones on all ranks.
    """
    if path is None:
        raise InputError(f"{_KEY}: not given; allowed: a folder with train/; give it with --data DIR")

    def opened() -> tuple[Source, Source | None]:
        evaluation = open_source(path, "eval", cache=cache) if has_evaluation_split(path) else None
        return open_source(path, "train", cache=cache), evaluation

    return _alike(path, cache, opened)


def labelled_images(path: str | None, cache: Path) -> tuple[Source, Source]:
    """As `training_images`, where both are needed, with labels that fit: see `labelled_sources`."""
    return _alike(path, cache, lambda: labelled_sources(path, cache))


def _alike(path: str | None, cache: Path, opened: Callable[[], tuple[Source, Evaluation]]) -> tuple[Source, Evaluation]:
    if path is not None:
        on_main(lambda: prepare(path, cache=cache))
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


def _facts(source: Source) -> tuple[int, int]:
    """How many images, and a checksum of labels and class names."""
    labels = np.ascontiguousarray(source.labels, dtype=np.int64)
    return len(source), zlib.crc32("\n".join(source.class_names).encode(), zlib.crc32(labels.tobytes()))
