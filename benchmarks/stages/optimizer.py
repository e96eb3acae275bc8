"""Measures one step of LARS on the parameters of ResNet-50 + BatchFormer beside the loop over tensors of the originals.

The parameters are those that bs4096.json trains. Cases: the loop; our LARS; torch.optim.SGD with momentum and foreach, which is
what LARS would cost without norms; a copy of as many bytes as LARS moves (28 per parameter: w and g read, then w, g and v read,
w and v written), the floor that memory sets.
"""

from collections.abc import Iterator

import torch

from benchmarks.measure import compare
from benchmarks.rows import Row
from benchmarks.stages import Effort, recipe
from benchmarks.stages.plain_step import plain_lars
from crossbatch.engine.optimizers import LARS
from crossbatch.engine.tasks.build import build_model, parameter_groups

_BYTES = 28
LR = 1e-6  # of what does not adapt: a step must not change much, or hundreds of them end in infinities


def run(effort: Effort) -> Iterator[Row]:
    """Yield a row for each optimizer, and for the copy."""
    cfg, settings = recipe.load_main(effort)
    with torch.device("meta"):
        groups = parameter_groups(build_model(cfg), cfg.config)
    for group in groups:
        group["lr"] = 0.1
        shapes = [p.shape for p in group["params"]]
        group["params"] = [torch.nn.Parameter(0.02 * torch.randn(shape, device=cfg.device.type)) for shape in shapes]
        for p in group["params"]:
            p.grad = torch.randn_like(p) * 1e-3
    velocities = {p: torch.zeros_like(p) for group in groups for p in group["params"]}
    count = sum(p.numel() for p in velocities)
    source, target = torch.zeros(2, count * _BYTES // 8, device=cfg.device.type)
    plain_groups = [{"params": group["params"]} for group in groups]
    cases = {
        "loop over tensors": lambda: _loop(groups, velocities),
        "LARS": LARS(groups, lr=0.1).step,
        "SGD, foreach": torch.optim.SGD(plain_groups, lr=LR, momentum=0.9, foreach=True).step,
        "copy of as many bytes": lambda: target.copy_(source),
    }
    yield from compare(cases, {**settings, "parameters": count}, effort)


def _loop(groups: list[dict], velocities: dict[torch.Tensor, torch.Tensor]) -> None:
    """Step tensor by tensor: some ten small operations for each."""
    for group in groups:
        for p in group["params"]:
            plain_lars(p, velocities[p], LR, group["weight_decay"])
