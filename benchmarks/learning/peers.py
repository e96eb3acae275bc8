"""Trains with a peer library's parts: python -m benchmarks.learning.peers PEER --recipe F --images DIR --marks N --out DIR

Writes metrics.jsonl as launch/pretrain.py does (step, images_seen, loss) and marks/step-<N>.pth, backbones named as
torchvision's or timm's.
"""

import argparse
import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks.stages.plain_data import TwoViews
from benchmarks.stages.plain_step import PlainStep, plain_backbone
from crossbatch.engine.config import AdamWConfig, Device, ResolvedConfig, load_config, resolve, usable_cores
from crossbatch.engine.schedules import encoder_momentum, learning_rate

PEERS = ("plain", "lightly", "stable-pretraining")
PACKAGES = {"lightly": "lightly", "stable-pretraining": "stable_pretraining"}  # that a peer imports
RESNETS_ONLY = ("stable-pretraining",)
EVERY_STEPS = 5
STORED_KEYS = 4096


class LightlyStep:
    """Trains MoCo v2, put together from lightly's parts."""

    def __init__(self, cfg: ResolvedConfig, device: torch.device):
        from lightly.loss import NTXentLoss  # pyright: ignore[reportMissingImports]
        from lightly.models.modules import MoCoProjectionHead  # pyright: ignore[reportMissingImports]
        from lightly.models.utils import deactivate_requires_grad  # pyright: ignore[reportMissingImports]

        model, params = cfg.config.crossbatch.model, cfg.config.optimizer.params
        assert isinstance(params, AdamWConfig)
        self.backbone = plain_backbone(cfg.config)
        head = MoCoProjectionHead(self.backbone.num_features, model.mlp_dim, model.projection_dim, batch_norm=True)
        self.encoder = nn.Sequential(self.backbone, head).to(device)
        self.average = copy.deepcopy(self.encoder)
        deactivate_requires_grad(self.average)
        self.criterion = NTXentLoss(model.temperature, memory_bank_size=(STORED_KEYS, model.projection_dim)).to(device)
        self.optimizer = torch.optim.AdamW(self.encoder.parameters(), weight_decay=params.weight_decay)
        self.momentum = 0.99

    def train_on(self, views: list[torch.Tensor]) -> torch.Tensor:
        """Train on two views, each fp32 [n, 3, H, W]; return the loss."""
        from lightly.models.utils import update_momentum  # pyright: ignore[reportMissingImports]

        update_momentum(self.encoder, self.average, self.momentum)
        first, second = views
        loss = 0.5 * (self._contrast(first, second) + self._contrast(second, first))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _contrast(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            keys = self.average(key)
        return self.criterion(self.encoder(query), keys)


class StablePretrainingStep:
    """Trains MoCo v3 with stable-pretraining's module, which has the loss, the heads and the moving averages."""

    def __init__(self, cfg: ResolvedConfig, device: torch.device):
        from stable_pretraining.methods.mocov3 import MoCov3  # pyright: ignore[reportMissingImports]

        model, params = cfg.config.crossbatch.model, cfg.config.optimizer.params
        assert isinstance(params, AdamWConfig)
        self.backbone = plain_backbone(cfg.config)
        widths = model.mlp_dim, model.projection_dim
        module = MoCov3(self.backbone, widths, predictor_hidden_dim=model.mlp_dim, temperature=model.temperature)
        self.module = module.to(device)
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, weight_decay=params.weight_decay)
        self.momentum = 0.99

    def train_on(self, views: list[torch.Tensor]) -> torch.Tensor:
        """Train on two views, each fp32 [n, 3, H, W]; return the loss."""
        loss = self.module(*views).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average in (self.module.backbone, self.module.projector):
            average.ema_coefficient.fill_(self.momentum)
            average.update_teacher()
        return loss.detach()


STEPS = {"plain": PlainStep, "lightly": LightlyStep, "stable-pretraining": StablePretrainingStep}


def lightly_transform(size: int, crop_min: float, blur: float) -> Callable[[Any], Any]:
    """Return lightly's transform for MoCo v2 with the crops and the jitter of MoCo v3."""
    from lightly.transforms import MoCoV2Transform  # pyright: ignore[reportMissingImports]

    return MoCoV2Transform(input_size=size, min_scale=crop_min, cj_sat=0.2, cj_hue=0.1, gaussian_blur=blur)


def main() -> None:
    """Train a peer; learning rate and momentum follow the recipe's schedules over the steps that are asked for."""
    parser = argparse.ArgumentParser("python -m benchmarks.learning.peers", description=__doc__, allow_abbrev=False)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--marks", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    detected = Device.detect()
    cfg, device = resolve(load_config(given.recipe, given.set), 1, detected), torch.device(detected.type)
    ours, batch = cfg.config.crossbatch, cfg.train_batch_size
    torch.manual_seed(ours.seed)  # of the weights and, as workers and order follow it, of the images
    size = ours.data.image_size
    assert isinstance(size, int)
    lightly, crop_min, blur = given.peer == "lightly", ours.data.crop_min, ours.data.blur_probability
    views = lightly_transform(size, crop_min, sum(blur) / 2) if lightly else TwoViews(size, crop_min, blur)
    images = ImageFolder(str(given.images / "train"), views)
    loader = DataLoader(
        images, batch, shuffle=True, num_workers=usable_cores(), drop_last=True, persistent_workers=True
    )
    step = STEPS[given.peer](cfg, device)
    (given.out / "marks").mkdir(parents=True, exist_ok=True)
    epochs, per_epoch = ours.schedule.epochs, len(loader)
    total = round(epochs * per_epoch)
    every = math.ceil(total / given.marks)
    endless = itertools.chain.from_iterable(loader for _ in itertools.count())
    with (given.out / "metrics.jsonl").open("w") as metrics:
        for number, (views, _) in zip(range(total), endless, strict=False):
            epoch = number / per_epoch
            rate = learning_rate(epoch, cfg.lr_peak, epochs, ours.schedule.warmup_epochs)
            for group in step.optimizer.param_groups:
                group["lr"] = rate
            step.momentum = encoder_momentum(epoch, ours.momentum.base, epochs, ours.momentum.cosine)
            loss = step.train_on([view.to(device) for view in views])
            done = number + 1
            if done % EVERY_STEPS == 0 or done == total:
                line = {"step": done, "images_seen": done * batch, "loss": loss.item()}
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
            if done % every == 0 or done == total:
                weights = step.backbone.state_dict()
                torch.save({"state_dict": weights}, given.out / "marks" / "unfinished")
                (given.out / "marks" / "unfinished").rename(given.out / "marks" / f"step-{done:08d}.pth")


if __name__ == "__main__":
    main()
