"""Makes parameter groups by name and original shape, before any sharding backend flattens a tensor."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn


def split_parameters(
    model: nn.Module, lr_scales: Mapping[str, float] | None = None, no_decay: Iterable[str] = ()
) -> dict[tuple[float, bool], list[nn.Parameter]]:
    """Split the trainable parameters by (learning rate scale, whether they are matrices); see `lars_param_groups`."""
    scales, patterns = lr_scales or {}, tuple(no_decay)
    split: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefix = _longest_prefix(name, scales)
            is_matrix = parameter.ndim > 1 and not any(fnmatchcase(name, pattern) for pattern in patterns)
            split.setdefault((1.0 if prefix is None else scales[prefix], is_matrix), []).append(parameter)
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

    `LARS(model.parameters(), ...)` needs no groups. People use them to give a part of the network a learning rate of its own
    (a pretrained backbone below a new head), and to exempt parameters that act as biases but have two or more dimensions
    (position embeddings, class tokens) from weight decay and trust ratio, as SimCLR's and BYOL's lists of names do.

    Args:
        model: not yet sharded, or sharded by FSDP2.
        weight_decay: of the parameters that adapt.
        lr: learning rate at scale 1; required with `lr_scales`. Schedulers of torch keep the ratios of the groups.
        lr_scales: learning rate scale by the name of a module or parameter, for example {"backbone": 0.1, "backbone.4": 0.3}.
            The longest name that fits decides, and whole names are compared: "1" fits "1.weight" and not "10.weight". A dot
            at the end changes nothing.
        no_decay: patterns as in `fnmatch` of names that neither decay nor adapt, for example ["*pos_embed", "*cls_token"].

    Raises:
        ValueError: if `lr` is missing, or if a name or a pattern has no effect on any trainable parameter.
    """
    if lr_scales and lr is None:
        raise ValueError("lars_param_groups: lr_scales is given but lr is not; give the learning rate at scale 1 as lr")
    scales, no_decay = lr_scales or {}, list(no_decay)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    deciding = {_longest_prefix(name, scales) for name in names}
    unused = [prefix for prefix in scales if prefix not in deciding]
    unused += [pattern for pattern in no_decay if not any(fnmatchcase(name, pattern) for name in names)]
    if unused:
        raise ValueError(
            f"lars_param_groups: {unused[0]!r} has no effect: it fits no trainable parameter, or a longer name fits each of "
            f"them, too; remove it, or give a name like {', '.join(names[:3])}"
        )
    groups = []
    for (scale, is_matrix), parameters in split_parameters(model, scales, no_decay).items():
        group = {"params": parameters, "adapts": is_matrix, "weight_decay": weight_decay if is_matrix else 0.0}
        groups.append(group if lr is None else {**group, "lr": lr * scale})
    return groups


def _longest_prefix(name: str, prefixes: Iterable[str]) -> str | None:
    """Return the longest prefix that consists of whole parts of the dotted `name`, or None if none fits."""
    fitting = [prefix for prefix in prefixes if f"{name}.".startswith(prefix.removesuffix(".") + ".")]
    return max(fitting, key=len, default=None)


def set_learning_rate(optimizer: Any, lr: float, updates_since_thaw: int = 0) -> None:
    """Set the learning rate of every group to `lr` times its `lr_scale`.

    `updates_since_thaw` counts the optimizer steps since the groups of `freeze_at_first` are trained; below 0 they are not yet.
    """
    for group in optimizer.param_groups:
        group["lr"], group["updates_since_thaw"] = lr * group["lr_scale"], updates_since_thaw


def freeze_at_first(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Let each step leave out the groups called `name` until `set_learning_rate` says that they are trained.

    Until then nothing of them changes, neither parameters nor state. A learning rate or gradients of 0 would not do: weight
    decay would still enter the velocity. AdamW's bias correction counts from their own first step.
    """
    counted: set[torch.Tensor] = set()

    def before_step(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            if group["name"] == name and group["updates_since_thaw"] < 0:
                group["frozen"], group["params"] = group["params"], []
            for tensor in set(group["params"]) - counted if group["name"] == name else ():
                if "step" in optimizer.state.get(tensor, {}):  # a resumed run has counted from the start of the run
                    optimizer.state[tensor]["step"].fill_(group["updates_since_thaw"])
                    counted.add(tensor)

    def after_step(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["params"] = group.pop("frozen", group["params"])

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)
