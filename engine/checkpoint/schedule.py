"""When a run saves, and what it says about it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from crossbatch import RunStopped, __version__
from crossbatch.engine.checkpoint import AsyncCheckpointWriter, Manifest, Outcome, local_state, random_state
from crossbatch.engine.run_log import Log
from crossbatch.engine.sharding import Backend, LocalShards


class Snapshot(NamedTuple):
    """What a checkpoint is made of, at the step at which it is asked for."""

    held: dict[str, LocalShards]
    manifest: Manifest
    config: dict[str, Any]

    @staticmethod
    def of(backend: Backend, config: dict[str, Any], **facts: Any) -> "Snapshot":
        """`facts` are fields of `Manifest`."""
        held = local_state(backend) | random_state()
        shapes = {name: list(tensor.shape) for name, tensor in held.items()}
        versions = {"crossbatch": __version__, "torch": torch.__version__}
        return Snapshot(
            held, Manifest(shapes=shapes, versions=versions, world_size=config["world_size"], **facts), config
        )


class CheckpointSchedule:
    """The schedule of saves of one run; every rank must make the same calls.

    Args:
        saver: writes them.
        every_steps: steps between two of them.
        snapshot: of the run as it is now.
        log: is told how each ended. A save that fails does not stop training; the next one is tried as usual.
        saved: the step of the checkpoint that the run was resumed from.
    """

    def __init__(
        self,
        saver: AsyncCheckpointWriter,
        every_steps: int,
        snapshot: Callable[[], Snapshot],
        log: Log,
        saved: int | None = None,
    ):
        self.saver, self.every_steps, self.snapshot, self.log = saver, every_steps, snapshot, log
        self._saved = saved
        self._due = False

    @property
    def busy(self) -> bool:
        return self.saver.busy

    def boundary(self, step: int, any_busy: bool) -> None:
        """After each step, with whether any rank was still writing: starts a save if one is due and the last one has ended."""
        self._report()
        if step and step % self.every_steps == 0 and self._saved != step:
            if self._due or any_busy:
                self.log.warn(f"step {step}: the disk is slow, the save waits for the one before it")
            self._due = True
        if self._due and not any_busy:
            self._due = False
            self.saver.save(*self.snapshot())

    def final(self, step: int) -> None:
        """Returns when the state after `step` is safely on disk. Raises RunStopped if it cannot be."""
        self.saver.wait()
        self._report()
        if self._saved == step:
            return
        self.saver.save(*self.snapshot(), wait=True)
        error = self._report()
        if error is not None:
            raise RunStopped(
                f"step {step} is done but cannot be saved: {error}; the last good checkpoint is {self._last_good()}: repeat "
                f"the command when there is room, it goes on from there"
            )

    def close(self) -> None:
        self.saver.close()

    def _report(self) -> str | None:
        """Says how the last save ended; its error, if it failed."""
        outcome = self.saver.finished()
        if outcome is None:
            return None
        if outcome.error is None:
            self._saved = outcome.step
            self._say(outcome)
        else:
            self.log.warn(
                f"step {outcome.step} could not be saved: {outcome.error}; the last good checkpoint is {self._last_good()}"
            )
        return outcome.error

    def _say(self, outcome: Outcome) -> None:
        gigabytes = outcome.num_bytes / 1e9
        self.log.note(
            f"saved step {outcome.step}: {gigabytes:.3g} GB in {outcome.seconds:.1f} s, "
            f"training waited {outcome.stalled_s:.2g} s"
        )
        self.log.scalars(
            {
                "checkpoint/gigabytes": gigabytes,
                "checkpoint/seconds": outcome.seconds,
                "checkpoint/stalled_s": outcome.stalled_s,
            },
            outcome.step,
        )

    def _last_good(self) -> str:
        return "none" if self._saved is None else f"step {self._saved}"
