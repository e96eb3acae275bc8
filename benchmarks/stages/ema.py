"""Measures the momentum update of ResNet-50 + BatchFormer beside the loop over parameters, which the originals use.

bs4096.json makes it after every step. Cases: what the backend does, one foreach call over all parameters; the loop; a copy of
as many bytes (12 per parameter: average and online read, average written), the floor that memory sets.
"""

from collections.abc import Iterator

import torch

from benchmarks.measure import compare
from benchmarks.rows import Row
from benchmarks.stages import Effort, recipe
from crossbatch.engine.runtime.distributed import process_group, world_from_environment
from crossbatch.engine.sharding import Backend

SMALL = ['crossbatch.model.backbone_args={"width": 8}', "crossbatch.model.mlp_dim=64"]
MOMENTUM = 0.99
_BYTES = 12


def run(effort: Effort) -> Iterator[Row]:
    """Yield a row for each way to update."""
    overrides = effort.pick(SMALL, [], [])
    cfg = recipe.load("bs4096", overrides)
    with process_group(world_from_environment(), cfg.device.type, threads=torch.get_num_threads()) as device:
        backend = recipe.build(cfg, device)
        count = sum(average.numel() for _, average in _pairs(backend))
        source, target = torch.zeros(2, count * _BYTES // 8, device=device)
        cases = {
            "ours, foreach": lambda: backend.update_momentum(MOMENTUM),
            "loop over parameters": lambda: _loop(backend),
            "copy of as many bytes": lambda: target.copy_(source),
        }
        settings = recipe.settings("bs4096", overrides, cfg, parameters=count)
        yield from compare(cases, "loop over parameters", settings, effort.pick(1, 2, 15))


def _pairs(backend: Backend) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the online and the average tensors of what is updated."""
    pairs = [(online, average) for _, online, average in backend.model.momentum_pairs() if online.requires_grad]
    return [(backend.local_parameter(online), backend.local_parameter(average)) for online, average in pairs]


@torch.no_grad()
def _loop(backend: Backend) -> None:
    """Update one parameter after the other, through a new tensor each."""
    for online, average in _pairs(backend):
        average.copy_(average * MOMENTUM + online * (1 - MOMENTUM))
