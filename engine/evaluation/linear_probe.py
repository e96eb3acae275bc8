"""Trains linear classifiers on frozen features, the linear probe, as in MoCo v3's linear evaluation.

The optimizer is SGD with momentum 0.9 and no weight decay; the learning rate falls along half a cosine, once an epoch; weights
start from N(0, 0.01), biases from 0. The best rate depends on the scale of the features, so several classifiers can be trained
side by side, one for each rate: they see the same batches, do not influence each other, and each ends where it would have
ended alone. A batch norm without parameters in front of them (He et al., 2022, appendix A) removes the scale.

Shapes: n images, C features, K classes, L classifiers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from crossbatch.models.collective import Collective
from crossbatch.models.norm import ViewBatchNorm

WEIGHT_STD = 0.01
NORM_EPS = 1e-6


class LinearProbe:
    """Trains linear classifiers on features; one all-reduce averages the gradients of the ranks.

    Args:
        peaks: the learning rate of the first epoch for each classifier.
        norm: whether to put a batch norm without parameters, over the images of all ranks, before the classifiers.
        seed: seed of the initial weights, which are the same for all classifiers.
        collective: the ranks that train together; default only this one.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        peaks: Sequence[float],
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        norm: bool = False,
        seed: int = 0,
        device: torch.device | None = None,
        collective: Collective | None = None,
    ):
        self.peaks, self.collective = tuple(peaks), collective or Collective()
        self.heads = nn.ModuleList(_classifier(num_features, num_classes, seed) for _ in peaks).to(device)
        self.norm: nn.Module = nn.Identity()
        if norm:
            self.norm = ViewBatchNorm(num_features, NORM_EPS, affine=False, num_views=1).to(device)
            self.norm.collective = self.collective
        groups = [{"params": list(head.parameters()), "lr": peak} for head, peak in zip(self.heads, peaks, strict=True)]
        self.optimizer = torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Set the learning rates for epoch number `epoch`, from 0, of `epochs`."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * epoch / epochs))

    @property
    def rates(self) -> list[float]:
        """Return the learning rate of each classifier in this epoch."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, features_nC: torch.Tensor, labels_n: torch.Tensor) -> torch.Tensor:
        """Update the weights and return the losses [L] on this rank's images; all ranks must bring equally many images."""
        normed = self.norm.train()(features_nC)
        losses_L = torch.stack([F.cross_entropy(head(normed), labels_n) for head in self.heads])
        self.optimizer.zero_grad(set_to_none=False)
        losses_L.sum().backward()
        if (world := self.collective.world_size) > 1:  # all gradients in one message
            gradients = [p.grad for p in self.heads.parameters() if p.grad is not None]
            vector_to_parameters(self.collective.all_reduce(parameters_to_vector(gradients)) / world, gradients)
        self.optimizer.step()
        return losses_L.detach()

    @torch.no_grad()
    def predict(self, features_nC: torch.Tensor) -> torch.Tensor:
        """Return the classes [L, n] that the classifiers predict."""
        normed = self.norm.eval()(features_nC)
        return torch.stack([head(normed).argmax(1) for head in self.heads])  # one [n, K] at a time

    def diverged(self) -> list[bool]:
        """Tell for each classifier whether its weights hold values that are not finite."""
        return [not all(bool(p.isfinite().all()) for p in head.parameters()) for head in self.heads]

    def state(self) -> dict[str, Any]:
        """Return weights and optimizer state for `load`; `torch.load(weights_only=True)` can read them."""
        return {name: getattr(self, name).state_dict() for name in ("heads", "norm", "optimizer")}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        for name in ("heads", "norm", "optimizer"):
            getattr(self, name).load_state_dict(state[name])


def _classifier(num_features: int, num_classes: int, seed: int) -> nn.Linear:
    """Return a new classifier; all start alike, so that no rate's result depends on the rates that are tried beside it."""
    head = nn.Linear(num_features, num_classes)
    nn.init.normal_(head.weight, std=WEIGHT_STD, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return head
