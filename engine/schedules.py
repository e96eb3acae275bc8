"""Learning rate and encoder momentum as functions of the fractional epoch as MoCo v3 released them (Chen et al. 2021).

Pure functions of the step, so a resumed run needs no scheduler state.
"""

import math


def learning_rate(epoch: float, peak: float, epochs: float, warmup_epochs: float) -> float:
    """Linear from exactly 0 to `peak` over the warm-up, then half a cosine to 0 at `epochs`."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def finetuning_rate(epoch: float, peak: float, epochs: float, warmup_epochs: float, deit_compat: bool) -> float:
    """Linear from 1e-6 to `peak`, then half a cosine to 1e-5.

    With `deit_compat`, as DeiT's training runs: a rate per whole epoch, set after it for the next one, so that the first two
    have the first rate; and the cosine starts with the warm-up, below whose end it is never seen.
    """
    start, end = 1e-6, 1e-5
    first = warmup_epochs
    if deit_compat:
        epoch, first = max(0, math.floor(epoch) - 1), 0.0
    if epoch < warmup_epochs:
        return start + (peak - start) * epoch / warmup_epochs
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (epoch - first) / (epochs - first)))


def encoder_momentum(epoch: float, base: float, epochs: float, cosine: bool) -> float:
    """Constant, or from `base` to 1 along half a cosine without warm-up."""
    return 1 - 0.5 * (1 + math.cos(math.pi * epoch / epochs)) * (1 - base) if cosine else base
