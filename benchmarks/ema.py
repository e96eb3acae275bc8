"""The momentum update of ResNet-50 + BatchFormer, as bs4096.json makes it after every step.

Cases: what the backend does, one foreach call over all parameters; the loop over parameters of the originals; a copy of as many
bytes (12 per parameter: average and online read, average written), the floor that memory sets.
"""

from collections.abc import Callable, Iterator

import torch

from benchmarks import recipe
from benchmarks.harness import Effort, Row, compare
from crossbatch.engine.runtime.distributed import process_group, world_from_environment
from crossbatch.engine.sharding import Backend

SMALL = ['crossbatch.model.backbone_args={"width": 8}', "crossbatch.model.mlp_dim=64"]
MOMENTUM = 0.99
_BYTES = 12


def run(effort: Effort) -> Iterator[Row]:
    overrides = effort.pick(SMALL, [], [])
    run = recipe.load("bs4096", overrides)
    with process_group(world_from_environment(), run.device.type, threads=torch.get_num_threads()) as device:
        backend = recipe.build(run, device)
        count = sum(average.numel() for _, average in _pairs(backend))
        source, target = torch.zeros(2, count * _BYTES // 8, device=device)
        cases: dict[str, Callable[[], object]] = {
            "ours, foreach": lambda: backend.update_momentum(MOMENTUM),
            "loop over parameters": lambda: _loop(backend),
            "copy of as many bytes": lambda: target.copy_(source),
        }
        settings = recipe.settings("bs4096", overrides, run, parameters=count)
        yield from compare(cases, "loop over parameters", settings, effort.pick(1, 2, 15))


def _pairs(backend: Backend) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Online and average memory of what is updated."""
    pairs = [(online, average) for _, online, average in backend.model.momentum_pairs() if online.requires_grad]
    return [(backend.local_parameter(online), backend.local_parameter(average)) for online, average in pairs]


@torch.no_grad()
def _loop(backend: Backend) -> None:
    """One parameter after the other, in a new tensor each."""
    for online, average in _pairs(backend):
        average.copy_(average * MOMENTUM + online * (1 - MOMENTUM))
