"""Measures where the time of a training step goes, in spans that the step itself opens.

    host to device      views to the device, normalised there
    online features     the online backbone; without gradient in all chunks but the last
    momentum features   the momentum backbone; with norms over ranks both run in lockstep as "online and momentum features"
    batch-wide part     BatchFormer, heads, gathered keys, loss
    backward            all backward passes of the step; the backends exchange gradients within them
    second pass         the online backbone once more, chunk by chunk (only with more than one chunk)
    optimizer           norm of the gradients and update
    moving average      of the momentum encoder
    other               what lies between: schedules, cutting and joining chunks

The step calls `with span("backward"):` and so on, where `span` is `StepTimer.span`, or torch.profiler.record_function
if nothing is measured; either way the spans appear in a trace of torch.profiler under the names above.
"""

import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

SECOND_PASS, OTHER, WHOLE = "second pass", "other", "step"

Span = Callable[[str], AbstractContextManager]


def descendants(of: int | None = None) -> list[int]:
    """Return the processes that descend from `of`, or from this one (on Linux; else none).

    `of` must descend from this process: where this one has no child, the list is empty, after microseconds.
    """
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return []
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [of or os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def cpu_s(family: Sequence[int]) -> float:
    """Return the CPU time in seconds, user and system, of this process, of its ended children, and (on Linux) of `family`."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() + ended.ru_utime + ended.ru_stime
    for pid in family:
        with suppress(OSError):  # it has ended
            seconds += time.clock_gettime(~pid << 3 | 2)  # its CPU clock, numbered as by clock_getcpuclockid(3)
    return seconds


class StepTimer:
    """Measures the parts of training steps; `read` gives the steps since the last `read`.

    The span "step" is a whole step, and the spans directly in it are its parts: a span within a part counts for that part, and
    one outside of any step is not measured. A step that raises is forgotten.

    On a GPU a span begins and ends with CUDA events of the current stream, so nothing waits for it; it lasts as long as the GPU
    worked on it or waited for it. On a CPU it is measured by the wall clock.
    """

    def __init__(self, device: torch.device):
        self._gpu = device.type == "cuda"
        self._open: list[str] = []
        self._spans: list[tuple[str, Any, Any]] = []  # of the step that is open, or was last: part, start, end
        self._steps: list[list[tuple[str, Any, Any]]] = []  # not read yet

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure what runs inside, as the part `name` of the step."""
        if self._open != ([] if name == WHOLE else [WHOLE]):
            yield
            return
        if name == WHOLE:
            self._spans = []
        self._open.append(name)
        start = self._mark()
        try:
            with record_function(name):
                yield
        finally:
            self._open.pop()
        self._spans.append((name, start, self._mark()))
        if name == WHOLE:
            self._steps.append(self._spans)

    def read(self) -> list[dict[str, float]]:
        """Return the milliseconds of each step by part, "step" being the whole; waits for the last step to end."""
        if self._gpu:
            torch.cuda.synchronize()
        steps, self._steps = self._steps, []
        return [_milliseconds(spans) for spans in steps]

    def _mark(self) -> float | torch.cuda.Event:
        """Return this moment: seconds on a CPU, an event on a GPU."""
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def mean_ms(steps: list[dict[str, float]]) -> dict[str, float]:
    """Average the milliseconds of each part over `steps`, keyed in snake_case ("host_to_device") for metrics.jsonl."""
    names = dict.fromkeys(part for step in steps for part in step if part != WHOLE)
    means = {part: sum(step.get(part, 0.0) for step in steps) / len(steps) for part in names}
    return {part.replace(" ", "_").replace("-", "_"): ms for part, ms in means.items()}


def _milliseconds(spans: list[tuple[str, Any, Any]]) -> dict[str, float]:
    """Add up one step: its parts in the order in which they began, what lies between them, and the whole."""
    total: dict[str, float] = {}
    for part, start, end in spans:
        ms = start.elapsed_time(end) if isinstance(start, torch.cuda.Event) else 1000 * (end - start)
        total[part] = total.get(part, 0.0) + ms
    whole = total.pop(WHOLE)
    return {**total, OTHER: whole - sum(total.values()), WHOLE: whole}
