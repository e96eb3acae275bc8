"""Parameter groups by name and original shape, made before any sharding backend flattens a tensor."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


def split_parameters(
    model: nn.Module, lr_scales: Mapping[str, float] | None = None, no_decay: Iterable[str] = ()
) -> dict[tuple[float, bool], list[nn.Parameter]]:
    """Split the trainable parameters by (learning rate scale, whether they are matrices).

    Args:
        model: not yet sharded, or sharded by FSDP2.
        lr_scales: learning rate scale by prefix of the parameter's name; the first prefix that fits counts, others have 1.
        no_decay: patterns as in `fnmatch` of names that count as biases whatever their shape, such as "*.pos_embed".
    """
    patterns = tuple(no_decay)
    split: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = next((scale for prefix, scale in (lr_scales or {}).items() if name.startswith(prefix)), 1.0)
            is_matrix = parameter.ndim > 1 and not any(fnmatchcase(name, pattern) for pattern in patterns)
            split.setdefault((scale, is_matrix), []).append(parameter)
    return split


def lars_param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    lr: float | None = None,
    lr_scales: Mapping[str, float] | None = None,
    no_decay: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Return parameter groups for `LARS` that are chosen by the parameters' names.

    `LARS(model.parameters(), ...)` needs no groups. People use them for a learning rate of its own for a part of the network
    (a pretrained backbone below a new head), and to exempt parameters that act as biases but have two or more dimensions
    (position embeddings, class tokens) from weight decay and trust ratio, as SimCLR's and BYOL's lists of names do.

    Args:
        model: not yet sharded, or sharded by FSDP2.
        weight_decay: of the parameters that adapt.
        lr: learning rate at scale 1; required with `lr_scales`. Schedulers of torch keep the ratios of the groups.
        lr_scales: learning rate scale by prefix of the parameter's name, for example {"backbone.": 0.1}.
        no_decay: patterns as in `fnmatch` of names that neither decay nor adapt, for example ["*pos_embed", "*cls_token"].

    Raises:
        ValueError: if `lr` is missing, or if a prefix or a pattern fits no trainable parameter.
    """
    if lr_scales and lr is None:
        raise ValueError("lars_param_groups: lr_scales is given but lr is not; give the learning rate at scale 1 as lr")
    no_decay = list(no_decay)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    unused = [prefix for prefix in lr_scales or {} if not any(name.startswith(prefix) for name in names)]
    unused += [pattern for pattern in no_decay if not any(fnmatchcase(name, pattern) for name in names)]
    if unused:
        raise ValueError(
            f"lars_param_groups: {unused[0]!r} fits no trainable parameter; the first names are {names[:3]}"
        )
    groups = []
    for (scale, is_matrix), parameters in split_parameters(model, lr_scales, no_decay).items():
        group = {"params": parameters, "adapts": is_matrix, "weight_decay": weight_decay if is_matrix else 0.0}
        groups.append(group if lr is None else {**group, "lr": lr * scale})
    return groups


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the scheduled rate, times each group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
