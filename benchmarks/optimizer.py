"""One optimizer step on the parameters of ResNet-50 + BatchFormer, as bs4096.json trains them.

Cases: our LARS; the loop over tensors of the originals; torch.optim.SGD with momentum and foreach, which is what LARS would
cost without norms; a copy of as many bytes as LARS moves (28 per parameter: w and g read, then w, g and v read, w and v
written), the floor that memory sets.
"""

from collections.abc import Callable, Iterator

import torch

from benchmarks import recipe
from benchmarks.harness import Effort, Row, compare
from crossbatch.engine.optimizers import LARS
from crossbatch.engine.tasks.build import build_model, parameter_groups

_BYTES = 28


SMALL = ['crossbatch.model.backbone_args={"width": 8}', "crossbatch.model.mlp_dim=64"]


def run(effort: Effort) -> Iterator[Row]:
    overrides = effort.pick(SMALL, [], [])
    run = recipe.load("bs4096", overrides)
    with torch.device("meta"):
        groups = parameter_groups(build_model(run), run.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for group in groups:
        group["lr"] = 0.1
        group["params"] = [torch.nn.Parameter(torch.randn(p.shape, device=device) * 0.02) for p in group["params"]]
        for p in group["params"]:
            p.grad = torch.randn_like(p) * 1e-3
    count = sum(p.numel() for group in groups for p in group["params"])
    # A step must not change much, or hundreds of them end in infinities.
    cases: dict[str, Callable[[], None]] = {
        "LARS": LARS(groups, lr=0.1).step,
        "loop over tensors": lambda: _loop(groups, velocities),
        "SGD, foreach": torch.optim.SGD(
            [{"params": group["params"]} for group in groups], lr=1e-6, momentum=0.9, foreach=True
        ).step,
        "copy of as many bytes": lambda: _copy(*halves),
    }
    velocities = {p: torch.zeros_like(p) for group in groups for p in group["params"]}
    halves = torch.zeros(2, count * _BYTES // 8, device=device).unbind()
    settings = recipe.settings("bs4096", overrides, run, parameters=count)
    yield from compare(cases, "loop over tensors", settings, effort.pick(1, 3, 20))


@torch.no_grad()
def _loop(groups: list[dict], velocities: dict[torch.Tensor, torch.Tensor]) -> None:
    """MoCo v3's formula, tensor by tensor: some ten small operations for each."""
    one = torch.ones((), device=next(iter(velocities)).device)
    for group in groups:
        for p in group["params"]:
            d = p.grad
            if p.ndim > 1:
                d = d.add(p, alpha=group["weight_decay"])
                p_norm, d_norm = p.norm(), d.norm()
                q = torch.where(p_norm > 0, torch.where(d_norm > 0, 0.001 * p_norm / d_norm, one), one)
                d = d.mul(q)
            velocity = velocities[p]
            velocity.mul_(0.9).add_(d)
            p.add_(velocity, alpha=-1e-6)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)
