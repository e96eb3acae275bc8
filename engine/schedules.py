"""Compute learning rate and encoder momentum from the fractional epoch, as MoCo v3 does (Chen et al., 2021).

They depend on the step alone, so a resumed run needs no scheduler state.
"""

import math

from crossbatch.engine.config import Config


def learning_rate(epoch: float, peak: float, epochs: float, warmup_epochs: float) -> float:
    """Return the learning rate: linear from exactly 0 to `peak` over the warm-up, then half a cosine to 0 at `epochs`."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def too_short(config: Config, images: int) -> list[str]:
    """Return warnings about a run of pretraining that will hardly learn anything from `images` images an epoch."""
    schedule, momentum, batch = config.crossbatch.schedule, config.crossbatch.momentum.base, config.train_batch_size
    steps = schedule.epochs * max(1, images // batch)
    # The quickstart, a small network on drawings of 64 px, needs 300. The moving average spans 1 / (1 - momentum) steps.
    enough = max(300, round(5 / (1 - momentum)) if momentum < 1 else 0)
    if steps >= enough:
        return []
    return [
        f"too short to learn much: {schedule.epochs} epochs x {images} images / {batch} images a step = {steps} steps; "
        f"allow {enough} at least: raise crossbatch.schedule.epochs, or lower train_batch_size"
    ]


def finetuning_rate(epoch: float, peak: float, epochs: float, warmup_epochs: float, deit_compat: bool) -> float:
    """Return the learning rate of fine-tuning: linear from 1e-6 to `peak`, then half a cosine to 1e-5.

    With `deit_compat` it follows DeiT's training: one rate per whole epoch, set after an epoch for the next one, so the first
    two epochs share the first rate; and the cosine counts from epoch 0, but shows only after the warm-up.
    """
    start, end = 1e-6, 1e-5
    first = warmup_epochs
    if deit_compat:
        epoch, first = max(0, math.floor(epoch) - 1), 0.0
    if epoch < warmup_epochs:
        return start + (peak - start) * epoch / warmup_epochs
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (epoch - first) / (epochs - first)))


def encoder_momentum(epoch: float, base: float, epochs: float, cosine: bool) -> float:
    """Return the momentum of the moving average: constant, or from `base` to 1 along half a cosine, without warm-up."""
    return 1 - 0.5 * (1 + math.cos(math.pi * epoch / epochs)) * (1 - base) if cosine else base
