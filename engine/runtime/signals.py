"""Stops a run after the same step on all ranks when any rank gets SIGTERM, SIGUSR1 (preemption), SIGHUP or Ctrl-C.

A signal is only remembered, and ends a wait for images. Between two steps, and between two batches of an evaluation, the ranks
tell each other. That is one all-reduce of three numbers on the CPU, at a moment when all ranks have just met.
"""

import signal
import time
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist

from crossbatch.data import asked_to_stop
from crossbatch.engine.runtime.distributed import cpu_group

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Interrupted(Exception):
    """Ends an evaluation; it is raised on all ranks when any rank has `received` a signal."""

    def __init__(self, received: signal.Signals):
        super().__init__(received.name)
        self.received = received


class Signals:
    """Remembers the last signal in `received`, as a context manager; a second Ctrl-C interrupts at once.

    Set `ignores_late` to let signals that come after the context do nothing: a run that is done shall not die of one.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.ignores_late = False

    def __enter__(self) -> "Signals":
        numbers = [number for number in SIGNALS if number != signal.SIGHUP or not _is_under_nohup()]
        self._before = {number: signal.signal(number, self._remember) for number in numbers}
        asked_to_stop.append(self._has_received)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        asked_to_stop.remove(self._has_received)
        if kind is not None:
            return  # a launcher ends with SIGTERM what is leaving with a message and an exit code of its own
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.ignores_late else handler)

    def wait(self, timeout_s: float) -> None:
        """Return when this rank has received a signal itself, or after `timeout_s`."""
        end = time.monotonic() + timeout_s
        while self.received is None and time.monotonic() < end:
            time.sleep(0.05)

    def _has_received(self) -> bool:
        return self.received is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


def _is_under_nohup() -> bool:
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


class Agreed(NamedTuple):
    """Holds what all ranks know between two steps."""

    received: signal.Signals | None  # a signal that a rank has received
    saving: bool  # whether any rank is still writing a checkpoint
    failed_rank: int | None  # a rank that cannot go on


class StepSync:
    """Lets the ranks agree between two steps, in a process group of its own.

    Args:
        timeout_s: how long a rank may keep the others waiting.
    """

    def __init__(self, timeout_s: float) -> None:
        self._group = cpu_group(timeout_s)

    def exchange(self, received: signal.Signals | None, saving: bool, failed: bool) -> Agreed:
        """Tell the other ranks what this one knows, and return what all know; every rank calls it once a step."""
        flags = torch.tensor([received or 0, saving, dist.get_rank() + 1 if failed else 0], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        number, any_saving, failed_rank = flags.tolist()
        received = signal.Signals(number) if number else None
        return Agreed(received, bool(any_saving), failed_rank - 1 if failed_rank else None)

    def close(self) -> None:
        """Leave the process group, on all ranks."""
        dist.destroy_process_group(self._group)
