"""Measures the loader, files -> batches of two 224 px views, beside torchvision's ImageFolder and DataLoader.

Both have as many worker processes as there are cores (plain_data.py is the baseline). All loaders live at once and take turns
in short slices, from full queues to full queues: so a slice is charged with what it takes, whatever the others prefetch, and
start-up is left out. Times are ms for a batch while nothing trains; the CPU time is that of this process and all workers.

Then follow the parts of our work on an image in one process, photographs of 12 megapixels, training steps beside DALI's
threads (in the process of the steps, as `TrainLoader` has them, and in a process of their own), and whether memory stays flat:
the resident size of this process and its workers, at three points of one long run.
"""

import importlib.util
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torchvision
from torch import multiprocessing

from benchmarks.measure import Sample, call_ms, compare, summarise
from benchmarks.rows import Row
from benchmarks.stages import Effort
from benchmarks.stages.plain_data import TwoViews, image_folder, plain_loader, spdl_loader
from crossbatch.data import BACKENDS, TrainLoader, moco_v3_augmentations, open_source
from crossbatch.data.augment import opencv
from crossbatch.data.augment.backends import has_dali
from crossbatch.data.augment.parameters import draw_parameters
from crossbatch.data.augment.pil import crop
from crossbatch.data.decode import decode, decode_pixels
from crossbatch.data.worker_batches import TrainDataset
from crossbatch.data.workers import keep_freed_memory
from crossbatch.engine.config import Device, usable_cores
from crossbatch.engine.runtime.timing import cpu_s, descendants

SIZE = 224
SPDL = "SPDL's threads, torchvision's transforms"
PHOTO = (4000, 3000)  # pixels of a photograph of 12 megapixels
STEP_SIZE, STEPS = 96, 8  # pixels of the views of training steps, and how many of these a turn has
_QUIET = 4, 0.03  # a family of processes is idle if it is seen so so often, so many seconds apart


def run(effort: Effort, images: Path | None = None) -> Iterator[Row]:
    """Yield the time of each backend and of its parts, of steps beside DALI, of large photographs, then what memory is used.

    The images are those in `images`, or generated ones.
    """
    backends = [name for name in BACKENDS if name != "dali" or has_dali()]
    with image_folder(images, effort.pick(32, 256, 256)) as root:
        yield from _speed(root, backends, effort, "given" if images else "generated")
        yield from _parts(root, effort, "given" if images else "generated")
        if "dali" in backends:
            yield from _beside_steps(root, effort, "given" if images else "generated")
    with image_folder(None, effort.pick(2, 4, 8), PHOTO) as root:
        yield from _photographs(root, effort)
    if Path("/proc/self/smaps_rollup").exists():
        yield from _memory(effort.pick(backends[:1], backends, backends), effort)


def _speed(root: Path, backends: list[str], effort: Effort, folder: str) -> list[Row]:
    keep_freed_memory()  # as in training on a CPU; of the baseline, too
    workers, batch, device = usable_cores(), effort.pick(16, 64, 64), torch.device(Device.detect().type)
    count = effort.pick(2, 4, 6)  # of a slice

    def ours(backend: str) -> Iterator:
        source = open_source(root, "train")
        return _endless(
            TrainLoader(source, batch_size=batch, image_size=SIZE, workers=workers, backend=backend, device=device)
        )

    loaders: dict[str, Iterator] = {
        "torchvision's ImageFolder and DataLoader": iter(plain_loader(root, SIZE, batch, workers)),
        **{f"ours, {backend}": ours(backend) for backend in backends},
    }
    settings: dict[str, Any] = {"workers": workers, "batch": batch, "size": SIZE, "folder": folder}
    if importlib.util.find_spec("spdl") is not None:
        loaders[SPDL] = spdl_loader(root, SIZE, batch, workers)
    else:
        settings["left_out"] = {SPDL: "not installed"}
    for batches in loaders.values():
        _take(batches, 2)
    times: dict[str, list[Sample]] = {name: [] for name in loaders}
    for _ in range(effort.pick(1, 2, 5)):
        for name, batches in loaders.items():
            times[name].append(_slice(batches, count))
    loaders.clear()  # ends the workers
    return summarise(times, settings)


