"""Implements the baseline of a training step: MoCo v3 + BatchFormer as one writes it from the papers in plain torch.

Every view passes the networks by itself; BatchFormer is `nn.TransformerEncoderLayer`, a head `nn.BatchNorm1d`; the loss is
`cross_entropy` of a matrix of logits; LARS and the moving average are loops over parameters. The sizes and the precision
are ours. There are no chunks, and one process on one device.
"""

import copy
import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from crossbatch.data.augment.parameters import IMAGENET_MEAN, IMAGENET_STD
from crossbatch.engine.config import Config, LarsConfig, ResolvedConfig, autocast_dtype
from crossbatch.models import autocast
from crossbatch.models.backbones import LAYOUTS

EPS = 1e-5  # of weights that a step may change: hundreds of steps must end in numbers


class PlainStep:
    """Trains on uint8 views [2, n, 3, H, W] when it is called, and returns the loss."""

    def __init__(self, cfg: ResolvedConfig, device: torch.device):
        torch.manual_seed(0)
        ours = cfg.config.crossbatch
        self.cfg, self.device, self.temperature = cfg, device, ours.model.temperature
        backbone = plain_backbone(cfg.config)
        width, hidden, dim = backbone.num_features, ours.model.mlp_dim, ours.model.projection_dim
        resnet = ours.model.arch.startswith("resnet")
        projector = plain_head([width, hidden, dim] if resnet else [width, hidden, hidden, dim], last_norm=True)
        self.encoder = nn.Sequential(backbone, projector).to(device)
        self.average = copy.deepcopy(self.encoder).requires_grad_(False)
        self.predictor = plain_head([dim, hidden, dim], last_norm=not resnet).to(device)
        self.batchformer = None
        if ours.batchformer.loss != "none":
            self.batchformer = nn.TransformerEncoderLayer(width, 4, width, dropout=ours.batchformer.dropout).to(device)
        trained = [self.encoder, self.predictor, *([self.batchformer] if self.batchformer else [])]
        self.parameters = [p for part in trained for p in part.parameters() if p.requires_grad]
        self.velocity = {p: torch.zeros_like(p) for p in self.parameters}
        lars = isinstance(cfg.config.optimizer.params, LarsConfig)
        self.adamw = None if lars else torch.optim.AdamW(self.parameters, lr=EPS, weight_decay=0.1)
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def __call__(self, views: torch.Tensor) -> torch.Tensor:
        images = [(view.to(self.device, non_blocking=True).float() / 255 - self.mean) / self.std for view in views]
        with autocast(self.device.type, autocast_dtype(self.cfg.precision)):
            queries = [self.predictor(self._project(self.encoder, view)) for view in images]
            with torch.no_grad():
                keys = [self._project(self.average, view) for view in images]
        loss = self._contrast(queries[0], keys[1]) + self._contrast(queries[1], keys[0])
        loss.backward()
        self._update()
        return loss.detach()

    def _project(self, encoder: nn.Sequential, view: torch.Tensor) -> torch.Tensor:
        """Project one view, [n, 3, H, W] -> [S * n, D], the original stream first."""
        features = encoder[0](view)
        if self.batchformer is not None:
            groups = features.float().view(-1, self.cfg.group_size or 1, features.shape[-1]).transpose(0, 1)
            mixed = self.batchformer(groups).transpose(0, 1).flatten(0, 1)
            features = torch.cat((features.float(), mixed))
        return encoder[1](features)

    def _contrast(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Sum the terms of all pairs of streams."""
        queries, keys = (F.normalize(x.float(), dim=1) for x in (queries, keys))
        streams = 2 if self.batchformer is not None else 1
        labels = torch.arange(len(queries) // streams, device=self.device)
        logits = [q @ k.T / self.temperature for q in queries.chunk(streams) for k in keys.chunk(streams)]
        return 2 * self.temperature * torch.stack([F.cross_entropy(term, labels) for term in logits]).sum()

    @torch.no_grad()
    def _update(self) -> None:
        if self.adamw is not None:
            self.adamw.step()
        else:
            for p in self.parameters:
                plain_lars(p, self.velocity[p], EPS, 1e-6)
        for p in self.parameters:
            p.grad = None
        plain_moving_average(zip(self.encoder.parameters(), self.average.parameters(), strict=True), 0.99)


@torch.no_grad()
def plain_moving_average(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], momentum: float) -> None:
    """Update one average after the other, through a new tensor each; `pairs` are of a parameter and its average."""
    for parameter, average in pairs:
        average.copy_(average * momentum + parameter * (1 - momentum))


@torch.no_grad()
def plain_lars(p: torch.Tensor, velocity: torch.Tensor, lr: float, weight_decay: float) -> None:
    """Update one parameter by MoCo v3's formula; biases and norms neither adapt nor decay."""
    gradient = p.grad
    assert gradient is not None
    if p.ndim > 1:
        gradient = gradient.add(p, alpha=weight_decay)
        p_norm, norm, one = p.norm(), gradient.norm(), torch.ones((), device=p.device)
        gradient = gradient * torch.where(p_norm > 0, torch.where(norm > 0, 0.001 * p_norm / norm, one), one)
    velocity.mul_(0.9).add_(gradient)
    p.add_(velocity, alpha=-lr)


def plain_head(widths: list[int], last_norm: bool) -> nn.Sequential:
    """Return linear layers of these widths with norm and ReLU between them, and at the end a norm or nothing."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    layers[-2:] = [nn.BatchNorm1d(widths[-1], affine=False)] if last_norm else []
    return nn.Sequential(*layers)


def plain_backbone(config: Config) -> Any:
    """Return torchvision's or timm's network of the sizes in `config`, [n, 3, H, W] -> [n, its attribute num_features].

    torchvision's ResNets have one width (and one stem), so `backbone_args` and `stem` must be left alone there.
    """
    model, size = config.crossbatch.model, config.crossbatch.data.image_size
    if model.arch in LAYOUTS:
        layout = replace(LAYOUTS[model.arch], **model.backbone_args)
        sizes = {name: value for name, value in vars(layout).items() if name != "conv_stem"}
        transformer: Any = timm.models.VisionTransformer(img_size=size, num_classes=0, global_pool="token", **sizes)
        transformer.pos_embed.requires_grad_(False)
        transformer.patch_embed.requires_grad_(not model.stop_grad_conv1)
        return transformer
    assert not model.backbone_args and model.stem == "imagenet", model
    network: Any = torchvision.models.get_model(model.arch)
    network.num_features, network.fc = network.fc.in_features, nn.Identity()
    return network
