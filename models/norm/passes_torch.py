"""Makes the passes of a `ViewBatchNorm` of torch's own kernels, one view at a time: on a CPU, and where Triton's cannot run.

The `native_batch_norm` family takes half-precision inputs with fp32 parameters on every device. Tensors of images are
[V*n, C, ...], of one view [n, C, ...]. What each pass computes is said here, for Triton's as well.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# Of a norm: mean and biased variance, [V, C], weight and bias, [C] or None. Of two norms: eight.
Channels = Sequence[Any]

SLOT_ROWS = 128  # at least, see `_in_slots`


def statistics(x: Tensor, num_views: int) -> Tensor:
    """Return mean and biased variance of each view, [V, 2, C], in fp32 (in fp64 for fp64)."""
    return _stack_pairs(_local_statistics(x_v) for x_v in _split(x, num_views))


def normalise(x: Tensor, residual: Tensor | None, channels: Channels, eps: float, relu: bool) -> Tensor:
    """Return relu((x - mean) / sqrt(var + eps) * weight + bias + residual); the last two steps are optional.

    With the channels of two norms, the residual is normalised by the second before it is added.
    """
    mean_VC, var_VC, weight, bias, *of_residual = channels
    weight_C, bias_C = in_dtype(weight, mean_VC, 1.0), in_dtype(bias, mean_VC, 0.0)
    y = torch.empty_like(x)
    shifted_var_VC = (var_VC + eps).rsqrt().pow(-2)
    views = zip(_split(x, len(mean_VC)), mean_VC, shifted_var_VC, _split(y, len(mean_VC)), strict=True)
    for x_v, mean_C, shifted_var_C, y_v in views:
        _normalise(x_v, mean_C, shifted_var_C, weight_C, bias_C, out=y_v)
    if residual is not None:
        y += normalise(residual, None, of_residual, eps, False) if of_residual else residual
    return y.relu_() if relu else y


def backward_sums(
    x: Tensor,
    residual: Tensor | None,
    dys: Sequence[Tensor],
    y: Tensor | None,
    channels: Channels,
    eps: float,
    relu: bool,
) -> list[Tensor]:
    """Return sum(dy) and sum(dy * xhat) of each view, [V, 2, C], and dy before the ReLU where that is a new tensor.

    `dys` are one or two gradients of the output, which are added. A residual that is normalised, too, adds its
    sum(dy * xhat): [V, 3, C]. Other residuals are not passed.
    """
    dy = dys[0] if len(dys) == 1 else dys[0] + dys[1]
    if relu:
        y = normalise(x, residual, channels, eps, False) if y is None else y
        dy = torch.ops.aten.threshold_backward(dy, y, 0)
    sums = _sums_of_views(dy, x, channels[:4], eps)
    if residual is not None:
        sums = torch.cat((sums, _sums_of_views(dy, residual, channels[4:], eps)[:, 1:]), 1)
    return [sums] if dy is dys[0] else [sums, dy]


def input_gradients(
    x: Tensor,
    residual: Tensor | None,
    dy: Tensor,
    channels: Channels,
    sums: Tensor,
    eps: float,
    count: int,
    relu: bool,
) -> list[Tensor]:
    """Return the gradient of x and, if the residual is normalised, of the residual, given the sums over `count` values."""
    assert not relu  # `backward_sums` has returned dy before the ReLU
    dx = _input_gradient(x, dy, channels[:4], sums[:, :2], eps, count)
    return [dx] if residual is None else [dx, _input_gradient(residual, dy, channels[4:], sums[:, ::2], eps, count)]


def _input_gradient(x: Tensor, dy: Tensor, channels: Channels, sums_V2C: Tensor, eps: float, count: int) -> Tensor:
    """Return dx. Its part in xhat is itself a normalisation of x: the same kernel."""
    mean_VC, var_VC, weight, _ = channels
    dx, invstd_VC = torch.empty_like(x), (var_VC + eps).rsqrt()
    scale_VC = in_dtype(weight, mean_VC, 1.0) * invstd_VC
    shift_slope_V2C = -scale_VC.unsqueeze(1) * (sums_V2C / count)
    images = (_split(tensor, len(mean_VC)) for tensor in (dy, x, dx))
    for dy_v, x_v, dx_v, mean_C, shifted_var_C, scale_C, (shift_C, slope_C) in zip(
        *images, mean_VC, invstd_VC.pow(-2), scale_VC, shift_slope_V2C, strict=True
    ):
        _normalise(x_v, mean_C, shifted_var_C, slope_C, shift_C, dx_v)
        if dy_v.dtype == scale_C.dtype:
            dx_v.addcmul_(dy_v, scale_C.view(1, -1, *(1,) * (x.dim() - 2)))
        else:  # for addcmul_, torch would first make fp32 copies of all three
            scaled_v, zero_C = torch.empty_like(dx_v), torch.zeros_like(scale_C)
            _normalise(dy_v, zero_C, torch.ones_like(scale_C), scale_C, zero_C, scaled_v)
            dx_v += scaled_v
    return dx


def _sums_of_views(dy: Tensor, x: Tensor, channels: Channels, eps: float) -> Tensor:
    """Return sum(dy) and sum(dy * xhat) of each view, [V, 2, C]."""
    mean_VC, var_VC, weight, _ = channels
    weight_C, invstd_VC = in_dtype(weight, mean_VC, 1.0), (var_VC + eps).rsqrt()
    views = zip(_split(dy, len(mean_VC)), _split(x, len(mean_VC)), mean_VC, invstd_VC, strict=True)
    return _stack_pairs(_backward_sums(*view, weight_C) for view in views)


def in_dtype(parameter: Tensor | None, like_VC: Tensor, default: float) -> Tensor:
    """Return a parameter [C] in the dtype of the statistics, or `default` everywhere if the norm has none."""
    return torch.full_like(like_VC[0], default) if parameter is None else parameter.to(like_VC.dtype)


def _split(x: Tensor, num_views: int) -> Tensor:
    """Split [V*n, C, ...] -> [V, n, C, ...]: each view is a run of rows, so dense in the memory format of `x`."""
    return x.unflatten(0, (num_views, -1))


def _stack_pairs(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Stack a pair of tensors [C] of every view -> [V, 2, C], in one copy."""
    return torch.stack([tensor for pair in pairs for tensor in pair]).unflatten(0, (-1, 2))


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
