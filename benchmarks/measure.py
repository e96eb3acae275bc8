"""Measures the cases of a stage side by side, so that every figure is a ratio within one run.

The cases take turns (baseline, ours, baseline, ours, ...), so a machine that slows down slows all of them. A turn gives one
sample, in ms of wall clock from synchronised device to synchronised device: the time of one call. Where calls are short, it is
the mean of a block of them: on a GPU, under 2 ms, 20 calls between two CUDA events; on a CPU, under 0.2 ms, the median of the
blocks that `torch.utils.benchmark.Timer.blocked_autorange` makes long enough for the clock.

Beside the wall clock stands the CPU time, user and system, of this process and all that descend from it. On cores that others
use too, it is the figure to trust: there, the wall clock measures the others.

Two calls warm up and do not count; the second of them is weighed: the most memory in use during it. A case that may fail
(`optional`: what torch cannot compile here, or what does not fit into memory) is left out, and the rows of the others say why.
"""

import functools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
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
from crossbatch.engine.runtime.timing import cpu_s, descendants

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "triton", "numpy", "pillow", "opencv-python-headless", "numba")
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")  # as nvidia-smi calls them
SHORT_MS, BLOCKS_S = 0.2, 0.02  # calls below SHORT_MS are timed in blocks, for so many seconds a turn
GPU_SHORT_MS, GPU_BLOCK = 2.0, 20  # on a GPU, and how many calls a block has there

_FORGET_PEAK = Path("/proc/self/clear_refs")  # Linux only, and not in every sandbox

Cases = Mapping[str, Callable[[], object]]  # by name, the baseline first; calls without arguments
T = TypeVar("T")


class Sample(float):
    """Holds milliseconds of wall clock, with the CPU time of all processes meanwhile as `cpu_ms`; arithmetic drops that."""

    cpu_ms: float

    def __new__(cls, ms: float, cpu_ms: float) -> "Sample":
        """Return `ms` with `cpu_ms` beside it."""
        sample = super().__new__(cls, ms)
        sample.cpu_ms = cpu_ms
        return sample

    def __reduce__(self) -> tuple:
        return Sample, (float(self), self.cpu_ms)


def as_in_training() -> None:
    """Let cuDNN choose by measuring, as training does unless it is deterministic, and as the originals do."""
    torch.backends.cudnn.benchmark = True


# --- time -----------------------------------------------------------------------------------------------------------


