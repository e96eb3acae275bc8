"""How a stage is measured, and what a row says.

A stage is a module with `run(effort) -> Iterator[Row]`. Its cases take turns (ours, baseline, ours, baseline, ...), so a
machine that slows down slows all of them, and a figure is always a ratio within one run. A row holds percentiles 20, 50 and 80
of n calls, the most memory that was in use, and where they come from: machine, clocks, versions, commit, and the stage's own
settings with the resolved configuration.

On a GPU a call is timed by CUDA events of the current stream, elsewhere by the wall clock; calls to warm up do not count.
"""

import enum
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.table import Table

from crossbatch.engine.config import usable_cores

VERSION = 2  # of a row; rows without one are version 1, which had no time, effort, clocks and peak_mib
PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "triton", "numpy")
_CLOCKS = {"clocks.sm": "sm_mhz", "clocks.max.sm": "max_sm_mhz", "clocks.mem": "memory_mhz", "power.limit": "power_w"}

_FORGET_PEAK = Path("/proc/self/clear_refs")  # Linux only, and not in every sandbox

T = TypeVar("T")


class Effort(enum.Enum):
    """How much a stage measures."""

    QUICK = "quick"  # small sizes, few repeats: does it run?
    BRIEF = "brief"  # the sizes that matter, a second or two each: every stage within minutes
    FULL = "full"

    def pick(self, quick: T, brief: T, full: T) -> T:
        return {Effort.QUICK: quick, Effort.BRIEF: brief, Effort.FULL: full}[self]


@dataclass
class Row:
    """One case of one stage. `ratio` is the baseline's p50 / this p50: above 1 this is faster, or smaller."""

    case: str
    p20: float
    p50: float
    p80: float
    n: int
    unit: str = "ms"
    baseline: str | None = None
    ratio: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    peak_mib: float | None = None  # in use at most during a call: of the GPU's allocator, or resident in this process
    clocks: dict[str, Any] | None = None  # right after the measurement

    @staticmethod
    def of_one(case: str, value: float, unit: str, settings: dict[str, Any], **more: Any) -> "Row":
        """Of something that is counted, or measured once."""
        return Row(case, value, value, value, 1, unit, settings=settings, **more)


def compare(
    cases: dict[str, Callable[[], Any]],
    baseline: str,
    settings: dict[str, Any],
    seconds: float,
    warmup: int = 3,
    rounds: int = 5,
    wall: bool = False,
) -> list[Row]:
    """Calls the cases in turn for about `seconds` (at least `rounds` times) and times each call.

    `wall`: by the wall clock and resident memory on a GPU, too, for what does not work in torch's current stream.
    """
    on_gpu = torch.cuda.is_available() and not wall
    peaks = {name: _warm_up(call, warmup, on_gpu) for name, call in cases.items()}
    clock = _event_ms if on_gpu else _wall_ms
    times: dict[str, list[float]] = {name: [] for name in cases}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[baseline]) < rounds:
        for name, call in cases.items():
            times[name].append(clock(call))
    rows = summarise(times, baseline, settings)
    for row in rows:
        row.peak_mib = peaks[row.case]
    return rows


def summarise(times: dict[str, list[float]], baseline: str, settings: dict[str, Any]) -> list[Row]:
    """Rows of what was timed, in ms, case by case."""
    middle, now = float(np.median(times[baseline])), clocks()
    return [
        Row(
            name,
            *(float(p) for p in np.percentile(values, (20, 50, 80))),
            n=len(values),
            baseline=baseline,
            ratio=middle / float(np.median(values)),
            settings=settings,
            clocks=now,
        )
        for name, values in times.items()
    ]


def _warm_up(call: Callable[[], Any], times: int, on_gpu: bool) -> float | None:
    """Calls it, and returns the peak of the last time; None where there was none, or where memory cannot be seen."""
    for _ in range(times - 1):
        call()
    if times == 0:
        return None
    if on_gpu or os.access(_FORGET_PEAK, os.W_OK):
        return _peak_mib(call, on_gpu)[1]
    call()
    return None


def _event_ms(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _wall_ms(call: Callable[[], Any]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return 1000 * (time.perf_counter() - start)


def peak_mib(call: Callable[[], Any]) -> float:
    """MiB that `call` adds at most: to the resident memory of this process, on a GPU to what the allocator has given out."""
    before, most = _peak_mib(call, torch.cuda.is_available())
    return most - before


def _peak_mib(call: Callable[[], Any], on_gpu: bool) -> tuple[float, float]:
    """MiB before, and at most during the call."""
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


def peak_mib_alone(module: str, *arguments: str) -> float:
    """The number that `python -m module arguments` prints last: a peak in a process that has done nothing else."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def _status_kib(name: str) -> float:
    """From the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name))


def machine() -> dict[str, Any]:
    """What the figures depend on; nothing that names a computer."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": usable_cores(), "threads": torch.get_num_threads(), "gpus": gpus}


def clocks() -> dict[str, Any]:
    """MHz now, the mean over CPU cores, and of each GPU, with its limit of power; what cannot be asked is left out."""
    found: dict[str, Any] = {}
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        mhz = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
        if mhz:
            found["cpu_mhz"] = round(sum(mhz) / len(mhz))
    if torch.cuda.is_available():
        query = [f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits"]
        with suppress(OSError, subprocess.CalledProcessError):
            out = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, check=True).stdout
            found["gpus"] = [
                {name: _number(value) for name, value in zip(_CLOCKS.values(), line.split(","), strict=True)}
                for line in out.splitlines()
            ]
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return None


@functools.cache
def origin() -> dict[str, Any]:
    """Versions and commit, as they were when this process first asked."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda if torch.cuda.is_available() else None}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        status = [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"]  # where these very rows go
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"versions": versions, "commit": None}
    return {"versions": versions, "commit": commit.strip() + ("+changes" if changed.strip() else "")}


def append(path: Path, stage: str, rows: list[Row], effort: Effort = Effort.FULL) -> None:
    """Adds rows to a JSONL file; a line that was cut off there before stays by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    common = {"version": VERSION, "stage": stage, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    common |= {"effort": effort.value, "machine": machine(), **origin()}
    with path.open("a+b") as file:
        if file.tell() and _last_byte(file) != b"\n":
            file.write(b"\n")
        file.write("".join(json.dumps({**common, **asdict(row)}) + "\n" for row in rows).encode())


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def table(stage: str, rows: list[Row]) -> Table:
    """For a person."""
    shown = Table("case", "p20", "p50", "p80", "unit", "n", "peak MiB", "ratio", title=stage)
    for row in rows:
        ratio = "baseline" if row.case == row.baseline else "" if row.ratio is None else f"{row.ratio:.2f} x"
        peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        values = (f"{value:.0f}" if value >= 1000 else f"{value:.4g}" for value in (row.p20, row.p50, row.p80))
        shown.add_row(row.case, *values, row.unit, str(row.n), peak, ratio)
    return shown


def over(cases: dict[str, float], baseline: str, unit: str, settings: dict[str, Any]) -> Iterator[Row]:
    """Rows of what was counted or measured once, case by case."""
    for name, value in cases.items():
        ratio = cases[baseline] / value if value else None
        yield Row.of_one(name, value, unit, settings, baseline=baseline, ratio=ratio)
