"""Defines the passes of a `ViewBatchNorm` as operators `crossbatch::view_norm_*`, and their gradients.

Each operator is one pass over the images, with a fake (shapes only) for FakeTensorMode and torch.compile, so a dispatch mode
sees what is read and written. A GPU runs Triton kernels where images are stored channels last, or are 2-d; contiguous images
and fp64 go through torch's kernels, as everything does on a CPU. They are made by `Library.define`, because a call of a
`custom_op` takes about 20 us more of Python on the path of every norm.

What the backward pass of a ReLU keeps is decided by bytes. Without a residual, Triton's kernels compute the mask again from x,
which they read anyway. With one, the mask comes from the output: the next layer keeps that as its input, while nobody else may
keep the residual (the shortcut of the first block of a ResNet's stage). The gradient before that ReLU is also the residual's,
so the pass for the sums writes it, and the last pass reads it in place of the output and the incoming gradients. A residual
with a norm of its own is an input like x: its norm's passes are made in those of x, and the mask is computed again from both.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossbatch.models.collective import Collective
from crossbatch.models.norm import passes_torch

_CHANNELS = "Tensor?[] channels"
_library = torch.library.Library("crossbatch", "FRAGMENT")


_everywhere = False


@contextlib.contextmanager
def as_if_fused() -> Iterator[None]:
    """Choose as on a GPU for tensors that have shapes only, so that what a GPU would move can be counted without one."""
    global _everywhere
    before, _everywhere = _everywhere, True
    try:
        yield
    finally:
        _everywhere = before


def is_fused(x: Tensor) -> bool:
    """Return whether the passes over `x` are Triton's."""
    if _everywhere:
        return True
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


def _fake_sums(x, residual, dys, y, channels, eps, relu) -> list[Tensor]:
    writes = y is not None or len(dys) == 2 or (relu and not is_fused(x))
    sums = x.new_empty(len(channels[0]), 2 if residual is None else 3, x.shape[1], dtype=channels[0].dtype)
    return [sums, *[torch.empty_like(x)] * writes]


def _fake_image(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x)


def _fake_gradients(x: Tensor, residual: Tensor | None, *_) -> list[Tensor]:
    return [torch.empty_like(image) for image in (x, residual) if image is not None]


statistics = _define("statistics", "int num_views) -> Tensor", _fake_pairs)
normalise = _define("normalise", f"Tensor? residual, {_CHANNELS}, float eps, bool relu) -> Tensor", _fake_image)
backward_sums = _define(
    "backward_sums",
    f"Tensor? residual, Tensor[] dys, Tensor? y, {_CHANNELS}, float eps, bool relu) -> Tensor[]",
    _fake_sums,
)
input_gradients = _define(
    "input_gradients",
    f"Tensor? residual, Tensor dy, {_CHANNELS}, Tensor sums, float eps, int count, bool relu) -> Tensor[]",
    _fake_gradients,
)


class Options(NamedTuple):
    """Hold what `ViewNormalise` takes besides tensors."""

    eps: float
    relu: bool
    values: int  # in a channel of a view, over all ranks
    collective: Collective
    keeps_output: bool  # for the mask of the ReLU; otherwise it is computed again


class ViewNormalise(torch.autograd.Function):
    """Compute relu((x - mean) / sqrt(var + eps) * weight + bias + residual) per view; the backward pass knows that mean and var
    come from x. With the channels of two norms, the residual is normalised by the second, from which its mean and var come.

    Returns the result twice if there are Triton's kernels and a residual, for two consumers: the backward pass adds up their
    gradients as it reads them, where autograd would do so in a pass of its own.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, x, residual, options: Options, *channels: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.options = options
        ctx.set_materialize_grads(False)
        y = normalise(x, residual, channels, options.eps, options.relu)
        kept = y if options.relu and options.keeps_output else None
        ctx.save_for_backward(x, residual if len(channels) == 8 else None, kept, *channels)
        return (y, y.detach()) if residual is not None and is_fused(x) else (y,)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, residual, y, *channels), (eps, relu, values, collective, _) = ctx.saved_tensors, ctx.options
        needs_dx, needs_dresidual, _, *needs = ctx.needs_input_grad
        memory_format = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        given = [dy.contiguous(memory_format=memory_format) for dy in dys if dy is not None]
        if not given:
            return (None,) * (3 + len(channels))
        sums, *written = backward_sums(x, residual, given, y, channels, eps, relu)
        # `dy` is the gradient before the ReLU, or without one written, that behind it.
        dy, relu = (written[0], False) if written else (given[0], relu)
        # The parameters' gradients first: an all-reduce may work in place.
        dchannels: list[Tensor | None] = [None] * len(channels)
        for at in range(2, len(channels), 4):
            for parameter, k in ((at, at // 4 + 1), (at + 1, 0)):  # a weight has sums of its own, a bias that of dy
                if needs[parameter]:
                    dchannels[parameter] = sums[:, k].sum(0).to(channels[parameter].dtype)
        dx, dresidual = None, dy if residual is None else None
        if needs_dx or (needs_dresidual and residual is not None):
            if collective.world_size > 1:
                sums = collective.all_reduce(sums)
            dx, *more = input_gradients(x, residual, dy, channels, sums, eps, values, relu)
            dresidual = more[0] if more else dresidual
        return dx if needs_dx else None, dresidual if needs_dresidual else None, None, *dchannels
