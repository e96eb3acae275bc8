"""Holds what training changes: the step of a task, its progress and the counts that a checkpoint keeps."""

import gc
import math
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from crossbatch.data import Batch
from crossbatch.engine import checkpoint
from crossbatch.engine.checkpoint import Resumed
from crossbatch.engine.checkpoint.schedule import Snapshot
from crossbatch.engine.config import to_dict
from crossbatch.engine.runtime.distributed import mean_over_ranks
from crossbatch.engine.runtime.nonfinite import Backup
from crossbatch.engine.step import Progress
from crossbatch.engine.tasks.task import Step, Task, TrainResult

CHUNK_KEY = "train_micro_batch_size_per_gpu"


class TrainState:
    """Holds everything of a run that a checkpoint keeps, on this rank. Call `build` before anything else.

    Args:
        task: what is trained.
        device: where its model lives.
        candidates: the checkpoints to continue from, in the order in which to try them; empty for a new run.
        allow_change: configuration keys that may differ from those of the checkpoint.

    Attributes:
        step: makes one optimizer step per call.
        chunk: images that its network sees at once, at most.
        has_trained: whether this process has made a step.
        num_skipped_images: broken images that this rank has replaced in this process.
        nonfinite_in_a_row: how many steps up to the last one were not finite.
    """

    def __init__(self, task: Task[Any], device: torch.device, candidates: list[Path], allow_change: Iterable[str] = ()):
        self.task, self.device, self.candidates, self.allow_change = task, device, candidates, tuple(allow_change)
        self.num_skipped_images, self.nonfinite_in_a_row = 0, 0
        self._skipped_images_before = 0  # on all ranks, before this process

    @property
    def total_steps(self) -> int:
        """Return the number of steps of all epochs."""
        return max(1, round(self.task.cfg.crossbatch.schedule.epochs * self.task.data.steps_per_epoch))

    def build(self, chunk: int) -> Resumed | None:
        """Build the step for chunks of `chunk` images, from the seed or from the first checkpoint that can be read.

        Returns that checkpoint, or None for a new run. Raises InputError if there are checkpoints but none fits.
        """
        cfg = self.task.cfg
        torch.manual_seed(cfg.crossbatch.seed)
        self.step: Step = self.task.build_step(chunk, resumes=bool(self.candidates))
        self._statistics = Backup(self.step.backend.model.buffers())
        self.chunk, self.has_trained = chunk, False
        return self.load(self.candidates)

    def load(self, candidates: list[Path]) -> Resumed | None:
        """Fill the step that is built from the first of these checkpoints that can be read, and return that checkpoint.

        Raises InputError if there are checkpoints but none fits.
        """
        cfg = self.task.cfg
        resumed = checkpoint.resume(
            candidates,
            self.step.backend,
            self.config(),
            self.task.data.sampler.num_images,
            self.allow_change,
            type(cfg.config),
            self.task.data.checksum,
        )
        if resumed:
            progress, before = Progress(**resumed.manifest.progress), resumed.config["crossbatch"]["precision"]
            self.step.progress = progress.in_precision(cfg.precision, before)
            self._skipped_images_before = resumed.manifest.skipped_images
        return resumed

    def build_with_smaller_chunks(self) -> None:
        """Free the memory of the step, and build it anew for half as many images at once."""
        del self.step.backend, self.step, self._statistics
        gc.collect()
        torch.cuda.empty_cache()
        self.allow_change += (CHUNK_KEY,)
        self.build(self.chunk // 2)

    def train_on(self, batch: Batch) -> TrainResult:
        """Train on a batch; a step whose gradients are not finite, or that runs out of memory, leaves the model as it was.

        Such a step updates no parameter, but its forward pass has changed the running statistics, maybe to NaN.
        """
        progress = replace(self.step.progress)
        self._statistics.take()
        try:
            result = self.task.train_on(self.step, batch)
        except torch.OutOfMemoryError:
            self._statistics.restore()
            raise
        if math.isfinite(result.grad_norm):
            self.nonfinite_in_a_row = 0
        else:
            self._statistics.restore()
            self.nonfinite_in_a_row += 1
            if self.nonfinite_in_a_row == 1:
                self._finite_progress = progress
        self.has_trained = True
        self.num_skipped_images += len(batch.skipped)
        return result

    def restore_progress(self) -> None:
        """Go back to the progress before the latest steps that were not finite; nothing else has changed since."""
        self.step.progress = self._finite_progress

    def config(self) -> dict[str, Any]:
        """Return the resolved configuration as a plain dict, so that the run can be repeated."""
        cfg = self.task.cfg
        return {**to_dict(cfg.config), "world_size": cfg.world_size, CHUNK_KEY: self.chunk}

    def snapshot(self) -> Snapshot:
        """Return what a checkpoint of this moment is made of; all ranks call it."""
        skipped = torch.tensor([float(self.num_skipped_images)], device=self.device)
        return Snapshot.of(
            self.step.backend,
            progress=asdict(self.step.progress),
            config=self.config(),
            images=self.task.data.sampler.num_images,
            images_checksum=self.task.data.checksum,
            steps_per_epoch=self.task.data.steps_per_epoch,
            skipped_images=self.skipped_images(float(mean_over_ranks(skipped))),
        )

    def counts(self) -> dict[str, Any]:
        """Return what changes with every step besides tensors; the `skipped_images` of all ranks add up to those of the run."""
        before = self._skipped_images_before if dist.get_rank() == 0 else 0
        return {"progress": asdict(self.step.progress), "skipped_images": before + self.num_skipped_images}

    def skipped_images(self, mean_per_rank: float) -> int:
        """Return how many broken images all ranks have replaced since the start of the run, from the mean over ranks."""
        return self._skipped_images_before + round(mean_per_rank * self.task.cfg.world_size)
