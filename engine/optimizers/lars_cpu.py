"""Makes the two passes of LARS on a CPU; each goes through memory once.

The first goes block by block through the cache and reads w and g. The second is the kernel of torch.optim.SGD(fused=True): it
reads w, g and v and writes w and v. That makes 7 values per element, where SGD with momentum and foreach moves 8.
"""

import torch
from torch import Tensor

from crossbatch.engine.optimizers.lars import Update, Work

_CACHED = 1 << 17  # elements of a block: w, g and d in fp32 fit into a core's second-level cache


def prepare(work: Work) -> None:
    """Do nothing: there is no GPU to wait for."""


def add_squares(work: Work, decay: float, sums: Tensor) -> None:
    """Add ||w||^2 to sums[0, number] and ||g + decay w||^2 to sums[1, number], over this rank's segments."""
    if not work.segments:
        return
    squares = sums.tolist()  # floats add faster than elements of a tensor
    scratch = torch.empty(_CACHED, dtype=work.flats[0].parameter.dtype)
    for segment, (parameter, gradient, _) in work.views():
        for w, d in zip(parameter.split(_CACHED), gradient.split(_CACHED), strict=True):
            if decay:
                d = torch.add(d, w, alpha=decay, out=scratch[: len(w)])
            squares[0][segment.number] += torch.dot(w, w).item() / segment.copies
            squares[1][segment.number] += torch.dot(d, d).item() / segment.copies
    sums.copy_(torch.tensor(squares, dtype=sums.dtype))


def update(work: Work, formula: Update) -> None:
    """Update this rank's segments as `Update` describes."""
    gains = formula.gains.tolist()
    for segment, (parameter, gradient, velocity) in work.views():
        gain = gains[segment.number]
        if formula.late_decay:
            parameter.mul_(1 - gain * formula.late_decay)
        torch._fused_sgd_(
            [parameter],
            [gradient],
            [velocity],
            momentum=formula.momentum,
            weight_decay=formula.decay,
            dampening=1 - gain,  # v = momentum v + (1 - dampening) (g + weight_decay w)
            lr=-formula.step,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
