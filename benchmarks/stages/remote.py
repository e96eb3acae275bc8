"""Measures the loader on shards of a web server that is 50 ms away and sends 200 MB/s, beside the same shards on the disk.

Each sample is an epoch of a new loader (opencv, a worker for each core), from its second batch to its last, in ms for a batch.
"first epoch" starts with an empty cache. The server (range_server.py) has one of the cores for itself, as one elsewhere would,
and all cases have the others; CPU ms count it, too. On a machine with one core it shares that.

Then whether memory stays flat: of this process, its workers and the server, at three points of one long run without a cache.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from benchmarks.measure import Sample, call_ms, summarise
from benchmarks.rows import Row
from benchmarks.stages import Effort
from benchmarks.stages.data import SIZE, resident_mib
from benchmarks.stages.plain_data import image_folder
from crossbatch.data import RemoteOptions, Source, TrainLoader, open_source
from crossbatch.data.sources.shard_writer import write_shards
from crossbatch.engine.config import usable_cores

LATENCY_MS, MB_PER_S = 50, 200


def run(effort: Effort) -> Iterator[Row]:
    """Yield the time of a batch of each case, then the memory."""
    if importlib.util.find_spec("aiohttp") is None:
        print("left out: aiohttp is not installed; pip install 'crossbatch[remote]'", flush=True)
        return
    images = effort.pick(32, 512, 1024)
    with tempfile.TemporaryDirectory() as temporary, image_folder(None, images) as root:
        write_shards(open_source(root), Path(temporary, "shards/train"), images // 4)
        with served(Path(temporary, "shards")) as url:
            yield from _speed(Path(temporary), url, effort)
            yield from _memory(url, effort)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve `folder` from a core of its own, which this process does without meanwhile, and yield the address."""
    command = [sys.executable, "-m", "benchmarks.range_server", str(folder)]
    command += [f"--latency-ms={LATENCY_MS}", f"--mb-per-s={MB_PER_S}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        usable = os.sched_getaffinity(0)
        try:
            if len(usable) > 1:
                os.sched_setaffinity(server.pid, {max(usable)})
                os.sched_setaffinity(0, usable - {max(usable)})
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            os.sched_setaffinity(0, usable)
            server.kill()


def _speed(folder: Path, url: str, effort: Effort) -> list[Row]:
    batch, workers = effort.pick(8, 32, 64), usable_cores()
    samples: dict[str, list[Sample]] = {}

    def measure(case: str, source: Source) -> None:
        with TrainLoader(source, batch, image_size=SIZE, workers=workers, backend="opencv") as loader:
            batches = loader.epoch(0)
            next(batches)
            epoch = call_ms(lambda: list(batches))
            left = loader.steps_per_epoch - 1
        samples.setdefault(case, []).append(Sample(epoch / left, epoch.cpu_ms / left))

    for turn in range(effort.pick(1, 3, 10)):
        measure("shards on the disk", open_source(folder / "shards"))
        measure("web server, no cache", open_source(url))
        for when in ("first epoch", "later epochs"):
            source = open_source(url, remote=RemoteOptions(folder / f"cache{turn}"))
            measure(f"web server, cache, {when}", source)
    settings = {"workers": workers, "batch": batch, "size": SIZE, "latency_ms": LATENCY_MS, "mb_per_s": MB_PER_S}
    return summarise(samples, settings)


def _memory(url: str, effort: Effort) -> Iterator[Row]:
    marks = effort.pick((2, 4, 8), (50, 100, 200), (300, 1000, 3000))
    with TrainLoader(open_source(url), batch_size=8, image_size=16, workers=2, backend="opencv") as loader:
        batches = (batch for epoch in count() for batch in loader.epoch(epoch))
        for step in range(1, marks[-1] + 1):
            next(batches)
            if step in marks:
                yield Row.of_one(f"memory, web server, after {step} steps", resident_mib(), "MiB", {"batch": 8})
