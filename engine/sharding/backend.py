"""Defines what the engine asks of a sharding backend, and the state that an optimizer keeps for a tensor."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from crossbatch.engine.optimizers import LARS
from crossbatch.models import ShardableModel


@dataclass(frozen=True)
class FlatSlice:
    """Holds a run of a flattened tensor: `local`, a 1-D view of memory, is full.flatten()[start:][: local.numel()]."""

    start: int
    local: torch.Tensor


@dataclass(frozen=True)
class LocalShards:
    """Holds this rank's slices of a flattened tensor of `shape`; `replicated` tells whether every rank holds all of it."""

    shape: torch.Size
    slices: list[FlatSlice]
    replicated: bool

    @staticmethod
    def whole(tensor: torch.Tensor) -> "LocalShards":
        """Describe a tensor that every rank holds."""
        return LocalShards(tensor.shape, [FlatSlice(0, tensor.detach().view(-1))], True)


class Backend(ABC):
    """Owns a sharded network and its optimizer."""

    model: ShardableModel
    optimizer: Any  # has param_groups, as torch.optim.Optimizer

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of torch that makes the updates; DeepSpeed's `optimizer` wraps it."""
        return self.optimizer

    @abstractmethod
    def __call__(self, *args, **kwargs) -> Any:
        """Call the model's forward, through whatever gathers its parameters."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, scale: float, is_last: bool = True) -> None:
        """Back-propagate this rank's mean loss times `scale`, and leave averaged gradients for `step`.

        Unless `is_last`, further calls belong to the same step: gradients add up, and the ranks exchange those of the chunked
        module only in the last call.
        """

    @abstractmethod
    def step(self, scale: float) -> float:
        """Make one optimizer step at the rates in `optimizer.param_groups`; clear the gradients and return their global norm.

        `scale` is the one given to `backward`, and is divided out. If the norm is not finite, no rank updates anything.
        """

    def zero_grad(self) -> None:
        """Drop the gradients of an interrupted step; only with a single rank."""
        for parameter in self.model.parameters():
            parameter.grad = None

    @abstractmethod
    def local_parameter(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return the memory of `parameter` on this rank between steps; parameters of equal shape are cut alike."""

    @abstractmethod
    def local_parameters(self) -> dict[str, LocalShards]:
        """Return every parameter of the model by name, trainable or not. After writing into it, call `sync_master_weights`."""

    @abstractmethod
    def local_optimizer_state(self) -> dict[str, dict[str, LocalShards]]:
        """Return the optimizer state of every trainable parameter by `state_keys`, with the same keys on every rank."""

    @abstractmethod
    def sync_master_weights(self, updates: int) -> None:
        """Take over parameters and optimizer state that were written into this rank's memory, as of `updates` steps."""

    @torch.no_grad()
    def update_momentum(self, momentum: float) -> None:
        """Set average = momentum * average + (1 - momentum) * online, in fp32, each rank on its own shards."""
        pairs = [(online, average) for _, online, average in self.model.momentum_pairs() if online.requires_grad]
        if pairs:
            online, average = ([self.local_parameter(p) for p in side] for side in zip(*pairs, strict=True))
            torch._foreach_lerp_(average, online, weight=1 - momentum)

    def local_buffers(self) -> dict[str, LocalShards]:
        """Return the running statistics, which every rank holds."""
        return {name: LocalShards.whole(buffer) for name, buffer in self.model.named_buffers()}


def state_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the names of the state tensors that have a parameter's shape."""
    return ("mu",) if isinstance(optimizer, LARS) else ("exp_avg", "exp_avg_sq")


def ensured_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the state of a tensor that the optimizer steps on; start it at zero, as the first step would, if there is none."""
    state = optimizer.state[tensor]
    for key in state_keys(optimizer):
        if key not in state:
            state[key] = torch.zeros_like(tensor)
    if not isinstance(optimizer, LARS) and "step" not in state:
        state["step"] = torch.zeros((), device=tensor.device)  # where fused AdamW wants it
    return state


def set_step_count(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of steps that AdamW's bias correction counts, which is the same for all tensors."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)
