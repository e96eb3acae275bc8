"""Defines what a `Trainer` asks of a task: data, a training step, an evaluation, and what to say at the start and at the end.

A function of its own (`pretrain_task`, `finetune_task`) builds a task as a whole: its configuration is final, its images are
open, and pretrained weights are read before anything of it is called. The trainer keeps the step that `build_step` returns and
hands it to the other methods, because a step that runs out of memory is replaced by one with smaller chunks.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from crossbatch.data import Batch
from crossbatch.engine.checkpoint import Resumed
from crossbatch.engine.config import Resolved
from crossbatch.engine.datasets import TrainData
from crossbatch.engine.gradient_noise import GradientNoise
from crossbatch.engine.runtime.timing import StepTimer
from crossbatch.engine.sharding import Backend
from crossbatch.engine.step import Progress


class Step(Protocol):
    """Makes one optimizer step per call, on the sharded model in `backend`; `progress` counts the steps."""

    backend: Backend
    progress: Progress

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


STARTED_FROM = "started_from.json"  # in the run directory: the weights that a run started from


@dataclass(frozen=True)
class TrainResult:
    """Holds what one training step gave on this rank.

    Attributes:
        metrics: scalar tensors of this rank for metrics.jsonl, "loss" first; "a/b" is written as b in a section a.
        rates: "lr" and whatever else the step was made with; None for a rate that was not used.
        grad_norm: norm of the gradients over all ranks; not finite if the step was skipped.
        suspects: what to look at if it is not finite, by the name that the user reads. The first one is computed from this
            rank's images alone, so another rank's NaN cannot reach it.
        noise: sums up the norms of gradients for the noise scale; None where that is not measured.
    """

    metrics: dict[str, torch.Tensor]
    rates: dict[str, float | None]
    grad_norm: float
    suspects: dict[str, torch.Tensor]
    noise: GradientNoise | None = None


StepT = TypeVar("StepT", bound=Step)


class Task(Protocol[StepT]):
    """Defines what is trained. All ranks call its methods together, so they may use collectives."""

    @property
    def cfg(self) -> Resolved:
        """Return the configuration of the run, in its final form."""
        ...

    @property
    def data(self) -> TrainData:
        """Return the training images."""
        ...

    @property
    def timer(self) -> StepTimer | None:
        """Return what measures the parts of each step, or None if nothing does."""
        ...

    def build_step(self, chunk: int, resumes: bool = False) -> StepT:
        """Build model, sharding backend and step from torch's current random state; the model sees `chunk` images at most.

        `resumes` says that a checkpoint will fill it, so weights that a new run starts from need not be there any more.
        """
        ...

    def on_start(self, step: StepT, resumed: Resumed | None, allow_change: Iterable[str]) -> list[str]:
        """Return lines for the log about a run that is built but not trained yet; `resumed` is what it continues from.

        Raises InputError if it may not continue from there. `allow_change` names the configuration keys that may differ.
        """
        ...

    def train_on(self, step: StepT, batch: Batch) -> TrainResult:
        """Train on a batch of this rank."""
        ...

    def evaluations_due(self, num_steps: int, is_last: bool) -> Collection[str]:
        """Return the names of the evaluations due after `num_steps` steps; `is_last` says that training ends there."""
        ...

    def evaluate(self, step: StepT, due: Collection[str], between_batches: Callable[[int], object]) -> dict[str, float]:
        """Evaluate what is `due`; return scores by their names in metrics.jsonl, the same on all ranks.

        `between_batches` is called before each forward pass, with the number of images, and raises to end the evaluation.
        """
        ...

    def on_end(self, scores: list[tuple[int, dict[str, float]]]) -> list[str]:
        """Write the results after the last step, and return the commands that a user may type next.

        `scores` are the number of steps and the scores of every evaluation since the start of this process.
        """
        ...

    def close(self) -> None:
        """End the processes that load images; called once, also after a failure."""
        ...
