"""Defines a backbone with a linear classifier, trained end to end, and a moving average of both."""

import copy

import torch
from timm.layers.drop import DropPath
from torch import nn

from crossbatch.models.backbones import Backbone, blocks
from crossbatch.models.collective import Collective, GroupCollective
from crossbatch.models.norm import set_num_views, synchronize_norms
from crossbatch.models.shardable import ShardableModel, backbone_units
from crossbatch.models.vit import ViT


class Network(nn.Module):
    """Turn images [n, 3, H, W] into logits [n, num_classes]. The head starts at N(0, 0.02), as in DeiT, its bias at 0."""

    def __init__(self, backbone: Backbone, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))


class Classifier(ShardableModel):
    """Hold a network that is trained, and its moving average.

    Args:
        backbone: the network with the weights to start from; the classifier trains this very module.
        num_classes: width of the head.
        drop_path: probability that a residual branch of a ViT's last block is skipped for an image; it falls linearly to 0 at
            the first block (Huang et al., 2016).
        averaged: whether there is a moving average.

    Raises:
        ValueError: if `drop_path` is above 0 and the backbone is a ResNet, which has none.
    """

    parts = ("logits", "average_logits")

    def __init__(self, backbone: Backbone, num_classes: int, drop_path: float = 0.0, averaged: bool = False):
        super().__init__()
        self.collective: Collective = GroupCollective()
        set_num_views(backbone, 1)
        _set_drop_path(backbone, drop_path)
        backbone.requires_grad_(True)  # positions and patch projections, too, may adapt
        self.online = Network(backbone, num_classes)
        self.momentum = copy.deepcopy(self.online).requires_grad_(False) if averaged else None

    @property
    def chunked_module(self) -> nn.Module:
        return self

    def momentum_pairs(self) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
        if self.momentum is None:
            return []
        online = dict(self.online.named_parameters())
        return [(name, online[name], average) for name, average in self.momentum.named_parameters()]

    def fsdp_units(self) -> list[nn.Module]:
        networks = [self.online] if self.momentum is None else [self.online, self.momentum]
        return [unit for network in networks for unit in (*backbone_units(network.backbone), network.head)]

    def set_collective(self, collective: Collective) -> None:
        """Let norms take their statistics over the ranks of `collective` from now on."""
        self.collective = collective
        synchronize_norms(self, collective)

    @torch.no_grad()
    def average_buffers(self) -> None:
        """Copy the running statistics to the moving average: they are averages already."""
        if self.momentum is not None:
            for online, average in zip(self.online.buffers(), self.momentum.buffers(), strict=True):
                average.copy_(online)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [n, num_classes] of the trained network for images [n, 3, H, W]."""
        return self.online(images)

    def average_logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [n, num_classes] of the moving average for images [n, 3, H, W]."""
        assert self.momentum is not None
        return self.momentum(images)


def _set_drop_path(backbone: Backbone, rate: float) -> None:
    if not rate:
        return
    if not isinstance(backbone, ViT):
        raise ValueError(f"drop_path is {rate:g}, but a ResNet has no drop path; set it to 0")
    rates = torch.linspace(0, rate, len(backbone.blocks)).tolist()
    for block, chance in zip(blocks(backbone), rates, strict=True):
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, DropPath(chance) if chance else nn.Identity())
