"""Makes the passes of LARS on a GPU, with Triton kernels over all segments, wherever they lie in memory.

Segments are cut into chunks, one program each. A table on the GPU tells a program where its chunk of w, g and v lies, so
neither the number of parameters nor the way they are stored costs a launch. The table travels from pinned memory
beside the kernels of the backward pass; nothing is read back.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from crossbatch.engine.optimizers.lars import Update, Work

_CHUNK = 8192  # elements of a program: 45 million parameters are 5500 programs
_BLOCK: Any = 1024  # elements it handles at once


def add_squares(work: list[Work], decay: float, sums: Tensor) -> None:
    """Add ||w||^2 to sums[0, number] and ||g + decay w||^2 to sums[1, number], over this rank's segments.

    Each number occurs at most once in `work`. The order of all additions is fixed, so equal inputs give equal bits.
    """
    if not work:
        return
    table, runs = (_to_device(array, work) for array in _tables(work))
    partial = torch.empty(2, table.shape[1], dtype=torch.float64, device=table.device)
    _squares[(table.shape[1],)](table, partial, table.shape[1], decay, BLOCK=_BLOCK)
    _finish[(runs.shape[1],)](runs, runs.shape[1], partial, table.shape[1], sums, sums.shape[1], BLOCK=_BLOCK)


def update(work: list[Work], formula: Update) -> None:
    """Update this rank's segments as `Update` describes."""
    if not work:
        return
    table, gains = _to_device(_tables(work)[0], work), formula.gains.float()
    _update[(table.shape[1],)](
        table, table.shape[1], gains, formula.momentum, formula.decay, formula.step, formula.late_decay, BLOCK=_BLOCK
    )


def _tables(work: list[Work]) -> tuple[np.ndarray, np.ndarray]:
    """Return two tables, of the chunks and of the segments.

    [5, chunks]: addresses of w, g and v, number of elements, number of the parameter.
    [4, segments]: first chunk, number of chunks, number of the parameter, ranks that hold the same elements.
    """
    addresses = np.array([[flat.data_ptr() for flat in segment[2:]] for segment in work], dtype=np.int64).T
    numbers, copies, lengths = np.array([(s.number, s.copies, len(s.parameter)) for s in work], dtype=np.int64).T
    chunks = -(-lengths // _CHUNK)
    first = np.cumsum(chunks) - chunks
    segment = np.repeat(np.arange(len(work)), chunks)
    start = (np.arange(len(segment)) - first[segment]) * _CHUNK
    sizes = np.minimum(_CHUNK, lengths[segment] - start)
    table = np.concatenate((addresses[:, segment] + 4 * start, [sizes, numbers[segment]]))
    return table, np.stack((first, chunks, numbers, copies))


def _to_device(table: np.ndarray, work: list[Work]) -> Tensor:
    device, host = work[0].parameter.device, torch.from_numpy(table)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@triton.jit
def _at(table, row, chunks, chunk):
    """Return where the chunk of w (row 0), g (1) or v (2) lies."""
    return tl.load(table + row * chunks + chunk).to(tl.pointer_type(tl.float32))


@triton.jit
def _squares(table, partial, chunks, decay, BLOCK: tl.constexpr):
    """Store partial[0, chunk] = ||w||^2 and partial[1, chunk] = ||g + decay w||^2."""
    chunk = tl.program_id(0)
    w_at, g_at = _at(table, 0, chunks, chunk), _at(table, 1, chunks, chunk)
    length = tl.load(table + 3 * chunks + chunk).to(tl.int32)
    w_squares = tl.zeros((BLOCK,), dtype=tl.float32)
    d_squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        w = tl.load(w_at + i, i < length, 0.0)
        d = tl.load(g_at + i, i < length, 0.0) + decay * w
        w_squares += w * w
        d_squares += d * d
    tl.store(partial + chunk, tl.sum(w_squares).to(tl.float64))
    tl.store(partial + chunks + chunk, tl.sum(d_squares).to(tl.float64))


@triton.jit
def _finish(runs, segments, partial, chunks, sums, count, BLOCK: tl.constexpr):
    """Add the partial sums of one segment, divided by its copies, to sums[:, number]."""
    segment = tl.program_id(0)
    first = tl.load(runs + segment)
    length = tl.load(runs + segments + segment)
    number = tl.load(runs + 2 * segments + segment)
    copies = tl.load(runs + 3 * segments + segment).to(tl.float64)
    for row in range(2):
        total = tl.zeros((BLOCK,), dtype=tl.float64)
        for start in range(0, length, BLOCK):
            i = start + tl.arange(0, BLOCK)
            total += tl.load(partial + row * chunks + first + i, i < length, 0.0)
        at = sums + row * count + number
        tl.store(at, tl.load(at) + tl.sum(total) / copies)


@triton.jit
def _update(table, chunks, gains, momentum, decay, step, late_decay, BLOCK: tl.constexpr):
    """Update w and v of one chunk as `Update` describes."""
    chunk = tl.program_id(0)
    w_at, g_at, v_at = _at(table, 0, chunks, chunk), _at(table, 1, chunks, chunk), _at(table, 2, chunks, chunk)
    length = tl.load(table + 3 * chunks + chunk).to(tl.int32)
    gain = tl.load(gains + tl.load(table + 4 * chunks + chunk))
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        w = tl.load(w_at + i, i < length)
        v = momentum * tl.load(v_at + i, i < length) + gain * (tl.load(g_at + i, i < length) + decay * w)
        tl.store(v_at + i, v, i < length)
        tl.store(w_at + i, w + step * v - gain * late_decay * w, i < length)
