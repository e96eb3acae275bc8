"""Measures the loader, files -> batches of two 224 px views, beside torchvision's ImageFolder and DataLoader.

Both have as many worker processes as there are cores (plain_data.py is the baseline). It says how many images per second can be
trained on, and whether memory stays flat. Times are ms for a batch while nothing trains, an average over up to 20 of them.
Memory is the resident size of this process and its workers, at three points of one long run, where there is psutil.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import host_ms, summarise
from benchmarks.rows import Row
from benchmarks.stages import Effort
from benchmarks.stages.plain_data import image_folder, plain_loader
from crossbatch.data import BACKENDS, TrainLoader, open_source
from crossbatch.data.augment.backends import has_dali
from crossbatch.engine.config import Device, usable_cores

SIZE = 224


def run(effort: Effort, images: Path | None = None) -> Iterator[Row]:
    """Yield the time of each backend, on the images in `images` or on generated ones, then its memory."""
    backends = [name for name in BACKENDS if name != "dali" or has_dali()]
    with image_folder(images, effort.pick(32, 256, 256)) as root:
        yield from _speed(root, backends, effort, "given" if images else "generated")
    if importlib.util.find_spec("psutil") is not None:  # comes with DeepSpeed
        yield from _memory(effort.pick(backends[:1], backends, backends), effort)


def _speed(root: Path, backends: list[str], effort: Effort, folder: str) -> list[Row]:
    workers, batch, device = usable_cores(), effort.pick(16, 64, 64), torch.device(Device.detect().type)
    count = effort.pick(4, 10, 20)

    def ours(backend: str) -> Iterator:
        source = open_source(root, "train")
        return _endless(
            TrainLoader(source, batch_size=batch, image_size=SIZE, workers=workers, backend=backend, device=device)
        )

    starts: dict[str, Callable[[], Iterator]] = {
        "torchvision's ImageFolder and DataLoader": lambda: iter(plain_loader(root, SIZE, batch, workers)),
        **{f"ours, {backend}": partial(ours, backend) for backend in backends},
    }
    times: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(effort.pick(1, 1, 3)):  # one loader at a time: two would take the cores from each other
        for name, start in starts.items():
            batches = start()
            _take(batches, count // 2)  # so many that none of those below was made before the clock started
            times[name].append(host_ms(partial(_take, batches, count)) / count)
            del batches  # ends its workers
    return summarise(times, {"workers": workers, "batch": batch, "size": SIZE, "folder": folder})


def _take(batches: Iterator, count: int) -> None:
    for _ in range(count):
        next(batches)


def _memory(backends: list[str], effort: Effort) -> Iterator[Row]:
    marks = effort.pick((10, 20, 40), (50, 100, 200), (1000, 5000, 10000))
    for backend in backends:
        source = open_source("synthetic://256?size=24", "train")
        loader = TrainLoader(source, batch_size=8, image_size=16, workers=2, backend=backend)
        for step, _ in zip(range(1, marks[-1] + 1), _endless(loader), strict=False):
            if step in marks:
                yield Row.of_one(f"memory, {backend}, after {step} steps", _resident_mib(), "MiB", {"batch": 8})


def _endless(loader: TrainLoader) -> Iterator:
    """Yield the batches of one epoch after the other; close the loader when nobody holds the iterator any more."""
    with loader:
        for epoch in itertools.count():
            yield from loader.epoch(epoch)


def _resident_mib() -> float:
    """Sum the proportional set sizes, where shared pages count once, of this process and all that descend from it."""
    import psutil

    this = psutil.Process()
    return sum(process.memory_full_info().pss for process in [this, *this.children(recursive=True)]) / 2**20
