"""Opens the images of a run, checks that all ranks have the same ones, and says in which order training reads them.

Rank 0 prepares the images, every rank opens them, and all must have found the same. Nodes may have copies of their own. One
file less on one of them gives all images another order there, so that one image would be its own negative and another would
never be seen, without any error message.
"""

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from crossbatch import InputError, RunStopped
from crossbatch.data import (
    Batch,
    EvaluationLoader,
    GlobalBatchSampler,
    ImagesLost,
    RemoteOptions,
    Source,
    TrainLoader,
    ViewAugmentation,
    check_workers,
    describe_source,
    has_evaluation_split,
    moco_v3_augmentations,
    open_source,
    prepare,
)
from crossbatch.data.sources.location import REMOTE, expanded
from crossbatch.data.sources.open import SPLITS
from crossbatch.data.workers import WAIT_S, await_images
from crossbatch.engine.config import Resolved, user_input
from crossbatch.engine.config.schema import PATH, DataConfig, PathConfig
from crossbatch.engine.runtime.distributed import on_all_ranks, on_main
from crossbatch.engine.runtime.world import World

_KEY = "crossbatch.data.path"
_EVALUATION = ", ".join(f"{name}/" for name in SPLITS["eval"])
_COMPARED = 64  # files that every rank reads to see whether it has the same ones as the others
_READ_S = 60.0  # how long reading them may take
MAX_NAMED = 10  # broken images that a rank names

Sources = TypeVar("Sources", bound=tuple[Source | None, ...])


@dataclass(frozen=True)
class TrainData:
    """Holds the training images of a run, and the order in which this rank reads them.

    Attributes:
        sampler: says which images this rank reads at which step.
        loader: loads them.
        steps_per_epoch: optimizer steps of one epoch of the schedule and of the log. With repeated augmentation the sampler
            needs more steps to show every image.
        checksum: of the names, labels and classes of the images, in their order.
    """

    sampler: GlobalBatchSampler
    loader: TrainLoader
    steps_per_epoch: int
    checksum: int

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Yield this rank's batches from optimizer step `first_step` on, epoch after epoch, without end."""
        epoch, step = divmod(first_step, self.sampler.steps_per_epoch)
        yield from self.loader.epoch(epoch, step)
        for later_epoch in itertools.count(epoch + 1):
            yield from self.loader.epoch(later_epoch)


