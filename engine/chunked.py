"""Computes a loss over the whole batch with the activations of only one chunk of the backbone in memory: the cut step.

A contrastive loss needs the features of the whole batch at once, but only the backbone's memory grows noticeably with the
batch. So the step is cut at the features (Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup", known as GradCache):

1. The backbone computes the features of every chunk without gradient. The last chunk keeps its graph.
2. The loss sees all features as one leaf tensor. Its backward pass ends there, with the gradient of every feature.
3. The last chunk is back-propagated from the gradient of its features; then every other chunk goes through the backbone
   once more, with gradient, and is back-propagated from its own. Ranks exchange gradients once, with the last of them.

The gradients are those of the unchunked step, if the second pass of a chunk repeats its first. `Replay` sees to that: it
restores random numbers and keeps batch norms from counting a batch twice. One extra forward pass for all chunks but one is the
price: at most a third of the step's compute.

`chunked_backward` is for training loops of any kind; the engine's own step calls `backward_in_chunks`.
"""

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from crossbatch.models.batchformer import BatchFormer
from crossbatch.models.norm import Statistics, ViewBatchNorm, reuse_batch_stats, set_num_chunks

Chunk = TypeVar("Chunk")
Tensors = tuple[Tensor, ...]

_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # backbones that have been through `chunked_backward` once


def chunked_backward(
    backbone: nn.Module,
    views: Tensor | Tensors,
    loss_of_features: Callable[[Any], Tensor],
    *,
    chunk: int,
    backward: Callable[[Tensor], object] | None = None,
    process_group: dist.ProcessGroup | None = None,
    check_sync: bool = True,
) -> Tensor:
    """Compute a loss over the whole batch and its gradients, running the backbone on one chunk at a time.

    Replaces the forward and backward pass of a training loop; the gradients equal those of the unchunked step up to rounding,
    and are added to `.grad` as `loss.backward()` would. Call `optimizer.step()` (or `engine.step()`) afterwards.

    `backbone` may be a plain module, one wrapped in DistributedDataParallel, sharded by `fully_shard` (FSDP2), or a DeepSpeed
    engine (ZeRO 0 to 3): gradients are exchanged once per step. Dropout draws the same numbers in both
    passes (torch's generators on the CPU and on CUDA are restored), and an enclosing `torch.autocast` holds for both. An
    nn.BatchNorm or nn.SyncBatchNorm takes its statistics over one chunk, and each chunk updates its running statistics once.

    Args:
        backbone: called with a chunk; returns a tensor or a tuple of tensors. Each has one row per input row, or no dimension
            at all (such as CLIP's logit scale). An output without dimensions must be equal for all chunks; it is passed on
            unchanged, and its gradient flows back once.
        views: either a tensor [V, n, ...], V views of n samples (a single view of images is `images[None]`): the backbone gets
            [V*m, ...], all m samples of the chunk in view 1, then all of them in view 2, and so on. Or a tuple of tensors
            [n, ...] of any shapes and dtypes, such as images and tokens: the backbone is called with m rows of each as
            positional arguments.
        loss_of_features: gets what the backbone returns, for the whole local batch: features [V, n, ...] for a tensor of
            views, [n, ...] for a tuple. Returns a scalar loss. Called once; parameters used in it receive their gradients once.
        chunk: the largest number of samples that the backbone sees at once. Chunks differ in size by at most one sample.
        backward: back-propagates a scalar; default `Tensor.backward`. With a GradScaler:
            `lambda loss: scaler.scale(loss).backward()`. It is also called to continue through the backbone, with a scalar
            through which the gradients pass as they are, so no scale is applied twice.
        process_group: the ranks among which gradients are averaged; default: DDP's group, or else the default group.
        check_sync: in the first call for this backbone, check that all ranks hold equal gradients. Set it to False if you
            average gradients yourself after the call.

    Returns:
        The loss of this rank, a detached scalar, not scaled.

    Raises:
        TypeError: `backbone`, `views`, the features or the loss have a wrong type, or `backbone` is wrapped in FSDP1.
        ValueError: `chunk` is below 1, `views` is empty or has tensors of unequal length, the features carry no gradient,
            the loss is not a scalar that depends on them, a `ViewBatchNorm` expects another number of views, the wrapper
            allows only one pass per step (DDP with `static_graph`, DeepSpeed with `gradient_accumulation_steps` above 1), or
            `backbone` calls a `BatchFormer`, which belongs in the loss.
        RuntimeError: in the first call, gradients differ between ranks (nothing averages them), or the second pass of a chunk
            gave different features from the first (the backbone draws random numbers that do not come from torch).
    """
    sync = _GradientSync(backbone, backward, process_group)
    chunks, stacked = _split(views, chunk)
    num_views = len(views) if stacked else 1
    if stacked:
        _check_norms(backbone, num_views)
    first_call = backbone not in _checked
    single = True
    parameters_of_loss: list[nn.Parameter] = []

    def forward(inputs: Tensors, with_grad: bool, is_last: bool) -> Tensors:
        nonlocal single
        rows = inputs[0].flatten(0, 1) if stacked else inputs[0]
        with torch.set_grad_enabled(with_grad), sync.exchanging(is_last), _batchformers_refused(backbone):
            output = backbone(rows, *inputs[1:])
        single = isinstance(output, Tensor)
        features = (output,) if isinstance(output, Tensor) else output
        _check_features(features, len(rows), with_grad)
        return tuple(features)

    def loss_of(features: Tensors) -> Tensor:
        features = tuple(f if stacked or f.dim() == 0 else f[0] for f in features)
        loss = loss_of_features(features[0] if single else features)
        _check_loss(loss)
        if first_call:
            parameters_of_loss.extend(_parameters_of(loss))
        return loss

    set_num_chunks(backbone, len(chunks))
    try:
        with sync.one_exchange(len(chunks)):
            loss = backward_in_chunks(
                chunks,
                num_views,
                backbone,
                lambda inputs, with_grad: forward(inputs, with_grad, is_last=len(chunks) == 1),
                lambda inputs, is_last: forward(inputs, True, is_last),
                loss_of,
                sync.backward,
                compare=first_call,
            )
    finally:
        set_num_chunks(backbone, 1)
    if first_call:
        sync.check(parameters_of_loss, check_sync)
        _checked.add(backbone)
    return loss


