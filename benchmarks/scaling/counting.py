"""Counts the collectives that really happen, whoever calls them: our own, DeepSpeed's, FSDP2's.

All of them pass torch's dispatcher as operators `c10d::...`, where the tensors can be weighed. What is noted is what traffic.py
predicts: kind and bytes of the whole tensor. A group of one rank sends nothing and is not counted.
"""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "broadcast_": "broadcast",
}


class Counting(TorchDispatchMode):
    """Within it, `calls` gathers (kind, bytes) -> number; other operators of c10d stand under their own names."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it will call operators on its local tensors
        namespace, _, name = str(func).partition(".")
        if namespace == "c10d" and dist.get_world_size() > 1:
            name = name.split(".")[0]
            self.calls[KINDS.get(name, name), _whole(args)] += 1
        return func(*args, **(kwargs or {}))


def _whole(args: tuple) -> int:
    """Bytes of the larger side, output or input: of a list of tensors, all of them."""
    sides = [[leaf for leaf in tree_leaves(arg) if isinstance(leaf, torch.Tensor)] for arg in args]
    return max((sum(t.numel() * t.element_size() for t in side) for side in sides), default=0)
