"""Computes attention over tiles of the score matrices: two products, one pass between them, and never the whole matrix.

A tile is either whole sequences with all their heads, or rows of one head. The backward pass computes the scores again (one
product of seven), so memory is O(G * C) plus a tile: on every device, for any width of a head. Scores and their
gradients are at least fp32.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from crossbatch.models.batchformer.dropout import Mask
from crossbatch.models.batchformer.reference import wide, wide_dtype

Tensors = tuple[Tensor, Tensor, Tensor]  # of q, k and v

# Elements: 2 MiB of fp32 for a core's cache; 32 MiB for a GPU (not yet measured).
TILE = {"cpu": 1 << 19, "cuda": 1 << 23}


class Area(NamedTuple):
    """Describe the place of a tile [B, R, G] in the scores [S * H, Q, G], and the mask there."""

    mask: Mask
    sequences: int  # S
    heads: int  # H
    rows: int  # Q
    first_head: int  # of S * H
    first_row: int  # of Q
    scale: float  # of the scores


class _Block(NamedTuple):
    """Cut out sequences and heads that are computed at once, some rows at a time."""

    sequences: slice
    heads: slice
    rows: int  # of a tile

    def of(self, x_SHND: Tensor) -> Tensor:
        """Cut the block out of a tensor, [B, N, D]; a view where the block is one sequence."""
        block = x_SHND[self.sequences, self.heads].flatten(0, 1)
        return wide(block) if block.device.type == "cpu" else block  # 16 bits only for tensor cores

    def tiles(self, q_SHQD: Tensor, lse_SHQ: Tensor, mask: Mask) -> Iterator[tuple[slice, Area, Tensor]]:
        """Yield the rows of each tile, its place, and its part [B, R] of the log-sum-exp."""
        S, H, Q, D = q_SHQD.shape
        for start in range(0, Q, self.rows):
            rows = slice(start, min(start + self.rows, Q))
            area = Area(mask, S, H, Q, self.sequences.start * H + self.heads.start, start, D**-0.5)
            yield rows, area, lse_SHQ[self.sequences, self.heads, rows].flatten(0, 1)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, out: Tensor, lse: Tensor, passes: ModuleType) -> None:
    """Fill `out`, [S, H, Q, D], and `lse`, the log-sum-exp of the scaled scores, [S, H, Q]."""
    for block in _blocks(q, k):
        q_b, k_b, v_b = (block.of(x) for x in (q, k, v))
        for rows, area, lse_r in block.tiles(q, lse, mask):
            kept = passes.softmax_dropout(_product(q_b[:, rows], k_b.mT), lse_r, area, v_b.dtype)
            _store(out, block, rows, torch.bmm(kept, v_b))


def backward(
    grad: Tensor, qkv: Tensors, out: Tensor, lse: Tensor, mask: Mask, grads: Tensors, passes: ModuleType
) -> None:
    """Fill `grads`, the gradients of q, k and v.

    With P the probabilities, M the mask / (1 - p), dO = grad and dP = dO V^T: dV = (P M)^T dO,
    dS = P (dP M - rowsum(dO O)) / sqrt(D), dQ = dS K, dK = dS^T Q (Dao et al. 2022, "FlashAttention", appendix B.2 and B.4).
    """
    (q, k, v), (dq, dk, dv) = qkv, grads
    for block in _blocks(q, k):
        q_b, k_b, v_b, grad_b = (block.of(x) for x in (q, k, v, grad))
        dk_b = dv_b = None
        for rows, area, lse_r in block.tiles(q, lse, mask):
            q_r, grad_r, out_r = q_b[:, rows], grad_b[:, rows], out[block.sequences, block.heads, rows].flatten(0, 1)
            delta = (wide(grad_r) * out_r).sum(-1)
            scores, gradient = _product(q_r, k_b.mT), _product(grad_r, v_b.mT)
            kept, gradient = passes.softmax_dropout_backward(scores, gradient, lse_r, delta, area, v_b.dtype)
            _store(dq, block, rows, torch.bmm(gradient, k_b))
            dk_b, dv_b = _add(dk_b, gradient.mT, q_r), _add(dv_b, kept.mT, grad_r)
        assert dk_b is not None and dv_b is not None
        _store(dk, block, slice(None), dk_b)
        _store(dv, block, slice(None), dv_b)


def _blocks(q: Tensor, k: Tensor) -> Iterator[_Block]:
    """Yield blocks of whole sequences where a tile holds at least one, and else of one head."""
    S, H, Q, _ = q.shape
    tile, G = TILE[q.device.type], k.shape[2]
    if tile >= H * Q * G:
        step = tile // (H * Q * G)
        for start in range(0, S, step):
            yield _Block(slice(start, min(start + step, S)), slice(0, H), Q)
        return
    for sequence in range(S):
        for head in range(H):
            yield _Block(slice(sequence, sequence + 1), slice(head, head + 1), max(1, tile // G))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply batches of matrices, with a result of at least fp32."""
    return torch.bmm(a, b) if a.dtype == wide_dtype(a) else torch.bmm(a, b, out_dtype=torch.float32)


def _add(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return total + a b, from the second addition on in at least fp32."""
    if total is None:
        return torch.bmm(a, b)
    return total.baddbmm_(a, b) if total.dtype == a.dtype == wide_dtype(a) else wide(total).add_(torch.bmm(a, b))


def _store(target: Tensor, block: _Block, rows: slice, value: Tensor) -> None:
    region = target[block.sequences, block.heads, rows]
    region.copy_(value.view(region.shape))
