"""Computes the passes between the products in Triton kernels without `tl.dot`, which run from V100 (sm_70) on.

A program handles some whole rows, reads fp16, bf16 or fp32 and computes in fp32. Masks come from the seeds of
`DropoutKey.dropout_seeds` on the GPU, so that a new step compiles nothing anew, and from positions; see `dropout` for the hash.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossbatch.models.batchformer.dropout import Mask, threshold
from crossbatch.models.batchformer.reference import wide_dtype
from crossbatch.models.batchformer.tiles import Area

ELEMENTS = 1024  # of a program at once, or a whole row of C features
_PARTIAL_SUMS = 264  # programs that sum over rows: two for each of an H100's multiprocessors


def softmax_dropout(scores_BRG: Tensor, lse_BR: Tensor, area: Area, dtype: torch.dtype) -> Tensor:
    """Return dropout(softmax(area.scale * scores)) in `dtype`, in place where that is the scores'; fill `lse_BR`."""
    (B, R, G), block = scores_BRG.shape, _block(scores_BRG.shape[-1], ELEMENTS)
    out = scores_BRG if scores_BRG.dtype == dtype else torch.empty_like(scores_BRG, dtype=dtype)
    numbers = area.scale, B * R, R, G, *_place(area), *_drops(area.mask)
    _launch(_softmax_dropout, _grid(B * R, block), scores_BRG, out, lse_BR, *numbers, **block)
    return out


