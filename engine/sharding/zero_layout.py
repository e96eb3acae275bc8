"""Finds where the elements of each parameter lie in the tensors that the optimizer of a DeepSpeed engine steps on.

    stage 0     everything everywhere
    stage 1, 2  parameters everywhere; the optimizer steps on this rank's run of one flat fp32 copy per group
                (`parameter._hp_mapping` is the cut, None where this rank holds nothing of the parameter)
    stage 3     every parameter is cut evenly (`ds_tensor`), and the optimizer steps on flat concatenations of those cuts
                (`grad_position` gives sub-group and offset)

With bf16 or fp16, the flat copies are still in fp32, cut alike. With `offload_optimizer` they lie in host memory. These tables
are DeepSpeed's own and may change, so `ZeroLayout` checks over all ranks that it reads them rightly.
"""

import contextlib
import importlib
import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from crossbatch.engine.optimizers.lars import LARS, Layout, Segment, original_shape

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class ZeroSlice(NamedTuple):
    """Locates elements of a parameter on this rank: flat[flat_start:][:numel] is parameter.flatten()[start:][:numel]."""

    flat: Tensor  # what the optimizer steps on
    flat_start: int
    start: int
    numel: int


class ZeroLayout:
    """Says where the elements of the trained parameters lie in what the engine's optimizer steps on.

    Args:
        engine: what `deepspeed.initialize` returned.
        parameters: those of its model that are trained, in the same order on all ranks. Every rank must call this.

    Attributes:
        stage: the ZeRO stage.
        stepping: the torch optimizer inside DeepSpeed's.
        replicated: whether this rank holds all elements of all parameters.

    Raises:
        RuntimeError: if DeepSpeed keeps the parameters in a way that is not known here.
    """

    def __init__(self, engine: Any, parameters: Iterable[Tensor]):
        self.stage = int(engine.zero_optimization_stage())
        self._device, self._optimizer = engine.device, engine.optimizer
        self.stepping = self._optimizer if self.stage == 0 else self._optimizer.optimizer
        self._group = getattr(self._optimizer, "dp_process_group", None)
        self.replicated = self.stage == 0 or dist.get_world_size(self._group) == 1
        _refuse_unknown_engine(engine, self)
        self._gathers = self._gather_stream()
        self._check_tables(list(parameters))

    def flats(self) -> list[Tensor]:
        """Return the flat tensors of stages 1 to 3 that the optimizer steps on."""
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        for name in names:
            if hasattr(self._optimizer, name):
                return getattr(self._optimizer, name)
        raise AttributeError(f"{type(self._optimizer).__name__} has none of {names}")

    def slices(self, parameter: Any) -> Iterator[ZeroSlice]:
        """Yield what this rank's optimizer steps on of a trained parameter, which is one run at most."""
        if self.stage == 0:
            yield ZeroSlice(parameter, 0, 0, parameter.numel())
        elif self.stage == 3:
            start, numel = self.even_cut(parameter)
            group, flat_start, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            if numel:
                yield ZeroSlice(self.flats()[group], flat_start, start, numel)
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            address = mapping.hp_fragment_address
            yield ZeroSlice(
                self.flats()[mapping.param_group_index],
                address.start,
                mapping.lp_fragment_address.start,
                address.numel,
            )

    def even_cut(self, parameter: Any) -> tuple[int, int]:
        """Return start and length of this rank's part of a stage-3 parameter, without the padding of the last parts."""
        start = parameter.ds_tensor.ds_numel * dist.get_rank(self._group)
        return start, max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))

    def all_reduce(self, sums: Tensor) -> Tensor:
        """Return the sum over all ranks of a tensor that may lie in host memory."""
        if dist.get_world_size(self._group) == 1:
            return sums
        total = sums.to(self._device)
        dist.all_reduce(total, group=self._group)
        return total.to(sums.device)

    def let_gathers_wait(self) -> None:
        """Let DeepSpeed's next gathers of parameters wait for what this stream has written into the shards of stage 3.

        DeepSpeed gathers on a stream of its own, which waits for nobody; its own steps are safe only because it gathers small
        parameters behind them, in a call that waits for the whole GPU, and we leave no parameters gathered.
        """
        if self._gathers is not None:
            self._gathers.wait_stream(torch.cuda.current_stream())

    def _gather_stream(self) -> Any:
        """Return the stream on which DeepSpeed gathers parameters; None below stage 3 and on a CPU."""
        if self.stage < 3:
            return None
        try:
            return (
                self._optimizer.parameter_offload.param_coordinator._PartitionedParameterCoordinator__allgather_stream
            )
        except AttributeError:
            raise RuntimeError(
                f"DeepSpeed {_version()} gathers parameters on a stream that crossbatch does not know; use another version of "
                f"it, zero_optimization.stage 0 to 2, or FSDP2"
            ) from None

    def lars_layout(self, adapts: dict[Tensor, bool]) -> Layout | None:
        """Return the layout for a LARS that was given the parameters in `adapts`; None where it steps on those themselves."""
        if self.stage == 0:
            return None
        flats = self.flats()
        segments: dict[Tensor, list[Segment]] = {flat: [] for flat in flats}
        for number, parameter in enumerate(adapts):
            for flat, flat_start, _, numel in self.slices(parameter):
                segments[flat].append(Segment(number, flat_start, flat_start + numel))
        does = list(adapts.values())
        here = [float(any(does[segment.number] for segment in segments[flat])) for flat in flats]
        anywhere = self.all_reduce(torch.tensor(here, dtype=torch.float64)).tolist()
        needs_norms = frozenset(flat for flat, ranks in zip(flats, anywhere, strict=True) if ranks)
        return Layout(segments, does, needs_norms, None if self.replicated else self.all_reduce)

    def _check_tables(self, parameters: list[Tensor]) -> None:
        """Check that we read DeepSpeed's tables rightly: over all ranks, every element is in exactly one run."""
        want = [float(original_shape(parameter).numel()) for parameter in parameters]
        found = torch.full((len(want),), float("nan"), dtype=torch.float64)  # the sum tells the other ranks
        with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError):
            runs = [list(self.slices(parameter)) for parameter in parameters]
            if all(run.flat_start + run.numel <= run.flat.numel() for run in itertools.chain(*runs)):
                found = torch.tensor([sum(run.numel for run in of_one) for of_one in runs], dtype=torch.float64)
        if (found if self.stage == 0 else self.all_reduce(found)).tolist() != want:
            raise RuntimeError(
                f"DeepSpeed {_version()} cuts parameters in a way that crossbatch does not know; use another version of it, "
                f"zero_optimization.stage 0, or FSDP2"
            )


