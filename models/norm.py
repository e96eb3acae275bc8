"""Batch norm that normalises each view by its own statistics, in one call and with one collective.

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
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from crossbatch.models.arguments import check_positive_integer
from crossbatch.models.collective import Collective, GroupCollective

SLOT_ROWS = 128  # at least, see `_in_slots`


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
        self.collective: Collective = GroupCollective(process_group)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a batch; the result has the shape, dtype and memory format of `input`.

        Args:
            input: [V*n, C], [V*n, C, L] or [V*n, C, H, W], view-major (all images of view 1, then all of view 2), with equally
                many rows on every rank; fp16, bf16 or fp32 with fp32 parameters (statistics are fp32 all the same), or fp64
                with fp64 parameters; contiguous or channels_last.

        Raises:
            ValueError: for other shapes; in training, if V does not divide the rows, or if a channel has only one value.
        """
        self._check_input_dim(input)
        if not self.training:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if input.dim() == 3:
            return self.forward(input.unsqueeze(-1)).squeeze(-1)
        count = self._values_per_channel(input)
        # In one of the two memory formats that the kernels are fast for.
        is_last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
        x = input if is_last else input.contiguous()
        with torch.no_grad():
            known = self.statistics if self.statistics is not None else {}
            if self not in known:
                known[self] = self._measure(x)
                self._track(*known[self], count)
            mean_VC, var_VC = known[self]
        normalised = _ViewNormalise.apply(x, self.weight, self.bias, mean_VC, var_VC, self.eps, count, self.collective)
        assert isinstance(normalised, Tensor)
        return normalised

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

    def _measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance of each view over all ranks, each [V, C]."""
        local_V2C = _stack_pairs(_local_statistics(x_v) for x_v in _split(x, self.num_views))
        if self.collective.world_size == 1:
            return local_V2C[:, 0], local_V2C[:, 1]
        mean_WVC, var_WVC = self.collective.all_gather(local_V2C).unbind(2)
        mean_VC = mean_WVC.mean(0)
        return mean_VC, var_WVC.mean(0) + (mean_WVC - mean_VC).square().mean(0)

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
            subclasses of nn.BatchNorm2d with a forward pass of their own, momentum=None, track_running_stats=False), before
            anything is changed.
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


class _ViewNormalise(torch.autograd.Function):
    """Compute (x - mean) / sqrt(var + eps) * weight + bias per view; the backward pass knows that mean and var come from x."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, x, weight, bias, mean_VC, var_VC, eps: float, count: int, collective: Collective
    ) -> Tensor:
        ctx.count, ctx.collective = count, collective
        invstd_VC = (var_VC + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean_VC, invstd_VC)
        weight_C = _in_dtype(weight, mean_VC, 1.0)
        bias_C = _in_dtype(bias, mean_VC, 0.0)
        y = torch.empty_like(x)
        views = len(mean_VC)
        per_view = zip(_split(x, views), mean_VC, invstd_VC.pow(-2), _split(y, views), strict=True)
        for x_v, mean_C, shifted_var_C, y_v in per_view:
            _normalise(x_v, mean_C, shifted_var_C, weight_C, bias_C, out=y_v)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mean_VC, invstd_VC = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        weight_C = _in_dtype(weight, mean_VC, 1.0)
        dy = dy.contiguous() if x.is_contiguous() else dy.contiguous(memory_format=torch.channels_last)
        views = len(mean_VC)
        per_view = list(zip(_split(dy, views), _split(x, views), mean_VC, invstd_VC, strict=True))
        sums_V2C = _stack_pairs(_backward_sums(*view, weight_C) for view in per_view)
        # The parameters' gradients first: an all-reduce may work in place.
        dweight = sums_V2C[:, 1].sum(0).to(weight.dtype) if needs_dweight else None
        dbias = sums_V2C[:, 0].sum(0).to(weight.dtype) if needs_dbias else None
        if not needs_dx:
            return None, dweight, dbias, None, None, None, None, None
        if ctx.collective.world_size > 1:
            sums_V2C = ctx.collective.all_reduce(sums_V2C)
        dx = torch.empty_like(x)
        input_gradients = _input_gradients_cuda if x.is_cuda else _input_gradients
        input_gradients(per_view, invstd_VC, weight_C, sums_V2C / ctx.count, _split(dx, views))
        return dx, dweight, dbias, None, None, None, None, None


def _split(x: Tensor, num_views: int) -> Tensor:
    """Split [V*n, C, ...] -> [V, n, C, ...]: each view is a run of rows, so dense in the memory format of `x`."""
    return x.unflatten(0, (num_views, -1))


