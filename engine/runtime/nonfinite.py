"""Handles numbers that go wrong: steps that are not finite, spikes of the loss, collapse of the features."""

import math
from collections import deque
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from crossbatch.engine.config import WatchConfig
from crossbatch.engine.step import Progress

MAX_WINDOW, MIN_WINDOW = 100, 20  # lines of metrics that the mean of the loss is taken over


class NonFiniteSteps:
    """Counts steps whose gradients are not finite, and keeps the state from before them.

    Such a step updates no parameter, but its forward pass has changed the running statistics of the norms, maybe to NaN. They
    are restored.

    Attributes:
        in_a_row: how many steps up to the last one were not finite.
        progress_before: the progress before the first of them; None if there are none.
    """

    def __init__(self, model: nn.Module):
        self.in_a_row = 0
        self.progress_before: Progress | None = None
        self._buffers = [buffer.detach() for buffer in model.buffers()]
        self._before = [buffer.clone() for buffer in self._buffers]

    def remember(self) -> None:
        """Keep the running statistics; call it before every step."""
        for before, buffer in zip(self._before, self._buffers, strict=True):
            before.copy_(buffer)

    def count(self, finite: bool, progress: Progress) -> None:
        """Count a step, and restore the statistics if it was not finite; `progress` is that from before the step."""
        if finite:
            self.in_a_row, self.progress_before = 0, None
            return
        for before, buffer in zip(self._before, self._buffers, strict=True):
            buffer.copy_(before)
        self.in_a_row += 1
        if self.in_a_row == 1:
            self.progress_before = replace(progress)


def describe_nonfinite(values: dict[str, torch.Tensor]) -> str:
    """Return where a step became non-finite, as "non-finite on rank 1: features, loss"; every rank calls it.

    Norms and keys carry one rank's NaN into the loss of all ranks. So the first of `values` must be computed from this rank's
    images alone, and if it is not finite on some ranks, only these are named.
    """
    mine = [name for name, value in values.items() if not math.isfinite(float(value))]
    everyone: list[list[str]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if not any(everyone):
        return "non-finite on all ranks: gradients (the loss is finite)"
    own = next(iter(values))
    culprits = {rank: names for rank, names in enumerate(everyone) if own in names}
    culprits = culprits or {rank: names for rank, names in enumerate(everyone) if names}
    ranks = f"rank{'s' if len(culprits) > 1 else ''} {' and '.join(str(rank) for rank in culprits)}"
    return f"non-finite on {ranks}: {_enumerate(next(iter(culprits.values())))}"


def _enumerate(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class LossMonitor:
    """Warns about spikes of the loss and collapse of the features, from one line of metrics to the next.

    Args:
        settings: `crossbatch.watch`, with the thresholds.
    """

    def __init__(self, settings: WatchConfig):
        self.settings = settings
        self._losses: deque[float] = deque(maxlen=MAX_WINDOW)
        self._collapsed = False

    def check(self, loss: float | None, feature_std: float | None) -> list[str]:
        """Return warnings about the next line of metrics; None stands for a number that it lacks, or that is not finite."""
        warnings = []
        if loss is not None:
            warnings.append(self._spike(loss))
            self._losses.append(loss)
        if feature_std is not None:
            warnings.append(self._collapse(feature_std))
        return [text for text in warnings if text]

    def _spike(self, loss: float) -> str | None:
        sigmas = self.settings.spike_sigmas
        if not sigmas or len(self._losses) < MIN_WINDOW:
            return None
        values = torch.tensor(self._losses, dtype=torch.float64)
        mean, deviation = float(values.mean()), float(values.std())
        if loss <= mean + sigmas * deviation:
            return None
        z = (loss - mean) / deviation if deviation else math.inf
        return f"loss jumped to {loss:.4g}, {z:.1f} standard deviations above its recent mean of {mean:.4g}"

    def _collapse(self, feature_std: float) -> str | None:
        was, self._collapsed = self._collapsed, feature_std < self.settings.collapse_std
        if was or not self._collapsed:
            return None
        return (
            f"feature_std fell to {feature_std:.3g}: the features of different images become equal (collapse); lower "
            f"optimizer.params.base_lr or raise crossbatch.momentum.base"
        )
