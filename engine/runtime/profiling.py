"""Measures where the time of a running job goes (`--profile N`), and traces it.

After WARM_UP steps, N steps are timed part by part, then N are traced; so the trace, which slows steps down, does not
affect the times. It writes into the run directory:

    profile/stages.md, stages.json      the parts of an iteration: waiting for data, the step's own parts, what lies between
    profile/rank0.<time>.pt.trace.json  for TensorBoard (with torch-tb-profiler), chrome://tracing or https://ui.perfetto.dev

Training itself is not changed.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from crossbatch import InputError
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.engine.runtime.timing import WHOLE

WARM_UP = 3  # steps: libraries choose algorithms, allocators grow
WAIT, BETWEEN, ITERATION = "data wait", "between steps", "iteration"


def steps_needed(steps: int) -> int:
    """Return how many steps a run must have left to profile `steps` of them."""
    return WARM_UP + steps + 1 + steps  # the first traced one warms the tracer up


def check_steps_left(steps: int, left: int) -> None:
    """Raise InputError unless `left` steps are enough to profile `steps`."""
    needed = steps_needed(steps)
    if needed > left:
        raise InputError(
            f"--profile: given {steps}, which takes {needed} steps (a few to warm up, as many again for the trace), "
            f"but this run has {left} left; lower it, or train longer"
        )


class RunProfile:
    """Writes the table and the traces of a run; call `stepped` after every step.

    Args:
        folder: profile/ of the run directory.
        steps: how many steps are timed, and then traced.
        rank: rank 0 writes the table, every rank a trace.
        batch: images of a step, over all ranks.
        note: tells the user.
    """

    def __init__(self, folder: Path, steps: int, rank: int, batch: int, note: Callable[[str], None]):
        self.folder, self.steps, self.rank, self.batch, self.note = folder, steps, rank, batch, note
        self._number, self._last = 0, time.perf_counter()
        self._timed: list[dict[str, float]] = []
        on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._tracer = profile(
            activities=[ProfilerActivity.CPU, *on_gpu],
            schedule=schedule(wait=WARM_UP + steps, warmup=1, active=steps, repeat=1),
            on_trace_ready=tensorboard_trace_handler(str(folder), worker_name=f"rank{rank}"),
            experimental_config=_ExperimentalConfig(profile_all_threads=True),  # see `crossbatch.models.lockstep`
        )
        self._tracer.start()  # idle for `wait` steps

    def stepped(self, parts: dict[str, float], waited_s: float) -> None:
        """Take in one step: its `parts` in ms, as `StepTimer.read` gives them, and how long it waited for its images."""
        now = time.perf_counter()
        iteration, self._last = 1000 * (now - self._last), now
        self._number += 1
        if WARM_UP < self._number <= WARM_UP + self.steps:
            wait, step = 1000 * waited_s, dict(parts)
            between = iteration - wait - step.pop(WHOLE)
            self._timed.append({WAIT: wait, **step, BETWEEN: between, ITERATION: iteration})
        if self._number == WARM_UP + self.steps and self.rank == 0:
            self._write_table()
        if self._number <= steps_needed(self.steps):
            self._tracer.step()
        if self._number == steps_needed(self.steps):
            self._tracer.stop()
            self.note(f"traces of {self.steps} steps are in {self.folder}")

    def _write_table(self) -> None:
        rows = table(self._timed)
        rate = 1000 * self.batch / rows[ITERATION]["p50"]
        facts = {"steps": self.steps, "train_batch_size": self.batch, "images_per_s": rate, "ms": rows}
        lines = [f"{self.steps} steps of {self.batch} images, {rate:.4g} images/s (median)", ""]
        lines += ["| part | p20 ms | p50 ms | p80 ms | share |", "| --- | --- | --- | --- | --- |"]
        for name, row in rows.items():
            figures = " | ".join(f"{row[p]:.4g}" for p in ("p20", "p50", "p80"))
            lines.append(f"| {name} | {figures} | {100 * row['share']:.1f} % |")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "stages.json", json.dumps(facts, indent=2) + "\n")
        write_atomically(self.folder / "stages.md", "\n".join(lines) + "\n")
        self.note(f"parts of {self.steps} steps, {rate:.4g} images/s: {self.folder / 'stages.md'}")


def table(steps: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the percentiles of each part's milliseconds over `steps`, and its share of their sum."""
    total = sum(step[ITERATION] for step in steps)
    names = dict.fromkeys(name for step in steps for name in step if name != ITERATION)
    rows = {}
    for name in (*names, ITERATION):
        values = [step.get(name, 0.0) for step in steps]
        p20, p50, p80 = (float(p) for p in np.percentile(values, (20, 50, 80)))
        rows[name] = {"p20": p20, "p50": p50, "p80": p80, "share": sum(values) / total}
    return rows
