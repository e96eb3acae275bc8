"""Shards with FSDP2.

Stage 0 replicates (a shard dimension of one), stages 1 and 2 keep parameters gathered until the backward pass, and stage 3
reshards them after every forward pass. The online and the momentum encoder are wrapped in the same places, so their shards
are cut alike and the momentum update needs no communication.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from crossbatch.engine.optimizers.lars import LARS, local
from crossbatch.engine.sharding.backend import (
    Backend,
    FlatSlice,
    LocalShards,
    ensured_state,
    set_step_count,
    state_keys,
)
from crossbatch.models import ShardableModel


class FsdpBackend(Backend):
    """Shards a model with FSDP2 (`fully_shard`).

    Args:
        model: on its device, equal on all ranks.
        make_optimizer: makes the optimizer of the trainable parameters of `model`, once they are sharded.
        stage: 0 to 3, see the module's docstring.
        gradient_clipping: largest global gradient norm; 0 for none.
    """

    def __init__(
        self,
        model: ShardableModel,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        stage: int,
        gradient_clipping: float,
    ):
        # A pooled feature is a view; nobody writes into it.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self.model = model
        self._clip = gradient_clipping
        ranks = dist.get_world_size()
        self._sharded = stage > 0 and ranks > 1
        device_type = next(model.parameters()).device.type
        shape = (ranks, 1) if stage == 0 else (1, ranks)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
        mesh = mesh if stage == 0 else mesh["shard"]
        self._wrapped = [
            fully_shard(module, mesh=mesh, reshard_after_forward=stage == 3) for module in (*model.fsdp_units(), model)
        ]
        # FSDP2 would prefetch in the reverse order of all forward passes, and so gather units of the momentum encoder, which
        # has no backward pass.
        averages = {average for _, _, average in model.momentum_pairs()}
        units = zip(model.fsdp_units(), self._wrapped, strict=False)
        online = [wrapped for unit, wrapped in units if averages.isdisjoint(unit.parameters())]
        for before, unit in itertools.pairwise(online):
            unit.set_modules_to_backward_prefetch([before])
        self.optimizer = make_optimizer(model)

    def __call__(self, *args, **kwargs) -> Any:
        return self.model(*args, **kwargs)

    def backward(self, loss: torch.Tensor, scale: float, is_last: bool = True) -> None:
        chunked, root = self.model.chunked_module, self.model
        assert isinstance(chunked, FSDPModule) and isinstance(root, FSDPModule)
        chunked.set_requires_gradient_sync(is_last)
        root.set_is_last_backward(is_last)
        (loss * scale).backward()

    def step(self, scale: float) -> float:
        gradients = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
        square = torch.stack(torch._foreach_norm(gradients)).square().sum()
        if self._sharded:
            dist.all_reduce(square)  # one for all; the norm of a DTensor would take one per parameter
        if isinstance(self.optimizer, LARS):
            self.optimizer.prepare()  # before the host waits
        norm = math.sqrt(square.item()) / scale
        if math.isfinite(norm):
            factor = min(1.0, self._clip / (norm + 1e-6)) / scale if self._clip else 1 / scale
            if factor != 1:
                torch._foreach_mul_(gradients, factor)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def local_parameter(self, parameter: nn.Parameter) -> torch.Tensor:
        return local(parameter.detach())

    def local_parameters(self) -> dict[str, LocalShards]:
        self._reshard()
        return {name: _shards(parameter) for name, parameter in self.model.named_parameters()}

    def local_optimizer_state(self) -> dict[str, dict[str, LocalShards]]:
        self._reshard()
        states = {
            name: ensured_state(self.optimizer, p) for name, p in self.model.named_parameters() if p.requires_grad
        }
        keys = state_keys(self.optimizer)
        return {name: {key: _shards(state[key]) for key in keys} for name, state in states.items()}

    def sync_master_weights(self, updates: int) -> None:
        set_step_count(self.optimizer, updates)

    def _reshard(self) -> None:
        """Go back to shards, which the optimizer knows; stages 0-2 stay gathered after a forward pass without backward."""
        for module in self._wrapped:
            module.reshard()


def _shards(tensor: torch.Tensor) -> LocalShards:
    """Return this rank's shard, one run of the flattened tensor: rows are cut in runs of ceil(rows / ranks)."""
    if not isinstance(tensor, DTensor):
        return LocalShards.whole(tensor)
    placement = tensor.placements[-1]
    assert placement.is_shard(0), placement
    mesh_dim = tensor.device_mesh.ndim - 1
    ranks, rank = tensor.device_mesh.size(mesh_dim), tensor.device_mesh.get_local_rank(mesh_dim)
    rows_each = -(-tensor.shape[0] // ranks)
    start = min(rank * rows_each, tensor.shape[0]) * (tensor.numel() // tensor.shape[0])
    return LocalShards(tensor.shape, [FlatSlice(start, local(tensor.detach()).view(-1))], ranks == 1)