def _slice(batches: Iterator, count: int) -> Sample:
    """Return the ms of a batch, from full queues to full queues of all loaders."""
    family = descendants()
    _wait_until_idle(family)
    busy_s, start = cpu_s(family), time.perf_counter()
    _take(batches, count)
    end, waiting_s = _wait_until_idle(family)
    return Sample(1000 * (end - start) / count, 1000 * (cpu_s(family) - busy_s - waiting_s) / count)


def _wait_until_idle(family: Sequence[int]) -> tuple[float, float]:
    """Wait until no thread of `family` and no other thread of this process runs or could run.

    Returns when that began, and the CPU time of looking, in seconds.
    """
    seen, since, before = 0, time.perf_counter(), time.thread_time()
    while seen < _QUIET[0]:
        if any(_can_run(pid) for pid in (os.getpid(), *family)):
            seen, since = 0, time.perf_counter()
        else:
            seen += 1
        time.sleep(_QUIET[1])
    return since, time.thread_time() - before


def _can_run(pid: int) -> bool:
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):  # it has just ended
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            if state in "RD" and int(task.name) != threading.get_native_id():
                return True
    return False


def _take(batches: Iterator, count: int) -> None:
    for _ in range(count):
        next(batches)


def _parts(root: Path, effort: Effort, folder: str) -> list[Row]:
    """Measure what the backend "opencv" does, on one core; its hand-over is what its loader takes more than all of it."""
    source, augmentations = open_source(root, "train"), moco_v3_augmentations(SIZE)
    indices = np.random.default_rng(0).permutation(len(source))[: effort.pick(8, 64, 64)]
    dataset = TrainDataset(source, augmentations, 0, "opencv")
    files = [source.read(int(index)) for index in indices]
    images = [decode_pixels(file) for file in files]
    heights, widths = np.array([image.shape[:2] for image in images]).T
    views = [draw_parameters(a, 0, 0, indices, view, heights, widths) for view, a in enumerate(augmentations)]

    def each(work: Callable[[int, int], object]) -> Callable[[], object]:
        return lambda: [work(view, row) is None for view in range(len(views)) for row in range(len(indices))]

    def resized(view: int, row: int) -> np.ndarray:
        return opencv.resize(crop(images[row], views[view], row), SIZE)

    crops = [[resized(view, row) for row in range(len(indices))] for view in range(len(views))]
    cases: dict[str, Callable[[], object]] = {
        "parts of opencv: all of them": lambda: dataset[0, indices],
        "parts of opencv: read": lambda: [source.read(int(index)) for index in indices],
        "parts of opencv: decode": lambda: [decode_pixels(file) is None for file in files],
        "parts of opencv: decode, by PIL": lambda: [decode(file) is None for file in files],
        "parts of opencv: crop and resize": each(resized),
        "parts of opencv: colours": each(lambda view, row: opencv.colour(crops[view][row], views[view], row)),
        "parts of opencv: colours, by OpenCV": each(
            lambda view, row: opencv.opencv_colour(crops[view][row], views[view], row)
        ),
    }
    return _on_one_core(cases, {"images": len(indices), "size": SIZE, "folder": folder}, effort)


def _photographs(root: Path, effort: Effort) -> list[Row]:
    """Measure photographs of 12 megapixels on one core, decoded whole and at a reduced resolution."""
    source, plain, augmentations = open_source(root, "train"), TwoViews(SIZE), moco_v3_augmentations(SIZE)
    indices = np.arange(len(source))
    whole, scaled = (TrainDataset(source, augmentations, 0, "opencv", scaled) for scaled in (False, True))
    cases: dict[str, Callable[[], object]] = {
        "12 megapixels: torchvision's transforms": lambda: [plain(source.open(int(index))) for index in indices],
        "12 megapixels: ours, scaled_decode false": lambda: whole[0, indices],
        "12 megapixels: ours": lambda: scaled[0, indices],
    }
    return _on_one_core(cases, {"images": len(indices), "size": SIZE, "folder": "generated"}, effort)


