"""Defines the passes of a `ViewBatchNorm` as operators `crossbatch::view_norm_*`, and their gradients.

Each operator is one pass over the images, with a fake (shapes only) for FakeTensorMode and torch.compile, so a dispatch mode
sees what is read and written. A GPU runs Triton kernels where images are stored channels last, or are 2-d; contiguous images
and fp64 go through torch's kernels, as everything does on a CPU. They are made by `Library.define`, because a call of a
`custom_op` takes 25 us more of Python on the path of every norm.

What the backward pass of a ReLU keeps is decided by bytes. Without a residual, Triton's kernels compute the mask again from x,
which they read anyway. With one, the mask comes from the output: the next layer keeps that as its input, while nobody else may
keep the residual (the shortcut of the first block of a ResNet's stage). The gradient before that ReLU is also the residual's,
so the pass for the sums writes it, and the last pass reads it in place of the output and the incoming gradients.
"""

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossbatch.models.collective import Collective
from crossbatch.models.norm import passes_torch

_CHANNELS = "Tensor mean, Tensor var, Tensor? weight, Tensor? bias"
_library = torch.library.Library("crossbatch", "FRAGMENT")


def is_fused(x: Tensor) -> bool:
    """Return whether the passes over `x` are Triton's."""
    is_last = x.dim() == 2 or x.is_contiguous(memory_format=torch.channels_last)
    return x.is_cuda and is_last and x.dtype != torch.float64 and _runs_triton(x.device)


@functools.cache
def _runs_triton(device: torch.device) -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


def _passes(x: Tensor) -> ModuleType:
    """Return the module of the passes over `x`; Triton is imported when a GPU needs it."""
    if not is_fused(x):
        return passes_torch
    from crossbatch.models.norm import passes_triton

    return passes_triton


def run_pass(name: str, x: Tensor, *args) -> Any:
    """Make the pass `name` over x: the one place from which all of them are called."""
    return getattr(_passes(x), name)(x, *args)


def _define(name: str, signature: str, fake: Callable) -> Callable:
    """Return the operator of the pass `name`, on whatever device x is."""
    operator = f"view_norm_{name}"
    _library.define(f"{operator}(Tensor x, {signature}", tags=torch.Tag.pt2_compliant_tag)
    _library.impl(operator, functools.partial(run_pass, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"crossbatch::{operator}", fake, lib=_library)
    return getattr(torch.ops.crossbatch, operator).default


def _fake_pairs(x: Tensor, num_views: int) -> Tensor:
    return x.new_empty(num_views, 2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_sums(x, dys, y, mean, var, weight, bias, eps, relu) -> list[Tensor]:
    writes = y is not None or len(dys) == 2 or (relu and not is_fused(x))
    return [_fake_pairs(x, len(mean)), *[torch.empty_like(x)] * writes]


def _fake_image(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x)


statistics = _define("statistics", "int num_views) -> Tensor", _fake_pairs)
normalise = _define("normalise", f"Tensor? residual, {_CHANNELS}, float eps, bool relu) -> Tensor", _fake_image)
backward_sums = _define(
    "backward_sums", f"Tensor[] dys, Tensor? y, {_CHANNELS}, float eps, bool relu) -> Tensor[]", _fake_sums
)
input_gradient = _define(
    "input_gradient", f"Tensor dy, {_CHANNELS}, Tensor sums, float eps, int count, bool relu) -> Tensor", _fake_image
)


class Options(NamedTuple):
    """Hold what `ViewNormalise` takes besides tensors."""

    eps: float
    relu: bool
    count: int  # of values in a channel of a view, over all ranks
    collective: Collective
    keeps_output: bool  # for the mask of the ReLU; otherwise it is computed again


class ViewNormalise(torch.autograd.Function):
    """Compute relu((x - mean) / sqrt(var + eps) * weight + bias + residual) per view; the backward pass knows that mean and var
    come from x.

    Returns the result twice if there are Triton's kernels and a residual, for two consumers: the backward pass adds up their
    gradients as it reads them, where autograd would do so in a pass of its own.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, x, weight, bias, mean_VC, var_VC, residual, options: Options
    ) -> tuple[Tensor, ...]:
        ctx.options = options
        ctx.set_materialize_grads(False)
        y = normalise(x, residual, mean_VC, var_VC, weight, bias, options.eps, options.relu)
        kept = y if options.relu and options.keeps_output else None
        ctx.save_for_backward(x, weight, bias, mean_VC, var_VC, kept)
        return (y, y.detach()) if residual is not None and is_fused(x) else (y,)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, weight, bias, mean_VC, var_VC, y), (eps, relu, count, collective, _) = ctx.saved_tensors, ctx.options
        needs_dx, needs_dweight, needs_dbias, _, _, needs_residual, _ = ctx.needs_input_grad
        memory_format = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        given = [dy.contiguous(memory_format=memory_format) for dy in dys if dy is not None]
        if not given:
            return (None,) * 7
        channels = mean_VC, var_VC, weight, bias
        sums_V2C, *written = backward_sums(x, given, y, *channels, eps, relu)
        # `dy` is the gradient before the ReLU, or without one written, that behind it.
        dy, relu = (written[0], False) if written else (given[0], relu)
        # The parameters' gradients first: an all-reduce may work in place.
        dweight = sums_V2C[:, 1].sum(0).to(weight.dtype) if needs_dweight else None
        dbias = sums_V2C[:, 0].sum(0).to(weight.dtype) if needs_dbias else None
        dx = None
        if needs_dx:
            if collective.world_size > 1:
                sums_V2C = collective.all_reduce(sums_V2C)
            dx = input_gradient(x, dy, *channels, sums_V2C, eps, count, relu)
        return dx, dweight, dbias, None, None, dy if needs_residual else None, None
