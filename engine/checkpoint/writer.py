"""Saves while training goes on.

Training stops only while this rank's runs are copied into host memory that is kept for the purpose (pinned and by the GPU's
copy engine where there is one). A thread then writes them, with a gloo group of its own, so that its messages never mix with
training's. One save is under way at a time: on a disk that is slower than the saves come, the next one is put off.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from crossbatch.engine.checkpoint.directory import Keep
from crossbatch.engine.checkpoint.pieces import shares
from crossbatch.engine.checkpoint.store import Manifest, write
from crossbatch.engine.runtime.distributed import cpu_group
from crossbatch.engine.sharding import LocalShards

PATIENCE_S = 86400  # with a rank whose disk is slow; one that has died is noticed at once


@dataclass(frozen=True)
class Outcome:
    """What became of a save. `error` is None if it is safely there, the same on all ranks."""

    step: int
    error: str | None
    num_bytes: int
    seconds: float  # until it was there
    stalled_s: float  # that training waited


class AsyncCheckpointWriter:
    """Writes the checkpoints of one run; every rank must make the same calls.

    Args:
        folder: `checkpoints/` of the run.
        keep: what stays there.
        token: as for `store.write`.
        asynchronous: whether training goes on while a checkpoint is written.
    """

    def __init__(self, folder: Path, keep: Keep, token: str, asynchronous: bool = True):
        self.folder, self.keep, self.token, self.asynchronous = folder, keep, token, asynchronous
        self._group = cpu_group(PATIENCE_S)
        self._host: dict[tuple[str, int], torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self, held: Mapping[str, LocalShards], manifest: Manifest, config: dict[str, Any], wait: bool = False
    ) -> None:
        """Starts a save; `finished` tells how it ended. With `wait`, or without `asynchronous`, returns when it has."""
        self.wait()
        start = time.perf_counter()
        runs = shares(held, dist.get_rank(), dist.get_world_size())
        copied = self._copy(runs)
        stalled_s = time.perf_counter() - start

        def work() -> None:
            error = None
            try:
                if copied is not None:
                    torch.cuda.set_device(copied.device)  # a new thread is on GPU 0, and would take memory there
                    copied.synchronize()
                write(self.folder, self._host, manifest, config, self.keep, self._group, self.token)
            except (CheckpointException, Exception) as raised:
                error = _in_words(raised)
            seconds = time.perf_counter() - start
            stalled = seconds if wait or not self.asynchronous else stalled_s
            self._outcome = Outcome(manifest.step, error, manifest.num_bytes, seconds, stalled)

        # A daemon: a rank that has to leave does not wait for a write that the others have left.
        self._thread = threading.Thread(target=work, name=f"checkpoint of step {manifest.step}", daemon=True)
        self._thread.start()
        if wait or not self.asynchronous:
            self.wait()

    def finished(self) -> Outcome | None:
        """How the last save ended: once, and only when it has."""
        if self.busy:
            return None
        outcome, self._outcome = self._outcome, None
        return outcome

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """After the last save, on all ranks."""
        self.wait()
        dist.destroy_process_group(self._group)

    def _copy(self, runs: Mapping[tuple[str, int], torch.Tensor]) -> torch.cuda.Event | None:
        """`runs` into host memory. What comes back tells when the copy engine is done."""
        on_gpu = any(run.is_cuda for run in runs.values())
        if self._host.keys() != runs.keys():
            self._host = {
                key: torch.empty(run.shape, dtype=run.dtype, pin_memory=on_gpu and run.is_cuda)
                for key, run in runs.items()
            }
        torch._foreach_copy_([self._host[key] for key in runs], list(runs.values()), non_blocking=True)
        if not on_gpu:
            return None
        copied = torch.cuda.Event()
        copied.record()
        return copied


def _in_words(error: BaseException) -> str:
    """One line, with the rank where DCP knows it."""
    if isinstance(error, CheckpointException):
        return "; ".join(
            f"rank {rank}: {type(raised).__name__}: {raised}" for rank, (raised, _) in error.failures.items()
        )
    return f"{type(error).__name__}: {error}"
