"""Measures one step of LARS on the parameters of ResNet-50 + BatchFormer beside the loop over tensors of the originals.

The parameters are those that bs4096.json trains. Cases: our LARS; the loop; torch.optim.SGD with momentum and foreach, which is
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
SMALL = ['crossbatch.model.backbone_args={"width": 8}', "crossbatch.model.mlp_dim=64"]


def run(effort: Effort) -> Iterator[Row]:
    """Yield a row for each optimizer, and for the copy."""
    overrides = effort.pick(SMALL, [], [])
    cfg = recipe.load("bs4096", overrides)
    with torch.device("meta"):
        groups = parameter_groups(build_model(cfg), cfg.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for group in groups:
        group["lr"] = 0.1
        group["params"] = [torch.nn.Parameter(torch.randn(p.shape, device=device) * 0.02) for p in group["params"]]
        for p in group["params"]:
            p.grad = torch.randn_like(p) * 1e-3
    count = sum(p.numel() for group in groups for p in group["params"])
    cases = {
        "LARS": LARS(groups, lr=0.1).step,
        "loop over tensors": lambda: _loop(groups, velocities),
        "SGD, foreach": torch.optim.SGD(
            [{"params": group["params"]} for group in groups], lr=LR, momentum=0.9, foreach=True
        ).step,
        "copy of as many bytes": lambda: target.copy_(source),
    }
    velocities = {p: torch.zeros_like(p) for group in groups for p in group["params"]}
    source, target = torch.zeros(2, count * _BYTES // 8, device=device)
    settings = recipe.settings("bs4096", overrides, cfg, parameters=count)
    yield from compare(cases, "loop over tensors", settings, effort.pick(1, 3, 20))


def _loop(groups: list[dict], velocities: dict[torch.Tensor, torch.Tensor]) -> None:
    """Step tensor by tensor: some ten small operations for each."""
    for group in groups:
        for p in group["params"]:
            plain_lars(p, velocities[p], LR, group["weight_decay"])
