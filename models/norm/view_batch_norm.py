"""Defines the batch norm that normalises each view by its own statistics, in one call and with one collective.

MoCo v3 encodes two crops ("views") of every image. The originals pass the views through the network one after the
other, so a batch norm sees the B images of one view at a time, and its statistics belong to that view. That matters: view 2
is blurred and solarised differently from view 1, and statistics mixed over 2B rows would be those of neither.

Two passes through the network, however, double every fixed cost of a batch norm, and a small collective is all fixed
cost: ResNet-50 has 53 norms, and torch's SyncBatchNorm takes one collective per norm, view and direction, 212 in a
forward and backward pass. Here both views travel through the network as one batch, view-major (all images of view 1, then
all of view 2), the norm splits them again, and the statistics of all views share one message:

    forward    all_gather of [V, 2, C]: the mean and the biased variance of each view on each rank
    backward   all_reduce of [V, 2, C]: sum(dy) and sum(dy * xhat) of each view

Ranks hold equally many images, so no counts travel, and the W local statistics merge by the law of total variance (Chan
et al., 1979, for equal counts): the mean is the mean of the means; the variance is the mean of the variances plus the
variance of the means. With one rank nothing is sent.

The input gradient, with means over (images, height, width) of all ranks, N values per channel:

    dx = weight / sqrt(var + eps) * (dy - mean(dy) - xhat * mean(dy * xhat))        xhat = (x - mean) / sqrt(var + eps)

A second pass over the same batch (chunks, checkpointed activations) takes its statistics from the first one and sends
nothing: see `reuse_batch_stats`.

Parameter gradients stay local: DDP, DeepSpeed or FSDP2 average them over the ranks.

Shape suffixes: V = views, n = images of one view on this rank, C = channels, W = world size.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from crossbatch.models.arguments import check_positive_integer
from crossbatch.models.collective import Collective, GroupCollective
from crossbatch.models.norm.operators import Options, ViewNormalise, is_fused, normalise, statistics

# Attributes of a result: a second one for another consumer, and how to compute it again.
TWIN, RECIPE = "_twin", "_recipe"


class ViewBatchNorm(_BatchNorm):
    """Normalise each view of a batch by its own statistics, taken over the ranks of a process group.

    Replaces nn.BatchNorm1d, nn.BatchNorm2d and nn.SyncBatchNorm, with their parameters, buffers and state dict. In training it
    equals nn.BatchNorm2d applied to each view of the concatenated ranks in turn: running statistics too are updated view
    after view. In evaluation it is nn.BatchNorm2d.

    Args:
        num_features: number C of channels.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics, as in nn.BatchNorm2d.
        affine: whether there are a weight and a bias, each [C].
        device: where parameters and buffers are created.
        dtype: of parameters and buffers.
        num_views: number V of views in a batch; 1 gives nn.SyncBatchNorm (which has no CPU version).
        process_group: as in nn.SyncBatchNorm; None means all ranks, or this process alone without torch.distributed.

    Raises:
        TypeError: if `num_views` is not an integer.
        ValueError: if `num_views` is below 1, or `momentum` is None (a cumulative average).
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_views: int = 2,
        process_group: dist.ProcessGroup | None = None,
    ):
        if momentum is None:
            raise ValueError("momentum is None, but ViewBatchNorm has no cumulative average; give a number, e.g. 0.1")
        check_positive_integer("num_views", num_views)
        super().__init__(num_features, eps, momentum, affine, device=device, dtype=dtype)
        self.num_views, self.num_chunks = num_views, 1
        self.statistics: Statistics | None = None  # of the batch that is passing, see `reuse_batch_stats`
        self.recomputes_output = False  # see `recomputed`
        self.collective: Collective = GroupCollective(process_group)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (a Tensor, but with `defer`)
        self, input: Tensor, residual: "Tensor | Deferred | None" = None, relu: bool = False, defer: bool = False
    ) -> "Tensor | Deferred":
        """Normalise a batch, and in the same pass add `residual` and apply a ReLU, if asked.

        On a GPU, each pass is one launch of a Triton kernel for all views if images are stored channels last, or are 2-d.
        Contiguous images, and fp64, take torch's kernels, view by view.

        Args:
            input: [V*n, C], [V*n, C, L] or [V*n, C, H, W], view-major (all images of view 1, then all of view 2), with equally
                many rows on every rank; fp16, bf16 or fp32 with fp32 parameters (statistics are fp32 all the same), or fp64
                with fp64 parameters; contiguous or channels_last.
            residual: added to the normalised input; of the same shape. What another norm has deferred is normalised in the
                passes of this one, and what both gather travels in one message.
            relu: whether to replace negative results by 0.
            defer: leave the work to the norm that is given the result as `residual`; in evaluation, it is done all the same.

        Returns:
            A tensor with the shape, dtype and memory format of `input`; with `defer` in training, a residual for another norm.

        Raises:
            ValueError: for other shapes; in training, if V does not divide the rows, or if a channel has only one value.
        """
        self._check_input_dim(input)
        if defer and self.training:
            # Copies, since ZeRO 3 takes parameters away when this call has ended.
            return Deferred(self, input, *(None if p is None else p.clone() for p in (self.weight, self.bias)))
        if isinstance(residual, Deferred) and not (self.training and residual.norm._is_like(self)):
            residual = residual.norm(residual.input)
        added = residual.input if isinstance(residual, Deferred) else residual
        if added is not None and added.shape != input.shape:
            raise ValueError(
                f"residual is {list(added.shape)}; it must have the shape of the input, {list(input.shape)}"
            )
        if not self.training:
            y = F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
            y = y if added is None else y.add_(added)
            return y.relu_() if relu else y
        # In one of the two memory formats that the kernels are fast for; a sequence is an image of width 1.
        is_last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if is_last else torch.contiguous_format
        x, added = (
            None if t is None else (t.unsqueeze(-1) if t.dim() == 3 else t).contiguous(memory_format=memory_format)
            for t in (input, added)
        )
        assert x is not None
        images: dict[ViewBatchNorm, Tensor] = {self: x}
        if isinstance(residual, Deferred):
            assert added is not None
            images[residual.norm] = added
        count = self._values_per_channel(input)
        with torch.no_grad():
            known = self.statistics if self.statistics is not None else {}
            if self not in known:
                known.update(self._measure(images))
                for norm in images:
                    norm._track(*known[norm], count)
        is_recomputed = self.recomputes_output and relu and added is None
        keeps_output = not (is_fused(x) or is_recomputed) or (added is not None and len(images) == 1)
        options = Options(self.eps, relu, count, self.collective, keeps_output)
        channels = [*known[self], self.weight, self.bias]
        if isinstance(residual, Deferred):
            channels += [*known[residual.norm], residual.weight, residual.bias]
        y, *twin = ViewNormalise.apply(x, added, options, *channels)  # pyright: ignore
        y = y.view(input.shape) if input.dim() == 3 else y
        for second in twin:
            setattr(y, TWIN, second.view(y.shape))
        if is_recomputed and y.requires_grad:
            # Copies, since ZeRO 3 takes parameters away between the passes.
            parameters = (None if p is None else p.detach().clone() for p in (self.weight, self.bias))
            channels = [*known[self], *parameters]
            setattr(y, RECIPE, partial(normalise, x.detach(), None, channels, self.eps, relu))
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        """Raise ValueError unless `input` has one of the shapes of `forward`."""
        if input.dim() not in (2, 3, 4) or input.shape[1] != self.num_features:
            c = self.num_features
            raise ValueError(
                f"ViewBatchNorm takes [V*n, {c}], [V*n, {c}, L] or [V*n, {c}, H, W], given {list(input.shape)}"
            )

    def _values_per_channel(self, input: Tensor) -> int:
        """Count the values N of one channel and one view, over all ranks."""
        rows, views, ranks = input.shape[0], self.num_views, self.collective.world_size
        if rows % views:
            raise ValueError(f"ViewBatchNorm got {rows} rows, which num_views (={views}) does not divide")
        count = input.numel() // (self.num_features * views) * ranks
        if count < 2:
            raise ValueError(
                f"ViewBatchNorm needs more than 1 value per channel and view to train, given {list(input.shape)} with "
                f"num_views={views} on {ranks} rank(s)"
            )
        return count

    def _is_like(self, other: "ViewBatchNorm") -> bool:
        """Return whether the passes of `other` can be those of this norm, too."""
        return self.training and (self.num_views, self.eps) == (other.num_views, other.eps)

    def _measure(self, images: "dict[ViewBatchNorm, Tensor]") -> "Statistics":
        """Return mean and biased variance of each view over all ranks, of each norm; one message for all norms."""
        of_norms = [statistics(x, self.num_views) for x in images.values()]
        local = of_norms[0] if len(of_norms) == 1 else torch.cat(of_norms)  # a kernel less
        if self.collective.world_size == 1:
            mean, var = local[:, 0], local[:, 1]
        else:
            means, variances = self.collective.all_gather(local).unbind(2)
            mean = means.mean(0)
            var = variances.mean(0) + (means - mean).square().mean(0)
        return dict(zip(images, zip(mean.split(self.num_views), var.split(self.num_views), strict=True), strict=True))

    def _track(self, mean_VC: Tensor, var_VC: Tensor, count: int) -> None:
        """Update the running statistics as V successive calls would; k chunks together weigh as much as one batch."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        kept = (1 - self.momentum) ** (1 / self.num_chunks)
        running = (self.running_mean, self.running_var)
        for of_view in zip(mean_VC, var_VC * (count / (count - 1)), strict=True):
            torch._foreach_mul_(running, kept)
            torch._foreach_add_(running, of_view, alpha=1 - kept)
        self.num_batches_tracked.add_(self.num_views)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_views={self.num_views}"


class Deferred(NamedTuple):
    """Hold the input and parameters (copies, [C] or None) of a norm, for the norm that normalises it and adds the result."""

    norm: ViewBatchNorm
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None


Statistics = dict[ViewBatchNorm, tuple[Tensor, Tensor]]  # mean and biased variance, each [V, C]


def convert_norms(model: nn.Module, num_views: int = 2, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Replace every batch norm of `model` by a `ViewBatchNorm`, in place, as nn.SyncBatchNorm.convert_sync_batchnorm does.

    The new norms take over the parameters themselves (an optimizer made before stays valid), buffers, mode, eps and momentum;
    state dicts stay as they are. Hooks of the old norms are lost. Call it before the model is wrapped by DDP or sharded.

    Args:
        model: holds nn.BatchNorm1d, nn.BatchNorm2d or nn.SyncBatchNorm, or is one.
        num_views: number of views in a batch, see `ViewBatchNorm`.
        process_group: ranks to take statistics over; None keeps the group of a SyncBatchNorm, and means all ranks otherwise.

    Returns:
        `model`, or the new norm if `model` itself is one.

    Raises:
        TypeError: if `num_views` is not an integer.
        ValueError: if `num_views` is below 1, and for batch norms that ViewBatchNorm cannot stand for (3-d or lazy ones,
            other subclasses of these three, momentum=None, track_running_stats=False), before anything is changed.
    """
    check_positive_integer("num_views", num_views)
    norms = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, _BatchNorm)}
    for name, norm in norms.items():
        if (reason := _reason_against(norm)) is not None:
            raise ValueError(f"norm {name or 'model'!r} ({type(norm).__name__}) cannot be converted: {reason}")
    # By norm, since one that is used in several places stays one.
    converted = {norm: _converted(norm, num_views, process_group) for norm in norms.values()}
    for name, norm in norms.items():
        if name == "":
            return converted[norm]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, converted[norm])
    return model