def _stack_pairs(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Stack a pair of tensors [C] of every view -> [V, 2, C], in one copy."""
    return torch.stack([tensor for pair in pairs for tensor in pair]).unflatten(0, (-1, 2))


def _in_dtype(parameter: Tensor | None, like_VC: Tensor, default: float) -> Tensor:
    """Return a parameter [C] in the dtype of the statistics, or `default` everywhere if the norm has none."""
    return torch.full_like(like_VC[0], default) if parameter is None else parameter.to(like_VC.dtype)


# What follows calls torch's own kernels for one view: x, dy and out are [n, C, ...], all else [C] or [2, C]. The
# `native_batch_norm` family takes half-precision inputs with fp32 parameters on every device.


def _local_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance on this rank, each [C], in fp32 (in fp64 for fp64)."""
    # `batch_norm_update_stats` returns the dtype of the running statistics that it is given; these are scrap. It is
    # 3 to 10 times faster than torch.var_mean over (0, 2, 3): 2.7 against 9.3 ms contiguous, 1.0 against 9.6 ms
    # channels_last, at [128, 16, 32, 32] on two CPU cores.
    x, slots = _in_slots(x)
    scrap_mean, scrap_var = x.new_zeros((2, x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
    mean, var = torch.batch_norm_update_stats(x, scrap_mean, scrap_var, 0.0)
    if slots == 1:
        return mean, var
    mean_SC, var_SC = mean.view(slots, -1).double(), var.view(slots, -1).double()
    mean_C = mean_SC.mean(0)
    return mean_C.to(mean.dtype), (var_SC.mean(0) + (mean_SC - mean_C).square().mean(0)).to(mean.dtype)


def _in_slots(x: Tensor) -> tuple[Tensor, int]:
    """Return, on a CPU, [n, C, ...] stored channels last as [rows, S*C], and S: each slot has some of the N values per channel.

    torch's kernels for channels last add up all N in fp32, one by one: at [64, 64, 48, 48] the relative error of a variance
    is 5e-4 to 1e-3. Sums over the 128 to 255 rows of a slot, put together in fp64, have one of 6e-7, and cost a tenth more.
    (Its kernels for contiguous images add in fp64, and those of GPUs in a tree.)
    """
    if x.is_cuda or (x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last)):
        return x, 1
    rows_NC = x.movedim(1, -1).flatten(0, -2)
    slots = 1
    while len(rows_NC) % (2 * slots) == 0 and len(rows_NC) // (2 * slots) >= SLOT_ROWS:
        slots *= 2
    return rows_NC.view(-1, slots * x.shape[1]), slots


def _normalise(x: Tensor, mean_C: Tensor, shifted_var_C: Tensor, weight_C: Tensor, bias_C: Tensor, out: Tensor) -> None:
    """Write (x - mean) / sqrt(shifted_var) * weight + bias to `out`: what batch norm does in evaluation."""
    unused = mean_C.new_empty(0), mean_C.new_empty(0)
    torch.native_batch_norm(x, weight_C, bias_C, mean_C, shifted_var_C, False, 0.0, 0.0, out=(out, *unused))


def _backward_sums(dy: Tensor, x: Tensor, mean_C: Tensor, invstd_C: Tensor, weight_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum(dy) and sum(dy * xhat) on this rank, each [C]: the gradients of bias and weight."""
    (dy, slots), (x, _) = _in_slots(dy), _in_slots(x)
    per_channel = (weight_C.repeat(slots), None, None, mean_C.repeat(slots), invstd_C.repeat(slots))
    _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(dy, x, *per_channel, True, 0.0, [False, True, True])
    if slots == 1:
        return dbias, dweight
    sum_dy_C, sum_dy_xhat_C = torch.stack((dbias, dweight)).view(2, slots, -1).double().sum(1).to(dbias.dtype)
    return sum_dy_C, sum_dy_xhat_C


PerView = list[tuple[Tensor, Tensor, Tensor, Tensor]]  # dy, x, mean, invstd


def _input_gradients(
    per_view: PerView, invstd_VC: Tensor, weight_C: Tensor, means_V2C: Tensor, dx_V: Iterable[Tensor]
) -> None:
    """Write dx, given the means of dy and of dy * xhat. Its part in xhat is itself a normalisation of x: the same kernel."""
    scale_VC = weight_C * invstd_VC
    shift_slope_V2C = -scale_VC.unsqueeze(1) * means_V2C
    constants = zip(invstd_VC.pow(-2), scale_VC, shift_slope_V2C, dx_V, strict=True)
    for (dy, x, mean_C, _), (shifted_var_C, scale_C, (shift_C, slope_C), dx) in zip(per_view, constants, strict=True):
        _normalise(x, mean_C, shifted_var_C, slope_C, shift_C, dx)
        dx.addcmul_(dy, scale_C.view(1, -1, *(1,) * (x.dim() - 2)))


def _input_gradients_cuda(
    per_view: PerView, invstd_VC: Tensor, weight_C: Tensor, means_V2C: Tensor, dx_V: Iterable[Tensor]
) -> None:
    """Write dx by the kernel of torch's SyncBatchNorm, which rounds once (it matters in bf16) and cannot write in place."""
    mean_dy_VC, mean_dy_xhat_VC = means_V2C.unbind(1)
    one = torch.ones(1, dtype=torch.int32, device=means_V2C.device)  # the kernel divides sums by their count
    means = zip(mean_dy_VC, mean_dy_xhat_VC / invstd_VC, dx_V, strict=True)
    for (dy, x, mean_C, invstd_C), (mean_dy_C, mean_dy_xmu_C, dx) in zip(per_view, means, strict=True):
        dx.copy_(torch.batch_norm_backward_elemt(dy, x, mean_C, invstd_C, weight_C, mean_dy_C, mean_dy_xmu_C, one))
