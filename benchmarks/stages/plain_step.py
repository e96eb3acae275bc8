"""Implements the baselines of a training step: MoCo v3 + BatchFormer in plain torch, on one device, without chunks.

Both forms: every view passes the networks by itself; BatchFormer is `nn.TransformerEncoderLayer`, a head `nn.BatchNorm1d` (on
one rank torch's SyncBatchNorm calls the same kernels); the logits are computed under autocast; fp16 has torch's GradScaler. The
sizes and the precision are ours. cudnn.benchmark is on, as for all that is measured.

    plain    as the originals' released code goes about it: images contiguous, LARS and the moving average as loops over
             parameters, torch.optim.AdamW by its defaults, and the loss read in every step before the backward pass
    tuned    what one would do first to make that fast: channels last, LARS and the moving average in foreach calls, AdamW
             fused, nothing read; `compiled`: the networks by torch.compile, too
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
from torchvision.models.resnet import BasicBlock, Bottleneck

from crossbatch.data.augment.parameters import IMAGENET_MEAN, IMAGENET_STD
from crossbatch.engine.config import Config, LarsConfig, ResolvedConfig, autocast_dtype
from crossbatch.models import autocast, build_backbone
from crossbatch.models.backbones import LAYOUTS

FOUND_SCALE = 256.0  # of the loss in fp16, as a run finds it: a step that overflows skips its optimizer
EPS = 1e-5  # of weights that a step may change: hundreds of steps must end in numbers


class PlainStep:
    """Trains on uint8 views [2, n, 3, H, W] when it is called, and returns the loss."""

    def __init__(self, cfg: ResolvedConfig, device: torch.device, tuned: bool = False, compiled: bool = False):
        ours = cfg.config.crossbatch
        torch.manual_seed(ours.seed)
        self.cfg, self.device, self.temperature, self.tuned = cfg, device, ours.model.temperature, tuned
        self.momentum = 0.99
        self.layout = torch.channels_last if tuned else torch.contiguous_format
        self.backbone = backbone = plain_backbone(cfg.config)
        width, hidden, dim = backbone.num_features, ours.model.mlp_dim, ours.model.projection_dim
        resnet = ours.model.arch.startswith("resnet")
        projector = plain_head([width, hidden, dim] if resnet else [width, hidden, hidden, dim], last_norm=True)
        self.encoder = nn.Sequential(backbone, projector).to(device).to(memory_format=self.layout)
        self.average = copy.deepcopy(self.encoder).requires_grad_(False)
        self.predictor = plain_head([dim, hidden, dim], last_norm=not resnet).to(device)
        self.batchformer = None
        if ours.batchformer.loss != "none":
            self.batchformer = nn.TransformerEncoderLayer(width, 4, width, dropout=ours.batchformer.dropout).to(device)
        trained = [self.encoder, self.predictor, *([self.batchformer] if self.batchformer else [])]
        self.parameters = [p for part in trained for p in part.parameters() if p.requires_grad]
        if isinstance(cfg.config.optimizer.params, LarsConfig):
            self.optimizer = PlainLars([{"params": self.parameters, "weight_decay": 1e-6}], EPS, foreach=tuned)
        else:
            decay = cfg.config.optimizer.params.weight_decay
            self.optimizer = torch.optim.AdamW(self.parameters, lr=EPS, weight_decay=decay, fused=tuned or None)
        self.scaler = torch.amp.GradScaler(device.type, FOUND_SCALE, enabled=cfg.precision == "fp16")
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        for network in [*self.encoder, *self.average, *trained[1:]] if compiled else []:
            network.compile(dynamic=False)

    def __call__(self, views: torch.Tensor) -> torch.Tensor:
        images = [(view.to(self.device, non_blocking=True).float() / 255 - self.mean) / self.std for view in views]
        return self.train_on(images)

    def train_on(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Train on two views that are normalised already, each fp32 [n, 3, H, W]."""
        images = [view.contiguous(memory_format=self.layout) for view in images]
        with autocast(self.device.type, autocast_dtype(self.cfg.precision)):
            queries = [self.predictor(self._project(self.encoder, view)) for view in images]
            with torch.no_grad():
                keys = [self._project(self.average, view) for view in images]
            loss = self._contrast(queries[0], keys[1]) + self._contrast(queries[1], keys[0])
        if not self.tuned:
            loss.item()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        plain_moving_average(
            zip(self.encoder.parameters(), self.average.parameters(), strict=True), self.momentum, self.tuned
        )
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
        """Sum the terms of all pairs of streams; under autocast the products are in 16 bits, as in the originals."""
        queries, keys = (F.normalize(x.float(), dim=1) for x in (queries, keys))
        streams = 2 if self.batchformer is not None else 1
        labels = torch.arange(len(queries) // streams, device=self.device)
        logits = [q @ k.T / self.temperature for q in queries.chunk(streams) for k in keys.chunk(streams)]
        return 2 * self.temperature * torch.stack([F.cross_entropy(term, labels) for term in logits]).sum()


@torch.no_grad()
def plain_moving_average(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], momentum: float, foreach: bool = False
) -> None:
    """Update the averages in `pairs` (parameter, average) one by one, each through a new tensor, or by one foreach call."""
    if foreach:
        parameters, averages = (list(tensors) for tensors in zip(*pairs, strict=True))
        torch._foreach_lerp_(averages, parameters, 1 - momentum)
        return
    for parameter, average in pairs:
        average.copy_(average * momentum + parameter * (1 - momentum))