def backward_in_chunks(
    chunks: Sequence[Chunk],
    num_views: int,
    backbone: nn.Module,
    forward: Callable[[Chunk, bool], Tensors],
    forward_again: Callable[[Chunk, bool], Tensors],
    loss_of_features: Callable[[Tensors], Tensor],
    backward: Callable[[Tensor, bool], None],
    compare: bool = False,
) -> Tensor:
    """Run forward and backward pass chunk by chunk (the cut step), through callables; return the detached loss.

    Args:
        chunks: what `forward` takes, in the order of the batch.
        num_views: V; features of a chunk of m samples have V*m rows, view-major.
        backbone: holds the batch norms, and parameters on the devices that draw random numbers.
        forward: turns (chunk, with_grad) into features, each [V*m, ...] or 0-dim.
        forward_again: turns (chunk, is_last) into the same with gradient, and may leave out trailing ones that have none.
        loss_of_features: turns features [V, n, ...] of the local batch into a scalar.
        backward: takes (scalar, is_last). A scale that it applies reaches all gradients once.
        compare: whether to raise RuntimeError if a second pass gives different features from the first.
    """
    *earlier, last = chunks
    replays = [Replay(backbone) for _ in earlier]
    parts = []
    for chunk, replay in zip(earlier, replays, strict=True):
        with replay.first():
            parts.append(forward(chunk, False))
    if earlier:
        torch.clear_autocast_cache()  # which may hold weights that were cast without gradient
    parts.append(forward(last, True))
    joined = tuple(_join(pieces, num_views) for pieces in zip(*parts, strict=True))
    if not earlier:
        loss = loss_of_features(joined)
        backward(loss, True)
        return loss.detach()
    kept = parts[-1]
    leaves = tuple(f.detach().requires_grad_(k.requires_grad) for f, k in zip(joined, kept, strict=True))
    loss = loss_of_features(leaves)
    backward(loss, False)
    if all(leaf.grad is None for leaf in leaves if leaf.dim()):
        raise ValueError("loss_of_features: the loss does not depend on the features, so the backbone gets no gradient")
    gradients = list(zip(*(_split_gradient(leaf, [p[i] for p in parts]) for i, leaf in enumerate(leaves)), strict=True))
    backward(_inject(kept, gradients[-1]), False)
    del kept, parts[-1]
    for number, (chunk, replay) in enumerate(zip(earlier, replays, strict=True), start=1):
        is_last = number == len(earlier)
        with replay.again():
            features = forward_again(chunk, is_last)
            if compare:
                _compare(parts[number - 1], features)
            backward(_inject(features, gradients[number - 1]), is_last)
    return loss.detach()


