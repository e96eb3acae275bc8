"""LARS (You, Gitman, Ginsburg 2017) gives every layer its own learning rate; here it is exact under every kind of sharding.

It multiplies the update of each parameter w with two or more dimensions by a trust ratio q. With gradient g, weight decay
wd, trust coefficient tc, momentum m, learning rate lr and velocity v:

    moco-v3   d = g + wd w     q = tc ||w|| / ||d||                        v = m v + q d               w = w - lr v
    larc      d = g + wd w     q = tc ||w|| / (||g|| + wd ||w|| + eps)     v = m v + q d               w = w - lr v
    mlperf    d = g + wd w     q = tc ||w|| / (||g|| + wd ||w|| + eps)     v = m v + lr q d            w = w - v

q is 1 where one of its norms is 0 (`larc` then leaves out the decay, too). All other parameters, that is biases and norms,
have q = 1 and wd = 0.

Sources: `moco-v3` is the formula of MoCo v3's released code (Chen, Xie, He 2021). `larc` is NVIDIA apex's LARC around SGD;
its `clip_trust_ratio` replaces q by min(q / lr, 1), so that lr is a ceiling. `mlperf` is the LARS of the MLPerf ResNet-50
reference (apex's FusedLARS), with the learning rate inside the velocity; its `decay_after_momentum` takes d = g and
subtracts lr q wd w from w beside v.

A rank that holds only a part of w knows only a part of ||w||. So a step makes two passes: one sums squares over what this
rank holds, and the other updates it after one all-reduce of the sums of all parameters. What a rank holds is a list of
`Segment`s: a whole parameter, the local part of a DTensor (FSDP2), or a run of a flat partition of DeepSpeed ZeRO, which has
no idea of parameters. The passes are in lars_cpu.py and, as Triton kernels, in lars_cuda.py; no step waits for the GPU.
"""

import importlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Variant = Literal["moco-v3", "larc", "mlperf"]
# Beside the arguments; schedulers read the last two.
GROUP_KEYS = ("params", "param_names", "name", "lr_scale", "initial_lr")


class Segment(NamedTuple):
    """Elements start:stop of a flattened tensor belong to parameter `number`; `copies` ranks hold these very elements."""

    number: int
    start: int
    stop: int
    copies: int = 1


@dataclass(frozen=True)
class Layout:
    """Says which elements of the tensors that LARS steps on belong to which parameter.

    Args:
        segments: for every tensor; elements outside of all segments are left alone.
        adapts: for every parameter, in the order of their numbers, whether it has a trust ratio and weight decay.
        needs_norms: the tensors in which any rank holds a segment that adapts; a step on one of them makes an all-reduce.
        all_reduce: returns the sum over the ranks that hold the other parts; None if this rank holds every parameter whole.
    """

    segments: Mapping[Tensor, Sequence[Segment]]
    adapts: Sequence[bool]
    needs_norms: frozenset[Tensor]
    all_reduce: Callable[[Tensor], Tensor] | None

    @staticmethod
    def of_parameters(adapts: Mapping[Tensor, bool]) -> "Layout":
        """Return the layout of whole parameters and of DTensors: one segment for what this rank holds of each.

        Raises:
            ValueError: if parameters are sharded over several mesh dimensions, which would take several all-reduces.
        """
        for parameter in adapts:
            _check_not_flattened(parameter)
        cuts = {cut for parameter in adapts for cut in _cuts(parameter)}
        if len(cuts) > 1:
            raise ValueError(f"LARS: parameters are sharded over more than one mesh dimension: {cuts}; use one")
        uncut: Any = (None, 0)
        mesh, dim = next(iter(cuts), uncut)
        segments = {
            p: [Segment(number, 0, local(p).numel(), mesh.size(dim) if cuts and not _cuts(p) else 1)]
            for number, p in enumerate(adapts)
        }
        needs_norms = frozenset(p for p, does in adapts.items() if does)

        def all_reduce(sums: Tensor) -> Tensor:
            total = sums.to(mesh.device_type)  # CPUOffloadPolicy keeps parameters in host memory
            dist.all_reduce(total, group=mesh.get_group(dim))
            return total.to(sums.device)

        return Layout(segments, list(adapts.values()), needs_norms, all_reduce if cuts else None)