class PlainLars(torch.optim.Optimizer):
    """Updates by MoCo v3's formula, tensor by tensor or in foreach calls; biases and norms get no trust ratio or decay."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, foreach: bool):
        super().__init__(groups, {"lr": lr})
        self.foreach = foreach
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["velocity"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter."""
        for group in self.param_groups:
            if self.foreach:
                self._step_at_once(group)
            else:
                for p in group["params"]:
                    self._step_one(p, group["lr"], group["weight_decay"])

    def _step_one(self, p: torch.Tensor, lr: float, weight_decay: float) -> None:
        gradient = p.grad
        assert gradient is not None
        if p.ndim > 1:
            gradient = gradient.add(p, alpha=weight_decay)
            p_norm, norm, one = p.norm(), gradient.norm(), torch.ones((), device=p.device)
            gradient = gradient * torch.where(p_norm > 0, torch.where(norm > 0, 0.001 * p_norm / norm, one), one)
        velocity = self.state[p]["velocity"]
        velocity.mul_(0.9).add_(gradient)
        p.add_(velocity, alpha=-lr)

    def _step_at_once(self, group: dict[str, Any]) -> None:
        """Do the same; the parameters that do not adapt come last."""
        parameters = sorted(group["params"], key=lambda p: p.ndim < 2)
        matrices = [p for p in parameters if p.ndim > 1]
        gradients = [p.grad for p in parameters]
        if matrices:
            decayed = torch._foreach_add(gradients[: len(matrices)], matrices, alpha=group["weight_decay"])
            p_norms, norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (matrices, decayed))
            ratios = torch.where((p_norms > 0) & (norms > 0), 0.001 * p_norms / norms, 1.0)
            torch._foreach_mul_(decayed, list(ratios.unbind()))
            gradients[: len(matrices)] = decayed
        velocities = [self.state[p]["velocity"] for p in parameters]
        torch._foreach_mul_(velocities, 0.9)
        torch._foreach_add_(velocities, gradients)
        torch._foreach_add_(parameters, velocities, alpha=-group["lr"])


def plain_head(widths: list[int], last_norm: bool) -> nn.Sequential:
    """Return linear layers of these widths with norm and ReLU between them, and at the end a norm or nothing."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    layers[-2:] = [nn.BatchNorm1d(widths[-1], affine=False)] if last_norm else []
    return nn.Sequential(*layers)


def plain_backbone(config: Config) -> Any:
    """Return torchvision's or timm's network of the sizes in `config`, [n, 3, H, W] -> [n, its attribute num_features].

    torchvision's ResNets have one width and one stem; others are put together of its blocks. timm's ViT starts from MoCo v3's
    positions and weights: frozen, its own random positions would say nothing.
    """
    model, size = config.crossbatch.model, config.crossbatch.data.image_size
    if model.arch in LAYOUTS:
        layout = replace(LAYOUTS[model.arch], **model.backbone_args)
        sizes = {name: value for name, value in vars(layout).items() if name != "conv_stem"}
        transformer: Any = timm.models.VisionTransformer(img_size=size, num_classes=0, global_pool="token", **sizes)
        start = build_backbone(model.arch, size, backbone_args=model.backbone_args)
        transformer.load_state_dict(start.state_dict())
        transformer.pos_embed.requires_grad_(False)
        transformer.patch_embed.requires_grad_(not model.stop_grad_conv1)
        return transformer
    network: Any = torchvision.models.get_model(model.arch)
    width = model.backbone_args.get("width", 64)
    if width != 64:
        block, blocks = type(network.layer1[0]), [len(getattr(network, f"layer{stage}")) for stage in range(1, 5)]
        network.inplanes = width
        network.conv1, network.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        for stage, count in enumerate(blocks):
            layer = network._make_layer(block, width * 2**stage, count, stride=1 if stage == 0 else 2)
            setattr(network, f"layer{stage + 1}", layer)
        network.fc = nn.Linear(network.inplanes, 1)
    if model.stem == "small":
        network.conv1, network.maxpool = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.Identity()
    for layer in network.modules():  # as by torchvision's zero_init_residual, which the originals set
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, (BasicBlock, Bottleneck)):
            nn.init.zeros_(layer.get_parameter("bn3.weight" if isinstance(layer, Bottleneck) else "bn2.weight"))
    network.num_features, network.fc = network.fc.in_features, nn.Identity()
    return network
