"""What goes wrong inside the numbers: steps that are not finite, spikes of the loss, collapse of the features."""

import math
from collections import deque
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from crossbatch.engine.config import WatchConfig
from crossbatch.engine.step import Progress

WINDOW, ENOUGH = 100, 20  # lines of metrics that the mean of the loss is taken over


class NonFiniteSteps:
    """Counts steps whose gradients are not finite, and keeps the state from before them.

    Such a step updates nothing, but its forward pass has moved the running statistics, maybe to NaN. They are put back.
    """

    def __init__(self, model: nn.Module):
        self.in_a_row = 0
        self.progress_before: Progress | None = None
        self._buffers = [buffer.detach() for buffer in model.buffers()]
        self._before = [buffer.clone() for buffer in self._buffers]

    def remember(self) -> None:
        """Before a step."""
        for before, buffer in zip(self._before, self._buffers, strict=True):
            before.copy_(buffer)

    def count(self, finite: bool, progress: Progress) -> None:
        """After it, with the progress from before it."""
        if finite:
            self.in_a_row, self.progress_before = 0, None
            return
        for before, buffer in zip(self._before, self._buffers, strict=True):
            buffer.copy_(before)
        self.in_a_row += 1
        if self.in_a_row == 1:
            self.progress_before = replace(progress)


def describe_nonfinite(values: dict[str, torch.Tensor]) -> str:
    """What of which rank is not finite; every rank must call it and gets the same text.

    Norms and keys carry one rank's NaN into the loss of all: the first of `values` is what no other rank can spoil, and ranks
    where it is not finite are named alone.
    """
    mine = [name for name, value in values.items() if not math.isfinite(float(value))]
    everyone: list[list[str]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if not any(everyone):
        return "the losses of all ranks are finite, their gradients are not"
    own = next(iter(values))
    guilty = {rank: names for rank, names in enumerate(everyone) if own in names}
    guilty = guilty or {rank: names for rank, names in enumerate(everyone) if names}
    first_names = next(iter(guilty.values()))
    ranks = " and ".join(str(rank) for rank in guilty)
    return f"{_enumerated(first_names)} of rank {ranks} are not finite"


def _enumerated(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class LossMonitor:
    """Warnings about lines of metrics, on rank 0."""

    def __init__(self, settings: WatchConfig):
        self.settings = settings
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._collapsed = False

    def check(self, loss: float, feature_std: float) -> list[str]:
        """What is odd about a line that follows those of the calls before."""
        found = [self._spike(loss), self._collapse(feature_std)]
        self._losses.append(loss)
        return [text for text in found if text]

    def _spike(self, loss: float) -> str | None:
        sigmas = self.settings.spike_sigmas
        if not sigmas or len(self._losses) < ENOUGH:
            return None
        values = torch.tensor(self._losses, dtype=torch.float64)
        mean, deviation = float(values.mean()), float(values.std())
        if loss <= mean + sigmas * deviation:
            return None
        z = (loss - mean) / deviation if deviation else math.inf
        return f"the loss jumped to {loss:.4g}, {z:.1f} standard deviations above its recent mean of {mean:.4g}"

    def _collapse(self, feature_std: float) -> str | None:
        was, self._collapsed = self._collapsed, feature_std < self.settings.collapse_std
        if was or not self._collapsed:
            return None
        return (
            f"feature_std fell to {feature_std:.3g}: the features of different images become equal (collapse); lower "
            f"optimizer.params.base_lr or raise crossbatch.momentum.base"
        )
