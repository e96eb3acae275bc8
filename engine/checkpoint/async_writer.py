"""Saves a checkpoint while training goes on.

This rank's slices are copied into host memory that is kept for the purpose, and a thread then writes them. On a CPU training
stops for the copies. On a GPU a side stream fills pinned memory while the next step computes its gradients:

    compute stream    step 8 | buffers cloned | forward, backward of step 9 | waits here, if at all | update of step 9
    side stream                               | copies of parameters, optimizer state and clones    |

A forward pass changes buffers (running statistics), so these are cloned first. All else changes in the optimizer's step, and a
hook before it waits for the copies.

The thread has a gloo group of its own, so that its messages never mix with those of training. Only one save is under way at a
time; on a slow disk the next one waits.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from crossbatch.engine.checkpoint.directory import Keep
from crossbatch.engine.checkpoint.slices import Slices, shares
from crossbatch.engine.checkpoint.store import Manifest, write
from crossbatch.engine.runtime.distributed import cpu_group
from crossbatch.engine.sharding import LocalShards

PATIENCE_S = 86400  # for a rank with a slow disk; a rank that has died is noticed at once


@dataclass(frozen=True)
class Outcome:
    """Tells how a save ended.

    Attributes:
        step: the step that was saved.
        error: why it failed, the same on all ranks; None if the checkpoint is safely on disk.
        num_bytes: size of all files but `state.json`; 0 on ranks other than 0.
        seconds: time until it was on disk.
        stalled_s: seconds for which training waited. That is the host's time until it could go on, and the GPU's time between
            two events around the wait for the copies, which the next update makes if they are not done by then.
    """

    step: int
    error: str | None
    num_bytes: int
    seconds: float
    stalled_s: float


class AsyncCheckpointWriter:
    """Writes the checkpoints of one run; every rank must make the same calls.

    Args:
        directory: `checkpoints/` of the run.
        keep: which checkpoints stay in `directory`.
        token: see `store.write`.
        asynchronous: whether training goes on while a checkpoint is written.
    """

    def __init__(self, directory: Path, keep: Keep, token: str, asynchronous: bool = True):
        self.directory, self.keep, self.token, self.asynchronous = directory, keep, token, asynchronous
        self._group = cpu_group(PATIENCE_S)
        self._host: dict[tuple[str, int], torch.Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None  # what the next update must wait for
        self._wait: tuple[torch.cuda.Event, torch.cuda.Event] | None = None  # start and end of that wait
        self._hook: RemovableHandle | None = None  # calls _before_update
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None

    @property
    def busy(self) -> bool:
        """Return whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self,
        held: Mapping[str, LocalShards],
        manifest: Manifest,
        config: dict[str, Any],
        optimizer: torch.optim.Optimizer,
        wait: bool = False,
        start: float | None = None,
    ) -> None:
        """Start a save. With `wait`, or if the writer is not `asynchronous`, return only when it has ended.

        `optimizer` is what changes `held`: on a GPU, its next step waits until all is copied. `finished` tells how the save
        ended; its seconds count from `start` (of time.perf_counter), or from this call.
        """
        start = time.perf_counter() if start is None else start
        self.wait()
        wait = wait or not self.asynchronous
        copied = self._copy(shares(held, dist.get_rank(), dist.get_world_size()), optimizer)
        stalled_s = time.perf_counter() - start

        def work() -> None:
            error = None
            try:
                if copied is not None:
                    torch.cuda.set_device(copied.device)  # a new thread is on GPU 0, and would take memory there
                    copied.synchronize()
                write(self.directory, self._host, manifest, config, self.keep, self._group, self.token)
            except Exception as raised:
                error = str(raised)
            seconds = time.perf_counter() - start
            self._outcome = Outcome(manifest.step, error, manifest.num_bytes, seconds, seconds if wait else stalled_s)

        # A daemon, so that a rank that has to leave does not wait for a write that the others have left.
        self._thread = threading.Thread(target=work, name=f"checkpoint of step {manifest.step}", daemon=True)
        self._thread.start()
        if wait:
            self.wait()

    def finished(self) -> Outcome | None:
        """Return how the last save ended, once; None while it is under way and afterwards."""
        if self.busy:
            return None
        outcome, self._outcome, self._copied = self._outcome, None, None
        if outcome is not None and self._wait is not None:
            start, end = self._wait
            end.synchronize()
            self._wait = None
            return replace(outcome, stalled_s=outcome.stalled_s + start.elapsed_time(end) / 1000)
        return outcome

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Leave the group of the writers; every rank calls it after the last save."""
        self.wait()
        if self._hook is not None:
            self._hook.remove()
        dist.destroy_process_group(self._group)

    def _copy(self, slices: Slices, optimizer: torch.optim.Optimizer) -> torch.cuda.Event | None:
        """Copy `slices` into host memory, and return the event of the GPU that tells when that is done."""
        if self._host.keys() != slices.keys():
            self._host = {
                key: torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
                for key, values in slices.items()
            }
        host, sources = [self._host[key] for key in slices], list(slices.values())
        device = next((values.device for values in sources if values.is_cuda), None)
        if device is None:
            torch._foreach_copy_(host, sources)
            return None
        sources = [values.clone() if name.startswith("buffers.") else values for (name, _), values in slices.items()]
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            torch._foreach_copy_(host, sources, non_blocking=True)
        self._copied, self._wait = torch.cuda.Event(), None
        self._copied.record(self._stream)
        if self._hook is not None:
            self._hook.remove()
        self._hook = optimizer.register_step_pre_hook(self._before_update)
        for values in sources:
            if values.is_cuda:
                values.record_stream(self._stream)  # whoever frees it meanwhile, as a step out of memory does
        return self._copied

    def _before_update(self, *_: Any) -> None:
        """Let the current stream wait for the copies of the last save, whose sources an update overwrites."""
        if self._copied is None:
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda.current_stream().wait_event(self._copied)
        end.record()
        self._copied, self._wait = None, (start, end)