def softmax_dropout_backward(
    scores_BRG: Tensor, gradient_BRG: Tensor, lse_BR: Tensor, delta_BR: Tensor, area: Area, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (P M, dS) of `tiles.backward` in `dtype` from scores and dP, in place where that is theirs."""
    (B, R, G), block = scores_BRG.shape, _block(scores_BRG.shape[-1], ELEMENTS)
    same = scores_BRG.dtype == dtype
    kept, ds = (x if same else torch.empty_like(x, dtype=dtype) for x in (scores_BRG, gradient_BRG))
    tensors = scores_BRG, gradient_BRG, kept, ds, lse_BR, delta_BR.contiguous()
    numbers = area.scale, B * R, R, G, *_place(area), *_drops(area.mask)
    _launch(_softmax_dropout_backward, _grid(B * R, block), *tensors, *numbers, **block)
    return kept, ds


def bias_relu(x_SQC: Tensor, bias_C: Tensor, mask: Mask) -> Tensor:
    """Return dropout(relu(x + bias)) in the dtype of x."""
    (S, Q, C), out = x_SQC.shape, torch.empty_like(x_SQC)
    block = _block(C, ELEMENTS)
    grid = (*_grid(S * Q, block), triton.cdiv(C, block["BLOCK"]))
    _launch(_bias_relu, grid, x_SQC, bias_C, out, S * Q, C, *_rows(mask, S, Q), *_drops(mask), **block)
    return out


def bias_relu_backward(grad_SQC: Tensor, out_SQC: Tensor, probability: float) -> Tensor:
    """Return the gradient of x."""
    dx = torch.empty_like(out_SQC)
    grid = (triton.cdiv(dx.numel(), ELEMENTS),)
    _launch(_bias_relu_backward, grid, grad_SQC, out_SQC, dx, dx.numel(), 1 / (1 - probability), BLOCK=ELEMENTS)
    return dx


def add_norm(
    x_SQC: Tensor, y_SQC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, mask: Mask
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return LayerNorm(x + dropout(y)), x + dropout(y), and its mean and 1 / deviation, [S, Q]."""
    (S, Q, C), block = x_SQC.shape, _block(x_SQC.shape[-1])
    out = torch.empty_like(x_SQC, dtype=torch.promote_types(x_SQC.dtype, wide_dtype(y_SQC)))
    total, mean = torch.empty_like(out), out.new_empty(S, Q)
    rstd = torch.empty_like(mean)
    tensors = x_SQC, y_SQC, weight_C, bias_C, out, total, mean, rstd
    numbers = eps, S * Q, C, *_rows(mask, S, Q), *_drops(mask)
    _launch(_add_norm, _grid(S * Q, block), *tensors, *numbers, **block, num_warps=_warps(block))
    return out, total, mean, rstd


def add_norm_backward(
    grad_SQC: Tensor,
    total_SQC: Tensor,
    mean_SQ: Tensor,
    rstd_SQ: Tensor,
    weight_C: Tensor,
    mask: Mask,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, y, weight and bias."""
    (S, Q, C), block = total_SQC.shape, _block(total_SQC.shape[-1])
    dx, dy = torch.empty_like(total_SQC), torch.empty_like(total_SQC, dtype=y_dtype)
    programs = min(*_grid(S * Q, block), _PARTIAL_SUMS)
    sums = dx.new_empty(2, programs, C)
    tensors = grad_SQC, total_SQC, mean_SQ, rstd_SQ, weight_C, dx, dy, sums
    numbers = S * Q, C, *_rows(mask, S, Q), *_drops(mask)
    _launch(_add_norm_backward, (programs,), *tensors, *numbers, **block, num_warps=_warps(block))
    return dx, dy, sums[0].sum(0, dtype=weight_C.dtype), sums[1].sum(0, dtype=weight_C.dtype)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments, num_warps: int = 4, **constants) -> None:
    """Call kernel[grid](...), where a type checker cannot know the arguments."""
    # Half of a multiprocessor's registers at most; without a limit, ptxas spills some for more threads than a pass needs.
    kernel[grid](*arguments, **constants, num_warps=num_warps, maxnreg=min(255, 1024 // num_warps))


def _block(columns: int, most: int | None = None) -> dict[str, int]:
    """Choose rows and columns that a program holds at once: whole rows, or at most `most` columns of them."""
    block = triton.next_power_of_2(columns) if most is None else min(triton.next_power_of_2(columns), most)
    return {"ROWS": max(1, ELEMENTS // block), "BLOCK": block}


def _grid(rows: int, block: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, block["ROWS"]),)


def _warps(block: dict[str, int]) -> int:
    return 4 if block["ROWS"] * block["BLOCK"] <= 1024 else 8


def _place(area: Area) -> tuple[int, ...]:
    mask = area.mask
    groups = area.sequences // len(mask.seeds_V)
    return area.first_head, area.heads, groups, area.rows, mask.first_row, area.first_row, mask.first_column


def _rows(mask: Mask, sequences: int, rows: int) -> tuple[int, ...]:
    return mask.first_row, sequences // len(mask.seeds_V) * rows


def _drops(mask: Mask) -> tuple[Tensor, int, float, bool]:
    return mask.seeds_V, threshold(mask.probability), 1 / (1 - mask.probability), mask.probability > 0


@triton.jit
def hash_words(word):
    """Compute `triple32` of uint32."""
    word = (word ^ (word >> 17)) * 0xED5AD4BB
    word = (word ^ (word >> 11)) * 0xAC4C1B51
    word = (word ^ (word >> 15)) * 0x31848BAB
    return word ^ (word >> 14)


@triton.jit
def row_words(rows, seed):
    """Return what the elements of a row share, for `survive`. `rows` int32, `seed` as loaded."""
    return hash_words(hash_words(rows.to(tl.uint32, bitcast=True)) ^ seed.to(tl.uint32, bitcast=True))


@triton.jit
def survive(of_rows, columns, threshold):
    """Tell which elements are kept: `of_rows` from `row_words`, `columns` int32."""
    words = hash_words(of_rows ^ hash_words(columns.to(tl.uint32, bitcast=True)))
    return words.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def _score_rows(
    total, R, G, first_head, heads, groups, Q, first_row, tile_row, first_column, seeds, ROWS: tl.constexpr
):
    """Return rows of the tile, which of them exist, their row words and the numbers of their first columns; all [ROWS, 1]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    real = row < total
    known = tl.minimum(row, total - 1)
    head = first_head + known // R  # of S * H
    sequence = head // heads
    group = sequence % groups
    position = first_row + group * Q + tile_row + known % R
    of_rows = row_words(position * heads + head % heads, tl.load(seeds + sequence // groups))
    return row, real, of_rows, first_column + group * G


@triton.jit
def _softmax_dropout(
    scores, out, lse,  # [B, R, G], [B, R, G], [B, R]
    scale, total, R, G,
    first_head, heads, groups, Q, first_row, tile_row, first_column,
    seeds, threshold, inverse, DROP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, real, of_rows, column = _score_rows(
        total, R, G, first_head, heads, groups, Q, first_row, tile_row, first_column, seeds, ROWS
    )
    at = row.to(tl.int64) * G
    highest = tl.full((ROWS, 1), -1e38, tl.float32)
    sums = tl.zeros((ROWS, 1), tl.float32)
    for start in range(0, G, BLOCK):
        i = start + tl.arange(0, BLOCK)[None, :]
        s = tl.load(scores + at + i, real & (i < G), 0.0).to(tl.float32) * scale
        s = tl.where(i < G, s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1, keep_dims=True))
        sums = sums * tl.exp(highest - higher) + tl.sum(tl.exp(s - higher), 1, keep_dims=True)
        highest = higher
    tl.store(lse + row, highest + tl.log(sums), real)
    factor = inverse / sums
    for start in range(0, G, BLOCK):
        i = start + tl.arange(0, BLOCK)[None, :]
        s = tl.load(scores + at + i, real & (i < G), 0.0).to(tl.float32) * scale
        p = tl.exp(s - highest) * factor
        if DROP:
            p = tl.where(survive(of_rows, column + i, threshold), p, 0.0)
        tl.store(out + at + i, p, real & (i < G))


@triton.jit
def _softmax_dropout_backward(
    scores, gradient, kept, ds, lse, delta,  # four [B, R, G], two [B, R]
    scale, total, R, G,
    first_head, heads, groups, Q, first_row, tile_row, first_column,
    seeds, threshold, inverse, DROP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, real, of_rows, column = _score_rows(
        total, R, G, first_head, heads, groups, Q, first_row, tile_row, first_column, seeds, ROWS
    )
    at = row.to(tl.int64) * G
    log_sum = tl.load(lse + row, real, 0.0)
    row_delta = tl.load(delta + row, real, 0.0)
    for start in range(0, G, BLOCK):
        i = start + tl.arange(0, BLOCK)[None, :]
        inside = real & (i < G)
        p = tl.exp(tl.load(scores + at + i, inside, 0.0).to(tl.float32) * scale - log_sum)
        dp = tl.load(gradient + at + i, inside, 0.0).to(tl.float32) * inverse
        p_kept = p * inverse
        if DROP:
            keep = survive(of_rows, column + i, threshold)
            dp = tl.where(keep, dp, 0.0)
            p_kept = tl.where(keep, p_kept, 0.0)
        tl.store(kept + at + i, p_kept, inside)
        tl.store(ds + at + i, p * (dp - row_delta) * scale, inside)


@triton.jit
def _feature_rows(row, first_row, rows_of_view, seeds):
    """Return the row words of some of the S * Q rows: positions run through the groups of a view."""
    return row_words(first_row + row % rows_of_view, tl.load(seeds + row // rows_of_view))


@triton.jit
def _bias_relu(
    x, bias, out, rows, C, first_row, rows_of_view,
    seeds, threshold, inverse, DROP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (i < C)
    at = row.to(tl.int64) * C + i
    value = tl.load(x + at, inside, 0.0).to(tl.float32) + tl.load(bias + i, i < C, 0.0).to(tl.float32)
    value = tl.where(value < 0, 0.0, value) * inverse  # a NaN stays
    if DROP:
        of_rows = _feature_rows(tl.minimum(row, rows - 1), first_row, rows_of_view, seeds)
        value = tl.where(survive(of_rows, i, threshold), value, 0.0)
    tl.store(out + at, value, inside)


@triton.jit
def _bias_relu_backward(grad, out, dx, count, inverse, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(grad + i, i < count, 0.0).to(tl.float32) * inverse
    tl.store(dx + i, tl.where(tl.load(out + i, i < count, 0.0) == 0, 0.0, value), i < count)


@triton.jit
def _add_norm(
    x, y, weight, bias, out, total, mean, rstd,  # [rows, C] twice, [C] twice, [rows, C] twice, [rows] twice
    eps, rows, C, first_row, rows_of_view,
    seeds, threshold, inverse, DROP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (i < C)
    at = row.to(tl.int64) * C + i
    value = tl.load(y + at, inside, 0.0).to(tl.float32) * inverse
    if DROP:
        of_rows = _feature_rows(tl.minimum(row, rows - 1), first_row, rows_of_view, seeds)
        value = tl.where(survive(of_rows, i, threshold), value, 0.0)
    value += tl.load(x + at, inside, 0.0).to(tl.float32)
    average = tl.sum(value, 1, keep_dims=True) / C
    centred = tl.where(inside, value - average, 0.0)
    inverse_deviation = 1.0 / tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True) / C + eps)
    scaled = centred * inverse_deviation * tl.load(weight + i, i < C, 0.0).to(tl.float32)
    tl.store(out + at, scaled + tl.load(bias + i, i < C, 0.0).to(tl.float32), inside)
    tl.store(total + at, value, inside)
    tl.store(mean + row, average, row < rows)
    tl.store(rstd + row, inverse_deviation, row < rows)


@triton.jit
def _add_norm_backward(
    grad, total, mean, rstd, weight, dx, dy, sums,  # sums: [2, programs, C], of the gradients of weight and bias
    rows, C, first_row, rows_of_view,
    seeds, threshold, inverse, DROP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    i = column[None, :]
    w = tl.load(weight + i, i < C, 0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, rows, programs * ROWS):
        row = first + program * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (i < C)
        at = row.to(tl.int64) * C + i
        g = tl.load(grad + at, inside, 0.0).to(tl.float32)
        inverse_deviation = tl.load(rstd + row, row < rows, 0.0)
        centred = tl.load(total + at, inside, 0.0).to(tl.float32) - tl.load(mean + row, row < rows, 0.0)
        normal = tl.where(inside, centred * inverse_deviation, 0.0)
        dweight += tl.sum(g * normal, 0)
        dbias += tl.sum(g, 0)
        g *= w
        average, slope = tl.sum(g, 1, keep_dims=True) / C, tl.sum(g * normal, 1, keep_dims=True) / C
        gradient = (g - average - normal * slope) * inverse_deviation
        tl.store(dx + at, gradient, inside)
        gradient *= inverse
        if DROP:
            of_rows = _feature_rows(tl.minimum(row, rows - 1), first_row, rows_of_view, seeds)
            gradient = tl.where(survive(of_rows, i, threshold), gradient, 0.0)
        tl.store(dy + at, gradient, inside)
    tl.store(sums + program * C + column, dweight, column < C)
    tl.store(sums + (programs + program) * C + column, dbias, column < C)
