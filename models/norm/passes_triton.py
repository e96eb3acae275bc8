"""Makes the passes of a `ViewBatchNorm` in Triton kernels, each for all views in one launch and with one read of its inputs.

Images are stored channels last, so that memory is [V, R, C] for 2-d and 4-d inputs alike, with R rows in a view. A program
handles a tile of rows and columns at a time, reads fp16, bf16 or fp32 and computes in fp32. Sums are taken over strips of rows
and then added up in one order, so equal inputs give equal bits: nothing is atomic, and the strips do not depend on the GPU.

The functions compute what those of `passes_torch` do. Only the ReLU's mask differs: `backward_sums` leaves it to
`input_gradients`, which computes it again, where nothing has to be written.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossbatch.models.norm.passes_torch import Channels, in_dtype

ELEMENTS = 1024  # of a tile: 4 for each of 256 threads, so that the registers leave room for other programs
COLUMNS = 64  # of a tile at most: 128 bytes of a row in 16 bits
PROGRAMS = 1056  # that sum over rows: eight for each of an H100's multiprocessors
TILES = 8  # of a program that sums nothing; it reads what belongs to channels once for all of them
_WARPS = 8
REGISTERS = 128  # of a thread at most; without a limit, ptxas spills some for more threads than a pass needs


def statistics(x: Tensor, num_views: int) -> Tensor:
    rows, C, block = _sizes(x, num_views)
    strips, strip = _strips(rows, C, num_views, block)
    partial, out = x.new_empty(strips, num_views, 2, C, dtype=torch.float64), _pairs(x, num_views)
    columns = triton.cdiv(C, block["BLOCK"])
    _launch(_strip_statistics, (strips * columns, num_views), x, partial, rows, C, strip, columns, **block)
    _launch(_merge, (columns, num_views), x, partial, out, rows, C, strip, strips, **block)
    return out


def normalise(x: Tensor, residual: Tensor | None, channels: Channels, eps: float, relu: bool) -> Tensor:
    views, of_channels, options = _channels(channels)
    rows, C, block = _sizes(x, views)
    grid, strip, columns = _tiles(rows, C, views, block)
    y = torch.empty_like(x)
    images = x, x if residual is None else residual, y
    options |= {"RESIDUAL": residual is not None, "RELU": relu}
    _launch(_normalise, grid, *images, *of_channels, rows, C, strip, columns, eps, **options, **block)
    return y


def backward_sums(
    x: Tensor,
    residual: Tensor | None,
    dys: Sequence[Tensor],
    y: Tensor | None,
    channels: Channels,
    eps: float,
    relu: bool,
) -> list[Tensor]:
    views, of_channels, options = _channels(channels)
    rows, C, block = _sizes(x, views)
    strips, strip = _strips(rows, C, views, block)
    columns = triton.cdiv(C, block["BLOCK"])
    partial = x.new_empty(strips, views, 2 if residual is None else 3, C, dtype=torch.float32)
    written = [torch.empty_like(x)] if y is not None or len(dys) == 2 else []
    images = dys[0], dys[-1], x, x if residual is None else residual, x if y is None else y, *(written or [x])
    options |= {"TWO": len(dys) == 2, "RELU": relu, "KEPT": y is not None, "WRITE": bool(written)}
    numbers = rows, C, strip, columns, eps
    _launch(_backward_sums, (strips * columns, views), *images, *of_channels, partial, *numbers, **options, **block)
    return [partial.sum(0), *written]


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
    views, of_channels, options = _channels(channels)
    rows, C, block = _sizes(x, views)
    grid, strip, columns = _tiles(rows, C, views, block)
    inputs = [x] if residual is None else [x, residual]
    gradients = [torch.empty_like(tensor) for tensor in inputs]
    tensors = dy, inputs[0], inputs[-1], gradients[0], gradients[-1], *of_channels, sums.contiguous()
    _launch(_input_gradients, grid, *tensors, rows, C, strip, columns, eps, 1 / count, **options, RELU=relu, **block)
    return gradients


def _launch(kernel: Any, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Call kernel[grid](...), where a type checker cannot know the arguments."""
    kernel[grid](*arguments, **constants, num_warps=_WARPS, maxnreg=REGISTERS)


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


def _tiles(rows: int, C: int, views: int, block: dict[str, int]) -> tuple[tuple[int, int], int, int]:
    """Return the grid with one program for `TILES` tiles, the rows of those, and how many tiles are side by side."""
    columns, strip = triton.cdiv(C, block["BLOCK"]), TILES * block["ROWS"]
    return (triton.cdiv(rows, strip) * columns, views), strip, columns