def compare(
    cases: Cases,
    settings: dict[str, Any],
    effort: Effort,
    resident: bool = False,
    sample: Callable[[Callable[[], object]], float] | None = None,
    optional: Collection[str] = (),
) -> list[Row]:
    """Measure the cases in turns and return a row for each, with its ratio to the first, which is the baseline.

    Args:
        cases: what to call, by name.
        settings: of all rows.
        effort: decides how long it takes.
        resident: on a GPU, too, weigh the resident memory of this process, for cases that do not use torch's allocator.
        sample: returns the milliseconds of a call; chosen by how long calls take, if None.
        optional: the cases that may fail in their first calls; the rows' setting "left_out" then says why.
    """
    on_gpu = torch.cuda.is_available() and not resident
    warm, left_out = {}, {}
    for name, call in cases.items():
        try:
            warm[name] = _warm_up(call, on_gpu)
        except Exception as error:
            if name not in optional:
                raise
            left_out[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            print(f"left out: {name}: {left_out[name]}", flush=True)
        if name in left_out and on_gpu:  # outside of the handler, whose traceback holds on to memory
            torch.cuda.empty_cache()
    if sample is None:
        shortest = min(ms for ms, _ in warm.values())
        sample = events_ms if on_gpu and shortest < GPU_SHORT_MS else block_ms if shortest < SHORT_MS else call_ms
    seconds, rounds = effort.pick((0.5, 2), (1.5, 3), (10, 5))
    settings = {**settings, "left_out": left_out} if left_out else settings
    rows = summarise(take_turns({name: cases[name] for name in warm}, seconds, rounds, sample), settings)
    for row in rows:
        row.peak_mib = warm[row.case][1]
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


def _with_cpu(sample: Callable[..., float]) -> Callable[..., Sample]:
    """Add the CPU time to the milliseconds that `sample` returns: as much of them as of all the time that it takes."""

    @functools.wraps(sample)
    def sample_with_cpu(call: Callable[[], object], *more: Any) -> Sample:
        family = descendants()
        busy_s, start = cpu_s(family), time.perf_counter()
        ms = sample(call, *more)
        wall_s, busy_s = time.perf_counter() - start, cpu_s(family) - busy_s
        return Sample(ms, ms * busy_s / wall_s)

    return sample_with_cpu


@_with_cpu
def call_ms(call: Callable[[], object], clock: Callable[[], float] = timer) -> float:
    """Return the milliseconds of one call, with torch's clock from a device that is done to a device that is done."""
    start = clock()
    call()
    return 1000 * (clock() - start)


def host_ms(call: Callable[[], object]) -> Sample:
    """Return the milliseconds that the calling process waits for one call, whatever the device still does."""
    return call_ms(call, time.perf_counter)


@_with_cpu
def block_ms(call: Callable[[], object]) -> float:
    """Return the milliseconds of a call as the median of blocks of calls that run one after the other."""
    clock = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return 1000 * clock.blocked_autorange(min_run_time=BLOCKS_S).median


@_with_cpu
def events_ms(call: Callable[[], object]) -> float:
    """Return the milliseconds of a call as the mean of GPU_BLOCK calls between two events of the GPU's current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(GPU_BLOCK):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / GPU_BLOCK


def summarise(samples: Mapping[str, Sequence[float]], settings: dict[str, Any], unit: str = "ms") -> list[Row]:
    """Return a row for each case, with its ratio to the first, which is the baseline; what is counted has one sample."""
    now, baseline = clocks(), next(iter(samples))
    rows = [Row.of_samples(case, values, unit, settings=settings, clocks=now) for case, values in samples.items()]
    for row in rows:
        row.baseline, row.ratio = baseline, rows[0].p50 / row.p50 if row.p50 else None
        row.cpu_ratio = rows[0].cpu_ms / row.cpu_ms if rows[0].cpu_ms and row.cpu_ms else None
    return rows


# --- memory ---------------------------------------------------------------------------------------------------------


def compare_peaks(cases: Mapping[str, Callable[[], float]], settings: dict[str, Any]) -> list[Row]:
    """Call each function in a process of its own, for which it is pickled, and return rows of the MiB that they return."""
    peaks = {}
    for case, function in cases.items():
        with ProcessPoolExecutor(1, get_context("spawn"), initializer=as_in_training) as pool:
            peaks[case] = [pool.submit(function).result()]
    return summarise(peaks, settings, "MiB")


def peak_mib(call: Callable[[], object]) -> float:
    """Return the MiB that `call` adds at most to this process's resident memory, or on a GPU to torch's allocator."""
    _, before, most = _weigh(call, torch.cuda.is_available())
    return most - before


def _warm_up(call: Callable[[], object], on_gpu: bool) -> tuple[float, float | None]:
    """Return the milliseconds and the peak MiB of a second call; no peak where memory cannot be seen."""
    call()
    if not (on_gpu or os.access(_FORGET_PEAK, os.W_OK)):
        return call_ms(call), None
    ms, _, most = _weigh(lambda: call_ms(call), on_gpu)
    return ms, most


def _weigh(call: Callable[[], T], on_gpu: bool) -> tuple[T, float, float]:
    """Return what `call` returns, the MiB in use before it, and at most during it."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return call(), before / 2**20, torch.cuda.max_memory_allocated() / 2**20
    _FORGET_PEAK.write_text("5")  # VmHWM, the largest resident memory so far, starts anew
    before = _status_mib("VmRSS")
    return call(), before, _status_mib("VmHWM")


def _status_mib(name: str) -> float:
    """Return a figure of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 2**10 for line in lines if line.startswith(name))


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
    lines = _output("nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader")
    return lines and {"gpus": [dict(zip(CLOCKS, line.split(", "), strict=True)) for line in lines.splitlines()]}


@functools.cache
def origin() -> dict[str, Any]:
    """Return versions and commit, as they were when this process first asked; CROSSBATCH_COMMIT where there is no .git."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda if torch.cuda.is_available() else None}
    for package in PACKAGES:
        versions[package] = None
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    git = "git", "-C", str(Path(__file__).parent)
    commit = _output(*git, "rev-parse", "--short", "HEAD") or os.environ.get("CROSSBATCH_COMMIT")
    changed = _output(*git, "status", "--porcelain", "--", ":/", ":(exclude)results")  # where these very rows go
    return {"versions": versions, "commit": f"{commit}+changes" if changed else commit}


def _output(*command: str) -> Any:
    """Return the text that a command prints; None where it is not installed, or fails."""
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def stored(stage: str, row: Row, effort: Effort = Effort.FULL) -> StoredRow:
    """Return the row as a line of a file holds it, with its origin."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    about = {"version": VERSION, "stage": stage, "time": now, "effort": effort.value, "machine": machine()}
    return {**about, **origin(), **asdict(row)}


def append(path: Path, stage: str, rows: list[Row], effort: Effort = Effort.FULL) -> None:
    """Append rows to a JSONL file; a line that was cut off there before stays a line by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_off + "".join(json.dumps(stored(stage, row, effort)) + "\n" for row in rows))
