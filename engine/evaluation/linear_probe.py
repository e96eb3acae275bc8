"""The linear probe: linear classifiers on frozen features, trained as MoCo v3 trains its one.

SGD with momentum 0.9 and no weight decay, a rate that falls along half a cosine epoch by epoch, weights from N(0, 0.01), biases
0. The best rate depends on the scale of the features, so several classifiers can stand side by side, one for each rate: they
see the same batches and know nothing of each other, and each ends where it would have ended alone. A batch norm without
parameters in front of them (He et al., 2022, appendix A) removes the scale.

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
    """Classifiers and their optimizer; the ranks' gradients are averaged with one all-reduce.

    Args:
        peaks: a learning rate for each classifier.
        norm: a batch norm without parameters, over the images of all ranks, before them.
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
        """Sets the rates of epoch number `epoch`, from 0, of `epochs`."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * epoch / epochs))

    @property
    def rates(self) -> list[float]:
        """Of this epoch."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, features_nC: torch.Tensor, labels_n: torch.Tensor) -> torch.Tensor:
        """One update; returns the losses [L] of this rank's images. All ranks bring equally many."""
        self.norm.train()
        losses_L = torch.stack([F.cross_entropy(logits, labels_n) for logits in self._logits(features_nC)])
        self.optimizer.zero_grad(set_to_none=False)
        losses_L.sum().backward()
        self._average_gradients()
        self.optimizer.step()
        return losses_L.detach()

    @torch.no_grad()
    def predict(self, features_nC: torch.Tensor) -> torch.Tensor:
        """Classes [L, n]."""
        self.norm.eval()
        return torch.stack([logits.argmax(1) for logits in self._logits(features_nC)])

    def diverged(self) -> list[bool]:
        """Of each classifier: whether its weights have stopped being numbers."""
        return [not all(bool(p.isfinite().all()) for p in head.parameters()) for head in self.heads]

    def state(self) -> dict[str, Any]:
        """For `load`: what `torch.load(weights_only=True)` reads back."""
        return {
            "heads": self.heads.state_dict(),
            "norm": self.norm.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.heads.load_state_dict(state["heads"])
        self.norm.load_state_dict(state["norm"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _logits(self, features_nC: torch.Tensor) -> list[torch.Tensor]:
        normed = self.norm(features_nC)
        return [head(normed) for head in self.heads]

    def _average_gradients(self) -> None:
        world = self.collective.world_size
        if world > 1:
            gradients = [p.grad for p in self.heads.parameters() if p.grad is not None]
            vector_to_parameters(self.collective.all_reduce(parameters_to_vector(gradients)) / world, gradients)


def _classifier(num_features: int, num_classes: int, seed: int) -> nn.Linear:
    """All start alike, so that a rate's result does not depend on which others are tried beside it."""
    head = nn.Linear(num_features, num_classes)
    nn.init.normal_(head.weight, std=WEIGHT_STD, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return head
