"""Runs one training step: features, batch-wide part, backward, update.

The step is cut at the backbone's features (see `crossbatch.models.moco`). With one chunk, autograd simply continues through
the cut. With more, only the backbone is chunked: see `crossbatch.engine.chunked`. The result is that of one chunk, except
for the batch over which the norms of a ResNet take their statistics.
"""

import math
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch.profiler import record_function

from crossbatch.data import normalize
from crossbatch.data.augment.parameters import channels_of
from crossbatch.engine.chunked import backward_in_chunks
from crossbatch.engine.config import ResolvedConfig, autocast_dtype
from crossbatch.engine.gradient_noise import GradientNoise
from crossbatch.engine.optimizers import set_learning_rate
from crossbatch.engine.runtime.timing import SECOND_PASS, WHOLE, Span, StepTimer
from crossbatch.engine.schedules import encoder_momentum, learning_rate
from crossbatch.engine.sharding import Backend
from crossbatch.models import MoCo, MoCoOutput, set_num_chunks

INITIAL_LOSS_SCALE, CLEAN_STEPS = 2.0**16, 2000
Output = TypeVar("Output")


@dataclass
class Progress:
    """Hold the counts that a run remembers besides tensors; data position, schedules and random numbers follow from them."""

    step: int = 0  # batches trained on
    updates: int = 0  # of these, the ones whose gradients were finite
    loss_scale: float = 1.0
    clean_steps: int = 0  # since the loss scale changed
    # Moving averages of `engine.gradient_noise`, and over which parts of a batch they were taken.
    noise_square: float = 0.0
    noise_variance: float = 0.0
    noise_over: str = ""

    @property
    def noise_scale(self) -> float | None:
        """Return the noise scale in images; None where it is not measured, or while an estimate is not positive."""
        return self.noise_variance / self.noise_square if min(self.noise_variance, self.noise_square) > 0 else None

    @staticmethod
    def start(precision: str) -> "Progress":
        return Progress(loss_scale=INITIAL_LOSS_SCALE if precision == "fp16" else 1.0)

    def in_precision(self, precision: str, before: str) -> "Progress":
        """Return the progress of a run that goes on in `precision`; if that is not `before`, its loss scale is found anew."""
        start = Progress.start(precision)
        return self if precision == before else replace(self, loss_scale=start.loss_scale, clean_steps=0)

    def finished(self, gradient_norm: float, precision: str) -> bool:
        """Count a step and return whether it updated anything.

        Also adjusts the loss scale of fp16 as torch.amp.GradScaler does: doubled after 2000 clean steps, halved on overflow
        (Micikevicius et al., 2018, section 3.2).
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


@dataclass
class StepResult(Generic[Output]):
    """Hold what one training step computed on this rank, and with which rates.

    Attributes:
        output: the loss and its parts, without a graph.
        grad_norm: the norm of the gradients over all ranks, not finite if the step was skipped.
        rates: "lr" as it was set for this step, before any group's `lr_scale`, even if the step was skipped. In pretraining
            also "momentum", by which this step moved the average; None after a skipped step, which moves nothing.
    """

    output: Output
    grad_norm: float
    rates: dict[str, float | None]


class TrainStep:
    """Run one step of pretraining per call; what varies is an argument or in `progress`, so a resumed run repeats its steps.

    A step whose gradients are not finite changes nothing: not the optimizer, not the schedules (they count `updates`), not the
    moving average. With fp16 that is how the loss scale is found.

    The backbone sees at most `chunk` images at once; the chunks of a step differ by one image at most. `steps_per_epoch` is for
    the schedules. Without a `timer`, the parts of a step are only marked for torch.profiler.
    """

    def __init__(
        self,
        backend: Backend,
        cfg: ResolvedConfig,
        device: torch.device,
        steps_per_epoch: int,
        chunk: int,
        timer: StepTimer | None = None,
    ):
        self.backend, self.cfg, self.device, self.steps_per_epoch = backend, cfg, device, steps_per_epoch
        self.seed, data = cfg.config.crossbatch.seed, cfg.config.crossbatch.data
        self.channels = channels_of(data.channels, data.mean, data.std)
        self.chunks = -(-cfg.local_batch // chunk)
        self.ranks_in_one = 1  # ranks of another run whose images this one has, see `cut`
        self.frozen_updates = round(cfg.crossbatch.schedule.freeze_backbone_epochs * steps_per_epoch)
        assert isinstance(backend.model, MoCo)
        backend.model.autocast_dtype = autocast_dtype(cfg.precision)
        for backbone in (backend.model.online.backbone, backend.model.momentum.backbone):
            set_num_chunks(backbone, self.chunks)
        self.noise = GradientNoise.of(backend.model, cfg, self.chunks)
        self.progress = Progress.start(cfg.precision)
        self.use_timer(timer)

    def use_timer(self, timer: StepTimer | None) -> None:
        """Measure the parts of every later step with `timer`, or with nothing."""
        self.span: Span = timer.span if timer is not None else record_function
        self.backend.model.span = self.span

    def __call__(self, views: torch.Tensor) -> StepResult[MoCoOutput]:
        """Train on uint8 views [2, n, 3, H, W]."""
        progress = self.progress
        with self.span(WHOLE):
            if progress.updates < self.frozen_updates:
                output = self._with_frozen_backbone(views)
            else:
                output = self._in_one_chunk(views) if self.chunks == 1 else self._in_chunks(views)
            output.loss = output.loss.detach()
            lr, momentum = self.learning_rate(progress.updates), None
            set_learning_rate(self.backend.optimizer, lr, progress.updates - self.frozen_updates)
            with self.span("optimizer"):
                scale, is_frozen = progress.loss_scale, progress.updates < self.frozen_updates
                grad_norm = self.backend.step(scale)
            if self.noise is not None:
                self.noise.end_step(grad_norm, scale, counts=math.isfinite(grad_norm) and not is_frozen)
            if progress.finished(grad_norm, self.cfg.precision):
                # The originals update the average at the start of the next step, with that step's momentum: the same numbers.
                momentum = self.momentum(progress.updates)
                with self.span("moving average"):
                    self.backend.update_momentum(momentum)
            assert isinstance(self.backend.model, MoCo)
            self.backend.model.average_running_stats()
        return StepResult(output, grad_norm, {"lr": lr, "momentum": momentum})

    def _in_one_chunk(self, views: torch.Tensor) -> MoCoOutput:
        """Run forward and backward of the whole local batch at once."""
        output = self.backend("loss", self._to_device(views), self.progress.step, self.seed)
        self._backward(output.loss, is_last=True)
        return output

    def _with_frozen_backbone(self, views: torch.Tensor) -> MoCoOutput:
        """Train what follows the backbone; the backbone runs without gradient, and so does not go backward."""
        parts = [self.backend("features", self._to_device(chunk), False) for chunk in self.cut(views)]
        online, momentum = (
            self._joined(torch.cat([piece.unflatten(0, (len(views), -1)) for piece in pieces], dim=1)).flatten(0, 1)
            for pieces in zip(*parts, strict=True)
        )
        # A CUDA graph keeps whether its input has a gradient, and later steps need that.
        output = self.backend("contrast", online.requires_grad_(), momentum, self.progress.step, self.seed)
        self._backward(output.loss, is_last=True)
        return output

    def _in_chunks(self, views: torch.Tensor) -> MoCoOutput:
        """Run forward and backward of the whole local batch with the activations of one chunk in memory at a time."""
        outputs: list[MoCoOutput] = []

        def forward(chunk: torch.Tensor, with_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
            return self.backend("features", self._to_device(chunk), with_grad)

        def forward_again(chunk: torch.Tensor, is_last: bool) -> tuple[torch.Tensor]:
            images = self._to_device(chunk)
            with self.span(SECOND_PASS):
                return (self.backend("embed", images),)

        def loss_of_features(features_VnC: tuple[torch.Tensor, ...]) -> torch.Tensor:
            online, momentum = (self._joined(features).flatten(0, 1) for features in features_VnC)
            outputs.append(self.backend("contrast", online, momentum, self.progress.step, self.seed))
            return outputs[0].loss

        backward_in_chunks(
            self.cut(views),
            len(views),
            self.backend.model.chunked_module,
            forward,
            forward_again,
            loss_of_features,
            self._backward,
        )
        return outputs[0]

    def cut(self, views: torch.Tensor) -> list[torch.Tensor]:
        """Cut [V, n, ...] into the chunks of a step.

        The norms of a ResNet take their statistics over the chunks that all ranks have at the same time. A replay on fewer
        ranks does, too, if each of its chunks holds the same chunk of `ranks_in_one` ranks.
        """
        if self.ranks_in_one == 1:
            return list(views.tensor_split(self.chunks, dim=1))
        by_rank = views.unflatten(1, (self.ranks_in_one, -1))
        return [chunk.flatten(1, 2) for chunk in by_rank.tensor_split(self.chunks, dim=2)]

    def _joined(self, features_VnC: torch.Tensor) -> torch.Tensor:
        """Return features of the joined chunks in the order of the batch."""
        if self.ranks_in_one == 1:
            return features_VnC
        positions = torch.arange(features_VnC.shape[1], device=features_VnC.device)
        return features_VnC[:, torch.cat(self.cut(positions[None]), dim=1)[0].argsort()]

    def _backward(self, loss: torch.Tensor, is_last: bool) -> None:
        if self.noise is not None:
            self.noise.is_last = is_last
        with self.span("backward"):
            self.backend.backward(loss, self.progress.loss_scale, is_last=is_last)

    def learning_rate(self, updates: int) -> float:
        """Return the scheduled learning rate of the step after `updates` updates."""
        schedule = self.cfg.config.crossbatch.schedule
        return learning_rate(updates / self.steps_per_epoch, self.cfg.lr_peak, schedule.epochs, schedule.warmup_epochs)

    def momentum(self, updates: int) -> float:
        """Return the scheduled momentum of the moving average after `updates` updates."""
        settings = self.cfg.config.crossbatch
        epoch = updates / self.steps_per_epoch
        return encoder_momentum(epoch, settings.momentum.base, settings.schedule.epochs, settings.momentum.cosine)

    def _to_device(self, views: torch.Tensor) -> torch.Tensor:
        """Turn uint8 [2, n, 3, H, W] into normalised fp32 [2n, 3, H, W], both views in one tensor, view-major."""
        with self.span("host to device"):
            # View by view: of a chunk, only each view is one piece of (pinned) memory that can be copied as it is.
            images = torch.cat([view.to(self.device, non_blocking=True) for view in views])
            return normalize(images, channels=self.channels).to(memory_format=torch.channels_last)