def _reason_against(norm: _BatchNorm) -> str | None:
    """Say why `norm` cannot be converted; None means that it can."""
    if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, ViewBatchNorm):
        return "only nn.BatchNorm1d, nn.BatchNorm2d and nn.SyncBatchNorm can; replace it by one of these"
    if not norm.track_running_stats or norm.running_mean is None:
        return "track_running_stats is False, but ViewBatchNorm evaluates with running statistics"
    if norm.momentum is None:
        return "momentum is None, but ViewBatchNorm has no cumulative average; set a number, e.g. 0.1"
    return None


def _converted(norm: _BatchNorm, num_views: int, process_group: dist.ProcessGroup | None) -> ViewBatchNorm:
    """Return a new norm with the parameters, buffers and mode of `norm`."""
    group = getattr(norm, "process_group", None) if process_group is None else process_group
    assert norm.momentum is not None
    new = ViewBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, num_views=num_views, process_group=group
    )
    for name, value in (*norm._parameters.items(), *norm._buffers.items()):
        setattr(new, name, value)
    return new.train(norm.training)


def for_two_consumers(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return `y` twice. If it comes from a norm with a residual on a GPU, that norm's backward pass adds up both gradients."""
    return y, getattr(y, TWIN, y)


def recomputed(y: Tensor) -> contextlib.AbstractContextManager:
    """Keep `y` for no backward pass of the operations inside this context, if it comes from a norm with `recomputes_output`.

    They keep the norm's input instead, which the norm keeps anyway, and its statistics. When one of them needs `y`, it is
    normalised again by the same kernel, so the bits are the same, and nothing is sent. What else they keep goes through the
    hooks of `saved_tensors_hooks` around this context, as without it.
    """
    recipe = getattr(y, RECIPE, None)
    if recipe is None:
        return contextlib.nullcontext()
    storage = y.untyped_storage()._cdata
    # torch asks the innermost hooks only.
    around = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    outer_pack, outer_unpack = around or (lambda tensor: tensor, lambda kept: kept)

    def pack(tensor: Tensor) -> Any:
        return recipe if tensor.untyped_storage()._cdata == storage else outer_pack(tensor)

    return saved_tensors_hooks(pack, lambda kept: recipe() if kept is recipe else outer_unpack(kept))


def synchronize_norms(model: nn.Module, collective: Collective) -> None:
    """Let the norms of `model` take their statistics over the ranks of `collective` from now on."""
    for norm in _norms(model):
        norm.collective = collective


def set_num_views(model: nn.Module, num_views: int) -> None:
    """Let the norms of `model` expect batches of `num_views` views from now on."""
    for norm in _norms(model):
        norm.num_views = num_views


def set_num_chunks(model: nn.Module, num_chunks: int) -> None:
    """Let the norms of `model` expect a batch in `num_chunks` calls; each moves the running statistics by its share."""
    for norm in _norms(model):
        norm.num_chunks = num_chunks


@contextlib.contextmanager
def reuse_batch_stats(model: nn.Module, statistics: Statistics) -> Iterator[None]:
    """Treat all passes inside this context as passes of the same batch.

    The first pass fills `statistics`, which is empty before, and updates the running statistics; later passes read them and
    send nothing. Inside another `reuse_batch_stats` this one does nothing.
    """
    norms = [norm for norm in _norms(model) if norm.statistics is None]
    for norm in norms:
        norm.statistics = statistics
    try:
        yield
    finally:
        for norm in norms:
            norm.statistics = None


def _norms(model: nn.Module) -> list[ViewBatchNorm]:
    """Return all norms of this kind in `model`."""
    return [module for module in model.modules() if isinstance(module, ViewBatchNorm)]
