"""Where the time of a training step goes: ranges around what the step itself calls.

    host to device      views to the device, normalised there
    online features     the online backbone; without gradient in all chunks but the last
    momentum features   the momentum backbone
    batch-wide part     BatchFormer, heads, gathered keys, loss
    backward            all backward passes of the step; the backends exchange gradients within them
    second pass         the online backbone once more, chunk by chunk (only with more than one chunk)
    optimizer           norm of the gradients and update
    moving average      of the momentum encoder
    other               what lies between: schedules, cutting and joining chunks

A range inside of another counts for the outer one. On a GPU the marks are CUDA events of the current stream, so nothing waits
for them, and a range is the time in which the GPU was busy with it or waited for it; on a CPU they are the wall clock. In a
trace of torch.profiler the ranges show under the same names.
"""

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

from crossbatch.engine.step import TrainStep
from crossbatch.models import MoCoOutput

SECOND_PASS, OTHER, WHOLE = "second pass", "other", "step"
PARTS = (
    "host to device",
    "online features",
    "momentum features",
    "batch-wide part",
    "backward",
    SECOND_PASS,
    "optimizer",
    "moving average",
    OTHER,
)

Mark = float | torch.cuda.Event
Spans = list[tuple[str, Mark, Mark]]


class StepParts:
    """A `TrainStep` whose parts are timed: call this instead of it. `read` gives the steps since the last `read`.

    It works on the very object: until `close`, the methods of `step`, its backend and its model that the list above is made
    of carry ranges.
    """

    def __init__(self, step: TrainStep):
        self.step, self._gpu = step, step.device.type == "cuda"
        self._free = False  # within a step, and within none of its parts: a range may begin
        self._spans: Spans = []
        self._pending: deque[Spans] = deque()  # steps whose marks may not have been passed by the GPU yet
        self._done: list[dict[str, float]] = []
        self._undo: list[Callable[[], None]] = []
        self._attach()

    def __call__(self, views: torch.Tensor) -> tuple[MoCoOutput, float]:
        self._spans, self._free = [], True
        start = self._mark()
        try:
            with record_function(WHOLE):
                result = self.step(views)
        finally:
            self._free = False
        self._spans.append((WHOLE, start, self._mark()))
        self._pending.append(self._spans)
        # The last step but one is over: this one has waited for the norm of its own gradients.
        while len(self._pending) > 1:
            self._done.append(self._milliseconds(self._pending.popleft()))
        return result

    def read(self) -> list[dict[str, float]]:
        """Milliseconds by part for each step, "step" being the whole; waits for the last step to end."""
        if self._gpu:
            torch.cuda.synchronize()
        self._done += [self._milliseconds(spans) for spans in self._pending]
        self._pending.clear()
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def _attach(self) -> None:
        step, backend = self.step, self.step.backend
        model: Any = backend.model
        self._wrap(step, "_to_device", "host to device")
        self._wrap(step, "_features_again", SECOND_PASS)
        self._wrap(model, "embed", "online features")
        self._wrap(model, "contrast", "batch-wide part")
        self._wrap(backend, "backward", "backward")
        self._wrap(backend, "step", "optimizer")
        self._wrap(backend, "update_momentum", "moving average")
        self._hook(model.momentum.backbone, "momentum features")

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        """The method `name` of this one object, in a range."""
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._free:
                return method(*args, **kwargs)
            with self._range(part):
                return method(*args, **kwargs)

        setattr(owner, name, timed)
        # Weakly: a run that is out of memory drops its backend, and must not find it held here.
        weakly = weakref.ref(owner)
        self._undo.append(lambda: _delete(weakly(), name))

    def _hook(self, module: torch.nn.Module, part: str) -> None:
        """A range around the calls of a module, outside of what a backend has hooked into it to gather its parameters."""
        entered: list[Any] = []

        def enter(*_: Any) -> None:
            if self._free:
                entered.append(self._range(part))
                entered[-1].__enter__()

        def leave(*_: Any) -> None:
            if entered:
                entered.pop().__exit__(None, None, None)

        handles = (
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        )
        self._undo += [handle.remove for handle in handles]

    @contextmanager
    def _range(self, part: str) -> Iterator[None]:
        self._free, start = False, self._mark()
        try:
            with record_function(part):
                yield
        finally:
            self._spans.append((part, start, self._mark()))
            self._free = True

    def _mark(self) -> Mark:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _milliseconds(self, spans: Spans) -> dict[str, float]:
        """One step: its parts in the order of PARTS, those that it had, and the whole."""
        total: dict[str, float] = {}
        for part, start, end in spans:
            total[part] = total.get(part, 0.0) + _between(start, end)
        whole = total.pop(WHOLE)
        total[OTHER] = whole - sum(total.values())
        return {part: total[part] for part in PARTS if part in total} | {WHOLE: whole}


def mean_ms(steps: list[dict[str, float]]) -> dict[str, float]:
    """Of several steps, by part, under names for programs: "host_to_device"."""
    names = dict.fromkeys(part for step in steps for part in step if part != WHOLE)
    means = {part: sum(step.get(part, 0.0) for step in steps) / len(steps) for part in names}
    return {part.replace(" ", "_").replace("-", "_"): ms for part, ms in means.items()}


def _delete(owner: Any, name: str) -> None:
    if owner is not None:
        delattr(owner, name)


def _between(start: Mark, end: Mark) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end)
    assert isinstance(start, float) and isinstance(end, float)
    return 1000 * (end - start)
