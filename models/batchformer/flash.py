"""Attention in one kernel that never writes scores to memory (Dao et al. 2022, "FlashAttention"), for sm_80 and later.

Heads of up to 512 features, which a ResNet-50 has, are what others leave out. The products over features run over slices of a
head, so that shared memory holds slices of the operands; the sums of a block of rows (or columns) stay whole, in
registers. Dropout is that of `passes_triton`: by position, computed again in the backward pass.

Both sums of the column kernel, dK and dV, are [columns, features] in registers, hence the smaller block of columns there.
"""

from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossbatch.models.batchformer.dispatch import FLASH_FEATURES
from crossbatch.models.batchformer.dropout import Mask
from crossbatch.models.batchformer.passes_triton import launch, score_rows, survive

SLICE = 64  # features of an operand of a product
ROWS = 64
COLUMNS = 32
ROWS_OF_COLUMNS = 32  # at once, in the kernel whose sums belong to columns
_WARPS = 8


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, out: Tensor, lse: Tensor, _: ModuleType) -> None:
    """See `tiles.forward`."""
    S, H, Q, D = q.shape
    launch(
        _forward,
        (triton.cdiv(Q, ROWS), S * H),
        q,
        k,
        v,
        out,
        lse,
        *_strides(q, k, v, out),
        *_numbers(q, k, mask),
        **_constants(D, mask),
        num_warps=_WARPS,
    )


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    grads: tuple[Tensor, Tensor, Tensor],
    _: ModuleType,
) -> None:
    """See `tiles.backward`."""
    (S, H, Q, D), G = q.shape, k.shape[2]
    dq, dk, dv = grads
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    delta = torch.linalg.vecdot(grad.float(), out.float())
    inputs = q, k, v, grad, lse, delta
    numbers = *_strides(q, k, v, grad), *_numbers(q, k, mask)
    constants = _constants(D, mask)
    launch(_rows_backward, (triton.cdiv(Q, ROWS), S * H), *inputs, dq, *numbers, **constants, num_warps=_WARPS)
    constants["ROWS"] = ROWS_OF_COLUMNS
    launch(
        _columns_backward, (triton.cdiv(G, COLUMNS), S * H), *inputs, dk, dv, *numbers, **constants, num_warps=_WARPS
    )


def _strides(*tensors_SHND: Tensor) -> tuple[int, ...]:
    """Of sequences, heads and rows; features lie side by side."""
    assert all(tensor.stride(-1) == 1 for tensor in tensors_SHND)
    return tuple(stride for tensor in tensors_SHND for stride in tensor.stride()[:3])


def _numbers(q: Tensor, k: Tensor, mask: Mask) -> tuple[Any, ...]:
    (S, H, Q, D), G = q.shape, k.shape[2]
    drops = mask.words_V, mask.threshold, 1 / (1 - mask.probability)
    return D**-0.5, H, S // len(mask.words_V), Q, G, mask.first_row, mask.first_column, *drops


def _constants(features: int, mask: Mask) -> dict[str, Any]:
    assert features <= FLASH_FEATURES
    block = max(16, triton.next_power_of_2(features))
    return {
        "DROP": mask.probability > 0,
        "D": features,
        "BLOCK": block,
        "SLICE": min(SLICE, block),
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
    }


