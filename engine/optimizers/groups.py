"""Who decays, who adapts and at which rate: decided by name and original shape, before any backend flattens a tensor."""

from typing import Any

import torch
from torch import nn

from crossbatch.engine.config import AdamWConfig, Config, LarsConfig
from crossbatch.engine.optimizers.lars import LARS


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Trainable parameters in up to four groups: matrices or vectors, of BatchFormer or of the rest.

    Each group carries `adapts` (LARS: weight decay and trust ratio; two or more dimensions), `weight_decay`, and `lr_scale`
    (relative to the schedule).
    """
    params = config.optimizer.params
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("batchformer."), parameter.ndim > 1), []).append(parameter)
    decays_1d = isinstance(params, AdamWConfig) and params.decay_1d
    return [
        {
            "params": parameters,
            "adapts": matrices,
            "weight_decay": params.weight_decay if matrices or decays_1d else 0.0,
            "lr_scale": config.crossbatch.batchformer.lr_scale if batchformer else 1.0,
        }
        for (batchformer, matrices), parameters in groups.items()
    ]


def build_optimizer(groups: list[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
    """The configured optimizer over `parameter_groups`; its learning rate is 0 until `set_learning_rate`."""
    params = config.optimizer.params
    if isinstance(params, LarsConfig):
        return LARS(groups, lr=0.0, momentum=params.momentum, trust_coefficient=params.trust_coefficient)
    return torch.optim.AdamW(groups, lr=0.0, betas=params.betas, eps=params.eps, foreach=True)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Sets the scheduled rate, times each group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
