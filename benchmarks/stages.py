"""The stages, and how they are run: each in a process of its own, under a time limit if there is one.

So a stage finds the machine as a user's process does: nothing cached, no thread pools of other stages, DeepSpeed not yet
initialised; and one that crashes takes nobody with it. Without a GPU the processes are forked from a server that has imported
torch and the like once, and that has done nothing else. With one they start from nothing, because CUDA does not survive a fork,
and packages look for it while they are imported.
"""

import importlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.harness import Effort, append, table

STAGES = (
    "decode",
    "augment",
    "data",
    "transfer",
    "index",
    "backbone",
    "batchformer",
    "heads",
    "collectives",
    "optimizer",
    "ema",
    "checkpoint",
    "step",
)
OF_IMAGES = ("decode", "augment", "data")  # these take a folder of images
IMPORTED_ONCE = ("benchmarks.step", "deepspeed", "torch.utils.flop_counter", "cv2")


def measure_each(
    stages: Sequence[str],
    effort: Effort,
    out: Path | None,
    images: Path | None = None,
    limit_s: float | None = None,
) -> dict[str, str]:
    """How each stage ended: "done in 12 s", or why not."""
    return {stage: run_alone(measure, (stage, effort, out, images), limit_s) for stage in stages}


def measure(stage: str, effort: Effort, out: Path | None, images: Path | None = None) -> None:
    """In this process; prints a table, also of the part of a stage that came before a failure."""
    options = {"images": images} if stage in OF_IMAGES else {}
    rows = []
    try:
        for row in importlib.import_module(f"benchmarks.{stage}").run(effort, **options):
            rows.append(row)
            if out is not None:
                append(out / f"{stage}.jsonl", stage, [row], effort)
    finally:
        if rows:
            console = Console(highlight=False)
            console.width = console.width if console.is_terminal else 120
            console.print(table(stage, rows))


def run_alone(function: Callable[..., None], arguments: tuple[Any, ...], limit_s: float | None = None) -> str:
    """Calls it in a process of its own, and says how that ended. What it started ends with it."""
    if torch.cuda.is_available():
        context = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED_ONCE))
    process: Any = context.Process(target=_alone, args=(function, arguments))
    start = time.monotonic()
    process.start()
    try:
        process.join(limit_s)
        seconds = time.monotonic() - start
        if process.exitcode is None:
            return f"stopped after {seconds:.0f} s, its limit; the rows until then are kept"
        return f"done in {seconds:.0f} s" if process.exitcode == 0 else f"failed with exit code {process.exitcode}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _alone(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.setsid()  # a group of processes that can be ended together
    try:
        function(*arguments)
    except Exception:
        traceback.print_exc()
        os._exit(1)
