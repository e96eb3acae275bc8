"""One training step: features, batch-wide part, backward, update.

The step is cut at the backbone's features (see `crossbatch.models.moco`). With one chunk a step, autograd simply continues
through the cut and the model's forward covers both sides.
"""

import math
from dataclasses import dataclass

import torch

from crossbatch.data import normalize
from crossbatch.engine.config import ResolvedConfig
from crossbatch.engine.optimizers import set_learning_rate
from crossbatch.engine.schedule import encoder_momentum, learning_rate
from crossbatch.engine.sharding import Backend
from crossbatch.models import Contrast

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
INITIAL_LOSS_SCALE, CLEAN_STEPS = 2.0**16, 2000


@dataclass
class Progress:
    """What a run remembers beside tensors. Everything else follows from it: data position, schedules, random numbers."""

    step: int = 0  # batches trained on
    updates: int = 0  # of these, the ones whose gradients were finite
    loss_scale: float = 1.0
    clean_steps: int = 0  # since the loss scale changed


class TrainStep:
    """Calls of `__call__` train; what varies is an argument or in `progress`, so a resumed run repeats the same steps.

    A step whose gradients are not finite changes nothing: not the optimizer, not the schedules (they count `updates`), not the
    moving average. With fp16 that is how the loss scale is found (Micikevicius et al., 2018, section 3.2): doubled after 2000
    clean steps, halved on overflow, as torch.amp.GradScaler does.

    Args:
        backend: the sharded model and its optimizer.
        steps_per_epoch: of the data, for the schedules.
    """

    def __init__(self, backend: Backend, run: ResolvedConfig, device: torch.device, steps_per_epoch: int):
        self.backend, self.run, self.device, self.steps_per_epoch = backend, run, device, steps_per_epoch
        self.progress = Progress(loss_scale=INITIAL_LOSS_SCALE if run.precision == "fp16" else 1.0)

    def __call__(self, views: torch.Tensor) -> tuple[Contrast, float]:
        """Trains on uint8 views [2, n, 3, H, W].

        Returns:
            The loss and its parts on this rank, and the global gradient norm, which is not finite if the step was skipped.
        """
        progress = self.progress
        images = self._to_device(views)
        with self.autocast():
            contrast = self.backend(images, step=progress.step, seed=self.run.config.crossbatch.seed)
        self.backend.backward(contrast.loss, progress.loss_scale)
        contrast.loss = contrast.loss.detach()
        set_learning_rate(self.backend.optimizer, self.learning_rate(progress.updates))
        gradient_norm = self.backend.step(progress.loss_scale)
        if math.isfinite(gradient_norm):
            progress.updates += 1
            # The originals update the average at the start of the next step, with that step's momentum: the same numbers.
            self.backend.update_momentum(self.momentum(progress.updates))
        self._adjust_loss_scale(math.isfinite(gradient_norm))
        progress.step += 1
        return contrast, gradient_norm

    def _adjust_loss_scale(self, clean: bool) -> None:
        progress = self.progress
        if self.run.precision != "fp16":
            return
        progress.clean_steps = progress.clean_steps + 1 if clean else 0
        if not clean:
            progress.loss_scale /= 2
        elif progress.clean_steps == CLEAN_STEPS:
            progress.loss_scale, progress.clean_steps = progress.loss_scale * 2, 0

    def autocast(self):
        dtype = AUTOCAST.get(self.run.precision)
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def learning_rate(self, updates: int) -> float:
        schedule = self.run.config.crossbatch.schedule
        return learning_rate(updates / self.steps_per_epoch, self.run.lr_peak, schedule.epochs, schedule.warmup_epochs)

    def momentum(self, updates: int) -> float:
        ours = self.run.config.crossbatch
        return encoder_momentum(
            updates / self.steps_per_epoch, ours.momentum.base, ours.schedule.epochs, ours.momentum.cosine
        )

    def _to_device(self, views: torch.Tensor) -> torch.Tensor:
        """uint8 [2, n, 3, H, W] -> normalised fp32 [2n, 3, H, W], both views in one tensor, view-major."""
        images = views.to(self.device, non_blocking=True).flatten(0, 1)
        return normalize(images).to(memory_format=torch.channels_last)
