"""Defines the three collective operations that a model needs.

The few places that talk to other ranks hold a `Collective`: one process, where every operation is the identity.
`GroupCollective` calls torch.distributed instead. Shapes: W = world size.
"""

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 renamed these two and warns about the old names.
_RENAMED = hasattr(dist, "all_gather_single")
_all_gather = dist.all_gather_single if _RENAMED else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if _RENAMED else dist.reduce_scatter_tensor


class Collective:
    """Treat this process as the only one, even inside a process group. Subclasses override all of it."""

    @property
    def rank(self) -> int:
        """Return the number of this process, from 0."""
        return 0

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return 1

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack the ranks' tensors: [...] -> [W, ...]. The result carries no gradient."""
        return tensor.detach().unsqueeze(0)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks: [...] -> [...], perhaps in place. The result carries no gradient."""
        return tensor.detach()

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks and keep this rank's slice: [W, ...] -> [...]. The result carries no gradient."""
        return tensor.detach()[0]


class GroupCollective(Collective):
    """Call torch.distributed in a process group; act as one process where torch.distributed is not initialised.

    Args:
        process_group: the ranks that take part; None means all ranks of the default group. It is looked up when an operation
            runs, so a model may be built before torch.distributed is initialised.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None):
        self.process_group = process_group

    @property
    def rank(self) -> int:
        return dist.get_rank(self.process_group) if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.process_group) if dist.is_initialized() else 1

    def all_gather(self, tensor: Tensor) -> Tensor:
        if (size := self.world_size) == 1:
            return super().all_gather(tensor)
        tensor = tensor.detach().contiguous()
        gathered = tensor.new_empty((size, *tensor.shape))
        _all_gather(gathered.view(-1), tensor.view(-1), group=self.process_group)
        return gathered

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.world_size == 1:
            return super().all_reduce(tensor)
        tensor = tensor.detach().contiguous()
        dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        if self.world_size == 1:
            return super().reduce_scatter(tensor)
        tensor = tensor.detach().contiguous()
        shard = tensor.new_empty(tensor.shape[1:])
        _reduce_scatter(shard.view(-1), tensor.view(-1), group=self.process_group)
        return shard

    def __deepcopy__(self, memo: dict) -> "GroupCollective":
        return GroupCollective(self.process_group)  # a process group cannot be copied, but models are


class _GatherWithGradient(torch.autograd.Function):
    """Stack [...] -> [W, ...]; a rank gets the sum of the gradients that all ranks found for its slice."""

    @staticmethod
    def forward(ctx, tensor: Tensor, collective: Collective) -> Tensor:
        ctx.collective = collective
        return collective.all_gather(tensor.contiguous())

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.collective.reduce_scatter(grad.contiguous()), None


def gather_with_gradient(tensor: Tensor, collective: Collective) -> Tensor:
    """Stack the ranks' tensors, [...] -> [W, ...]; the backward pass is a reduce-scatter (sum)."""
    if collective.world_size == 1:
        return tensor.unsqueeze(0)
    return _GatherWithGradient.apply(tensor, collective)  # pyright: ignore[reportReturnType]
