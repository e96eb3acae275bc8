"""Measures the loader, files -> batches of two 224 px views, beside torchvision's ImageFolder and DataLoader.

Both have as many worker processes as there are cores (plain_data.py is the baseline). It says how many images per second can be
trained on, and whether memory stays flat. Times are ms for a batch while nothing trains, an average over up to 20 of them.
Memory is the resident size of this process and its workers, at three points of one long run.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import summarise
from benchmarks.rows import Row
from benchmarks.stages import Effort
from benchmarks.stages.plain_data import plain_loader, write_jpegs
from crossbatch.data import BACKENDS, TrainLoader, open_source
from crossbatch.data.augment.backends import has_dali
from crossbatch.engine.config import usable_cores

SIZE = 224
BASELINE = "torchvision's ImageFolder and DataLoader"


def run(effort: Effort, images: Path | None = None) -> Iterator[Row]:
    """Yield the time of each backend, on the images in `images` or on generated ones, then its memory."""
    with tempfile.TemporaryDirectory() as temporary:
        root = images or Path(temporary)
        if images is None:
            write_jpegs(root, effort.pick(32, 256, 256))
        yield from _speed(root, effort, "given" if images else "generated")
    yield from _memory(effort)


def _speed(root: Path, effort: Effort, folder: str) -> list[Row]:
    workers, batch = usable_cores(), effort.pick(16, 64, 64)
    settings = {"workers": workers, "batch": batch, "size": SIZE, "folder": folder}
    starts: dict[str, Callable[[], Iterator]] = {BASELINE: lambda: iter(plain_loader(root, SIZE, batch, workers))}
    for backend in backends():
        starts[f"ours, {backend}"] = partial(_ours, root, batch, workers, backend)
    times: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(effort.pick(1, 1, 3)):  # one loader at a time: two would take the cores from each other
        for name, start in starts.items():
            times[name].append(_ms_per_batch(start(), effort.pick(4, 10, 20)))
    return summarise(times, BASELINE, settings)


def _ms_per_batch(batches: Iterator, count: int) -> float:
    """Time `count` batches, after so many others that none of them was made before the clock started."""
    for _ in range(count // 2):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return 1000 * (time.perf_counter() - start) / count


def _memory(effort: Effort) -> Iterator[Row]:
    marks = effort.pick((10, 20, 40), (50, 100, 200), (1000, 5000, 10000))
    for backend in effort.pick(backends()[:1], backends(), backends()):
        loader = TrainLoader(
            open_source("synthetic://256?size=24", "train"),
            batch_size=8,
            image_size=16,
            workers=2,
            backend=backend,
        )
        batches = _endless(loader)
        for step in range(1, marks[-1] + 1):
            next(batches)
            if step in marks:
                yield Row.of_one(f"memory, {backend}, after {step} steps", _resident_mib(), "MiB", {"batch": 8})
        batches.close()


def backends() -> list[str]:
    """Return the names of the backends that are installed."""
    return [name for name in BACKENDS if name != "dali" or has_dali()]


def _ours(root: Path, batch: int, workers: int, backend: str) -> Iterator:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_source(root, "train")
    loader = TrainLoader(source, batch_size=batch, image_size=SIZE, workers=workers, backend=backend, device=device)
    return _endless(loader)


def _endless(loader: TrainLoader) -> Generator[Any, None, None]:
    try:
        for epoch in itertools.count():
            yield from loader.epoch(epoch)
    finally:
        loader.close()


def _resident_mib() -> float:
    """Sum the proportional set sizes, where shared pages count once, of this process and all that descend from it."""
    import psutil  # comes with DeepSpeed

    this = psutil.Process()
    return sum(process.memory_full_info().pss for process in [this, *this.children(recursive=True)]) / 2**20
