"""Makes the passes of LARS on a GPU, with Triton kernels over all segments, wherever they lie in memory.

Segments are cut into chunks, one program each. A table on the GPU tells a program where its chunk of w, g and v lies, so
neither the number of parameters nor the way they are stored costs a launch. The table stays on the GPU; where memory has
moved, a new one travels from pinned memory. Nothing is read back.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from crossbatch.engine.optimizers.lars import Update, Work

_CHUNK = 8192  # elements of a program: 45 million parameters are 5500 programs
_BLOCK: Any = 1024  # elements it handles at once


@dataclass(eq=False)
class _Tables:
    """Holds what is known of the segments of a `Work`.

    Attributes:
        tensors: [chunks]: index of the chunk's tensor.
        starts: [chunks]: bytes from the start of the tensor to the chunk.
        lengths_numbers: [2, chunks]: elements of the chunk, and number of the parameter.
        runs: [4, segments], on the GPU: first chunk, chunks, number of the parameter, ranks that hold the same elements.
        addresses: of parameter, gradient and velocity of every tensor, for which `chunks` was made.
        chunks: [5, chunks], on the GPU: addresses of w, g and v, elements, number of the parameter.
    """

    tensors: np.ndarray
    starts: np.ndarray
    lengths_numbers: np.ndarray
    runs: Tensor
    addresses: list[list[int]]
    chunks: Tensor


def prepare(work: Work) -> None:
    """Send the tables of `work` to the GPU."""
    if work.segments:
        _tables(work)


def add_squares(work: Work, decay: float, sums: Tensor) -> None:
    """Add ||w||^2 to sums[0, number] and ||g + decay w||^2 to sums[1, number], over this rank's segments.

    Each number occurs at most once in `work`. The order of all additions is fixed, so equal inputs give equal bits.
    """
    if not work.segments:
        return
    tables = _tables(work)
    table, runs = tables.chunks, tables.runs
    partial = torch.empty(2, table.shape[1], dtype=torch.float64, device=table.device)
    _squares[(table.shape[1],)](table, partial, table.shape[1], decay, BLOCK=_BLOCK)
    _finish[(runs.shape[1],)](runs, runs.shape[1], partial, table.shape[1], sums, sums.shape[1], BLOCK=_BLOCK)


def update(work: Work, formula: Update) -> None:
    """Update this rank's segments as `Update` describes."""
    table, gains = _tables(work).chunks, formula.gains.float()
    _update[(table.shape[1],)](
        table, table.shape[1], gains, formula.momentum, formula.decay, formula.step, formula.late_decay, BLOCK=_BLOCK
    )


def _tables(work: Work) -> _Tables:
    """Return the tables of `work`; only where a tensor has moved is anything computed."""
    addresses = [[flat.data_ptr() for flat in flats] for flats in work.flats]
    tables = work.tables = work.tables or _static_tables(work)
    if tables.addresses != addresses:
        at = np.array(addresses, dtype=np.int64).T[:, tables.tensors] + tables.starts
        tables.chunks = _to_device(np.concatenate((at, tables.lengths_numbers)), work)
        tables.addresses = addresses
    return tables


def _static_tables(work: Work) -> _Tables:
    """Cut the segments into chunks."""
    rows = [(index, s.number, s.start, s.stop - s.start, s.copies) for index, s in work.segments]
    tensors, numbers, starts, lengths, copies = np.array(rows, dtype=np.int64).T
    chunks = -(-lengths // _CHUNK)
    first = np.cumsum(chunks) - chunks
    segment = np.repeat(np.arange(len(rows)), chunks)
    start = (np.arange(len(segment)) - first[segment]) * _CHUNK
    sizes = np.minimum(_CHUNK, lengths[segment] - start)
    runs = _to_device(np.stack((first, chunks, numbers, copies)), work)
    lengths_numbers = np.stack((sizes, numbers[segment]))
    return _Tables(tensors[segment], 4 * (starts[segment] + start), lengths_numbers, runs, [], runs)


def _to_device(table: np.ndarray, work: Work) -> Tensor:
    device, host = work.flats[0].parameter.device, torch.from_numpy(table)
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