def train_data(
    cfg: Resolved,
    world: World,
    device: torch.device,
    source: Source,
    augmentations: Sequence[ViewAugmentation],
    repeats: int = 1,
    shuffle_window: int = 0,
) -> TrainData:
    """Return the images of `source` as this rank reads them for training, in an order of the seed.

    Args:
        cfg: the resolved configuration.
        world: this rank among the others.
        device: where the model lives.
        source: the training images.
        augmentations: one per view.
        repeats: views of an image that count as images of the batch, which is the repeated augmentation of Hoffer et al.
            (2020). An epoch has as many of them as there are images.
        shuffle_window: images that are shuffled among each other; 0 for all of them.

    Raises:
        InputError: if there are fewer images than in a batch.
    """
    seed, batch = cfg.crossbatch.seed, cfg.train_batch_size
    with user_input("train_batch_size"):
        sampler = GlobalBatchSampler(seed, len(source), batch // repeats, world.size, world.rank, shuffle_window)
    loader = train_loader(cfg, device, source, sampler, augmentations, wait_s=longest_wait_s(cfg))
    return TrainData(sampler, loader, max(1, len(source) // batch), checksum(source))


def train_loader(
    cfg: Resolved,
    device: torch.device,
    source: Source,
    sampler: GlobalBatchSampler,
    augmentations: Sequence[ViewAugmentation],
    **more: Any,
) -> TrainLoader:
    """Return a loader of `source` with the settings of `crossbatch.data`; `more` are further arguments of `TrainLoader`."""
    data = cfg.crossbatch.data
    # What "auto" became before the weights said how many channels there are.
    backend = "auto" if data.backend == "dali" and augmentations[0].channels != 3 else data.backend
    return TrainLoader(
        source,
        sampler=sampler,
        augmentations=augmentations,
        seed=cfg.crossbatch.seed,
        workers=cfg.workers,
        max_skipped_fraction=data.max_skipped_fraction,
        backend=backend,
        scaled_decode=data.scaled_decode,
        device=device,
        **more,
    )


def view_augmentations(data: DataConfig) -> tuple[ViewAugmentation, ViewAugmentation]:
    """Return the augmentations that make the two views of pretraining."""
    return moco_v3_augmentations(data.image_size, data.crop_min, data.channels, data.blur_probability)


def check_loaders(world: World, *loaders: TrainLoader | EvaluationLoader) -> None:
    """Raise InputError, on all ranks, if the workers of a node cannot pass images on, as with too little shared memory."""
    num_bytes = world.local_size * sum(loader.shared_bytes for loader in loaders)
    if num_bytes:
        with user_input("crossbatch.data.workers"):
            on_all_ranks(lambda: check_workers(num_bytes, "the data workers of this node"), ValueError)


def longest_wait_s(cfg: Resolved) -> float:
    """Return how many seconds to wait for images: few enough to report the loss before the other ranks stop waiting."""
    return cfg.crossbatch.watch.timeout_s / 2


@contextmanager
def stop_on_lost_images() -> Iterator[None]:
    """Raise an ImagesLost of a loader as RunStopped, which ends the run and says how to resume it."""
    try:
        yield
    except ImagesLost as error:
        raise RunStopped(f"crossbatch.data: {error}, and resume") from error


def log_skipped_images(
    images: Iterable[str], named: set[str] | None = None, say: Callable[[str], object] | None = None
) -> None:
    """Print or `say` which images of this rank are broken, each once, ten at most; `named` remembers those of earlier calls."""
    named, say = set() if named is None else named, say or partial(print, flush=True)
    for image in dict.fromkeys(images):
        if image not in named and len(named) < MAX_NAMED:
            named.add(image)
            say(f"skipped a broken image: {image}")


def remote_options(data: PathConfig, wait_s: float = WAIT_S) -> RemoteOptions:
    """Return how remote shards are read, as the section `crossbatch.data` says.

    A request is repeated for less than `wait_s`, after which a loader gives up, so that the message says what was wrong.
    """
    folder = None if data.cache_dir is None else expanded(data.cache_dir)
    return RemoteOptions(folder, data.cache_gib, 0.8 * wait_s)


def training_images(
    path: str | None, cache: Path, evaluate: bool = True, remote: RemoteOptions | None = None
) -> tuple[Source, Source | None]:
    """Open the training images of `crossbatch.data.path`; every rank calls it.

    With `evaluate`, open those to evaluate on, too, if there are any. Without it, their folder is not looked at and may be in
    any state, as ImageNet's validation images are before they are sorted into classes.

    Raises InputError if there are no images, or if the ranks find different ones.
    """
    return open_on_all_ranks(path, cache, partial(_open, evaluate=evaluate, remote=remote), remote)


def found_images(path: str | None, train: Source, evaluation: Source | None, evaluates: bool = True) -> list[str]:
    """Return lines for the log: the images and classes found, what was passed over, and why there is no evaluation."""
    lines = [f"training: {describe_source(train)}"]
    if evaluation is not None:
        lines.append(f"evaluation: {describe_source(evaluation)}")
    elif evaluates and not train.has_labels:
        lines.append(f"evaluation: none, as the images of {path} have no labels; k-NN is off")
    elif evaluates:
        lines.append(f"evaluation: none, as {_lacking(path)}")
    return lines


def _lacking(path: str | None) -> str:
    """Say in which place there are no images to evaluate on."""
    if path is not None and path.startswith("list://"):
        return f"{path} has no option eval=FILE, a list of images to evaluate on"
    if path is not None and path.startswith("hf://"):
        return f"{path} has no split {', '.join(SPLITS['eval'])}, and no option eval=NAME"
    if path is not None and path.partition("://")[0] in REMOTE:
        return f"{path} has none of {_EVALUATION} with shards, and no option eval=FOLDER"
    return f"{path} has none of {_EVALUATION} beside train/"


def labelled_images(path: str | None, cache: Path, remote: RemoteOptions | None = None) -> tuple[Source, Source]:
    """Open training and evaluation images as `training_images` does; both are needed, with labels: see `labelled_sources`."""
    return open_on_all_ranks(path, cache, partial(labelled_sources, remote=remote), remote)


def labelled_sources(
    path: str | None, cache: Path | None = None, remote: RemoteOptions | None = None
) -> tuple[Source, Source]:
    """Open the training and evaluation images of `crossbatch.data.path`, after `prepare`.

    Raises InputError if one is missing or empty, or if a label has no class.
    """
    train, evaluation = _open(path, cache, remote=remote)
    if evaluation is None and not train.has_labels:
        raise InputError(
            f"{_KEY}: the images of {path} have no labels, which evaluation and fine-tuning need; add labels"
        )
    if evaluation is None:
        raise InputError(f"{_KEY}: {_lacking(path)}; add it")
    for split, source in (("training", train), ("evaluation", evaluation)):
        _check_labels(source, len(train.class_names), f"{_KEY}: {path}: the {split} images")
    return train, evaluation


def _open(
    path: str | None, cache: Path | None, evaluate: bool = True, remote: RemoteOptions | None = None
) -> tuple[Source, Source | None]:
    if path is None:
        raise InputError(f"{_KEY}: not given; allowed: a {PATH}; give it with --data DIR")
    with user_input(_KEY):
        train = open_source(path, "train", cache=cache, remote=remote)
        evaluate = evaluate and train.has_labels and has_evaluation_split(path)
        return train, open_source(path, "eval", cache=cache, remote=remote) if evaluate else None


def _check_labels(source: Source, num_classes: int, where: str) -> None:
    """Raise InputError if no image has a label, or a label has no class."""
    labels = source.labels
    if not (labels >= 0).any():
        raise InputError(f"{where}: none of them has a label; add labels")
    wrong = np.flatnonzero((labels < -1) | (labels >= num_classes))  # -1: cannot be read, and is left out
    if len(wrong):
        first = int(wrong[0])
        raise InputError(
            f"{where}: {len(wrong)} labels out of range, the first {int(labels[first])} of {source.name(first)}; allowed: "
            f"0 to {num_classes - 1}, as there are {num_classes} classes"
        )


def open_on_all_ranks(
    path: str | None,
    cache: Path,
    opened: Callable[[str | None, Path], Sources],
    remote: RemoteOptions | None,
) -> Sources:
    """Open images with `opened` on every rank, after rank 0 has prepared them, and check that all ranks found the same.

    Raises InputError if they have not, or if `opened` does.
    """
    if path is not None:
        on_main(user_input(_KEY)(lambda: prepare(path, cache=cache, remote=remote)))
    sources = on_all_ranks(lambda: opened(path, cache))
    if dist.get_world_size() == 1:
        return sources
    opened_here = [source for source in sources if source is not None]
    reader = ThreadPoolExecutor(1)
    contents = reader.submit(lambda: [_contents(source) for source in opened_here])
    reader.shutdown(wait=False)  # it may never come back from the disk
    with stop_on_lost_images():
        compared = await_images(contents, _READ_S)
    mine = [(len(source), checksum(source), read) for source, read in zip(opened_here, compared, strict=True)]
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            counts, wanted = (" + ".join(str(images) for images, *_ in facts) for facts in (theirs, found[0]))
            names, first = ([checksums for _, checksums, _ in facts] for facts in (theirs, found[0]))
            how = "other file contents than rank 0"
            if counts != wanted:
                how = f"{counts} images, but rank 0 finds {wanted}"
            elif names != first:
                how = "other files or labels than rank 0"
            raise InputError(f"{_KEY}: {path}: rank {rank} finds {how}; give every node the same files")
    return sources


def _contents(source: Source) -> int:
    """Return a checksum of some of the files, evenly spread."""
    contents = 0
    for index in np.unique(np.linspace(0, len(source) - 1, _COMPARED).astype(int)).tolist():
        with suppress(OSError):  # a broken image, on all nodes or on one
            contents = zlib.crc32(source.read(index), contents)
    return contents


def checksum(source: Source) -> int:
    """Return a checksum of labels and class names, in order, and of image names if `source` has a checksum of them."""
    labels = np.ascontiguousarray(source.labels, dtype=np.int64)
    names = "\n".join(source.class_names).encode(errors="surrogateescape")
    return zlib.crc32(names, zlib.crc32(labels.tobytes(), getattr(source, "checksum", 0)))
