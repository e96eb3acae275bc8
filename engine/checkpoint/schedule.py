"""Decides when a run saves, and reports how each save ended."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from crossbatch import RunStopped, __version__
from crossbatch.engine.checkpoint import AsyncCheckpointWriter, Manifest
from crossbatch.engine.checkpoint.slices import local_state, random_state
from crossbatch.engine.run_log import Log
from crossbatch.engine.sharding import Backend, LocalShards


class Snapshot(NamedTuple):
    """Holds what a checkpoint is made of, at one step."""

    held: dict[str, LocalShards]
    manifest: Manifest
    config: dict[str, Any]
    optimizer: torch.optim.Optimizer  # whose next step changes what is held

    @staticmethod
    def of(backend: Backend, config: dict[str, Any], **facts: Any) -> "Snapshot":
        """Return the snapshot of `backend` as it is now; `facts` are fields of `Manifest`."""
        held = local_state(backend) | random_state()
        manifest = Manifest(
            shapes={name: list(tensor.shape) for name, tensor in held.items()},
            versions={"crossbatch": __version__, "torch": torch.__version__},
            world_size=config["world_size"],
            **facts,
        )
        return Snapshot(held, manifest, config, backend.torch_optimizer)


class CheckpointSchedule:
    """Saves a run every `every_steps` steps and at its end; all ranks make the same calls.

    Args:
        writer: writes the checkpoints.
        every_steps: number of steps between two checkpoints.
        snapshot: returns the state of the run as it is now.
        log: is told how each save ended. A save that fails does not stop training; the next one is tried as usual.
        saved_step: the step of the checkpoint that the run continues from, if it lies in the same run directory.
    """

    def __init__(
        self,
        writer: AsyncCheckpointWriter,
        every_steps: int,
        snapshot: Callable[[], Snapshot],
        log: Log,
        saved_step: int | None = None,
    ):
        self.writer, self.every_steps, self.snapshot, self.log = writer, every_steps, snapshot, log
        self._saved_step = self._asked_step = saved_step
        self._due = False

    def boundary(self, step: int, any_busy: bool, is_last: bool = False) -> None:
        """Start a save if one is due after `step`, which it always is after the last one; calls may be repeated for a step.

        `any_busy` says whether any rank is still writing the previous checkpoint.
        """
        self._report()
        if step and (is_last or step % self.every_steps == 0) and self._asked_step != step:
            self._asked_step = step
            if self._due or any_busy:
                self.log.warn(f"step {step}: the disk is slow; this save waits for the one before it")
            self._due = True
        if self._due and not any_busy:
            self._due = False
            self._save()

    def final(self, step: int) -> None:
        """Save the state after `step`, and return when it is safely on the disk. Raises RunStopped if that fails."""
        self.writer.wait()
        self._report()
        if self._saved_step == step:
            return
        self._save(wait=True)
        error = self._report()
        if error is not None:
            raise RunStopped(
                f"step {step} is done but cannot be saved: {error}; the last good checkpoint is {self._last_good()}; repeat "
                f"the command when there is room"
            )

    def _save(self, wait: bool = False) -> None:
        start = time.perf_counter()  # before the snapshot, which training waits for, too
        self.writer.save(*self.snapshot(), wait=wait, start=start)

    def _report(self) -> str | None:
        """Log how the last save ended, once; return its error if it failed."""
        outcome = self.writer.finished()
        if outcome is None:
            return None
        if outcome.error is None:
            self._saved_step = outcome.step
            gigabytes, seconds, stalled_s = outcome.num_bytes / 1e9, outcome.seconds, outcome.stalled_s
            took = f"{gigabytes:.3g} GB in {seconds:.1f} s, training waited {stalled_s:.2g} s"
            self.log.note(f"saved step {outcome.step}: {took}")
            values = {"gigabytes": gigabytes, "seconds": seconds, "stalled_s": stalled_s}
            self.log.scalars({f"checkpoint/{name}": value for name, value in values.items()}, outcome.step)
        else:
            self.log.warn(
                f"step {outcome.step} could not be saved: {outcome.error}; the last good checkpoint is {self._last_good()}"
            )
        return outcome.error

    def _last_good(self) -> str:
        return "none" if self._saved_step is None else f"step {self._saved_step}"
