"""One optimizer step: features, batch-wide part, backward, update.

The step is cut at the backbone's features (see `crossbatch.models.moco`). With one chunk a step, autograd simply continues
through the cut and the model's forward covers both sides.
"""

import torch

from crossbatch.data import normalize
from crossbatch.engine.config import ResolvedConfig
from crossbatch.engine.optimizers import set_learning_rate
from crossbatch.engine.schedule import encoder_momentum, learning_rate
from crossbatch.engine.sharding import Backend
from crossbatch.models import Contrast

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainStep:
    """Calls of `__call__` train; everything that varies is an argument, so a resumed run repeats the same steps.

    Args:
        backend: the sharded model and its optimizer.
        steps_per_epoch: of the data, for the schedules.
    """

    def __init__(self, backend: Backend, run: ResolvedConfig, device: torch.device, steps_per_epoch: int):
        self.backend, self.run, self.device, self.steps_per_epoch = backend, run, device, steps_per_epoch

    def __call__(self, views: torch.Tensor, step: int) -> tuple[Contrast, torch.Tensor | float]:
        """Trains on uint8 views [2, n, 3, H, W] as optimizer step number `step` (from 0).

        Returns:
            The loss and its parts on this rank, and the global gradient norm.
        """
        images = self._to_device(views)
        with self.autocast():
            contrast = self.backend(images, step=step, seed=self.run.config.crossbatch.seed)
        self.backend.backward(contrast.loss)
        contrast.loss = contrast.loss.detach()
        set_learning_rate(self.backend.optimizer, self.learning_rate(step))
        gradient_norm = self.backend.step()
        # The originals update the average at the start of the next step, with that step's momentum: the same numbers.
        self.backend.update_momentum(self.momentum(step + 1))
        return contrast, gradient_norm

    def autocast(self):
        dtype = AUTOCAST.get(self.run.precision)
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def learning_rate(self, step: int) -> float:
        schedule = self.run.config.crossbatch.schedule
        return learning_rate(step / self.steps_per_epoch, self.run.lr_peak, schedule.epochs, schedule.warmup_epochs)

    def momentum(self, step: int) -> float:
        ours = self.run.config.crossbatch
        return encoder_momentum(
            step / self.steps_per_epoch, ours.momentum.base, ours.schedule.epochs, ours.momentum.cosine
        )

    def _to_device(self, views: torch.Tensor) -> torch.Tensor:
        """uint8 [2, n, 3, H, W] -> normalised fp32 [2n, 3, H, W], both views in one tensor, view-major."""
        images = views.to(self.device, non_blocking=True).flatten(0, 1)
        return normalize(images).to(memory_format=torch.channels_last)