def _pairs(x: Tensor, views: int) -> Tensor:
    return x.new_empty(views, 2, x.shape[1], dtype=torch.float32)


def _channels(channels: Channels) -> tuple[int, tuple[Any, ...], dict[str, bool]]:
    """Return the number of views, what the kernels take of the channels of one norm or both, and which of the two it is."""
    views, stride = len(channels[0]), channels[0].stride(0)
    vectors = []
    for mean, var, weight, bias in (channels[at : at + 4] for at in range(0, len(channels), 4)):
        assert mean.stride() == var.stride() == (stride, 1)
        vectors.append((mean, var, in_dtype(weight, mean, 1.0), in_dtype(bias, mean, 0.0)))
    return views, (*vectors[0], *vectors[-1], stride), {"BOTH": len(vectors) == 2}


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
def _over_rows(values):
    """Return the sums of the columns of a tile [1, BLOCK], in fp64: a program does so once, at its end."""
    return tl.sum(values.to(tl.float64), 0, keep_dims=True)


@triton.jit
def _store_sum(partial, number, k, sums, i, C, value):
    """Store the k-th of `sums` sums over the rows [1, BLOCK] of strip `number` in `partial`, [strips, V, sums, C]."""
    at = ((number * tl.num_programs(1) + tl.program_id(1)) * sums + k) * C + i
    tl.store(partial + at, value, i < C)


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
    total = _over_rows(sums)
    mean = total / (last - first)
    _store_sum(partial, number, 0, 2, i, C, shift + mean)
    _store_sum(partial, number, 1, 2, i, C, _over_rows(squares) - total * mean)