class Flats(NamedTuple):
    """Holds a tensor that LARS steps on, its gradient and its velocity as 1-D views of equal length."""

    parameter: Tensor
    gradient: Tensor
    velocity: Tensor


@dataclass(eq=False)
class Work:
    """Lists this rank's segments of some parameters of a group; it is kept, because from step to step only memory moves.

    Attributes:
        segments: each with the index of its tensor in `flats`.
        flats: the tensors of the current step; every step sets them anew.
        tables: what lars_cuda makes of the segments.
    """

    segments: list[tuple[int, Segment]]
    flats: list[Flats] = field(default_factory=list)
    tables: Any = None

    def views(self) -> Iterator[tuple[Segment, Flats]]:
        """Yield every segment with its elements of parameter, gradient and velocity."""
        for index, segment in self.segments:
            yield segment, Flats(*(flat[segment.start : segment.stop] for flat in self.flats[index]))


class KeptWork(NamedTuple):
    """Holds the work of a group's tensors that have a gradient: of the parameters that adapt, and of the others."""

    layout: Layout
    tensors: list[Tensor]
    adapting: Work
    others: Work

    def fits(self, layout: Layout, tensors: list[Tensor]) -> bool:
        """Return whether it was made for this layout and these tensors; `==` would compare the tensors' elements."""
        return self.layout is layout and [*map(id, self.tensors)] == [*map(id, tensors)]

    @staticmethod
    def of(layout: Layout, tensors: list[Tensor]) -> "KeptWork":
        """List the segments of `tensors`."""
        found: tuple[list[tuple[int, Segment]], ...] = ([], [])
        for index, tensor in enumerate(tensors):
            for segment in layout.segments[tensor]:
                found[not layout.adapts[segment.number]].append((index, segment))
        return KeptWork(layout, tensors, Work(found[0]), Work(found[1]))


class Update(NamedTuple):
    """Holds the coefficients of the second pass, which covers all variants. With c = gains[number]:

    v = momentum v + c (g + decay w)
    w = w + step v - c late_decay w
    """

    momentum: float
    gains: Tensor  # [parameters]
    decay: float
    step: float
    late_decay: float


