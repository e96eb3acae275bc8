"""Measures one step of LARS on the parameters of ResNet-50 + BatchFormer beside the loop over tensors of the originals.

The parameters are those that bs4096.json trains. Cases: the loop; the same formula in torch's foreach calls; our LARS;
torch.optim.SGD with momentum and foreach, which is what LARS would cost without norms; torch.optim.AdamW, fused, which our ViT
recipes use; apex's LARC and FusedAdam where apex is installed; a copy of as many bytes as LARS moves (28 per parameter: w and g
read, then w, g and v read, w and v written), the floor that memory sets.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.measure import compare
from benchmarks.rows import Row
from benchmarks.stages import Effort, recipe
from benchmarks.stages.plain_step import PlainLars
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
    count = sum(p.numel() for group in groups for p in group["params"])
    source, target = torch.zeros(2, count * _BYTES // 8, device=cfg.device.type)

    def plain_groups() -> list[dict[str, Any]]:
        return [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]

    everything = [p for group in groups for p in group["params"]]
    cases: dict[str, Callable[[], object]] = {
        "loop over tensors": PlainLars(plain_groups(), LR, foreach=False).step,
        "LARS in foreach calls": PlainLars(plain_groups(), LR, foreach=True).step,
        "LARS": LARS(groups, lr=0.1).step,
        "SGD, foreach": torch.optim.SGD(everything, lr=LR, momentum=0.9, foreach=True).step,
        "AdamW, fused": torch.optim.AdamW(everything, lr=LR, fused=True).step,
        **_of_apex(everything),
        "copy of as many bytes": lambda: target.copy_(source),
    }
    optional = [name for name in cases if name.startswith("apex")]
    yield from compare(cases, {**settings, "parameters": count}, effort, optional=optional)


def _of_apex(parameters: list[torch.nn.Parameter]) -> dict[str, Callable[[], object]]:
    """Return what NVIDIA's apex has; PyPI's package of that name is another project, without these modules."""
    if not (importlib.util.find_spec("apex") and importlib.util.find_spec("apex.optimizers")):
        return {}
    from apex.optimizers import FusedAdam, FusedSGD  # pyright: ignore[reportMissingImports]
    from apex.parallel.LARC import LARC  # pyright: ignore[reportMissingImports]

    try:
        larc = LARC(FusedSGD(parameters, lr=LR, momentum=0.9), trust_coefficient=0.001, clip=False)
        return {"apex, LARC of FusedSGD": larc.step, "apex, FusedAdam": FusedAdam(parameters, lr=LR).step}
    except RuntimeError as error:  # installed without its kernels
        print(f"left out: apex: {error}")
        return {}
