"""Files -> batches of two 224 px views, with every core: what can be trained on per second, and whether memory stays flat.

The baseline is torchvision's ImageFolder and DataLoader with as many worker processes (benchmarks/plain.py). Times are ms for a
batch while nothing trains, an average over 20 of them. Memory: resident size of this process and its workers, at three points
of one long run.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Effort, Row, summarise
from benchmarks.plain import plain_loader, write_jpegs
from crossbatch.data import BACKENDS, TrainLoader, open_source
from crossbatch.data.augment.backends import has_dali
from crossbatch.engine.config import usable_cores

SIZE = 224
BASELINE = "torchvision's ImageFolder and DataLoader"


def run(effort: Effort, images: Path | None = None) -> Iterator[Row]:
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
        starts[f"ours, {backend}"] = lambda backend=backend: _endless(_loader(root, batch, workers, backend))
    times: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(effort.pick(1, 1, 3)):  # one loader at a time: two would take the cores from each other
        for name, start in starts.items():
            times[name].append(_ms_per_batch(start(), effort.pick(4, 10, 20)))
    return summarise(times, BASELINE, settings)


def _ms_per_batch(batches: Iterator, count: int) -> float:
    """Of `count` batches, after enough others that none of them was made while nobody waited."""
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
    """Those that are installed."""
    return [name for name in BACKENDS if name != "dali" or has_dali()]


def _loader(root: Path, batch: int, workers: int, backend: str) -> TrainLoader:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_source(root, "train")
    return TrainLoader(
        source,
        batch_size=batch,
        image_size=SIZE,
        workers=workers,
        backend=backend,
        device=device,
    )


def _endless(loader: TrainLoader) -> Generator[Any, None, None]:
    try:
        for epoch in itertools.count():
            yield from loader.epoch(epoch)
    finally:
        loader.close()


def _resident_mib() -> float:
    """Of this process and all that descend from it, by the proportional set size: shared pages count once."""
    kib = 0.0
    for process in _family(os.getpid()):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        kib += next(float(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kib / 1024


def _family(process: int) -> list[int]:
    """Workers may be children of a forkserver, and any thread may have started one."""
    children = [
        int(child) for file in Path(f"/proc/{process}/task").glob("*/children") for child in file.read_text().split()
    ]
    return [process, *(member for child in children for member in _family(child))]
