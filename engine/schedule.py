"""Learning rate and encoder momentum as functions of the fractional epoch as MoCo v3 released them (Chen et al. 2021).

Pure functions of the step, so a resumed run needs no scheduler state.
"""

import math


def learning_rate(epoch: float, peak: float, epochs: float, warmup_epochs: float) -> float:
    """Linear from exactly 0 to `peak` over the warm-up, then half a cosine to 0 at `epochs`."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def encoder_momentum(epoch: float, base: float, epochs: float, cosine: bool) -> float:
    """Constant, or from `base` to 1 along half a cosine without warm-up."""
    return 1 - 0.5 * (1 + math.cos(math.pi * epoch / epochs)) * (1 - base) if cosine else base
