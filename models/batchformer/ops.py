"""The fused kernels as torch operators `crossbatch::batchformer_*`, so that autograd, torch.compile and FSDP2 know them.

Each has a fake (shapes only), and its backward is an operator too. No mask is stored: backward passes derive it from the
same seeds and positions. Kept per element of a feature: q, k, v and the attention's output; the sum that is normalised;
and the hidden layer's output, where a zero tells the backward pass that no gradient flows. Kept per row: a log-sum-exp, a
mean and a deviation.

Passes over elements are Triton kernels on a GPU and torch operators over small blocks on a CPU; the products between are
torch's. Shapes as in `reference`; the arguments seeds .. first_column are those of a `Mask`.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.library import custom_op

from crossbatch.models.batchformer import passes_cpu, tiles
from crossbatch.models.batchformer.dropout import Mask
from crossbatch.models.batchformer.reference import wide_dtype


def _passes(tensor: Tensor) -> ModuleType:
    if tensor.device.type == "cpu":
        return passes_cpu
    from crossbatch.models.batchformer import passes_triton

    return passes_triton


@custom_op("crossbatch::batchformer_attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, seeds: Tensor, probability: float, first_row: int, first_column: int
) -> tuple[Tensor, Tensor]:
    """Return [S, H, Q, D] and the rows' log-sum-exp of the scaled scores, fp32 [S, H, Q]."""
    mask = Mask(seeds, probability, first_row, first_column)
    out, lse = _empty_outputs(q)
    with torch.autocast(q.device.type, enabled=False):
        tiles.forward(q, k, v, mask, out, lse, _passes(q))
    return out, lse


@custom_op("crossbatch::batchformer_attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seeds: Tensor,
    probability: float,
    first_row: int,
    first_column: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, contiguous."""
    mask = Mask(seeds, probability, first_row, first_column)
    grads = _contiguous_like(q), _contiguous_like(k), _contiguous_like(v)
    with torch.autocast(q.device.type, enabled=False):
        tiles.backward(grad, q, k, v, out, lse, mask, grads, _passes(q))
    return grads


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    S, H, Q, D = q.shape
    out = q.new_empty(S, Q, H, D).transpose(1, 2)  # so that the heads of a row lie side by side for the next product
    return out, q.new_empty(S, H, Q, dtype=wide_dtype(q))


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@attention.register_fake
def _(q, k, v, seeds, probability, first_row, first_column):
    return _empty_outputs(q)


@attention_backward.register_fake
def _(grad, q, k, v, out, lse, seeds, probability, first_row, first_column):
    return _contiguous_like(q), _contiguous_like(k), _contiguous_like(v)


def _keep_for_attention(ctx, inputs, output):
    q, k, v, seeds, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, seeds)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _attention_gradients(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    q, k, v, out, lse, seeds = ctx.saved_tensors
    grads = attention_backward(grad, q, k, v, out, lse, seeds, *ctx.numbers)
    return *grads, None, None, None, None


attention.register_autograd(_attention_gradients, setup_context=_keep_for_attention)


@custom_op("crossbatch::batchformer_bias_relu", mutates_args=())
def bias_relu(x: Tensor, bias: Tensor, seeds: Tensor, probability: float, first_row: int) -> Tensor:
    """Return dropout(relu(x + bias))."""
    return _passes(x).bias_relu(x.contiguous(), bias, Mask(seeds, probability, first_row))


@custom_op("crossbatch::batchformer_bias_relu_backward", mutates_args=())
def bias_relu_backward(grad: Tensor, out: Tensor, probability: float) -> Tensor:
    """Return the gradient of x. An element of `out` is 0 where it was negative or dropped: only there no gradient passes."""
    return _passes(out).bias_relu_backward(grad.contiguous(), out, probability)


@bias_relu.register_fake
def _(x, bias, seeds, probability, first_row):
    return _contiguous_like(x)


@bias_relu_backward.register_fake
def _(grad, out, probability):
    return _contiguous_like(out)


def _keep_for_bias_relu(ctx, inputs, output):
    _, bias, _, ctx.probability, _ = inputs
    ctx.save_for_backward(output)
    ctx.bias_dtype = bias.dtype


def _bias_relu_gradients(ctx, grad):
    (out,) = ctx.saved_tensors
    dx = bias_relu_backward(grad, out, ctx.probability)
    return dx, dx.flatten(0, -2).sum(0, dtype=ctx.bias_dtype), None, None, None


bias_relu.register_autograd(_bias_relu_gradients, setup_context=_keep_for_bias_relu)


@custom_op("crossbatch::batchformer_add_norm", mutates_args=())
def add_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float, seeds: Tensor, probability: float, first_row: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return LayerNorm(x + dropout(y)), that sum [S, Q, C], its mean and 1 / its deviation [S, Q]."""
    mask = Mask(seeds, probability, first_row)
    return _passes(x).add_norm(x.contiguous(), y.contiguous(), weight, bias, eps, mask)


@custom_op("crossbatch::batchformer_add_norm_backward", mutates_args=())
def add_norm_backward(
    grad: Tensor,
    y: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    seeds: Tensor,
    probability: float,
    first_row: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x + dropout(y), y, weight and bias; only the dtype of `y` is read."""
    mask = Mask(seeds, probability, first_row)
    return _passes(total).add_norm_backward(grad.contiguous(), total, mean, rstd, weight, mask, y.dtype)


def _norm_outputs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(wide_dtype(x), y.dtype)
    out = x.new_empty(x.shape, dtype=dtype)
    mean = x.new_empty(x.shape[:-1], dtype=dtype)
    return out, torch.empty_like(out), mean, torch.empty_like(mean)


@add_norm.register_fake
def _(x, y, weight, bias, eps, seeds, probability, first_row):
    return _norm_outputs(x, y)


@add_norm_backward.register_fake
def _(grad, y, total, mean, rstd, weight, seeds, probability, first_row):
    vectors = torch.empty_like(weight), torch.empty_like(weight)
    return torch.empty_like(total), torch.empty_like(total, dtype=y.dtype), *vectors


def _keep_for_add_norm(ctx, inputs, output):
    x, y, weight, _, _, seeds, ctx.probability, ctx.first_row = inputs
    _, *statistics = output
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(y.new_empty(0), *statistics, weight, seeds)
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)


def _add_norm_gradients(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    y, total, mean, rstd, weight, seeds = ctx.saved_tensors
    dx, dy, dweight, dbias = add_norm_backward(
        grad, y, total, mean, rstd, weight, seeds, ctx.probability, ctx.first_row
    )
    return dx.to(ctx.x_dtype), dy, dweight, dbias, None, None, None, None


add_norm.register_autograd(_add_norm_gradients, setup_context=_keep_for_add_norm)
