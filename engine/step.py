"""One training step: features, batch-wide part, backward, update.

The step is cut at the backbone's features (see `crossbatch.models.moco`). With one chunk, autograd simply continues through
the cut. With more, only the backbone is chunked (Gao et al., 2021, "GradCache"): every chunk's features without gradient;
the batch-wide part on all of them, and its backward down to the features; then each chunk once more, back-propagated
from the gradient of its features. The last chunk needs no second pass: its first one kept what a backward pass takes. The
result is that of one chunk, but for the batch that a ResNet's norms see.
"""

import math
from dataclasses import dataclass, replace

import torch

from crossbatch.data import normalize
from crossbatch.engine.config import ResolvedConfig, autocast_dtype
from crossbatch.engine.optimizers import set_learning_rate
from crossbatch.engine.schedules import encoder_momentum, learning_rate
from crossbatch.engine.sharding import Backend
from crossbatch.models import NUM_VIEWS, MoCo, MoCoOutput, Statistics, reuse_batch_stats, set_num_chunks

INITIAL_LOSS_SCALE, CLEAN_STEPS = 2.0**16, 2000


@dataclass
class Progress:
    """What a run remembers beside tensors. Everything else follows from it: data position, schedules, random numbers."""

    step: int = 0  # batches trained on
    updates: int = 0  # of these, the ones whose gradients were finite
    loss_scale: float = 1.0
    clean_steps: int = 0  # since the loss scale changed

    @staticmethod
    def start(precision: str) -> "Progress":
        return Progress(loss_scale=INITIAL_LOSS_SCALE if precision == "fp16" else 1.0)

    def in_precision(self, precision: str, before: str) -> "Progress":
        """For a run that goes on in another precision than `before`: its loss scale has to be found anew."""
        start = Progress.start(precision)
        return self if precision == before else replace(self, loss_scale=start.loss_scale, clean_steps=0)

    def finished(self, gradient_norm: float, precision: str) -> bool:
        """Counts a step, and adjusts the loss scale of fp16 as torch.amp.GradScaler does: doubled after 2000 clean steps,
        halved on overflow (Micikevicius et al., 2018, section 3.2). Returns whether the step updated anything.
        """
        clean = math.isfinite(gradient_norm)
        self.step += 1
        self.updates += clean
        if precision == "fp16":
            self.clean_steps = self.clean_steps + 1 if clean else 0
            if not clean:
                self.loss_scale /= 2
            elif self.clean_steps == CLEAN_STEPS:
                self.loss_scale, self.clean_steps = self.loss_scale * 2, 0
        return clean


class TrainStep:
    """Calls of `__call__` train; what varies is an argument or in `progress`, so a resumed run repeats the same steps.

    A step whose gradients are not finite changes nothing: not the optimizer, not the schedules (they count `updates`), not the
    moving average. With fp16 that is how the loss scale is found.

    Args:
        backend: the sharded model and its optimizer.
        steps_per_epoch: of the data, for the schedules.
        chunk: images that the backbone sees at once, at most. The chunks of a step differ by one image at most.
    """

    def __init__(self, backend: Backend, run: ResolvedConfig, device: torch.device, steps_per_epoch: int, chunk: int):
        self.backend, self.run, self.device, self.steps_per_epoch = backend, run, device, steps_per_epoch
        self.seed = run.config.crossbatch.seed
        self.chunks = -(-run.local_batch // chunk)
        assert isinstance(backend.model, MoCo)
        backend.model.autocast_dtype = autocast_dtype(run.precision)
        self.backbone = backend.model.online.backbone
        for backbone in (self.backbone, backend.model.momentum.backbone):
            set_num_chunks(backbone, self.chunks)
        self.progress = Progress.start(run.precision)

    def __call__(self, views: torch.Tensor) -> tuple[MoCoOutput, float]:
        """Trains on uint8 views [2, n, 3, H, W].

        Returns:
            The loss and its parts on this rank, and the global gradient norm, which is not finite if the step was skipped.
        """
        progress = self.progress
        contrast = self._in_one_chunk(views) if self.chunks == 1 else self._in_chunks(views)
        contrast.loss = contrast.loss.detach()
        set_learning_rate(self.backend.optimizer, self.learning_rate(progress.updates))
        gradient_norm = self.backend.step(progress.loss_scale)
        if progress.finished(gradient_norm, self.run.precision):
            # The originals update the average at the start of the next step, with that step's momentum: the same numbers.
            self.backend.update_momentum(self.momentum(progress.updates))
        return contrast, gradient_norm

    def _in_one_chunk(self, views: torch.Tensor) -> MoCoOutput:
        contrast = self.backend("loss", self._to_device(views), self.progress.step, self.seed)
        self.backend.backward(contrast.loss, self.progress.loss_scale)
        return contrast

    def _in_chunks(self, views: torch.Tensor) -> MoCoOutput:
        """Forward and backward of the same, with the activations of one chunk in memory at a time."""
        *earlier, last = views.tensor_split(self.chunks, dim=1)
        statistics: list[Statistics] = [{} for _ in earlier]
        features = []
        for chunk, found in zip(earlier, statistics, strict=True):
            with reuse_batch_stats(self.backbone, found):
                features.append(self.backend("features", self._to_device(chunk), False))
        features.append(self.backend("features", self._to_device(last), True))
        online, momentum = (_join(parts) for parts in zip(*features, strict=True))
        online = online.detach().requires_grad_()
        contrast = self.backend("contrast", online, momentum, self.progress.step, self.seed)
        self.backend.backward(contrast.loss, self.progress.loss_scale, is_last=False)
        assert online.grad is not None
        *gradients, last_gradient = online.grad.unflatten(0, (NUM_VIEWS, -1)).tensor_split(self.chunks, dim=1)
        self._backward_features(features[-1][0], last_gradient, is_last=False)
        for number, (chunk, gradient) in enumerate(zip(earlier, gradients, strict=True), start=1):
            with reuse_batch_stats(self.backbone, statistics[number - 1]):
                again = self._features_again(self._to_device(chunk))
                self._backward_features(again, gradient, is_last=number == len(earlier))
        return contrast

    def _features_again(self, images: torch.Tensor) -> torch.Tensor:
        return self.backend("embed", images)

    def _backward_features(self, features: torch.Tensor, gradient: torch.Tensor, is_last: bool) -> None:
        """Back-propagates `gradient`, [V, m, C] and scaled, from `features`, [V*m, C]."""
        scale = self.progress.loss_scale
        # In fp32, where taking out the scale (a power of two) and putting it in again changes no bit.
        surrogate = (features.float() * (gradient.float() / scale).flatten(0, 1)).sum()  # whose gradient is `gradient`
        self.backend.backward(surrogate, scale, is_last)

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
        # View by view: of a chunk, only each view is one piece of (pinned) memory that can be copied as it is.
        images = torch.cat([view.to(self.device, non_blocking=True) for view in views])
        return normalize(images).to(memory_format=torch.channels_last)


def _join(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Features of chunks, each [V*m, C], view-major -> of the local batch [V*n, C], view-major."""
    return torch.cat([part.unflatten(0, (NUM_VIEWS, -1)) for part in parts], dim=1).flatten(0, 1)
