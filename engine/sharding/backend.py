"""What the engine asks of a sharding backend."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from crossbatch.models import ShardableModel


@dataclass(frozen=True)
class FlatSlice:
    """A run of a flattened tensor: `local`, a 1-D view of this rank's memory, is full.flatten()[start:][: local.numel()]."""

    start: int
    local: torch.Tensor


@dataclass(frozen=True)
class LocalShards:
    """What this rank holds of one tensor; `replicated` when every rank holds all of it."""

    shape: torch.Size
    pieces: list[FlatSlice]
    replicated: bool

    @staticmethod
    def whole(tensor: torch.Tensor) -> "LocalShards":
        return LocalShards(tensor.shape, [FlatSlice(0, tensor.detach().view(-1))], True)


class Backend(ABC):
    """A sharded network with its optimizer."""

    model: ShardableModel
    optimizer: Any  # has param_groups, as torch.optim.Optimizer

    @abstractmethod
    def __call__(self, *args, **kwargs) -> Any:
        """The model's forward, through whatever gathers its parameters."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, scale: float, more: bool = False) -> None:
        """Back-propagates the local mean loss times `scale` and leaves averaged gradients for `step`.

        With `more`, further calls belong to the same step: gradients add up, and the ranks exchange those of what
        is chunked only at the call without.
        """

    @abstractmethod
    def step(self, scale: float) -> float:
        """One optimizer step at the rates in `optimizer.param_groups`; clears the gradients and returns their global norm.

        `scale` is that of `backward`; it is taken out again. If the norm is not finite, nothing is updated, on any rank.
        """

    def zero_grad(self) -> None:
        """Forgets gradients of a step that did not come to its end; for a world of one."""
        for parameter in self.model.parameters():
            parameter.grad = None

    @abstractmethod
    def local_parameter(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The memory of `parameter` on this rank between steps (equally cut for equally shaped parameters)."""

    @abstractmethod
    def local_parameters(self) -> dict[str, LocalShards]:
        """Every parameter of the model by name, trainable or not. Write into it, then call `loaded`."""

    @abstractmethod
    def local_optimizer_state(self) -> dict[str, dict[str, LocalShards]]:
        """Per trainable parameter, its optimizer state by `state_keys`, the same keys on every rank."""

    @abstractmethod
    def sync_master_weights(self, updates: int) -> None:
        """Takes over parameters and optimizer state that were written into the held memory, after `updates` steps."""

    @torch.no_grad()
    def update_momentum(self, momentum: float) -> None:
        """average = momentum * average + (1 - momentum) * online, in fp32, each rank on its own shards."""
        pairs = [(online, average) for _, online, average in self.model.momentum_pairs() if online.requires_grad]
        if not pairs:
            return
        online = [self.local_parameter(online) for online, _ in pairs]
        average = [self.local_parameter(average) for _, average in pairs]
        torch._foreach_lerp_(average, online, weight=1 - momentum)

    def local_buffers(self) -> dict[str, LocalShards]:
        """Running statistics, replicated everywhere."""
        return {name: LocalShards.whole(buffer) for name, buffer in self.model.named_buffers()}