class LARS(torch.optim.Optimizer):
    """LARS scales the update of each weight matrix by a trust ratio, in plain torch, DDP and FSDP2 (`fully_shard`).

    Under DeepSpeed ZeRO, call `lars_for_zero(engine)` once; without that call, the first step raises.

    Which parameters adapt (have a trust ratio and weight decay) follows from their shape when they are given: those with two
    or more dimensions do, biases and norms do not. So `LARS(model.parameters(), lr=0.1, weight_decay=1e-6)` is right. A group
    overrides that for all of its parameters with its key `adapts` (True or False); see also `lars_param_groups`.

    Args:
        params: tensors, (name, tensor) pairs or groups, as for any optimizer of torch. Every other argument is also a key of
            a group. Further keys, except `name`, `lr_scale` and `initial_lr`, are refused.
        lr: learning rate. MoCo v3 multiplies a base rate of 0.3 to 0.6 by batch size / 256.
        weight_decay: factor of the weights that is added to the gradient, for parameters that adapt.
        momentum: decay of the velocity.
        trust_coefficient: factor tc of the trust ratio, tc ||w|| / ||gradient||.
        variant: the formula, "moco-v3", "larc" or "mlperf"; see the module's docstring.
        eps: added to the denominator of the trust ratio (`larc` and `mlperf` only).
        clip_trust_ratio: makes lr a ceiling (`larc` only).
        decay_after_momentum: keeps the weight decay out of the velocity (`mlperf` only).

    Attributes:
        adapts: for every parameter given, whether it adapts.
        layout: says where the parameters lie in the tensors of `param_groups`; the first step or `lars_for_zero` makes it.

    The state of a tensor is `mu`, the velocity, with the tensor's shape and placement.

    Raises:
        ValueError: for values out of range, keys of a group that it does not know, and parameters that FSDP1 has flattened.
    """

    layout: Layout | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        variant: Variant = "moco-v3",
        eps: float = 1e-8,
        clip_trust_ratio: bool = False,
        decay_after_momentum: bool = False,
    ):
        self.adapts: dict[Tensor, bool] = {}
        self._kept: dict[Tensor, KeptWork] = {}  # by the first tensor of a group
        # Gradients, and what `_prepare` has made for them.
        self._prepared: tuple[list[Tensor | None], tuple[Any, list[tuple[Work, Work]]]] | None = None
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
            "variant": variant,
            "eps": eps,
            "clip_trust_ratio": clip_trust_ratio,
            "decay_after_momentum": decay_after_momentum,
            "adapts": None,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, and decide from the shapes of its parameters which of them adapt."""
        allowed = (*self.defaults, *GROUP_KEYS)
        for key in param_group:
            if key not in allowed:
                raise ValueError(
                    f"LARS: a parameter group has the key {key!r}; allowed: {', '.join(allowed)}; keys that are only yours can "
                    f"be set in optimizer.param_groups afterwards"
                )
        _check_values({**self.defaults, **param_group})
        with warnings.catch_warnings():  # torch warns of a parameter that is given twice, and then updates it twice
            warnings.filterwarnings("error", "optimizer contains a parameter group with duplicate parameters")
            try:
                super().add_param_group(param_group)
            except UserWarning:
                raise ValueError("LARS: a parameter is given twice in one group; give it once") from None
        group = self.param_groups[-1]
        for parameter in group["params"]:
            _check_not_flattened(parameter)
            is_matrix = len(original_shape(parameter)) > 1
            self.adapts[parameter] = is_matrix if group["adapts"] is None else bool(group["adapts"])
        self.layout = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which makes a layout of its own at its first step."""
        return {**super().__getstate__(), "adapts": self.adapts, "_kept": {}, "_prepared": None}

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient, and return what `closure` returned.

        Raises:
            RuntimeError: if `param_groups` hold tensors that were not given, as DeepSpeed ZeRO's flat partitions are.
            TypeError: if parameters are not in fp32 (on a CPU also fp64), or in another type than gradient or velocity.
            ValueError: if a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self._groups()
        if not groups:
            return loss
        gradients, prepared = _gradients(groups), self._prepared
        self._prepared = None
        # Kept gradients have ids that no others can have.
        is_ready = prepared is not None and [*map(id, prepared[0])] == [*map(id, gradients)]
        passes, work = prepared[1] if prepared and is_ready else self._prepare(groups)
        del prepared
        assert self.layout is not None
        device = local(groups[0]["params"][0]).device
        # ||w||^2, and ||d||^2 or ||g||^2
        sums = torch.zeros(2, len(self.layout.adapts), dtype=torch.float64, device=device)
        for group, (adapting, _) in zip(groups, work, strict=True):
            passes.add_squares(adapting, group["weight_decay"] if group["variant"] == "moco-v3" else 0.0, sums)
        if self.layout.all_reduce is not None and any(
            tensor in self.layout.needs_norms for group in groups for tensor in group["params"]
        ):
            sums = self.layout.all_reduce(sums)
        for group, (adapting, others) in zip(groups, work, strict=True):
            if adapting.segments:
                passes.update(adapting, _formula(group, _trust_ratios(group, sums), group["weight_decay"]))
            if others.segments:  # SGD with momentum
                passes.update(others, _formula(group, torch.ones_like(sums[0]), 0.0))
            adapting.flats = others.flats = []  # the gradients' memory is free when their owner drops them
        return loss

    @torch.no_grad()
    def prepare(self) -> None:
        """Prepare the next `step` as far as that needs no values; call it before the host waits for a norm of the gradients.

        Until then, parameters, gradients and velocities may change their values, but not their memory. If `step` finds other
        gradients or groups, or if `zero_grad` comes first, what was prepared is dropped.
        """
        groups = self._groups()
        if groups:
            passes, work = self._prepare(groups)
            for one in itertools.chain(*work):
                passes.prepare(one)
            self._prepared = _gradients(groups), (passes, work)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and drop what `prepare` has done for a step that is not made."""
        for one in itertools.chain(*self._prepared[1][1]) if self._prepared else ():
            one.flats = []
        self._prepared = None
        super().zero_grad(set_to_none)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["params"]]

    def _prepare(self, groups: list[dict[str, Any]]) -> tuple[Any, list[tuple[Work, Work]]]:
        """Return the module of the passes, and the work of every group: on parameters that adapt, and on others."""
        self._check_tensors(groups)
        if self.layout is None:
            self.layout = Layout.of_parameters(self.adapts)
        passes = _passes(local(groups[0]["params"][0]).device.type)
        return passes, [self._work(group, self.layout) for group in groups]

    def _check_tensors(self, groups: list[dict[str, Any]]) -> None:
        """Raise for tensors that were not given and that no layout explains, and for types that the passes do not know."""
        known = self.adapts if self.layout is None else self.layout.segments
        for tensor in (tensor for group in groups for tensor in group["params"]):
            if tensor not in known:
                raise RuntimeError(
                    f"LARS: step() met a tensor of shape {list(tensor.shape)} that is not one of the parameters given to it, "
                    f"so it does not know which parameter its elements belong to. DeepSpeed ZeRO replaces parameters by flat "
                    f"partitions: call crossbatch.lars_for_zero(engine) once after deepspeed.initialize. (If this was raised "
                    f"inside deepspeed.initialize: with fp16 or bf16, set zero_optimization.stage to 1 or more.)"
                )
            if tensor.dtype not in ((torch.float32,) if tensor.is_cuda else (torch.float32, torch.float64)):
                raise TypeError(
                    f"LARS: a parameter of shape {list(tensor.shape)} is in {tensor.dtype}; allowed: float32, on a CPU also "
                    f"float64; keep parameters in float32 and compute in lower precision with torch.autocast"
                )
            if tensor.grad is not None and tensor.grad.is_sparse:
                raise ValueError(
                    f"LARS: the gradient of a parameter of shape {list(tensor.shape)} is sparse; allowed: dense; build the "
                    f"embedding with sparse=False"
                )
            for name, other in (("gradient", tensor.grad), ("velocity", self.state.get(tensor, {}).get("mu"))):
                if other is not None and (other.dtype, other.device) != (tensor.dtype, tensor.device):
                    raise TypeError(
                        f"LARS: a parameter of shape {list(tensor.shape)} is in {tensor.dtype} on {tensor.device}, its {name} "
                        f"in {other.dtype} on {other.device}; allowed: the same; convert or move the model before the first "
                        f"step, or build LARS again"
                    )

    def _work(self, group: dict[str, Any], layout: Layout) -> tuple[Work, Work]:
        """Return what this rank holds of the group's parameters: of those that adapt, and of the others."""
        tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
        kept = self._kept.get(group["params"][0])
        if kept is None or not kept.fits(layout, tensors):
            kept = self._kept[group["params"][0]] = KeptWork.of(layout, tensors)
        flats = []
        for tensor in tensors:
            state = self.state[tensor]
            if "mu" not in state:
                state["mu"] = torch.zeros_like(tensor)
            flats.append(_flat(local(tensor), local(tensor.grad), local(state["mu"])))
        kept.adapting.flats = kept.others.flats = flats
        return kept.adapting, kept.others


