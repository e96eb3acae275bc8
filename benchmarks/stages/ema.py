"""Measures the momentum update of ResNet-50 + BatchFormer beside the loop over parameters, which the originals use.

bs4096.json makes it after every step. Cases: the loop; torch's foreach call by hand; what the backend does, one foreach call
over all parameters; a copy of as many bytes (12 per parameter: average and online read, average written), the floor that memory
sets.
"""

from collections.abc import Iterator

import torch

from benchmarks.measure import compare
from benchmarks.rows import Row
from benchmarks.stages import Effort, recipe
from benchmarks.stages.plain_step import plain_moving_average

MOMENTUM = 0.99
_BYTES = 12


def run(effort: Effort) -> Iterator[Row]:
    """Yield a row for each way to update."""
    cfg, settings = recipe.load_main(effort)
    with recipe.one_rank() as device:
        backend = recipe.build(cfg, device)
        pairs = [
            (backend.local_parameter(online), backend.local_parameter(average))
            for _, online, average in backend.model.momentum_pairs()
            if online.requires_grad
        ]
        count = sum(average.numel() for _, average in pairs)
        source, target = torch.zeros(2, count * _BYTES // 8, device=device)
        cases = {
            "loop over parameters": lambda: plain_moving_average(pairs, MOMENTUM),
            "foreach by hand": lambda: plain_moving_average(pairs, MOMENTUM, foreach=True),
            "ours, foreach": lambda: backend.update_momentum(MOMENTUM),
            "copy of as many bytes": lambda: target.copy_(source),
        }
        yield from compare(cases, {**settings, "parameters": count}, effort)
