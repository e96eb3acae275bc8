"""A backbone with a linear classifier on its features, trained end to end, and a moving average of both."""

import copy

import torch
from timm.layers.drop import DropPath
from torch import nn

from crossbatch.models.backbones import Backbone, blocks
from crossbatch.models.collective import Collective
from crossbatch.models.norm import set_num_views, synchronize_norms
from crossbatch.models.shardable import ShardableModel, backbone_units
from crossbatch.models.vit import ViT


class Network(nn.Module):
    """Images [n, 3, H, W] -> logits [n, num_classes]. The head starts at N(0, 0.02), as in DeiT, its bias at 0."""

    def __init__(self, backbone: Backbone, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))


class Classifier(ShardableModel):
    """The network that is trained, and its moving average.

    Args:
        backbone: with the weights to start from; belongs to the classifier from now on.
        num_classes: width of the head.
        drop_path: chance of the last block of a ViT to be skipped for an image; those before it in proportion (Huang et
            al., 2016).
        averaged: whether there is a moving average.

    Raises ValueError for `drop_path` with a ResNet, which has none.
    """

    def __init__(self, backbone: Backbone, num_classes: int, drop_path: float = 0.0, averaged: bool = False):
        super().__init__()
        self.collective = Collective()
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
        """Joins the ranks: norms take their statistics over all of them."""
        self.collective = collective
        synchronize_norms(self, collective)

    @torch.no_grad()
    def average_buffers(self) -> None:
        """Running statistics have averaged themselves: the moving average takes them over as they are."""
        if self.momentum is not None:
            for online, average in zip(self.online.buffers(), self.momentum.buffers(), strict=True):
                average.copy_(online)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Images [n, 3, H, W] -> logits [n, num_classes] of the trained network."""
        return self.online(images)

    def average_logits(self, images: torch.Tensor) -> torch.Tensor:
        """The same of the moving average."""
        assert self.momentum is not None
        return self.momentum(images)


def _set_drop_path(backbone: Backbone, rate: float) -> None:
    if not rate:
        return
    if not isinstance(backbone, ViT):
        raise ValueError(f"finetune.drop_path is {rate:g}, but a ResNet has no drop path; set it to 0.")
    rates = torch.linspace(0, rate, len(backbone.blocks)).tolist()
    for block, chance in zip(blocks(backbone), rates, strict=True):
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, DropPath(chance) if chance else nn.Identity())