def _gradients(groups: list[dict[str, Any]]) -> list[Tensor | None]:
    return [tensor.grad for group in groups for tensor in group["params"]]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor (sharing its memory), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def original_shape(parameter: Tensor) -> torch.Size:
    """Return the shape that the model gave to a parameter, also when DeepSpeed's stage 3 has taken its data away."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _formula(group: dict[str, Any], ratios: Tensor, decay: float) -> Update:
    """Return the update of the group's variant with the trust ratios q, [parameters]."""
    gains, step = (ratios * group["lr"], -1.0) if group["variant"] == "mlperf" else (ratios, -group["lr"])
    late = group["decay_after_momentum"]
    return Update(group["momentum"], gains, 0.0 if late else decay, step, decay if late else 0.0)


def _trust_ratios(group: dict[str, Any], sums: Tensor) -> Tensor:
    """Return q of all parameters, [parameters]."""
    w_norm, d_norm = sums.sqrt()
    usable = (w_norm > 0) & (d_norm > 0)
    if group["variant"] != "moco-v3":
        d_norm = d_norm + group["weight_decay"] * w_norm + group["eps"]
    q = group["trust_coefficient"] * w_norm / d_norm
    if group["clip_trust_ratio"]:
        q = (q / group["lr"]).clamp(max=1.0) if group["lr"] > 0 else torch.ones_like(q)
    if group["variant"] == "larc":
        # Without the decay: if w = 0 there is none; if g = 0 nothing is left of d, and q = 0 says the same.
        return torch.where(usable, q, (w_norm == 0).to(q.dtype))
    return torch.where(usable, q, 1.0)