class Replay:
    """Let a second pass of a chunk through `module` repeat its first one: random numbers and batch norm statistics.

    A `ViewBatchNorm` takes its statistics from the first pass, without communication. Other batch norms compute theirs again
    from the same images, and leave their running statistics alone the second time.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._statistics: Statistics = {}
        self._devices: list[int] = []  # on which the module may draw random numbers
        if torch.cuda.is_initialized():
            used = {p.get_device() for p in module.parameters() if p.is_cuda}
            self._devices = sorted(used | {torch.cuda.current_device()})

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Run the first forward pass inside this context."""
        self._cpu_state = torch.get_rng_state()
        self._cuda_states = [torch.cuda.get_rng_state(device) for device in self._devices]
        with reuse_batch_stats(self._module, self._statistics):
            yield

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Run the second forward pass and its backward pass (in which checkpointed blocks run again) inside this context."""
        with (
            torch.random.fork_rng(self._devices),
            reuse_batch_stats(self._module, self._statistics),
            _running_stats_frozen(self._module),
        ):
            torch.set_rng_state(self._cpu_state)
            for device, state in zip(self._devices, self._cuda_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


@contextlib.contextmanager
def _running_stats_frozen(module: nn.Module) -> Iterator[None]:
    """Let batch norms in training normalise by their batch, but leave their running statistics alone."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextlib.contextmanager
