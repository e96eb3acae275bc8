"""Measures the cases of a stage side by side, so that every figure is a ratio within one run.

The cases take turns (ours, baseline, ours, baseline, ...), so a machine that slows down slows all of them. A turn gives one
sample, in ms of wall clock from synchronised device to synchronised device: the time of one call or, where a call takes less
than 0.2 ms, the mean of a block of them, which `torch.utils.benchmark.Timer.blocked_autorange` makes long enough for the clock
(on a busy machine the median of single calls is the better figure: most of them fall between two interruptions). Calls that
warm up do not count; the last of them is weighed: the most memory in use during it.
"""

import functools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.benchmark import Timer, timer

from benchmarks.rows import VERSION, Row, StoredRow
from benchmarks.stages import Effort
from crossbatch.engine.config import usable_cores

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "triton", "numpy")
ROOT = Path(__file__).parents[1]
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")  # as nvidia-smi calls them
SHORT_MS, BLOCKS_S = 0.2, 0.02  # calls below SHORT_MS are timed in blocks, for so many seconds a turn

_FORGET_PEAK = Path("/proc/self/clear_refs")  # Linux only, and not in every sandbox

Cases = Mapping[str, Callable[[], object]]  # by name; calls without arguments
T = TypeVar("T")


# --- time -----------------------------------------------------------------------------------------------------------


def compare(
    cases: Cases,
    baseline: str,
    settings: dict[str, Any],
    seconds: float,
    warmup: int = 3,
    rounds: int = 5,
    resident: bool = False,
) -> list[Row]:
    """Measure the cases in turns for about `seconds`, at least `rounds` turns each, and return a row for each.

    `resident`: weigh the resident memory of this process on a GPU, too, for cases that do not use torch's allocator.
    """
    on_gpu = torch.cuda.is_available() and not resident
    weighed = {name: _warm_up(call, warmup, on_gpu) for name, call in cases.items()}
    sample = block_ms if min(ms for ms, _ in weighed.values()) < SHORT_MS else call_ms
    rows = summarise(take_turns(cases, seconds, rounds, sample), baseline, settings)
    for row in rows:
        row.peak_mib = weighed[row.case][1]
    return rows


def take_turns(
    cases: Cases, seconds: float, rounds: int, sample: Callable[[Callable[[], object]], float]
) -> dict[str, list[float]]:
    """Return the samples of each case, one a turn, until `seconds` are over and there were `rounds` turns."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    turns, end = 0, time.perf_counter() + seconds
    while turns < rounds or time.perf_counter() < end:
        for name, call in cases.items():
            samples[name].append(sample(call))
        turns += 1
    return samples


def call_ms(call: Callable[[], object]) -> float:
    """Return the milliseconds of one call, from a device that is done to a device that is done."""
    start = timer()
    call()
    return 1000 * (timer() - start)


def host_ms(call: Callable[[], object]) -> float:
    """Return the milliseconds that the calling process waits for one call, whatever the device still does."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def block_ms(call: Callable[[], object]) -> float:
    """Return the milliseconds of a call as the median of blocks of calls that run one after the other."""
    clock = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return 1000 * clock.blocked_autorange(min_run_time=BLOCKS_S).median


def summarise(samples: dict[str, list[float]], baseline: str, settings: dict[str, Any]) -> list[Row]:
    """Return a row for each case of `samples` in ms, with its ratio to the baseline."""
    now = clocks()
    rows = [Row.of_samples(case, values, settings=settings, clocks=now) for case, values in samples.items()]
    middle = next(row.p50 for row in rows if row.case == baseline)
    for row in rows:
        row.baseline, row.ratio = baseline, middle / row.p50
    return rows


def over(values: dict[str, float], baseline: str, unit: str, settings: dict[str, Any]) -> Iterator[Row]:
    """Yield a row for each case that was counted or measured once, with its ratio to the baseline."""
    for case, value in values.items():
        ratio = values[baseline] / value if value else None
        yield Row.of_one(case, value, unit, settings, baseline=baseline, ratio=ratio)


# --- memory ---------------------------------------------------------------------------------------------------------


def _warm_up(call: Callable[[], object], times: int, on_gpu: bool) -> tuple[float, float | None]:
    """Return the milliseconds and the peak MiB of the last of `times` calls; no peak where memory cannot be seen."""
    for _ in range(times - 1):
        call()
    if not (on_gpu or os.access(_FORGET_PEAK, os.W_OK)):
        return call_ms(call), None
    milliseconds: list[float] = []
    _, peak = _memory_mib(lambda: milliseconds.append(call_ms(call)), on_gpu)
    return milliseconds[0], peak


def peak_mib(call: Callable[[], object]) -> float:
    """Return the MiB that `call` adds at most to this process's resident memory, or on a GPU to torch's allocator."""
    before, most = _memory_mib(call, torch.cuda.is_available())
    return most - before


def in_new_process(function: Callable[..., T], *arguments: object) -> T:
    """Call `function` in a process that does nothing else, and return what it returns: a peak, say."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _memory_mib(call: Callable[[], object], on_gpu: bool) -> tuple[float, float]:
    """Return the MiB in use before the call, and at most during it."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return before / 2**20, torch.cuda.max_memory_allocated() / 2**20
    _FORGET_PEAK.write_text("5")  # VmHWM, the largest resident memory so far, starts anew
    before = _status_kib("VmRSS")
    call()
    return before / 2**10, _status_kib("VmHWM") / 2**10


def _status_kib(name: str) -> float:
    """Return a figure of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name))


# --- where a row comes from -----------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return what the figures depend on; nothing that names a computer."""
    cpu = platform.processor()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": usable_cores(), "threads": torch.get_num_threads(), "gpus": gpus}


def clocks() -> dict[str, Any] | None:
    """Return what nvidia-smi says now of each GPU's clocks and power limit ("1980 MHz"); None where there is none to ask."""
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        return {"gpus": [dict(zip(CLOCKS, line.split(", "), strict=True)) for line in lines]}
    return None


@functools.cache
def origin() -> dict[str, Any]:
    """Return versions and commit, as they were when this process first asked."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda if torch.cuda.is_available() else None}
    for package in PACKAGES:
        versions[package] = None
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    commit = None
    with suppress(OSError, subprocess.CalledProcessError):
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")  # where these very rows go
        commit = _git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    return {"versions": versions, "commit": commit}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def stored(stage: str, row: Row, effort: Effort = Effort.FULL) -> StoredRow:
    """Return the row as a line of a file holds it, with its origin."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    about = {"version": VERSION, "stage": stage, "time": now, "effort": effort.value, "machine": machine()}
    return {**about, **origin(), **asdict(row)}


def append(path: Path, stage: str, rows: list[Row], effort: Effort = Effort.FULL) -> None:
    """Append rows to a JSONL file; a line that was cut off there before stays a line by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else b""
    lines = "".join(json.dumps(stored(stage, row, effort)) + "\n" for row in rows)
    with path.open("ab") as file:
        file.write(b"\n" * (before[-1:] not in (b"", b"\n")) + lines.encode())