def _beside_steps(root: Path, effort: Effort, folder: str) -> list[Row]:
    """Measure steps of many small operators, whose launches DALI's threads might delay; on a CPU each side has one core."""
    device, batch = torch.device(Device.detect().type), effort.pick(8, 32, 32)
    network = torchvision.models.mobilenet_v3_small(num_classes=128).to(device)
    arguments = root, batch, usable_cores() - 1 if device.type == "cuda" else 1, device
    alone = torch.randint(256, (2, batch, STEP_SIZE, STEP_SIZE, 3), dtype=torch.uint8, device=device)
    with _in_a_process(*arguments) as elsewhere:
        streams = {
            "a step with nothing beside it": itertools.repeat(alone.permute(0, 1, 4, 2, 3)),  # channels last, as DALI's
            "a step beside DALI's threads in its process": _dali(*arguments),
            "a step beside DALI in a process of its own": elsewhere,
        }
        waits: dict[str, list[float]] = {name: [] for name in streams}

        def run_steps(name: str) -> None:
            for _ in range(STEPS):
                start = time.perf_counter()
                views = next(streams[name])
                waits[name].append(1000 * (time.perf_counter() - start))
                network(views.flatten(0, 1).float()).square().mean().backward()

        cases: dict[str, Callable[[], object]] = {name: partial(run_steps, name) for name in streams}
        settings = {"images": batch * STEPS, "size": STEP_SIZE, "folder": folder, "threads": arguments[2]}
        rows = _on_one_core(cases, settings, effort, _from_idle)
    for row in rows:
        row.settings = {**row.settings, "data_wait_ms": float(np.median(waits[row.case]))}
    return rows


def _from_idle(call: Callable[[], object]) -> float:
    """Return the milliseconds of a call that begins when what the turn before has set in motion is done."""
    _wait_until_idle(descendants())
    return call_ms(call)


def _dali(root: Path, batch: int, threads: int, device: torch.device) -> Iterator[torch.Tensor]:
    loader = TrainLoader(open_source(root, "train"), batch, STEP_SIZE, workers=threads, backend="dali", device=device)
    return (made.views for made in _endless(loader))


@contextmanager
def _in_a_process(*arguments: Any) -> Iterator[Iterator[torch.Tensor]]:
    """Yield the views that `_dali` makes in another process, which hands them over in shared memory, two batches ahead."""
    context = multiprocessing.get_context("spawn")
    batches = context.Queue(2)
    process = context.Process(target=_fill, args=(batches, *arguments), daemon=True)
    process.start()
    try:
        yield iter(partial(batches.get, timeout=60), None)
    finally:
        process.kill()
        process.join()


def _fill(batches: Any, *arguments: Any) -> None:
    torch.set_num_threads(1)
    for views in _dali(*arguments):
        batches.put(views)


def _on_one_core(
    cases: dict[str, Callable[[], object]],
    settings: dict,
    effort: Effort,
    sample: Callable[[Callable[[], object]], float] | None = None,
) -> list[Row]:
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        return compare(cases, settings, effort, sample=sample)
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


def _memory(backends: list[str], effort: Effort) -> Iterator[Row]:
    marks = effort.pick((10, 20, 40), (50, 100, 200), (1000, 5000, 10000))
    for backend in backends:
        source = open_source("synthetic://256?size=24", "train")
        loader = TrainLoader(source, batch_size=8, image_size=16, workers=2, backend=backend)
        for step, _ in zip(range(1, marks[-1] + 1), _endless(loader), strict=False):
            if step in marks:
                yield Row.of_one(f"memory, {backend}, after {step} steps", resident_mib(), "MiB", {"batch": 8})


def _endless(loader: TrainLoader) -> Iterator:
    """Yield the batches of one epoch after the other; close the loader when nobody holds the iterator any more."""
    with loader:
        for epoch in itertools.count():
            yield from loader.epoch(epoch)


def resident_mib() -> float:
    """Sum the proportional set sizes, where shared pages count once, of this process and all that descend from it."""
    kib = 0
    for pid in (os.getpid(), *descendants()):
        with suppress(OSError):  # it has ended
            kib += int(re.findall(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)[0])
    return kib / 1024
