"""Makes the passes of a `ViewBatchNorm` in Triton kernels, each for all views in one launch and with one read of its inputs.

Images are stored channels last, so that memory is [V, R, C] for 2-d and 4-d inputs alike, with R rows in a view. A program
handles a tile of rows and columns, reads fp16, bf16 or fp32 and computes in fp32. Sums are taken over strips of rows and then
added up in one order, so equal inputs give equal bits: nothing is atomic, and the strips do not depend on the GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossbatch.models.norm.passes_torch import in_dtype

ELEMENTS = 4096  # of a tile: 16 for each of 256 threads
COLUMNS = 64  # of a tile at most: 128 bytes of a row in 16 bits
PROGRAMS = 1056  # that sum over rows: eight for each of an H100's multiprocessors
_WARPS = 8


def statistics(x: Tensor, num_views: int) -> Tensor:
    """Compute what `passes_torch.statistics` does, by partial means and sums of squares that are shifted."""
    rows, C, block = _sizes(x, num_views)
    strips, strip = _strips(rows, C, num_views, block)
    partial, out = x.new_empty(strips, num_views, 2, C, dtype=torch.float32), _pairs(x, num_views)
    columns = triton.cdiv(C, block["BLOCK"])
    _launch(_strip_statistics, (strips * columns, num_views), x, partial, rows, C, strip, columns, **block)
    _launch(_merge, (columns, num_views), x, partial, out, rows, C, strip, strips, **block)
    return out


def normalise(
    x: Tensor,
    residual: Tensor | None,
    mean_VC: Tensor,
    var_VC: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """Compute what `passes_torch.normalise` does."""
    rows, C, block = _sizes(x, len(mean_VC))
    y, grid, columns = torch.empty_like(x), *_tiles(rows, C, len(mean_VC), block)
    images = x, x if residual is None else residual, y
    options = {"RESIDUAL": residual is not None, "RELU": relu}
    numbers = mean_VC.stride(0), rows, C, columns, eps
    _launch(_normalise, grid, *images, *_channels(mean_VC, var_VC, weight, bias), *numbers, **options, **block)
    return y


def backward_sums(
    x: Tensor,
    dys: Sequence[Tensor],
    y: Tensor | None,
    mean_VC: Tensor,
    var_VC: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> list[Tensor]:
    """Compute what `passes_torch.backward_sums` does, but for a ReLU whose `y` is not given: `input_gradient` masks again."""
    views = len(mean_VC)
    rows, C, block = _sizes(x, views)
    strips, strip = _strips(rows, C, views, block)
    columns = triton.cdiv(C, block["BLOCK"])
    partial = x.new_empty(strips, views, 2, C, dtype=torch.float32)
    written = [torch.empty_like(x)] if y is not None or len(dys) == 2 else []
    images = dys[0], dys[-1], x, x if y is None else y, *(written or [x])
    options = {"TWO": len(dys) == 2, "RELU": relu, "KEPT": y is not None, "WRITE": bool(written)}
    numbers = mean_VC.stride(0), rows, C, strip, columns, eps
    tensors = *images, *_channels(mean_VC, var_VC, weight, bias), partial
    _launch(_backward_sums, (strips * columns, views), *tensors, *numbers, **options, **block)
    return [partial.sum(0), *written]


def input_gradient(
    x: Tensor,
    dy: Tensor,
    mean_VC: Tensor,
    var_VC: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums_V2C: Tensor,
    eps: float,
    count: int,
    relu: bool,
) -> Tensor:
    """Compute what `passes_torch.input_gradient` does, and with `relu` for the gradient behind the ReLU."""
    rows, C, block = _sizes(x, len(mean_VC))
    dx, grid, columns = torch.empty_like(x), *_tiles(rows, C, len(mean_VC), block)
    tensors = dy, x, dx, *_channels(mean_VC, var_VC, weight, bias), sums_V2C.contiguous()
    numbers = mean_VC.stride(0), rows, C, columns, eps, 1 / count
    _launch(_input_gradient, grid, *tensors, *numbers, RELU=relu, **block)
    return dx


def _launch(kernel: Any, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Call kernel[grid](...), where a type checker cannot know the arguments."""
    kernel[grid](*arguments, **constants, num_warps=_WARPS)


def _sizes(x: Tensor, views: int) -> tuple[int, int, dict[str, int]]:
    """Return rows of a view, columns, and the size of a tile."""
    C = x.shape[1]
    block = min(triton.next_power_of_2(C), COLUMNS)
    return x.numel() // (views * C), C, {"ROWS": ELEMENTS // block, "BLOCK": block}


