"""How a model talks to the other ranks: the few places that need it take a `Collective` as an argument.

The class below is the one-process case, in which every operation is the identity; the engine derives the one that calls
torch.distributed. Shapes: W = world size.
"""

import torch


class Collective:
    """One process. Subclasses override the three operations and the two numbers."""

    rank: int = 0
    world_size: int = 1

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stacks the ranks' tensors: [...] -> [W, ...]. Carries no gradient."""
        return tensor.detach().unsqueeze(0)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums over the ranks: [...] -> [...]. Carries no gradient; may work in place."""
        return tensor.detach()

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums over the ranks and keeps this rank's slice: [W, ...] -> [...]. Carries no gradient."""
        return tensor.detach()[0]


class _GatherWithGradient(torch.autograd.Function):
    """[...] -> [W, ...]; the gradient of a rank's slice is the sum of what all ranks' losses say about it."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, collective: Collective) -> torch.Tensor:
        ctx.collective = collective
        return collective.all_gather(tensor.contiguous())

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.collective.reduce_scatter(grad.contiguous()), None


def gather_with_gradient(tensor: torch.Tensor, collective: Collective) -> torch.Tensor:
    """All-gather [...] -> [W, ...] whose backward is a reduce-scatter (sum)."""
    if collective.world_size == 1:
        return tensor.unsqueeze(0)
    return _GatherWithGradient.apply(tensor, collective)  # pyright: ignore[reportReturnType]
