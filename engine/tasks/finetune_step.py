"""Runs one step of fine-tuning: mixed and erased images, cross-entropy of their chunks, update, moving average.

Mixup, CutMix and random erasing are timm's; they are drawn anew from (seed, step, rank) in every step, so a resumed run repeats
them.
"""

import random

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch.nn import functional as F

from crossbatch.data import normalize
from crossbatch.data.augment.parameters import RGB, Channels
from crossbatch.engine.config import ResolvedFinetune, autocast_dtype
from crossbatch.engine.optimizers import set_learning_rate
from crossbatch.engine.schedules import finetuning_rate
from crossbatch.engine.sharding import Backend
from crossbatch.engine.step import Progress, StepResult
from crossbatch.models import set_num_chunks
from crossbatch.models.classifier import Classifier


class FinetuneStep:
    """Makes one optimizer step of fine-tuning per call; the gradients of chunks add up.

    Args:
        backend: the sharded `Classifier` and its optimizer.
        cfg: the resolved configuration.
        device: where the model lives.
        steps_per_epoch: optimizer steps in one epoch of the schedule.
        chunk: images that the network sees at once, at most.
        rank: this rank, for the random numbers of mixup and erasing.
        channels: how images are normalised.
    """

    def __init__(
        self,
        backend: Backend,
        cfg: ResolvedFinetune,
        device: torch.device,
        steps_per_epoch: int,
        chunk: int,
        rank: int,
        channels: Channels = RGB,
    ):
        self.backend, self.cfg, self.device, self.steps_per_epoch = backend, cfg, device, steps_per_epoch
        self.rank, self.chunk, self.channels = rank, chunk, channels
        self.chunks = -(-cfg.local_batch // chunk)
        assert isinstance(backend.model, Classifier)
        self.model = backend.model
        self.model.autocast_dtype = autocast_dtype(cfg.precision)
        set_num_chunks(self.model.online, self.chunks)
        settings = cfg.crossbatch.finetune
        self.erase = RandomErasing(settings.random_erasing, mode="pixel", device=device.type)
        self.mix, self.smoothing = None, settings.label_smoothing
        if settings.mixup or settings.cutmix:
            num_classes = self.model.online.head.out_features
            self.mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=self.smoothing, num_classes=num_classes)
            self.smoothing = 0.0  # mixed targets are smooth already
        self.progress = Progress.start(cfg.precision)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> StepResult[torch.Tensor]:
        """Train on uint8 images [n, 3, H, W] and int64 labels [n]; the result's output is the mean loss of this rank."""
        progress = self.progress
        _seed_everything(self.cfg.crossbatch.seed, progress.step, self.rank)
        inputs = self.erase(normalize(images.to(self.device, non_blocking=True), channels=self.channels))
        targets = labels.to(self.device)
        if self.mix is not None:
            inputs, targets = self.mix(inputs, targets)  # targets: class probabilities [n, num_classes]
        loss = self._forward_backward(inputs.to(memory_format=torch.channels_last), targets)
        schedule, epoch = self.cfg.crossbatch.schedule, progress.updates / self.steps_per_epoch
        lr = finetuning_rate(epoch, self.cfg.lr_peak, schedule.epochs, schedule.warmup_epochs, schedule.deit_compat)
        set_learning_rate(self.backend.optimizer, lr)
        grad_norm = self.backend.step(progress.loss_scale)
        if progress.finished(grad_norm, self.cfg.precision):
            self.backend.update_momentum(self.cfg.crossbatch.finetune.ema_decay)
            self.model.average_buffers()
        return StepResult(loss, grad_norm, {"lr": lr})

    def _forward_backward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss, after back-propagating it chunk by chunk."""
        losses = []
        chunks = zip(inputs.tensor_split(self.chunks), targets.tensor_split(self.chunks), strict=True)
        for number, (some, wanted) in enumerate(chunks, start=1):
            logits = self.backend("logits", some).float()
            total = F.cross_entropy(logits, wanted, label_smoothing=self.smoothing, reduction="sum")
            loss = total / len(inputs)
            self.backend.backward(loss, self.progress.loss_scale, is_last=number == self.chunks)
            losses.append(loss.detach())
        return torch.stack(losses).sum()


def _seed_everything(seed: int, step: int, rank: int) -> None:
    """Seed torch, which draws the dropped paths, numpy, which draws mixup's boxes, and Python, for timm's erased rectangles."""
    number = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
