"""Defines the layer's three functions as fused operators `crossbatch::batchformer_*`, for autograd, torch.compile and FSDP2.

Each has a fake (shapes only), and its backward is an operator too. No mask is stored: backward passes derive it from the
same seeds and positions. Kept per element of a feature: q, k, v and the attention's output; the sum that is normalised;
and the hidden layer's output, where a zero tells the backward pass that no gradient flows. Kept per row: a log-sum-exp, a
mean and a deviation.

Passes over elements are Triton kernels on a GPU and torch operators over small blocks on a CPU; the products between are
torch's (`tiles`). Shapes as in `reference`; operators take a `Mask` as its fields, seeds .. first_column.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.library import custom_op

from crossbatch.models.batchformer import passes_cpu, tiles
from crossbatch.models.batchformer.dropout import Mask
from crossbatch.models.batchformer.reference import wide_dtype


def attention(q_SHQD: Tensor, k_SHGD: Tensor, v_SHGD: Tensor, mask: Mask) -> Tensor:
    """Compute what `reference.attention` does."""
    return attention_op(q_SHQD, k_SHGD, v_SHGD, mask.seeds_V, mask.probability, mask.first_row, mask.first_column)[0]


def bias_relu(x_SQC: Tensor, bias_C: Tensor, mask: Mask) -> Tensor:
    """Compute what `reference.bias_relu` does."""
    return bias_relu_op(x_SQC, bias_C, mask.seeds_V, mask.probability, mask.first_row)


def add_norm(x_SQC: Tensor, y_SQC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, mask: Mask) -> Tensor:
    """Compute what `reference.add_norm` does."""
    return add_norm_op(x_SQC, y_SQC, weight_C, bias_C, eps, mask.seeds_V, mask.probability, mask.first_row)[0]


def _passes(tensor: Tensor) -> ModuleType:
    """Return the module of the passes for this device; Triton is imported when a GPU needs it."""
    if tensor.device.type == "cpu":
        return passes_cpu
    from crossbatch.models.batchformer import passes_triton

    return passes_triton


@custom_op("crossbatch::batchformer_attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, seeds: Tensor, probability: float, first_row: int, first_column: int
) -> tuple[Tensor, Tensor]:
    """Return [S, H, Q, D] and the rows' log-sum-exp of the scaled scores, fp32 [S, H, Q]."""
    out, lse = _empty_outputs(q)
    with torch.autocast(q.device.type, enabled=False):
        tiles.forward(q, k, v, Mask(seeds, probability, first_row, first_column), out, lse, _passes(q))
    return out, lse


@custom_op("crossbatch::batchformer_attention_backward", mutates_args=())
def attention_backward_op(
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
    grads = _contiguous_like(q), _contiguous_like(k), _contiguous_like(v)
    with torch.autocast(q.device.type, enabled=False):
        mask = Mask(seeds, probability, first_row, first_column)
        tiles.backward(grad, (q, k, v), out, lse, mask, grads, _passes(q))
    return grads


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    S, H, Q, D = q.shape
    out = q.new_empty(S, Q, H, D).transpose(1, 2)  # so that the heads of a row lie side by side for the next product
    return out, q.new_empty(S, H, Q, dtype=wide_dtype(q))


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@attention_op.register_fake
def _(q, k, v, seeds, probability, first_row, first_column):
    return _empty_outputs(q)


@attention_backward_op.register_fake
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
    return *attention_backward_op(grad, *ctx.saved_tensors, *ctx.numbers), None, None, None, None


attention_op.register_autograd(_attention_gradients, setup_context=_keep_for_attention)


@custom_op("crossbatch::batchformer_bias_relu", mutates_args=())
def bias_relu_op(x: Tensor, bias: Tensor, seeds: Tensor, probability: float, first_row: int) -> Tensor:
    """Return dropout(relu(x + bias))."""
    return _passes(x).bias_relu(x.contiguous(), bias, Mask(seeds, probability, first_row))


@custom_op("crossbatch::batchformer_bias_relu_backward", mutates_args=())
def bias_relu_backward_op(grad: Tensor, out: Tensor, probability: float) -> Tensor:
    """Return the gradient of x. An element of `out` is 0 where it was negative or dropped: only there no gradient passes."""
    return _passes(out).bias_relu_backward(grad.contiguous(), out, probability)


@bias_relu_op.register_fake
def _(x, bias, seeds, probability, first_row):
    return _contiguous_like(x)


@bias_relu_backward_op.register_fake
def _(grad, out, probability):
    return _contiguous_like(out)


def _keep_for_bias_relu(ctx, inputs, output):
    _, bias, _, ctx.probability, _ = inputs
    ctx.save_for_backward(output)
    ctx.bias_dtype = bias.dtype


def _bias_relu_gradients(ctx, grad):
    (out,) = ctx.saved_tensors
    dx = bias_relu_backward_op(grad, out, ctx.probability)
    return dx, dx.flatten(0, -2).sum(0, dtype=ctx.bias_dtype), None, None, None


bias_relu_op.register_autograd(_bias_relu_gradients, setup_context=_keep_for_bias_relu)


@custom_op("crossbatch::batchformer_add_norm", mutates_args=())
def add_norm_op(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float, seeds: Tensor, probability: float, first_row: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return LayerNorm(x + dropout(y)), that sum [S, Q, C], its mean and 1 / its deviation [S, Q]."""
    mask = Mask(seeds, probability, first_row)
    return _passes(x).add_norm(x.contiguous(), y.contiguous(), weight, bias, eps, mask)


@custom_op("crossbatch::batchformer_add_norm_backward", mutates_args=())
def add_norm_backward_op(
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


@add_norm_op.register_fake
def _(x, y, weight, bias, eps, seeds, probability, first_row):
    out = x.new_empty(x.shape, dtype=torch.promote_types(wide_dtype(x), y.dtype))
    mean = out.new_empty(x.shape[:-1])
    return out, torch.empty_like(out), mean, torch.empty_like(mean)


@add_norm_backward_op.register_fake
def _(grad, y, total, mean, rstd, weight, seeds, probability, first_row):
    vectors = torch.empty_like(weight), torch.empty_like(weight)
    return torch.empty_like(total), torch.empty_like(total, dtype=y.dtype), *vectors


def _keep_for_add_norm(ctx, inputs, output):
    x, y, weight, _, _, seeds, *ctx.numbers = inputs
    _, *statistics = output
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(y.new_empty(0), *statistics, weight, seeds)
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)


def _add_norm_gradients(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    dx, *others = add_norm_backward_op(grad, *ctx.saved_tensors, *ctx.numbers)
    return dx.to(ctx.x_dtype), *others, None, None, None, None


add_norm_op.register_autograd(_add_norm_gradients, setup_context=_keep_for_add_norm)
