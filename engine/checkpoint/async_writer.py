"""Saves a checkpoint while training goes on.

Training stops only while this rank's slices are copied into host memory that is kept for the purpose (on a GPU: pinned, and
filled by the copy engine). A thread then writes them. It has a gloo group of its own, so that its messages never mix with
those of training. Only one save is under way at a time; on a slow disk the next one waits.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from crossbatch.engine.checkpoint.directory import Keep
from crossbatch.engine.checkpoint.slices import Slices, shares
from crossbatch.engine.checkpoint.store import Manifest, write
from crossbatch.engine.runtime.distributed import cpu_group
from crossbatch.engine.sharding import LocalShards

PATIENCE_S = 86400  # for a rank with a slow disk; a rank that has died is noticed at once


@dataclass(frozen=True)
class Outcome:
    """Tells how a save ended. `error` is the same on all ranks, and None if the checkpoint is safely on disk."""

    step: int
    error: str | None
    num_bytes: int
    seconds: float  # from the call until it was on disk
    stalled_s: float  # for which training waited


class AsyncCheckpointWriter:
    """Writes the checkpoints of one run; every rank must make the same calls.

    Args:
        directory: `checkpoints/` of the run.
        keep: what stays there.
        token: see `store.write`.
        asynchronous: whether training goes on while a checkpoint is written.
    """

    def __init__(self, directory: Path, keep: Keep, token: str, asynchronous: bool = True):
        self.directory, self.keep, self.token, self.asynchronous = directory, keep, token, asynchronous
        self._group = cpu_group(PATIENCE_S)
        self._host: dict[tuple[str, int], torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None

    @property
    def busy(self) -> bool:
        """Return whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self, held: Mapping[str, LocalShards], manifest: Manifest, config: dict[str, Any], wait: bool = False
    ) -> None:
        """Start a save. With `wait`, or if the writer is not `asynchronous`, return only when it has ended.

        `finished` tells how it ended.
        """
        self.wait()
        wait = wait or not self.asynchronous
        start = time.perf_counter()
        copied = self._copy(shares(held, dist.get_rank(), dist.get_world_size()))
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
        outcome, self._outcome = self._outcome, None
        return outcome

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Leave the group of the writers; every rank calls it after the last save."""
        self.wait()
        dist.destroy_process_group(self._group)

    def _copy(self, slices: Slices) -> torch.cuda.Event | None:
        """Copy `slices` into host memory, and return the event of the GPU that tells when that is done."""
        if self._host.keys() != slices.keys():
            self._host = {
                key: torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
                for key, values in slices.items()
            }
        torch._foreach_copy_([self._host[key] for key in slices], list(slices.values()), non_blocking=True)
        if not any(values.is_cuda for values in slices.values()):
            return None
        copied = torch.cuda.Event()
        copied.record()
        return copied