def _batchformers_refused(backbone: nn.Module) -> Iterator[None]:
    """Raise ValueError where a BatchFormer in training is called: what it mixes must be groups of the whole batch."""

    def refuse(module: nn.Module, _: object) -> None:
        if module.training:
            raise ValueError(
                "backbone: calls a BatchFormer, which would mix the images of a chunk, and of its views, instead of the groups "
                "of the batch; call it in loss_of_features, on features [V, n, C]"
            )

    handles = [m.register_forward_pre_hook(refuse) for m in backbone.modules() if isinstance(m, BatchFormer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _join(pieces: Tensors, num_views: int) -> Tensor:
    """Join features of chunks, each [V*m, ...], to those of the batch, [V, n, ...]; an output without rows stays as it is."""
    if pieces[-1].dim() == 0:
        if any(not torch.equal(piece, pieces[-1]) for piece in pieces):
            raise ValueError(
                "backbone: an output without dimensions differs between chunks; allowed: one that is equal for all (such as a "
                "logit scale); return one value per sample, [n], and average it in loss_of_features"
            )
        return pieces[-1]
    return torch.cat([piece.unflatten(0, (num_views, -1)) for piece in pieces], dim=1)


def _split_gradient(leaf: Tensor, pieces: Sequence[Tensor]) -> list[Tensor | None]:
    """Split the gradient of `leaf`, [V, n, ...], into those of its chunks, each [V*m, ...] as its piece."""
    if leaf.grad is None:
        return [None] * len(pieces)
    if leaf.dim() == 0:
        # It belongs to the chunk with which gradients are exchanged, the last but one: the last one is back-propagated first.
        return [*[None] * (len(pieces) - 2), leaf.grad, None]
    sizes = [len(piece) // len(leaf) for piece in pieces]
    return [part.flatten(0, 1) for part in leaf.grad.split(sizes, dim=1)]


def _inject(features: Tensors, gradients: Sequence[Tensor | None]) -> Tensor:
    """Return a scalar whose backward pass gives `features` these gradients, however the scalar is scaled."""
    pairs = [(f, g) for f, g in zip(features, gradients, strict=False) if g is not None]
    return _Inject.apply([g for _, g in pairs], *(f for f, _ in pairs))  # pyright: ignore[reportReturnType]


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradients: list[Tensor], *features: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.gradients = gradients
        return torch.zeros((), device=features[0].device)

    @staticmethod
    @once_differentiable
    def backward(ctx, _scale):  # pyright: ignore[reportIncompatibleMethodOverride]
        # The gradients were scaled when they were computed, and wrappers such as DeepSpeed scale every scalar that they see.
        return None, *ctx.gradients


class _GradientSync:
    """Keep gradients of a backbone on their rank until the last chunk, whatever the backbone is wrapped in."""

    def __init__(
        self, backbone: nn.Module, backward: Callable[[Tensor], object] | None, process_group: dist.ProcessGroup | None
    ):
        if not isinstance(backbone, nn.Module):
            raise TypeError(
                f"backbone: given {type(backbone).__name__}; allowed: an nn.Module, perhaps wrapped (DDP, FSDP2, DeepSpeed)"
            )
        modules = list(backbone.modules())
        if any(isinstance(module, FullyShardedDataParallel) for module in modules):
            raise TypeError("backbone: FSDP1 (FullyShardedDataParallel) is not supported; shard it with fully_shard")
        self.backbone = backbone
        self.ddp = [module for module in modules if isinstance(module, DistributedDataParallel)]
        if any(module.static_graph for module in self.ddp):
            raise ValueError(
                "backbone: DistributedDataParallel has static_graph=True, which allows only one pass per step; leave it out"
            )
        self.fsdp = [module for module in modules if isinstance(module, FSDPModule)]
        self.engine = _deepspeed_engine(backbone, modules)
        if self.engine is not None and backward is not None:
            raise ValueError("backward: leave it out with a DeepSpeed engine, which scales losses itself")
        self._backward: Callable[[Tensor], object] = backward or (
            Tensor.backward if self.engine is None else self.engine.backward
        )
        self.group = process_group or (self.ddp[0].process_group if self.ddp else None)
        self.accumulating = any(not module.require_backward_grad_sync for module in self.ddp)  # the caller's no_sync

    @contextlib.contextmanager
    def one_exchange(self, num_chunks: int) -> Iterator[None]:
        """Run the whole step inside this context; ZeRO 1 to 3 exchange all gradients at its end."""
        if self.engine is None or self.engine.zero_optimization_stage() == 0 or num_chunks == 1:
            yield
            return
        with self.engine.coalesce_grad_reduction():
            yield

    @contextlib.contextmanager
    def exchanging(self, is_last: bool) -> Iterator[None]:
        """Run a forward or a backward pass inside this context; unless `is_last`, its gradients stay on this rank."""
        if is_last:
            yield
            return
        with contextlib.ExitStack() as stack:
            for module in self.ddp:
                stack.enter_context(module.no_sync())
            if self.engine is not None and self.engine.zero_optimization_stage() == 0:
                stack.enter_context(self.engine.no_sync())
            self._set_fsdp(False)
            stack.callback(self._set_fsdp, True)
            yield

    def _set_fsdp(self, exchange: bool) -> None:
        for module in self.fsdp:
            module.set_requires_gradient_sync(exchange, recurse=False)
            module.set_is_last_backward(exchange)

    def backward(self, scalar: Tensor, is_last: bool) -> None:
        with self.exchanging(is_last), contextlib.ExitStack() as stack:
            for device_type in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device_type):  # it is for forward passes
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            self._backward(scalar)

    def check(self, parameters_of_loss: Sequence[nn.Parameter], over_ranks: bool) -> None:
        """Raise ValueError for gradients that keep a loss scale, and RuntimeError for gradients that nothing averages."""
        named = list(self.backbone.named_parameters())
        known = {id(parameter) for _, parameter in named}
        others = [p for p in parameters_of_loss if id(p) not in known]
        if self.engine is not None:
            named = []  # DeepSpeed averages them, and keeps the averages elsewhere
            scale = getattr(self.engine.optimizer, "loss_scale", 1.0)
            if others and scale != 1:
                raise ValueError(
                    f"loss_of_features: uses parameters that the DeepSpeed engine does not know, and their gradients are "
                    f"scaled by its loss scale (={scale:g}); put them into the engine's module, or train in bf16"
                )
        named += [(f"{list(p.shape)} in loss_of_features", p) for p in others]
        if over_ranks and not self.accumulating and dist.is_available() and dist.is_initialized():
            _check_equal([(name, p) for name, p in named if p.requires_grad and not isinstance(p, DTensor)], self.group)


def _deepspeed_engine(backbone: nn.Module, modules: Sequence[nn.Module]) -> Any:
    """Return the engine that `backbone` is, or None; where DeepSpeed was not imported, there is none."""
    deepspeed: Any = sys.modules.get("deepspeed")
    engines: list[Any] = [m for m in modules if deepspeed and isinstance(m, deepspeed.DeepSpeedEngine)]
    if not engines:
        # DeepSpeed marks the parameters of ZeRO 1 and 2 by the one attribute, those of ZeRO 3 by the other.
        if any(hasattr(p, "_hp_mapping") or hasattr(p, "ds_id") for p in backbone.parameters()):
            raise TypeError("backbone: its parameters belong to a DeepSpeed engine; pass the engine, not its .module")
        return None
    if engines != [backbone]:
        raise TypeError("backbone: contains a DeepSpeed engine; allowed: the engine itself, not inside another module")
    if (accumulated := engines[0].gradient_accumulation_steps()) != 1:
        raise ValueError(
            f"backbone: its DeepSpeed engine has gradient_accumulation_steps = {accumulated}; set it to 1, and `chunk` to "
            f"what fits into memory"
        )
    return engines[0]


def _check_equal(named: Sequence[tuple[str, Tensor]], group: dist.ProcessGroup | None) -> None:
    """Raise RuntimeError unless these parameters have gradients of the same norm on all ranks of `group`."""
    if not named or dist.get_world_size(group) == 1:
        return
    device = named[0][1].device
    norms = torch.zeros(len(named), dtype=torch.float64, device=device)
    for i, (_, p) in enumerate(named):
        if p.grad is not None:
            norms[i] = torch.linalg.vector_norm(p.grad, dtype=torch.float64)
    extremes = torch.stack((norms, -norms))
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    largest, smallest = extremes[0], -extremes[1]
    different = ((largest - smallest) > 1e-4 * largest).tolist()
    if any(different):
        names = [name for (name, _), differs in zip(named, different, strict=True) if differs]
        raise RuntimeError(
            f"backbone: gradients differ between ranks ({', '.join(names[:3])}{', ...' * (len(names) > 3)}), so nothing "
            f"averages them. Pass the wrapped backbone (DDP, fully_shard or a DeepSpeed engine, not its .module) and wrap "
            f"modules that loss_of_features uses as well; or, if you average gradients after this call, pass check_sync=False."
        )


def _split(views: Tensor | Tensors, chunk: int) -> tuple[list[Tensors], bool]:
    """Return chunks of at most `chunk` samples, each a tuple of tensors, and whether these are [V, m, ...] (or [m, ...])."""
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk: given {chunk!r}; allowed: an integer >= 1")
    stacked = isinstance(views, Tensor)
    tensors = (views,) if isinstance(views, Tensor) else views
    if not isinstance(tensors, tuple) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        kinds = [type(tensor).__name__ for tensor in tensors] if isinstance(tensors, tuple) else type(views).__name__
        raise TypeError(
            f"views: given {kinds}; allowed: a tensor [V, n, ...] (for a list of views: torch.stack(views)) or a tuple of "
            f"tensors [n, ...], one for each argument of the backbone"
        )
    dim = 1 if stacked else 0
    shapes = [list(tensor.shape) for tensor in tensors]
    if not tensors or any(tensor.dim() <= dim or 0 in tensor.shape[: dim + 1] for tensor in tensors):
        raise ValueError(
            f"views: given shapes {shapes}; allowed: one tensor [V, n, ...] or a tuple of [n, ...], n >= 1"
        )
    samples = {tensor.shape[dim] for tensor in tensors}
    if len(samples) > 1:
        raise ValueError(f"views: given shapes {shapes}; all tensors must have the same number of rows")
    pieces = -(-samples.pop() // chunk)
    return list(zip(*(tensor.tensor_split(pieces, dim=dim) for tensor in tensors), strict=True)), stacked


def _check_norms(backbone: nn.Module, num_views: int) -> None:
    """Raise ValueError for a ViewBatchNorm that expects another number of views."""
    for name, norm in backbone.named_modules():
        if isinstance(norm, ViewBatchNorm) and norm.num_views != num_views:
            raise ValueError(
                f"views: has {num_views} views, but the norm {name!r} of the backbone has num_views = {norm.num_views}; "
                f"call convert_norms (or set_num_views) with num_views={num_views}"
            )


def _check_features(features: Any, rows: int, with_grad: bool) -> None:
    """Raise TypeError or ValueError unless a backbone returned tensors of so many rows, with gradient if asked."""
    if not isinstance(features, (tuple, list)) or not all(isinstance(feature, Tensor) for feature in features):
        raise TypeError(f"backbone: returned {type(features).__name__}; allowed: a tensor or a tuple of tensors")
    for feature in features:
        if feature.dim() and len(feature) != rows:
            raise ValueError(
                f"backbone: returned {list(feature.shape)} for a chunk of {rows} rows; allowed: {rows} rows, or a scalar"
            )
    if with_grad and not any(feature.requires_grad for feature in features):
        raise ValueError(
            "backbone: its features carry no gradient; unfreeze it, or compute its features without chunked_backward"
        )


def _check_loss(loss: Any) -> None:
    """Raise TypeError or ValueError unless `loss` is a scalar tensor with a gradient."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_of_features: returned {type(loss).__name__}; allowed: a scalar tensor")
    if loss.dim():
        raise ValueError(f"loss_of_features: returned a tensor {list(loss.shape)}; allowed: a scalar, such as its mean")
    if not loss.requires_grad:
        raise ValueError(
            "loss_of_features: the loss carries no gradient; call this outside torch.no_grad(), and do not detach the loss"
        )


def _compare(first: Tensors, again: Tensors) -> None:
    """Raise RuntimeError if a second pass gave different features from the first."""
    for before, after in zip(first, again, strict=False):
        if (after.detach().float() - before.float()).norm() > 1e-2 * before.float().norm():
            raise RuntimeError(
                "backbone: the second pass of a chunk gave different features from the first. Its random numbers must come "
                "from torch's default generators, and a forward pass must not change what the next one computes."
            )


def _parameters_of(loss: Tensor) -> list[nn.Parameter]:
    """Return the parameters that `loss` was computed from: the leaves of its graph."""
    seen, found = set(), []
    to_visit = [loss.grad_fn]
    while to_visit:
        node = to_visit.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter):
            found.append(variable)
        to_visit += [following for following, _ in node.next_functions]
    return found
