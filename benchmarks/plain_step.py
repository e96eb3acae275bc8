"""One training step of MoCo v3 + BatchFormer as one writes it from the papers with torch's own parts, on one device.

Every view passes the networks by itself; BatchFormer is `nn.TransformerEncoderLayer`, a head `nn.BatchNorm1d`; the loss is
`cross_entropy` of a matrix of logits; LARS and the moving average are loops over parameters. Same sizes and precision as ours.
No chunks, one process.
"""

import copy
import itertools

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.plain import plain_backbone
from crossbatch.data.augment.parameters import IMAGENET_MEAN, IMAGENET_STD
from crossbatch.engine.config import LarsConfig, ResolvedConfig, autocast_dtype
from crossbatch.models import autocast

EPS = 1e-5  # of weights that a step may change: hundreds of steps must end in numbers


class PlainStep:
    """Calls of it train on uint8 views [2, n, 3, H, W]."""

    def __init__(self, run: ResolvedConfig, device: torch.device):
        torch.manual_seed(0)
        ours = run.config.crossbatch
        self.run, self.device, self.temperature = run, device, ours.model.temperature
        backbone = plain_backbone(run.config)
        width, hidden, dim = backbone.num_features, ours.model.mlp_dim, ours.model.projection_dim
        resnet = ours.model.arch.startswith("resnet")
        projector = _mlp([width, hidden, dim] if resnet else [width, hidden, hidden, dim], last_norm=True)
        self.encoder = nn.Sequential(backbone, projector).to(device)
        self.average = copy.deepcopy(self.encoder).requires_grad_(False)
        self.predictor = _mlp([dim, hidden, dim], last_norm=not resnet).to(device)
        self.batchformer = None
        if ours.batchformer.add_bf:
            self.batchformer = nn.TransformerEncoderLayer(width, 4, width, dropout=ours.batchformer.dropout).to(device)
        trained = nn.ModuleList([self.encoder, self.predictor, *([self.batchformer] if self.batchformer else [])])
        self.parameters = [p for p in trained.parameters() if p.requires_grad]
        self.velocity = {p: torch.zeros_like(p) for p in self.parameters}
        lars = isinstance(run.config.optimizer.params, LarsConfig)
        self.adamw = None if lars else torch.optim.AdamW(self.parameters, lr=EPS, weight_decay=0.1)
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def __call__(self, views: torch.Tensor) -> torch.Tensor:
        images = [(view.to(self.device, non_blocking=True).float() / 255 - self.mean) / self.std for view in views]
        with autocast(self.device.type, autocast_dtype(self.run.precision)):
            queries = [self.predictor(self._project(self.encoder, view)) for view in images]
            with torch.no_grad():
                keys = [self._project(self.average, view) for view in images]
        loss = self._contrast(queries[0], keys[1]) + self._contrast(queries[1], keys[0])
        loss.backward()
        self._update()
        return loss.detach()

    def _project(self, encoder: nn.Sequential, view: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] -> [S * n, D], the original stream first."""
        features = encoder[0](view)
        if self.batchformer is not None:
            groups = features.float().view(-1, self.run.group_size or 1, features.shape[-1]).transpose(0, 1)
            mixed = self.batchformer(groups).transpose(0, 1).flatten(0, 1)
            features = torch.cat((features.float(), mixed))
        return encoder[1](features)

    def _contrast(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The terms of all pairs of streams."""
        queries, keys = (F.normalize(x.float(), dim=1) for x in (queries, keys))
        streams = 2 if self.batchformer is not None else 1
        labels = torch.arange(len(queries) // streams, device=self.device)
        terms = [
            F.cross_entropy(q @ k.T / self.temperature, labels)
            for q in queries.chunk(streams)
            for k in keys.chunk(streams)
        ]
        return 2 * self.temperature * torch.stack(terms).sum()

    @torch.no_grad()
    def _update(self) -> None:
        if self.adamw is not None:
            self.adamw.step()
        else:
            for p in self.parameters:
                assert p.grad is not None
                _lars(p, p.grad, self.velocity[p])
        for p in self.parameters:
            p.grad = None
        for average, p in zip(self.average.parameters(), self.encoder.parameters(), strict=True):
            average.copy_(average * 0.99 + p * 0.01)


def _lars(p: torch.Tensor, gradient: torch.Tensor, velocity: torch.Tensor) -> None:
    """MoCo v3's formula for one parameter."""
    one = torch.ones((), device=p.device)
    if p.ndim > 1:
        gradient = gradient + 1e-6 * p
        p_norm, norm = p.norm(), gradient.norm()
        gradient = gradient * torch.where(p_norm > 0, torch.where(norm > 0, 0.001 * p_norm / norm, one), one)
    velocity.mul_(0.9).add_(gradient)
    p.add_(velocity, alpha=-EPS)


def _mlp(widths: list[int], last_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(itertools.pairwise(widths), start=2):
        layers.append(nn.Linear(before, after, bias=False))
        if number < len(widths):
            layers += [nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(nn.BatchNorm1d(after, affine=False))
    return nn.Sequential(*layers)
