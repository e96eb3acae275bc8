"""One optimizer step on the parameters of ResNet-50 + BatchFormer, as bs4096.json trains them.

Cases: our LARS; the loop over tensors of the originals; torch.optim.SGD with momentum and foreach, which is what LARS would
cost without norms; a copy of as many bytes as LARS moves (28 per parameter: w and g read, then w, g and v read, w and v
written), the floor that memory sets.
"""

from collections.abc import Callable

import torch

from benchmarks.harness import Row, compare
from crossbatch.engine.build import build_model
from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.engine.optimizers import LARS, parameter_groups

_BYTES = 28


def run(quick: bool) -> list[Row]:
    overrides = ['crossbatch.model.backbone_args={"width": 8}', "crossbatch.model.mlp_dim=64"] if quick else []
    config = load_config("ds_configs/bs4096.json", overrides)
    with torch.device("meta"):
        groups = parameter_groups(build_model(resolve(config, 16, Device("cpu"))), config)
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
    settings = {"recipe": "bs4096", "overrides": overrides, "parameters": count, "device": device.type}
    return compare(cases, "loop over tensors", settings, 1 if quick else 20)


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
