"""Who decays, who adapts and at which rate: decided by name and original shape, before any backend flattens a tensor."""

from typing import Any

import torch
from torch import nn

from crossbatch.engine.config import AdamWConfig, Config, FinetuneConfig, LarsConfig
from crossbatch.engine.optimizers.lars import LARS

# Of a ViT, added to every image alike as biases are, whatever their shape.
POSITIONS = ("cls_token", "pos_embed")


def parameter_groups(model: nn.Module, config: Config | FinetuneConfig) -> list[dict[str, Any]]:
    """Trainable parameters in up to four groups: decayed or not, at BatchFormer's rate or that of the rest.

    Each group carries `adapts` (LARS: weight decay and trust ratio; two or more dimensions), `weight_decay`, and `lr_scale`
    (relative to the schedule). DeepSpeed steps group by group, so a BatchFormer at its own rate costs LARS one more all-reduce.
    """
    params = config.optimizer.params
    is_adamw = isinstance(params, AdamWConfig)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scales = config.crossbatch.lr_scales
            lr_scale = next((scale for prefix, scale in scales.items() if name.startswith(prefix)), 1.0)
            is_matrix = parameter.ndim > 1 and not (is_adamw and name.endswith(POSITIONS))
            groups.setdefault((lr_scale, is_matrix), []).append(parameter)
    decays_1d = is_adamw and params.decay_1d
    return [
        {
            "params": parameters,
            "adapts": matrices,
            "weight_decay": params.weight_decay if matrices or decays_1d else 0.0,
            "lr_scale": lr_scale,
        }
        for (lr_scale, matrices), parameters in groups.items()
    ]


def build_optimizer(groups: list[dict[str, Any]], config: Config | FinetuneConfig) -> torch.optim.Optimizer:
    """The configured optimizer over `parameter_groups`; its learning rate is 0 until `set_learning_rate`."""
    params = config.optimizer.params
    if isinstance(params, LarsConfig):
        return LARS(
            groups,
            lr=0.0,
            variant=params.variant,
            momentum=params.momentum,
            trust_coefficient=params.trust_coefficient,
            eps=params.eps,
            clip=params.clip_trust_ratio,
            decay_after_momentum=params.decay_after_momentum,
        )
    return torch.optim.AdamW(groups, lr=0.0, betas=params.betas, eps=params.eps, fused=True)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Sets the scheduled rate, times each group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
