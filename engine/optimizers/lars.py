"""LARS (You, Gitman, Ginsburg 2017) in the form that MoCo v3 trains with.

For a parameter with two or more dimensions (group key `adapts`), with weight decay wd and trust coefficient tc:

    d = g + wd * p
    d = d * tc * ||p|| / ||d||        (factor 1 where either norm is 0)
    mu = momentum * mu + d
    p = p - lr * mu                   (lr outside the buffer)

For the others d = g: no decay, no factor, as MoCo v3 released it (Chen, Xie, He 2021). There is no epsilon and no clipping.

Parameters may be DTensors (FSDP2): each rank squares its own shards, and one all-reduce of the stacked sums gives the norms of
all parameters. DTensor arithmetic would give the same numbers with four collectives per parameter.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


class LARS(torch.optim.Optimizer):
    """See the module. Groups need `adapts` and `weight_decay`; state per parameter: `mu`, in the parameter's placement."""

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9, trust_coefficient: float = 0.001):
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        assert closure is None
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        directions = {}
        for group, parameters in work:
            for p in parameters:
                if "mu" not in self.state[p]:
                    self.state[p]["mu"] = torch.zeros_like(p)
            gradients = [local(p.grad) for p in parameters]
            if group["adapts"] and parameters:
                gradients = torch._foreach_add(gradients, [local(p) for p in parameters], alpha=group["weight_decay"])
            directions[id(group)] = gradients
        adapting = [(group, parameters) for group, parameters in work if group["adapts"] and parameters]
        for (group, _), factors in zip(adapting, self._trust_ratios(adapting, directions), strict=True):
            torch._foreach_mul_(directions[id(group)], list(factors.unbind()))
        for group, parameters in work:
            if parameters:
                velocities = [local(self.state[p]["mu"]) for p in parameters]
                torch._foreach_mul_(velocities, group["momentum"])
                torch._foreach_add_(velocities, directions[id(group)])
                torch._foreach_add_([local(p) for p in parameters], velocities, alpha=-group["lr"])

    def _trust_ratios(self, adapting, directions) -> list[torch.Tensor]:
        """One tensor of factors per group."""
        parameters = [p for _, members in adapting for p in members]
        if not parameters:
            return []
        everything = [local(p) for p in parameters] + [d for group, _ in adapting for d in directions[id(group)]]
        squares = torch.stack(torch._foreach_norm(everything)).square_()
        mesh = next((p.device_mesh for p in parameters if isinstance(p, DTensor)), None)
        if mesh is not None and mesh.size(mesh.ndim - 1) > 1:
            dist.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))
        p_norm, d_norm = squares.sqrt_().chunk(2)
        usable = (p_norm > 0) & (d_norm > 0)
        ratios = torch.where(usable, p_norm / torch.where(usable, d_norm, 1.0), 1.0)
        coefficients = [
            torch.where(u, group["trust_coefficient"] * r, 1.0)
            for (group, members), r, u in zip(
                adapting,
                ratios.split([len(m) for _, m in adapting]),
                usable.split([len(m) for _, m in adapting]),
                strict=True,
            )
        ]
        return coefficients


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor (sharing its memory), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
