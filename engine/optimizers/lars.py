"""LARS (You, Gitman, Ginsburg 2017) that stays LARS however parameters are cut.

LARS scales the update of each parameter w with two or more dimensions (group key `adapts`) by a trust ratio q. With gradient g,
weight decay wd, trust coefficient tc, momentum m, learning rate lr and velocity v:

    moco-v3   d = g + wd w     q = tc ||w|| / ||d||                        v = m v + q d               w = w - lr v
    larc      d = g + wd w     q = tc ||w|| / (||g|| + wd ||w|| + eps)     v = m v + q d               w = w - lr v
    mlperf    d = g + wd w     q = tc ||w|| / (||g|| + wd ||w|| + eps)     v = m v + lr q d            w = w - v

q is 1 where a norm in it is 0 (`larc` then leaves the decay out, too). The others, biases and norms, have q = 1 and wd = 0.
Sources: `moco-v3` is what MoCo v3 released (Chen, Xie, He 2021). `larc` is NVIDIA apex's LARC around SGD; its `clip` takes
min(q / lr, 1) for q, so that lr is a ceiling. `mlperf` is the LARS of the MLPerf ResNet-50 reference (apex's FusedLARS), with
the learning rate inside the velocity; its `decay_after_momentum` takes d = g and subtracts lr q wd w from w beside v.

A shard knows only its part of ||w||. So the step makes two passes, one for sums of squares over what this rank holds and, after
one all-reduce of those of all parameters together, one for the update. What is held is a list of `Segment`s: a whole
parameter, the local part of a DTensor (FSDP2), or a run of DeepSpeed's flat partitions, which know nothing of parameters. The
passes are in lars_cpu.py and, as Triton kernels, in lars_cuda.py; nothing in a step waits for the GPU.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Variant = Literal["moco-v3", "larc", "mlperf"]


class Segment(NamedTuple):
    """Elements start:stop of a flattened tensor belong to parameter `number`; `copies` ranks hold these very elements."""

    number: int
    start: int
    stop: int
    copies: int = 1


@dataclass(frozen=True)
class Layout:
    """What the tensors that LARS steps on hold of which parameter. Elements outside of all segments are left alone."""

    segments: dict[Tensor, list[Segment]]
    count: int  # parameters, numbered from 0
    all_reduce: Callable[[Tensor], Tensor] | None  # sums over the ranks that hold the rest; None if there are none

    @staticmethod
    def of_parameters(parameters: Iterable[Tensor]) -> "Layout":
        """For parameters that are whole or DTensors: what a rank holds of each is one segment.

        Raises ValueError if they are sharded over several mesh dimensions, which would need several all-reduces.
        """
        parameters = list(parameters)
        cuts = {cut for parameter in parameters for cut in _cuts(parameter)}
        if len(cuts) > 1:
            raise ValueError(f"LARS: parameters are sharded over more than one mesh dimension: {cuts}; use one.")
        mesh, dim = next(iter(cuts), (None, 0))
        segments = {
            p: [Segment(number, 0, local(p).numel(), 1 if mesh is None or _cuts(p) else mesh.size(dim))]
            for number, p in enumerate(parameters)
        }
        if mesh is None:
            return Layout(segments, len(segments), None)

        def all_reduce(sums: Tensor) -> Tensor:
            dist.all_reduce(sums, group=mesh.get_group(dim))
            return sums

        return Layout(segments, len(segments), all_reduce)


class Work(NamedTuple):
    """One segment of a parameter: flat views of equal length."""

    number: int
    copies: int
    parameter: Tensor
    gradient: Tensor
    velocity: Tensor


class Update(NamedTuple):
    """The second half of all variants. With c = gains[number]:

    v = momentum v + c (g + decay w)
    w = w + step v - c late_decay w
    """

    momentum: float
    gains: Tensor  # [count]
    decay: float
    step: float
    late_decay: float


class LARS(torch.optim.Optimizer):
    """See the module.

    Args:
        params: parameters or groups; `adapts` (default: True) and `weight_decay` (default: 0) may differ between groups.
        lr: learning rate.
        variant, momentum, trust_coefficient, eps, clip, decay_after_momentum: as in the formulas; eps is part of `larc` and
            `mlperf`, clip of `larc`, decay_after_momentum of `mlperf`.

    State of a tensor: `mu`, the velocity, in the tensor's shape and placement. Set `layout` if the tensors are not parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        variant: Variant = "moco-v3",
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        clip: bool = False,
        decay_after_momentum: bool = False,
    ):
        if variant not in get_args(Variant):
            raise ValueError(f"LARS: variant {variant!r} is unknown; there are {', '.join(get_args(Variant))}.")
        if (clip and variant != "larc") or (decay_after_momentum and variant != "mlperf"):
            raise ValueError(f"LARS: clip is part of larc and decay_after_momentum of mlperf, not of {variant}.")
        defaults = {"lr": lr, "momentum": momentum, "trust_coefficient": trust_coefficient, "weight_decay": 0.0}
        super().__init__(params, {**defaults, "adapts": True})
        self.variant, self.eps, self.clip, self.decay_after_momentum = variant, eps, clip, decay_after_momentum
        self.layout: Layout | None = None

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every tensor that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.layout is None:
            self.layout = Layout.of_parameters(p for group in self.param_groups for p in group["params"])
        groups = [(group, list(self._work(group))) for group in self.param_groups]
        groups = [(group, work) for group, work in groups if group["params"]]
        if not groups:
            return loss
        device = local(groups[0][0]["params"][0]).device
        passes = _passes(device.type)
        sums = torch.zeros(2, self.layout.count, dtype=torch.float64, device=device)  # ||w||^2, and ||d||^2 or ||g||^2
        for group, work in groups:
            if group["adapts"]:
                passes.add_squares(work, group["weight_decay"] if self.variant == "moco-v3" else 0.0, sums)
        if self.layout.all_reduce is not None and any(group["adapts"] for group, _ in groups):
            sums = self.layout.all_reduce(sums)
        for group, work in groups:
            passes.update(work, self._formula(group, sums))
        return loss

    def _work(self, group: dict[str, Any]) -> Iterator[Work]:
        """What this rank holds of the group's parameters."""
        assert self.layout is not None
        for tensor in group["params"]:
            if tensor.grad is None:
                continue
            if tensor not in self.layout.segments:
                raise RuntimeError(f"LARS is to step on a tensor of shape {list(tensor.shape)} that its layout lacks.")
            state = self.state[tensor]
            if "mu" not in state:
                state["mu"] = torch.zeros_like(tensor)
            flats = _flat(local(tensor), local(tensor.grad), local(state["mu"]))
            for number, start, stop, copies in self.layout.segments[tensor]:
                yield Work(number, copies, *(flat[start:stop] for flat in flats))

    def _formula(self, group: dict[str, Any], sums: Tensor) -> Update:
        inside, step = (group["lr"], -1.0) if self.variant == "mlperf" else (1.0, -group["lr"])
        if not group["adapts"]:
            return Update(group["momentum"], torch.full_like(sums[0], inside), 0.0, step, 0.0)
        late = self.decay_after_momentum
        decay = group["weight_decay"]
        gains = self._trust_ratios(group, sums) * inside
        return Update(group["momentum"], gains, 0.0 if late else decay, step, decay if late else 0.0)

    def _trust_ratios(self, group: dict[str, Any], sums: Tensor) -> Tensor:
        """q of all parameters, [count]."""
        w_norm, d_norm = sums.sqrt()
        usable = (w_norm > 0) & (d_norm > 0)
        if self.variant != "moco-v3":
            d_norm = d_norm + group["weight_decay"] * w_norm + self.eps
        q = group["trust_coefficient"] * w_norm / d_norm
        if self.clip:
            q = (q / group["lr"]).clamp(max=1.0) if group["lr"] > 0 else torch.ones_like(q)
        if self.variant == "larc":
            # Without the decay: if w = 0 there is none; if g = 0 nothing is left of d, and q = 0 says the same.
            return torch.where(usable, q, (w_norm == 0).to(q.dtype))
        return torch.where(usable, q, 1.0)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor (sharing its memory), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _passes(device_type: str) -> Any:
    """The module with `add_squares` and `update`; importing Triton takes a second, so only where it is used."""
    return importlib.import_module(f"crossbatch.engine.optimizers.lars_{device_type}")


def _cuts(parameter: Tensor) -> list[tuple[Any, int]]:
    """The mesh dimensions over which `parameter` is sharded."""
    if not isinstance(parameter, DTensor):
        return []
    mesh = parameter.device_mesh
    return [(mesh, d) for d, p in enumerate(parameter.placements) if not p.is_replicate() and mesh.size(d) > 1]


def _flat(parameter: Tensor, gradient: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1-D, in the order in which the parameter lies in memory: also a channels_last weight is updated in place."""
    if not parameter.is_contiguous():
        order = sorted(range(parameter.ndim), key=parameter.stride, reverse=True)
        parameter, gradient, velocity = (t.permute(order) for t in (parameter, gradient, velocity))
    return parameter.view(-1), gradient.reshape(-1), velocity.view(-1)
