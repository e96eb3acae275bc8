"""How a stage is measured, and what a row says.

A stage is a module with `run(quick) -> list[Row]`. Its cases take turns (ours, baseline, ours, baseline, ...), so a machine
that slows down slows all of them, and a figure is always a ratio within one run. A row holds percentiles 20, 50
and 80 of n calls, and where they come from: machine, versions, commit, and the stage's own settings.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "triton", "numpy")


@dataclass
class Row:
    """One case of one stage. `ratio` is the baseline's p50 / this p50: above 1 this is faster."""

    case: str
    p20: float
    p50: float
    p80: float
    n: int
    unit: str = "ms"
    baseline: str | None = None
    ratio: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def compare(
    cases: dict[str, Callable[[], Any]],
    baseline: str,
    settings: dict[str, Any],
    seconds: float,
    warmup: int = 3,
    rounds: int = 5,
) -> list[Row]:
    """Calls the cases in turn for about `seconds` (at least `rounds` times) and times each call, GPU work included."""
    for call in cases.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in cases}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[baseline]) < rounds:
        for name, call in cases.items():
            times[name].append(_milliseconds(call))
    return summarise(times, baseline, settings)


def summarise(times: dict[str, list[float]], baseline: str, settings: dict[str, Any]) -> list[Row]:
    """Rows of what was timed, in ms, case by case."""
    middle = float(np.median(times[baseline]))
    return [
        Row(
            name,
            *(float(p) for p in np.percentile(values, (20, 50, 80))),
            n=len(values),
            baseline=baseline,
            ratio=middle / float(np.median(values)),
            settings=settings,
        )
        for name, values in times.items()
    ]


def _milliseconds(call: Callable[[], Any]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return 1000 * (time.perf_counter() - start)


def peak_mib(call: Callable[[], Any]) -> float:
    """MiB that `call` adds at most: to the resident memory of this process, on a GPU to what the allocator has given out."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the largest resident memory so far, starts anew
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) / 2**10


def peak_mib_alone(module: str, *arguments: str) -> float:
    """The number that `python -m module arguments` prints last: a peak in a process that has done nothing else."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stdout + done.stderr
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
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}


def origin() -> dict[str, Any]:
    """Versions and commit."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda if torch.cuda.is_available() else None}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"versions": versions, "commit": None}
    return {"versions": versions, "commit": commit.strip() + ("+changes" if changed.strip() else "")}


def append(path: Path, stage: str, rows: list[Row]) -> None:
    """Adds rows to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    common = {"stage": stage, "machine": machine(), **origin()}
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**common, **asdict(row)}) + "\n")


def table(stage: str, rows: list[Row]) -> Table:
    """For a person."""
    shown = Table("case", "p20", "p50", "p80", "unit", "n", "speed-up", title=stage)
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} x {row.baseline}"
        shown.add_row(row.case, *(f"{value:.4g}" for value in (row.p20, row.p50, row.p80)), row.unit, str(row.n), ratio)
    return shown