def lars_for_zero(engine: "DeepSpeedEngine") -> "DeepSpeedEngine":
    """Tell the LARS inside a DeepSpeed engine which parameters its flat partitions hold, and return the engine.

    ```
    optimizer = LARS(model.parameters(), lr=0.1, weight_decay=1e-6)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    lars_for_zero(engine)
    ```
    Every rank must call this once; calling it again changes nothing. It covers ZeRO stages 0 to 3 in fp32, stages 1 to 3 in
    bf16 and fp16 (where DeepSpeed keeps fp32 copies), and `offload_optimizer` to "cpu". DeepSpeed's
    config needs `"zero_allow_untested_optimizer": true` and, with `offload_optimizer`, `"zero_force_ds_cpu_optimizer": false`.

    Args:
        engine: the first value that `deepspeed.initialize` returned, after it was given the LARS as `optimizer`.

    Returns:
        The same engine, changed in place.

    Raises:
        TypeError: if `engine` is something else, for example the model.
        ValueError: if the engine's optimizer is not a `crossbatch.LARS`.
        RuntimeError: if the engine uses what is not supported (model parallelism, mixture of experts, offload to NVMe, ZenFlow,
            16 bits at stage 0), or if this version of DeepSpeed stores parameters in an unknown way.
    """
    if not hasattr(engine, "zero_optimization_stage"):
        raise TypeError(
            f"lars_for_zero: engine is a {type(engine).__name__}; allowed: the first value of deepspeed.initialize, "
            f"as in `engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)`"
        )
    optimizer: Any = engine.optimizer
    lars = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(lars, LARS):
        raise ValueError(
            f"lars_for_zero: the engine's optimizer is {type(lars).__name__}; give a crossbatch.LARS to deepspeed.initialize"
        )
    # DeepSpeed leaves out frozen and empty parameters.
    trained = {p: does for p, does in lars.adapts.items() if p.requires_grad and original_shape(p).numel()}
    lars.layout = ZeroLayout(engine, trained).lars_layout(trained)
    return engine


def _refuse_unknown_engine(engine: Any, layout: ZeroLayout) -> None:
    if layout.stage > 0:
        reasons = {
            "model parallelism: each rank holds a part of every tensor": getattr(engine, "mp_world_size", 1) > 1,
            "mixture-of-experts layers: ranks hold different parameters": getattr(engine, "has_moe_layers", False),
            "offload_optimizer to NVMe; use cpu": getattr(layout._optimizer, "swap_optimizer", False),
            "ZenFlow: it steps with its own optimizer": bool(getattr(engine, "zenflow", False)),
        }
    else:
        reasons = {"fp16 or bf16 at stage 0; use stage 1": not isinstance(layout.stepping, torch.optim.Optimizer)}
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise RuntimeError(f"DeepSpeed {_version()}: crossbatch does not support {found[0]}")


def _version() -> str:
    return importlib.import_module("deepspeed").__version__
