"""DeepSpeed ZeRO, stages 0-3, in fp32: autocast lowers the precision of the computation, never of the state.

DeepSpeed sees one micro-batch a step; the momentum encoder lives inside the wrapped model, so stage 3 partitions it exactly
like the online one. Where DeepSpeed keeps which run of a parameter:

    stage 0     everything everywhere
    stage 1, 2  parameters everywhere; the optimizer steps on this rank's run of one flat fp32 copy per group
                (`parameter._hp_mapping` is the cut, None where this rank holds nothing of the parameter)
    stage 3     every parameter is cut evenly (`ds_tensor`), and the optimizer steps on flat concatenations of those cuts
                (`grad_position` gives sub-group and offset)

Which also tells LARS what lies where in what it is handed. With `offload_optimizer` the flat copies lie in host memory.
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from crossbatch.engine.config import Resolved
from crossbatch.engine.optimizers import LARS, Layout, Segment, build_optimizer, parameter_groups
from crossbatch.engine.optimizers.state import ensured_state, set_step_count, state_keys
from crossbatch.engine.sharding.backend import Backend, FlatSlice, LocalShards
from crossbatch.models import ShardableModel


class ZeroBackend(Backend):
    def __init__(self, model: ShardableModel, run: Resolved):
        if run.device.type == "cpu":
            # It would compile, for a minute, a shared-memory all-reduce that only inference calls.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.stage = run.config.zero_optimization.stage
        self._exchange: contextlib.ExitStack | None = None  # open while gradients add up; closing it sends them
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        optimizer = build_optimizer(parameter_groups(model, run.config), run.config)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        logging.getLogger("DeepSpeed").addFilter(_unexpected)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(run), dist_init_required=False
        )
        self.model = model
        self._check_cut()
        if isinstance(optimizer, LARS):
            optimizer.layout = self._lars_layout()

    def __call__(self, *args, **kwargs) -> Any:
        return self.engine(*args, **kwargs) if self.model.training else self.model(*args, **kwargs)

    def backward(self, loss: torch.Tensor, scale: float, more: bool = False) -> None:
        if self.stage == 0:
            with self.engine.no_sync() if more else contextlib.nullcontext():
                self.engine.backward(loss * scale)
            return
        if scale != self.optimizer.loss_scale:
            self.optimizer.override_loss_scale(scale)
        if more and self._exchange is None:
            self._exchange = contextlib.ExitStack()
            self._exchange.enter_context(self.engine.coalesce_grad_reduction())
        self.engine.backward(loss)
        if not more and self._exchange is not None:
            self._exchange.close()
            self._exchange = None

    def step(self, scale: float) -> float:
        if self.stage == 0:  # DeepSpeed neither scales nor computes a norm there
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = float(nn.utils.get_total_norm(gradients)) / scale
            if not math.isfinite(norm):
                self.optimizer.zero_grad()
                return norm
            if scale != 1:
                torch._foreach_mul_(gradients, 1 / scale)
            self.engine.step()
            return norm
        self.engine.step()  # takes the scale out, and skips the update itself
        norm = self.engine.get_global_grad_norm()
        assert norm is not None
        return float(norm)

    def local_parameter(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.ds_tensor if self.stage == 3 else parameter.data  # pyright: ignore[reportAttributeAccessIssue]

    def local_parameters(self) -> dict[str, LocalShards]:
        return {name: self._parameter_held(name, parameter) for name, parameter in self.model.named_parameters()}

    def local_optimizer_state(self) -> dict[str, dict[str, LocalShards]]:
        return {name: self._state_held(name, p) for name, p in self._trainable().items()}

    def sync_master_weights(self, updates: int) -> None:
        """The fp32 copies that stages 1-3 step on take over the parameters, too."""
        for parameter in self._trainable().values():
            for flat, flat_start, start, numel in self._cut(parameter):
                source = self.local_parameter(parameter).view(-1)
                flat.data.view(-1)[flat_start : flat_start + numel].copy_(
                    source[start if self.stage < 3 else 0 :][:numel]
                )
        set_step_count(self._stepping, updates)

    # --- where things are ------------------------------------------------------------------------------------------

    def _check_cut(self) -> None:
        """That we read DeepSpeed's tables rightly: over all ranks, every element is in exactly one run."""
        parameters = self._trainable().values()
        found = torch.tensor([float(sum(cut[3] for cut in self._cut(p))) for p in parameters], dtype=torch.float64)
        if self.stage > 0:
            found = self._all_reduce(found)
        if found.tolist() != [self._shapes[name].numel() for name in self._trainable()]:
            raise RuntimeError(
                f"DeepSpeed {deepspeed.__version__} cuts parameters in a way that crossbatch does not know."
            )

    def _lars_layout(self) -> Layout:
        segments: dict[torch.Tensor, list[Segment]] = {flat: [] for flat in self._flats()}
        trainable = self._trainable().values()
        for number, parameter in enumerate(trainable):
            for flat, flat_start, _, numel in self._cut(parameter):
                segments[flat].append(Segment(number, flat_start, flat_start + numel))
        alone = self.stage == 0 or dist.get_world_size() == 1
        return Layout(segments, len(trainable), None if alone else self._all_reduce)

    def _flats(self) -> list[torch.Tensor]:
        """The tensors that the optimizer steps on."""
        if self.stage == 0:
            return list(self._trainable().values())
        if self.stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups

    def _all_reduce(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums of what may lie in host memory, by whatever the ranks communicate with."""
        return self.model.collective.all_reduce(sums.to(self.engine.device)).to(sums.device)

    def _trainable(self) -> dict[str, Any]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def _stepping(self) -> torch.optim.Optimizer:
        """The torch optimizer inside DeepSpeed's."""
        return self.optimizer if self.stage == 0 else self.optimizer.optimizer

    def _parameter_held(self, name: str, parameter: Any) -> LocalShards:
        if self.stage < 3:
            return LocalShards.whole(parameter)
        start, numel = _even_cut(parameter)
        return LocalShards(
            self._shapes[name],
            [FlatSlice(start, parameter.ds_tensor.data.view(-1)[:numel])],
            dist.get_world_size() == 1,
        )

    def _state_held(self, name: str, parameter: Any) -> dict[str, LocalShards]:
        keys = state_keys(self._stepping)
        pieces: dict[str, list[FlatSlice]] = {key: [] for key in keys}
        for flat, flat_start, start, numel in self._cut(parameter):
            state = ensured_state(self._stepping, flat)
            for key in keys:
                pieces[key].append(FlatSlice(start, state[key].view(-1)[flat_start : flat_start + numel]))
        replicated = self.stage == 0 or dist.get_world_size() == 1
        return {key: LocalShards(self._shapes[name], pieces[key], replicated) for key in keys}

    def _cut(self, parameter: Any) -> Iterator[tuple[torch.Tensor, int, int, int]]:
        """(flat tensor the optimizer steps on, start in it, start in the parameter, elements) of this rank's part."""
        if self.stage == 0:
            yield parameter, 0, 0, parameter.numel()
        elif self.stage == 3:
            start, numel = _even_cut(parameter)
            group, flat_start, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            if numel:
                yield self.optimizer.fp32_partitioned_groups_flat[group], flat_start, start, numel
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            flat = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            address = mapping.hp_fragment_address
            yield flat, address.start, mapping.lp_fragment_address.start, address.numel


def _unexpected(record: logging.LogRecord) -> bool:
    """Drops two warnings: of an optimizer that has not read the cut, and of outputs of the whole model, which has no parameters
    outside of its parts.
    """
    return not any(text in record.getMessage() for text in ("untested optimizer", "unknown inputs or outputs type"))


def _even_cut(parameter: Any) -> tuple[int, int]:
    """Start and length of this rank's part of a stage-3 parameter; the last parts may be padded, the padding is not counted."""
    start = parameter.ds_tensor.ds_numel * dist.get_rank()
    return start, max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))


def deepspeed_config(run: Resolved) -> dict[str, Any]:
    """The dict that DeepSpeed sees: no "auto", no section of ours."""
    zero = {name: value for name, value in vars(run.config.zero_optimization).items() if value is not None}
    offload = vars(zero.pop("offload_optimizer"))
    if offload["device"] != "none":
        zero["offload_optimizer"] = offload
    if zero["stage"] == 3:
        # Parameters that stay gathered would miss the momentum update, which works on the shards.
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "train_batch_size": run.config.train_batch_size,
        "train_micro_batch_size_per_gpu": run.local_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": run.config.gradient_clipping,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # offloaded, ours steps on the CPU as it does anywhere
        "zero_allow_untested_optimizer": True,  # LARS, which has read the cut
    }
