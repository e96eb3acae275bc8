"""Undoes a step that is not finite and says what went wrong; warns about spikes of the loss and collapse of the features."""

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from crossbatch.engine.config import WatchConfig
from crossbatch.engine.sharding import LocalShards

LOSS_JUMPED = "loss jumped"  # so a warning begins
MAX_WINDOW, MIN_WINDOW = 100, 20  # lines of metrics over which the mean of the loss is taken


class Backup:
    """Keeps a copy of tensors that are changed in place, taken and restored by one kernel launch per dtype.

    A ResNet-50 has 333 running statistics in its two encoders, and they are copied before every step.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]):
        alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
        for tensor in tensors:
            alike[tensor.device, tensor.dtype].append(tensor.detach())
        # Mixed dtypes would make _foreach_copy_ copy one tensor after the other.
        self._pairs = [(some, [torch.empty_like(tensor) for tensor in some]) for some in alike.values()]

    def take(self) -> None:
        """Copy the tensors as they are now."""
        for tensors, copies in self._pairs:
            torch._foreach_copy_(copies, tensors)

    def restore(self) -> None:
        """Give the tensors the values that they had at the last `take`."""
        for tensors, copies in self._pairs:
            torch._foreach_copy_(tensors, copies)


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
    names = next(iter(culprits.values()))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"non-finite on {ranks}: {', '.join(names[:3])}{more}"


def largest_weights(parameters: Mapping[str, LocalShards]) -> dict[str, dict[str, Any]]:
    """Return the largest absolute value of each parameter over all ranks, with the rank and the element; every rank calls it.

    A rank may hold another value than a checkpoint gets, which only one rank writes.
    """
    mine: dict[str, tuple[float, float, int, int]] = {}
    for name, shards in parameters.items():
        for part in (part for part in shards.slices if part.local.numel()):
            values = part.local.detach().flatten()
            size, at = values.abs().nan_to_num(math.inf, math.inf).max(0)
            found = (float(size), float(values[at]), dist.get_rank(), part.start + int(at))
            mine[name] = max(found, mine.get(name, found), key=lambda one: one[0])
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    largest = {}
    for name in parameters:
        _, value, rank, element = max((one[name] for one in everyone if name in one), key=lambda one: one[0])
        largest[name] = {"value": value if math.isfinite(value) else None, "rank": rank, "element": element}
    return largest


class LossMonitor:
    """Warns about spikes of the loss and collapse of the features, from one line of metrics to the next.

    Args:
        settings: `crossbatch.watch`, with the thresholds.
    """

    def __init__(self, settings: WatchConfig):
        self.settings = settings
        self._losses: deque[float] = deque(maxlen=MAX_WINDOW)
        self._collapsed: dict[str, bool] = {}

    def check(self, loss: float | None, feature_std: float | None, effective_rank: float | None = None) -> list[str]:
        """Return warnings about the next line of metrics; None stands for a number that it lacks, or that is not finite."""
        equal = "the features of different images are becoming equal"
        line = "the features of different images differ along a line only"
        warnings = [
            self._spike(loss),
            self._collapse("feature_std", feature_std, self.settings.collapse_std, equal),
            self._collapse("effective_rank", effective_rank, self.settings.collapse_rank, line),
        ]
        return [text for text in warnings if text]

    def _spike(self, loss: float | None) -> str | None:
        if loss is None:
            return None
        values = torch.tensor(self._losses, dtype=torch.float64)
        self._losses.append(loss)
        if not self.settings.spike_sigmas or len(values) < MIN_WINDOW:
            return None
        mean, deviation = float(values.mean()), float(values.std())
        if loss <= mean + self.settings.spike_sigmas * deviation:
            return None
        z = (loss - mean) / deviation if deviation else math.inf
        return f"{LOSS_JUMPED} to {loss:.4g}, {z:.1f} standard deviations above its recent mean of {mean:.4g}"

    def _collapse(self, name: str, value: float | None, limit: float, what: str) -> str | None:
        """Return a warning if `value` is below `limit`, and the one before it was not."""
        if value is None:
            return None
        was, self._collapsed[name] = self._collapsed.get(name, False), value < limit
        if was or not self._collapsed[name]:
            return None
        remedy = "lower optimizer.params.base_lr or raise crossbatch.momentum.base"
        return f"{name} fell to {value:.3g}: {what} (collapse); {remedy}"