def _strips(rows: int, C: int, views: int, block: dict[str, int]) -> tuple[int, int]:
    """Return how many strips a view is cut into for sums over its rows, and the rows of a strip: whole tiles."""
    wanted = max(1, PROGRAMS // (views * triton.cdiv(C, block["BLOCK"])))
    strip = triton.cdiv(triton.cdiv(rows, wanted), block["ROWS"]) * block["ROWS"]
    return triton.cdiv(rows, strip), strip


def _tiles(rows: int, C: int, views: int, block: dict[str, int]) -> tuple[tuple[int, int], int]:
    """Return the grid with one program for every tile, and how many tiles are side by side."""
    columns = triton.cdiv(C, block["BLOCK"])
    return (triton.cdiv(rows, block["ROWS"]) * columns, views), columns


def _pairs(x: Tensor, views: int) -> Tensor:
    return x.new_empty(views, 2, x.shape[1], dtype=torch.float32)


def _channels(mean_VC: Tensor, var_VC: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
    assert mean_VC.stride() == var_VC.stride() and mean_VC.stride(1) == 1
    return mean_VC, var_VC, in_dtype(weight, mean_VC, 1.0), in_dtype(bias, mean_VC, 0.0)


@triton.jit
def _tile(columns, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the number of this program's strip or tile, its columns [1, BLOCK], and where its elements lie in a tile."""
    program = tl.program_id(0)
    i = (program % columns) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return program // columns, i, tl.arange(0, ROWS)[:, None] * C + i


@triton.jit
def _first_element(row, rows, C):
    """Return where a row of this program's view begins, in 64 bits: all images together may have more than 2^31 elements."""
    return (tl.program_id(1).to(tl.int64) * rows + row) * C


@triton.jit
def _of_channels(mean, var, weight, bias, stride, i, C, eps):
    """Return mean, 1 / deviation, weight / deviation and bias, each [1, BLOCK]."""
    view = tl.program_id(1) * stride
    invstd = 1.0 / tl.sqrt(tl.load(var + view + i, i < C, 1.0) + eps)
    return (
        tl.load(mean + view + i, i < C, 0.0),
        invstd,
        invstd * tl.load(weight + i, i < C, 0.0),
        tl.load(bias + i, i < C, 0.0),
    )


@triton.jit
def _store_sums(partial, number, i, C, first, second):
    """Store two sums over rows [1, BLOCK] of strip `number` in `partial`, [strips, V, 2, C]."""
    at = partial + (number * tl.num_programs(1) + tl.program_id(1)) * 2 * C + i
    tl.store(at, first, i < C)
    tl.store(at + C, second, i < C)


@triton.jit
def _strip_statistics(x, partial, rows, C, strip, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Store how far the mean of a strip is from the view's first row, and the sum of squares around the mean.

    Sums are of small numbers: of differences to the first row, less their mean in the strip's first tile.
    """
    number, i, at = _tile(columns, C, ROWS, BLOCK)
    first, last = number * strip, tl.minimum(number * strip + strip, rows)
    row = tl.arange(0, ROWS)[:, None]
    first_row = tl.load(x + _first_element(0, rows, C) + i, i < C, 0.0).to(tl.float32)
    inside = (first + row < last) & (i < C)
    value = tl.load(x + _first_element(first, rows, C) + at, inside, 0.0).to(tl.float32)
    shift = tl.sum(tl.where(inside, value - first_row, 0.0), 0, keep_dims=True) / tl.minimum(ROWS, last - first)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(first, last, ROWS):
        inside = (start + row < last) & (i < C)
        value = tl.load(x + _first_element(start, rows, C) + at, inside, 0.0).to(tl.float32)
        value = tl.where(inside, value - first_row - shift, 0.0)
        sums += value
        squares += value * value
    total = tl.sum(sums, 0, keep_dims=True)
    mean = total / (last - first)
    _store_sums(partial, number, i, C, shift + mean, tl.sum(squares, 0, keep_dims=True) - total * mean)


@triton.jit
def _merge(x, partial, out, rows, C, strip, strips, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Store mean and biased variance of a view, [V, 2, C], from `_strip_statistics` (Chan et al., 1979)."""
    view, views = tl.program_id(1), tl.num_programs(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    shift = tl.load(partial + view * 2 * C + i, i < C, 0.0)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, strips, ROWS):
        number = start + tl.arange(0, ROWS)[:, None]
        inside = (number < strips) & (i < C)
        at = partial + (number * views + view) * 2 * C + i
        count = tl.minimum(strip, rows - number * strip).to(tl.float32)
        away = tl.where(inside, tl.load(at, inside, 0.0) - shift, 0.0)
        sums += count * away
        squares += tl.load(at + C, inside, 0.0) + count * away * away
    total = tl.sum(sums, 0, keep_dims=True)
    variance = (tl.sum(squares, 0, keep_dims=True) - total * (total / rows)) / rows
    first_row = tl.load(x + _first_element(0, rows, C) + i, i < C, 0.0).to(tl.float32)
    tl.store(out + view * 2 * C + i, first_row + (shift + total / rows), i < C)
    tl.store(out + view * 2 * C + C + i, tl.maximum(variance, 0.0), i < C)


@triton.jit
def _normalise(
    x, residual, y, mean, var, weight, bias,  # three [V, R, C], two [V, C], two [C]
    stride, rows, C, columns, eps,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number, i, at = _tile(columns, C, ROWS, BLOCK)
    mean_i, _, scale_i, bias_i = _of_channels(mean, var, weight, bias, stride, i, C, eps)
    inside = (number * ROWS + tl.arange(0, ROWS)[:, None] < rows) & (i < C)
    first = _first_element(number * ROWS, rows, C)
    value = (tl.load(x + first + at, inside, 0.0).to(tl.float32) - mean_i) * scale_i + bias_i
    if RESIDUAL:
        value += tl.load(residual + first + at, inside, 0.0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # a NaN stays
    tl.store(y + first + at, value, inside)


@triton.jit
def _backward_sums(
    dy, dy_2, x, y, written, mean, var, weight, bias, partial,  # five [V, R, C], two [V, C], two [C], [strips, V, 2, C]
    stride, rows, C, strip, columns, eps,
    TWO: tl.constexpr, RELU: tl.constexpr, KEPT: tl.constexpr, WRITE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number, i, at = _tile(columns, C, ROWS, BLOCK)
    mean_i, invstd_i, scale_i, bias_i = _of_channels(mean, var, weight, bias, stride, i, C, eps)
    row = tl.arange(0, ROWS)[:, None]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    slopes = tl.zeros((ROWS, BLOCK), tl.float32)
    last = tl.minimum(number * strip + strip, rows)
    for start in range(number * strip, last, ROWS):
        inside = (start + row < last) & (i < C)
        first = _first_element(start, rows, C)
        g = tl.load(dy + first + at, inside, 0.0).to(tl.float32)
        if TWO:
            g += tl.load(dy_2 + first + at, inside, 0.0).to(tl.float32)
        centred = tl.load(x + first + at, inside, 0.0).to(tl.float32) - mean_i
        if RELU:
            if KEPT:
                g = tl.where(tl.load(y + first + at, inside, 0.0) <= 0, 0.0, g)
            else:
                g = tl.where(centred * scale_i + bias_i <= 0, 0.0, g)
        if WRITE:
            g = g.to(written.dtype.element_ty)  # the sums are those of what is written
            tl.store(written + first + at, g, inside)
            g = g.to(tl.float32)
        sums += g
        slopes += g * centred
    slope = tl.sum(slopes, 0, keep_dims=True) * invstd_i
    _store_sums(partial, number, i, C, tl.sum(sums, 0, keep_dims=True), slope)


@triton.jit
def _input_gradient(
    dy, x, dx, mean, var, weight, bias, sums,  # three [V, R, C], two [V, C], two [C], [V, 2, C]
    stride, rows, C, columns, eps, inverse_count,
    RELU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number, i, at = _tile(columns, C, ROWS, BLOCK)
    mean_i, invstd_i, scale_i, bias_i = _of_channels(mean, var, weight, bias, stride, i, C, eps)
    sums_i = sums + tl.program_id(1) * 2 * C + i
    mean_dy = tl.load(sums_i, i < C, 0.0) * inverse_count
    slope = tl.load(sums_i + C, i < C, 0.0) * inverse_count * invstd_i
    inside = (number * ROWS + tl.arange(0, ROWS)[:, None] < rows) & (i < C)
    first = _first_element(number * ROWS, rows, C)
    g = tl.load(dy + first + at, inside, 0.0).to(tl.float32)
    centred = tl.load(x + first + at, inside, 0.0).to(tl.float32) - mean_i
    if RELU:
        g = tl.where(centred * scale_i + bias_i <= 0, 0.0, g)
    tl.store(dx + first + at, scale_i * (g - mean_dy - centred * slope), inside)
