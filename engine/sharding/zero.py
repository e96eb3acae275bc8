"""Shards with DeepSpeed ZeRO, stages 0-3, in fp32: autocast lowers the precision of the computation, never that of the state.

DeepSpeed sees one micro-batch a step. The momentum encoder lives inside the wrapped model, so stage 3 partitions it exactly
like the online one.
"""

import contextlib
import importlib
import logging
import math
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import compiler
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module
from pydantic import ValidationError
from torch import nn

from crossbatch import InputError
from crossbatch.engine.optimizers import LARS
from crossbatch.engine.optimizers.lars import original_shape
from crossbatch.engine.sharding.backend import (
    Backend,
    FlatSlice,
    LocalShards,
    ensured_state,
    set_step_count,
    state_keys,
)
from crossbatch.engine.sharding.zero_layout import ZeroLayout, lars_for_zero
from crossbatch.models import ShardableModel
from crossbatch.models.compiled import compiled_modules


class ZeroBackend(Backend):
    """Shards a model with DeepSpeed ZeRO.

    Args:
        model: on its device, equal on all ranks.
        make_optimizer: makes the optimizer of the trainable parameters of `model`.
        config: the configuration for DeepSpeed.
    """

    def __init__(
        self,
        model: ShardableModel,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        config: dict[str, Any],
    ):
        if next(model.parameters()).device.type == "cpu":
            # DeepSpeed would compile, for a minute, a shared-memory all-reduce that only inference calls.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.stage = config["zero_optimization"]["stage"]
        self._exchange: contextlib.ExitStack | None = None  # open while gradients add up; closing it sends them
        if self.stage == 3:
            for module in compiled_modules(model):
                set_z3_leaf_module(module, True)  # or DeepSpeed's hooks inside would break the graph
        if self.stage > 0:
            _import_muon_without_compiling()
        optimizer = make_optimizer(model)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        logging.getLogger("DeepSpeed").addFilter(_is_relevant)
        try:
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, dist_init_required=False
            )
        except ValidationError as error:
            if error.title != "CommsLoggerConfig":  # of comms_logger, the only section that it gets as it is
                raise
            wrong = error.errors()[0]
            raise InputError(
                f"comms_logger.{'.'.join(map(str, wrong['loc']))}: DeepSpeed says: {wrong['msg']}"
            ) from None
        self.model = model
        self._layout = ZeroLayout(self.engine, self._trainable().values())
        if self.stage > 0 and "offload_optimizer" not in config["zero_optimization"]:
            self._compute_norms_at_once()
        if isinstance(optimizer, LARS):
            lars_for_zero(self.engine)

    def __call__(self, *args, **kwargs) -> Any:
        return self.engine(*args, **kwargs) if self.model.training else self.model(*args, **kwargs)

    def backward(self, loss: torch.Tensor, scale: float, is_last: bool = True) -> None:
        if self.stage == 0:
            with contextlib.nullcontext() if is_last else self.engine.no_sync():
                self.engine.backward(loss * scale)
            return
        if scale != self.optimizer.loss_scale:
            self.optimizer.override_loss_scale(scale)
        if not is_last and self._exchange is None:
            self._exchange = contextlib.ExitStack()
            self._exchange.enter_context(self.engine.coalesce_grad_reduction())
        self.engine.backward(loss)
        if is_last and self._exchange is not None:
            self._exchange.close()
            self._exchange = None

    def step(self, scale: float) -> float:
        if self.stage == 0:  # DeepSpeed neither scales nor computes a norm there
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            total = nn.utils.get_total_norm(gradients)
            if isinstance(self.optimizer, LARS):
                self.optimizer.prepare()  # before the host waits
            norm = float(total) / scale
            if not math.isfinite(norm):
                self.optimizer.zero_grad()
                return norm
            if scale != 1:
                torch._foreach_mul_(gradients, 1 / scale)
            self.engine.step()
            return norm
        self.engine.step()  # divides the scale out, and skips the update itself
        self._layout.let_gathers_wait()
        norm = self.engine.get_global_grad_norm()
        assert norm is not None
        return float(norm)  # without waiting for the update: it lies in host memory, see `group_norms`

    def update_momentum(self, momentum: float) -> None:
        super().update_momentum(momentum)
        self._layout.let_gathers_wait()

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        return self._layout.stepping

    def local_parameter(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.ds_tensor if self.stage == 3 else parameter.data  # pyright: ignore[reportAttributeAccessIssue]

    def local_parameters(self) -> dict[str, LocalShards]:
        if self.stage < 3:
            return {name: LocalShards.whole(parameter) for name, parameter in self.model.named_parameters()}
        shards = {}
        for name, parameter in self.model.named_parameters():
            start, numel = self._layout.even_cut(parameter)
            slices = [FlatSlice(start, self.local_parameter(parameter).data.view(-1)[:numel])]
            shards[name] = LocalShards(original_shape(parameter), slices, self._layout.replicated)
        return shards

    def local_optimizer_state(self) -> dict[str, dict[str, LocalShards]]:
        return {name: self._state_shards(parameter) for name, parameter in self._trainable().items()}

    def sync_master_weights(self, updates: int) -> None:
        """Copy the parameters into the fp32 copies that stages 1-3 step on, too."""
        for parameter in self._trainable().values():
            for flat, flat_start, start, numel in self._layout.slices(parameter):
                source = self.local_parameter(parameter).view(-1)[0 if self.stage == 3 else start :]
                flat.data.view(-1)[flat_start:][:numel].copy_(source[:numel])
        set_step_count(self.torch_optimizer, updates)
        self._layout.let_gathers_wait()

    def _compute_norms_at_once(self) -> None:
        """Let DeepSpeed take its gradient norm from `group_norms`."""
        optimizer = self.optimizer

        def norms() -> list[torch.Tensor]:
            if self.stage == 3:
                return group_norms([*optimizer.averaged_gradients.values()], torch.float64, self._layout.all_reduce)
            groups = [
                # Padding stands between the gradients of parameters, or behind them.
                [g for g, _ in zip((g for g in group if not getattr(g, "_zero_padding", False)), held, strict=False)]
                for group, held in zip(
                    optimizer.averaged_gradients.values(), optimizer.params_in_partition, strict=True
                )
            ]
            return group_norms(groups, torch.float32, self._layout.all_reduce)

        if self.stage == 3:
            optimizer._get_norm_groups = norms
        else:
            optimizer.scaled_global_norm = lambda: torch.linalg.vector_norm(torch.stack(norms()))

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _state_shards(self, parameter: Any) -> dict[str, LocalShards]:
        optimizer = self.torch_optimizer
        slices: dict[str, list[FlatSlice]] = {key: [] for key in state_keys(optimizer)}
        for flat, flat_start, start, numel in self._layout.slices(parameter):
            state = ensured_state(optimizer, flat)
            for key in slices:
                slices[key].append(FlatSlice(start, state[key].view(-1)[flat_start:][:numel]))
        shape, replicated = original_shape(parameter), self._layout.replicated
        return {key: LocalShards(shape, found, replicated) for key, found in slices.items()}


def _import_muon_without_compiling() -> None:
    """Import DeepSpeed's Muon, which nobody uses here, without torch.compile; that would take every rank 2 s to import."""
    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    except ImportError:  # of a version without it
        pass
    finally:
        compiler.compile = compile_


def group_norms(
    groups: list[list[torch.Tensor]], dtype: torch.dtype, all_reduce: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """Return the norm of the gradients of each group over all ranks, in host memory.

    The bits are those of DeepSpeed's own loops (on a CPU), which cast every gradient to fp64 in a call of its own, send every
    group alone, and leave the norm on the GPU, where reading it again after the step would wait for update and all-gather.

    Args:
        groups: this rank's parts of the gradients of each group.
        dtype: in which the sum of squares of a group travels, fp32 in stages 1 and 2, fp64 in stage 3.
        all_reduce: returns the sum over ranks.
    """
    gradients = [gradient for group in groups for gradient in group]
    squares = torch.zeros(0, dtype=torch.float64)  # of a rank that holds padding only
    if gradients:
        squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square()
    sums = torch.stack([part.sum() for part in squares.split([len(group) for group in groups])])
    return [*all_reduce(sums.to(dtype)).sqrt().cpu()]


def _is_relevant(record: logging.LogRecord) -> bool:
    """Drop two warnings that do not apply: our LARS knows the cut, and the whole model owns no parameters of its own."""
    return not any(text in record.getMessage() for text in ("untested optimizer", "unknown inputs or outputs type"))