def _check_values(group: dict[str, Any]) -> None:
    variant = group["variant"]
    if variant not in get_args(Variant):
        raise ValueError(f"LARS: variant is {variant!r}; allowed: {', '.join(get_args(Variant))}")
    for name, only in (("clip_trust_ratio", "larc"), ("decay_after_momentum", "mlperf")):
        if group[name] and variant != only:
            raise ValueError(
                f"LARS: {name} is part of variant {only}, not of {variant}; set variant={only!r} or leave it out"
            )
    if variant == "moco-v3" and group["eps"] != 1e-8:  # the default
        raise ValueError("LARS: eps is part of variants larc and mlperf, not of moco-v3; leave it out or set variant")
    for name in ("lr", "weight_decay", "momentum", "trust_coefficient", "eps"):
        if not 0 <= group[name] < float("inf"):
            raise ValueError(f"LARS: {name} is {group[name]}; allowed: >= 0 and finite")


def _check_not_flattened(parameter: Tensor) -> None:
    """Refuse parameters of FSDP1: they are 1-D, with and without use_orig_params, so that nothing would adapt."""
    if getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False):
        raise ValueError(
            "LARS: FullyShardedDataParallel (FSDP1) has flattened the parameters, and their shapes decide which of them adapt; "
            "shard with torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )


def _passes(device_type: str) -> Any:
    """Return the module with `add_squares` and `update`; Triton takes a second to import, so only where it is used."""
    if device_type not in ("cpu", "cuda"):
        raise TypeError(f"LARS: parameters are on {device_type}; allowed: cpu, cuda")
    return importlib.import_module(f"crossbatch.engine.optimizers.lars_{device_type}")


def _cuts(parameter: Tensor) -> list[tuple[Any, int]]:
    """Return the mesh dimensions over which `parameter` is sharded."""
    if not isinstance(parameter, DTensor):
        return []
    mesh = parameter.device_mesh
    return [(mesh, d) for d, p in enumerate(parameter.placements) if not p.is_replicate() and mesh.size(d) > 1]


def _flat(parameter: Tensor, gradient: Tensor, velocity: Tensor) -> Flats:
    """Return 1-D views in the memory order of the parameter, so that channels_last weights are updated in place."""
    if not parameter.is_contiguous():
        order = sorted(range(parameter.ndim), key=parameter.stride, reverse=True)
        parameter, gradient, velocity = (t.permute(order) for t in (parameter, gradient, velocity))
    return Flats(parameter.view(-1), gradient.reshape(-1), velocity.view(-1))