@triton.jit
def _start(tensor, stride_s, stride_h, H):
    """Of this program's sequence and head."""
    number = tl.program_id(1)
    return tensor + (number // H).to(tl.int64) * stride_s + (number % H).to(tl.int64) * stride_h


@triton.jit
def _product(
    a, b, rows, columns, a_stride, b_stride, A, B, D: tl.constexpr, SLICE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """a[rows] b[columns]^T, [ROWS, COLUMNS] in fp32, a slice of features at a time."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, SLICE):
        d = start + tl.arange(0, SLICE)
        left = tl.load(a + rows[:, None] * a_stride + d[None, :], (rows[:, None] < A) & (d[None, :] < D), 0.0)
        right = tl.load(b + columns[None, :] * b_stride + d[:, None], (columns[None, :] < B) & (d[:, None] < D), 0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _features(a, rows, stride, A, D: tl.constexpr, BLOCK: tl.constexpr):
    """a[rows], [.., BLOCK], zero outside."""
    d = tl.arange(0, BLOCK)
    return tl.load(a + rows[:, None] * stride + d[None, :], (rows[:, None] < A) & (d[None, :] < D), 0.0)


@triton.jit
def _store(a, rows, stride, A, value, D: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    tl.store(a + rows[:, None] * stride + d[None, :], value, (rows[:, None] < A) & (d[None, :] < D))


@triton.jit
def _forward(
    q, k, v, out, lse,
    q_s, q_h, q_n, k_s, k_h, k_n, v_s, v_h, v_n, o_s, o_h, o_n,
    scale, H, groups, Q, G, first_row, first_column, words, threshold, inverse,
    DROP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = dropout(softmax(scale q k^T)) v of a block of rows."""
    number = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q, k, v = _start(q, q_s, q_h, H), _start(k, k_s, k_h, H), _start(v, v_s, v_h, H)
    of_rows, column = score_rows(number, rows, H, groups, Q, G, first_row, first_column, words)
    highest = tl.full((ROWS,), -1e38, tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, G, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        s = _product(q, k, rows, columns, q_n, k_n, Q, G, D, SLICE, ROWS, COLUMNS) * scale
        s = tl.where(columns[None, :] < G, s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp(s - higher[:, None])
        fade = tl.exp(highest - higher)
        sums = sums * fade + tl.sum(p, 1)
        if DROP:
            p = tl.where(survive(of_rows[:, None], (column + columns)[None, :], threshold), p, 0.0)
        values = _features(v, columns, v_n, G, D, BLOCK)
        total = tl.dot(p.to(values.dtype), values, total * fade[:, None], input_precision="ieee")
        highest = higher
    total *= (inverse / sums)[:, None]
    _store(_start(out, o_s, o_h, H), rows, o_n, Q, total, D, BLOCK)
    tl.store(lse + number.to(tl.int64) * Q + rows, highest + tl.log(sums), rows < Q)


@triton.jit
def _gradients(
    q, k, v, grad, rows, columns, q_n, k_n, v_n, g_n, log_sums, deltas,
    scale, H, groups, Q, G, first_row, first_column, words, threshold, inverse,
    DROP: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(P M, dS) of `tiles.backward`, [ROWS, COLUMNS]; zero outside."""
    s = _product(q, k, rows, columns, q_n, k_n, Q, G, D, SLICE, ROWS, COLUMNS) * scale
    real = (rows[:, None] < Q) & (columns[None, :] < G)
    p = tl.where(real, tl.exp(s - log_sums[:, None]), 0.0)
    dp = _product(grad, v, rows, columns, g_n, v_n, Q, G, D, SLICE, ROWS, COLUMNS) * inverse
    kept = p * inverse
    if DROP:
        of_rows, column = score_rows(tl.program_id(1), rows, H, groups, Q, G, first_row, first_column, words)
        keep = survive(of_rows[:, None], (column + columns)[None, :], threshold)
        dp = tl.where(keep, dp, 0.0)
        kept = tl.where(keep, kept, 0.0)
    return kept, p * (dp - deltas[:, None]) * scale


@triton.jit
def _rows_backward(
    q, k, v, grad, lse, delta, dq,
    q_s, q_h, q_n, k_s, k_h, k_n, v_s, v_h, v_n, g_s, g_h, g_n,
    scale, H, groups, Q, G, first_row, first_column, words, threshold, inverse,
    DROP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dq of a block of rows; dq is contiguous."""
    at = tl.program_id(1).to(tl.int64) * Q
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q, k, v, grad = (
        _start(q, q_s, q_h, H), _start(k, k_s, k_h, H), _start(v, v_s, v_h, H), _start(grad, g_s, g_h, H)
    )  # fmt: skip
    log_sums, deltas = tl.load(lse + at + rows, rows < Q, 0.0), tl.load(delta + at + rows, rows < Q, 0.0)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, G, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        _, ds = _gradients(
            q, k, v, grad, rows, columns, q_n, k_n, v_n, g_n, log_sums, deltas,
            scale, H, groups, Q, G, first_row, first_column, words, threshold, inverse,
            DROP, D, SLICE, ROWS, COLUMNS,
        )  # fmt: skip
        keys = _features(k, columns, k_n, G, D, BLOCK)
        total = tl.dot(ds.to(keys.dtype), keys, total, input_precision="ieee")
    _store(dq + at * D, rows, D, Q, total, D, BLOCK)


@triton.jit
def _columns_backward(
    q, k, v, grad, lse, delta, dk, dv,
    q_s, q_h, q_n, k_s, k_h, k_n, v_s, v_h, v_n, g_s, g_h, g_n,
    scale, H, groups, Q, G, first_row, first_column, words, threshold, inverse,
    DROP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of columns; both are contiguous."""
    at = tl.program_id(1).to(tl.int64) * Q
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    q, k, v, grad = (
        _start(q, q_s, q_h, H), _start(k, k_s, k_h, H), _start(v, v_s, v_h, H), _start(grad, g_s, g_h, H)
    )  # fmt: skip
    dk_total = tl.zeros((COLUMNS, BLOCK), tl.float32)
    dv_total = tl.zeros((COLUMNS, BLOCK), tl.float32)
    for first in range(0, Q, ROWS):
        rows = first + tl.arange(0, ROWS)
        log_sums, deltas = tl.load(lse + at + rows, rows < Q, 0.0), tl.load(delta + at + rows, rows < Q, 0.0)
        kept, ds = _gradients(
            q, k, v, grad, rows, columns, q_n, k_n, v_n, g_n, log_sums, deltas,
            scale, H, groups, Q, G, first_row, first_column, words, threshold, inverse,
            DROP, D, SLICE, ROWS, COLUMNS,
        )  # fmt: skip
        gradients = _features(grad, rows, g_n, Q, D, BLOCK)
        dv_total = tl.dot(tl.trans(kept.to(gradients.dtype)), gradients, dv_total, input_precision="ieee")
        queries = _features(q, rows, q_n, Q, D, BLOCK)
        dk_total = tl.dot(tl.trans(ds.to(queries.dtype)), queries, dk_total, input_precision="ieee")
    start = tl.program_id(1).to(tl.int64) * G * D
    _store(dk + start, columns, D, G, dk_total, D, BLOCK)
    _store(dv + start, columns, D, G, dv_total, D, BLOCK)