@triton.jit
def _merge(x, partial, out, rows, C, strip, strips, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Store mean and biased variance of a view, [V, 2, C], from `_strip_statistics` (Chan et al., 1979)."""
    view, views = tl.program_id(1), tl.num_programs(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    shift = tl.load(partial + view * 2 * C + i, i < C, 0.0)
    sums = tl.zeros((ROWS, BLOCK), tl.float64)
    squares = tl.zeros((ROWS, BLOCK), tl.float64)
    for start in range(0, strips, ROWS):
        number = start + tl.arange(0, ROWS)[:, None]
        inside = (number < strips) & (i < C)
        at = partial + (number * views + view) * 2 * C + i
        count = tl.minimum(strip, rows - number * strip).to(tl.float64)
        away = tl.where(inside, tl.load(at, inside, 0.0) - shift, 0.0)
        sums += count * away
        squares += tl.load(at + C, inside, 0.0) + count * away * away
    total = _over_rows(sums)
    variance = (_over_rows(squares) - total * (total / rows)) / rows
    first_row = tl.load(x + _first_element(0, rows, C) + i, i < C, 0.0).to(tl.float64)
    tl.store(out + view * 2 * C + i, first_row + (shift + total / rows), i < C)
    tl.store(out + view * 2 * C + C + i, tl.maximum(variance, 0.0), i < C)


@triton.jit
def _normalise(
    x, residual, y,  # three [V, R, C]
    mean, var, weight, bias, mean_2, var_2, weight_2, bias_2,  # two [V, C] and two [C], of x and of the residual
    stride, rows, C, strip, columns, eps,
    BOTH: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number, i, at = _tile(columns, C, ROWS, BLOCK)
    mean_i, _, scale_i, bias_i = _of_channels(mean, var, weight, bias, stride, i, C, eps)
    mean_2i, _, scale_2i, bias_2i = _of_channels(mean_2, var_2, weight_2, bias_2, stride, i, C, eps)
    last = tl.minimum(number * strip + strip, rows)
    for start in range(number * strip, last, ROWS):
        inside = (start + tl.arange(0, ROWS)[:, None] < last) & (i < C)
        first = _first_element(start, rows, C)
        value = (tl.load(x + first + at, inside, 0.0).to(tl.float32) - mean_i) * scale_i + bias_i
        if RESIDUAL:
            other = tl.load(residual + first + at, inside, 0.0).to(tl.float32)
            if BOTH:
                other = (other - mean_2i) * scale_2i + bias_2i
            value += other
        if RELU:
            value = tl.where(value < 0, 0.0, value)  # a NaN stays
        tl.store(y + first + at, value, inside)


@triton.jit
def _backward_sums(
    dy, dy_2, x, residual, y, written,  # six [V, R, C]
    mean, var, weight, bias, mean_2, var_2, weight_2, bias_2,  # two [V, C] and two [C], of x and of the residual
    stride, partial, rows, C, strip, columns, eps,  # partial: [strips, V, 2 or 3, C]
    BOTH: tl.constexpr, TWO: tl.constexpr, RELU: tl.constexpr, KEPT: tl.constexpr, WRITE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number, i, at = _tile(columns, C, ROWS, BLOCK)
    mean_i, invstd_i, scale_i, bias_i = _of_channels(mean, var, weight, bias, stride, i, C, eps)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    slopes = tl.zeros((ROWS, BLOCK), tl.float32)
    mean_2i, invstd_2i, scale_2i, bias_2i = _of_channels(mean_2, var_2, weight_2, bias_2, stride, i, C, eps)
    slopes_2 = tl.zeros((ROWS, BLOCK), tl.float32)
    last = tl.minimum(number * strip + strip, rows)
    for start in range(number * strip, last, ROWS):
        inside = (start + tl.arange(0, ROWS)[:, None] < last) & (i < C)
        first = _first_element(start, rows, C)
        g = tl.load(dy + first + at, inside, 0.0).to(tl.float32)
        if TWO:
            g += tl.load(dy_2 + first + at, inside, 0.0).to(tl.float32)
        centred = tl.load(x + first + at, inside, 0.0).to(tl.float32) - mean_i
        centred_2 = centred
        if BOTH:
            centred_2 = tl.load(residual + first + at, inside, 0.0).to(tl.float32) - mean_2i
        if RELU:
            if KEPT:
                g = tl.where(tl.load(y + first + at, inside, 0.0) <= 0, 0.0, g)
            elif BOTH:
                g = tl.where(centred * scale_i + bias_i + (centred_2 * scale_2i + bias_2i) <= 0, 0.0, g)
            else:
                g = tl.where(centred * scale_i + bias_i <= 0, 0.0, g)
        if WRITE:
            g = g.to(written.dtype.element_ty)  # the sums are those of what is written
            tl.store(written + first + at, g, inside)
            g = g.to(tl.float32)
        sums += g
        slopes += g * centred
        if BOTH:
            slopes_2 += g * centred_2
    kinds = 3 if BOTH else 2
    _store_sum(partial, number, 0, kinds, i, C, _over_rows(sums))
    _store_sum(partial, number, 1, kinds, i, C, _over_rows(slopes) * invstd_i)
    if BOTH:
        _store_sum(partial, number, 2, kinds, i, C, _over_rows(slopes_2) * invstd_2i)


@triton.jit
def _input_gradients(
    dy, x, residual, dx, dresidual,  # five [V, R, C]
    mean, var, weight, bias, mean_2, var_2, weight_2, bias_2,  # two [V, C] and two [C], of x and of the residual
    stride, sums, rows, C, strip, columns, eps, inverse_count,  # sums: [V, 2 or 3, C]
    BOTH: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number, i, at = _tile(columns, C, ROWS, BLOCK)
    mean_i, invstd_i, scale_i, bias_i = _of_channels(mean, var, weight, bias, stride, i, C, eps)
    sums_i = sums + tl.program_id(1) * (3 if BOTH else 2) * C + i
    mean_dy = tl.load(sums_i, i < C, 0.0) * inverse_count
    slope = tl.load(sums_i + C, i < C, 0.0) * inverse_count * invstd_i
    mean_2i, invstd_2i, scale_2i, bias_2i = _of_channels(mean_2, var_2, weight_2, bias_2, stride, i, C, eps)
    slope_2 = slope
    if BOTH:
        slope_2 = tl.load(sums_i + 2 * C, i < C, 0.0) * inverse_count * invstd_2i
    last = tl.minimum(number * strip + strip, rows)
    for start in range(number * strip, last, ROWS):
        inside = (start + tl.arange(0, ROWS)[:, None] < last) & (i < C)
        first = _first_element(start, rows, C)
        g = tl.load(dy + first + at, inside, 0.0).to(tl.float32)
        centred = tl.load(x + first + at, inside, 0.0).to(tl.float32) - mean_i
        centred_2 = centred
        if BOTH:
            centred_2 = tl.load(residual + first + at, inside, 0.0).to(tl.float32) - mean_2i
        if RELU:
            if BOTH:
                g = tl.where(centred * scale_i + bias_i + (centred_2 * scale_2i + bias_2i) <= 0, 0.0, g)
            else:
                g = tl.where(centred * scale_i + bias_i <= 0, 0.0, g)
        tl.store(dx + first + at, scale_i * (g - mean_dy - centred * slope), inside)
        if BOTH:
            tl.store(dresidual + first + at, scale_2i * (g - mean_dy - centred_2 * slope_2), inside)
