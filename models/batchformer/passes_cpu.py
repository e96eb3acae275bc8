"""Computes the passes between the products by torch operators over blocks that stay in a core's cache.

The functions are those of `passes_triton`. Masks cost some fifteen integer operations an element, in place in one block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from crossbatch.models.batchformer.dropout import LAST_SHIFT, ROUNDS, Mask, hash_words, signed, threshold
from crossbatch.models.batchformer.reference import wide, wide_dtype
from crossbatch.models.batchformer.tiles import Area

# Elements: 1 MiB of words. Smaller blocks are faster on an idle CPU (by 1 %) and far slower on a busy one, since every
# operation waits for the slowest thread.
_BLOCK = 1 << 18

Index = tuple[slice, slice]


def softmax_dropout(scores_BRG: Tensor, lse_BR: Tensor, area: Area, dtype: torch.dtype) -> Tensor:
    """Return dropout(softmax(area.scale * scores)), in place; fill `lse_BR`."""
    assert scores_BRG.dtype == dtype
    for at, keep in _attention_blocks(scores_BRG, area):
        block = scores_BRG[at].mul_(area.scale)
        highest = block.amax(-1, keepdim=True)
        total = block.sub_(highest).exp_().sum(-1, keepdim=True)
        lse_BR[at].copy_((total.log() + highest).squeeze(-1))
        block.div_(total)
        if keep is not None:
            block.mul_(keep)
    return scores_BRG


def softmax_dropout_backward(
    scores_BRG: Tensor, gradient_BRG: Tensor, lse_BR: Tensor, delta_BR: Tensor, area: Area, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (P M, dS) of `tiles.backward` from scores and dP, in place."""
    assert scores_BRG.dtype == dtype
    for at, keep in _attention_blocks(scores_BRG, area):
        probabilities, gradient = scores_BRG[at], gradient_BRG[at]
        probabilities.mul_(area.scale).sub_(lse_BR[at].unsqueeze(-1)).exp_()
        if keep is not None:
            gradient.mul_(keep)
        gradient.sub_(delta_BR[at].unsqueeze(-1)).mul_(probabilities).mul_(area.scale)
        if keep is not None:
            probabilities.mul_(keep)
    return scores_BRG, gradient_BRG


def bias_relu(x_SQC: Tensor, bias_C: Tensor, mask: Mask) -> Tensor:
    """Return dropout(relu(x + bias)) in the dtype of x."""
    out = torch.empty_like(x_SQC)
    for at, keep in _feature_blocks(x_SQC, mask):
        block = (wide(x_SQC[at]) + bias_C).clamp_min_(0)
        if keep is not None:
            block.mul_(keep)
        out[at].copy_(block)
    return out


def bias_relu_backward(grad_SQC: Tensor, out_SQC: Tensor, probability: float) -> Tensor:
    """Return the gradient of x."""
    # Not `out > 0`: where the forward pass met a NaN, so shall the backward pass.
    passes = (out_SQC != 0).to(out_SQC.dtype).mul_(1 / (1 - probability))
    return passes.mul_(grad_SQC)


def add_norm(
    x_SQC: Tensor, y_SQC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, mask: Mask
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return LayerNorm(x + dropout(y)), x + dropout(y), and its mean and 1 / deviation, [S, Q]."""
    total = wide(y_SQC).to(torch.promote_types(x_SQC.dtype, wide_dtype(y_SQC)), copy=True)
    for at, keep in _feature_blocks(total, mask):
        block = total[at]
        if keep is not None:
            block.mul_(keep)
        block.add_(x_SQC[at])
    weight, bias = weight_C.to(total.dtype), bias_C.to(total.dtype)
    out, mean, rstd = torch.native_layer_norm(total, total.shape[-1:], weight, bias, eps)
    return out, total, mean.squeeze(-1), rstd.squeeze(-1)


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
    weight = weight_C.to(total_SQC.dtype)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad_SQC,
        total_SQC,
        total_SQC.shape[-1:],
        mean_SQ.unsqueeze(-1),
        rstd_SQ.unsqueeze(-1),
        weight,
        weight,
        [True] * 3,
    )
    dy = torch.empty_like(dx, dtype=y_dtype)
    for at, keep in _feature_blocks(dx, mask):
        dy[at].copy_(dx[at] if keep is None else dx[at] * keep)
    return dx, dy, dweight.to(weight_C.dtype), dbias.to(weight_C.dtype)


def _attention_blocks(tile_BRG: Tensor, area: Area) -> Iterator[tuple[Index, Tensor | None]]:
    (B, R, G), mask = tile_BRG.shape, area.mask
    heads = slice(area.first_head, area.first_head + B)
    rows = mask.attention_rows(area.sequences, area.heads, area.rows).flatten(0, 1)
    columns = mask.columns(area.sequences, G).repeat_interleave(area.heads, dim=0)[heads]
    seeds = mask.seeds(area.sequences).repeat_interleave(area.heads)[heads]
    rows = rows[heads, area.first_row : area.first_row + R]
    return _blocks(tile_BRG, seeds, rows, columns, mask)


def _feature_blocks(x_SQC: Tensor, mask: Mask) -> Iterator[tuple[Index, Tensor | None]]:
    S, Q, C = x_SQC.shape
    columns = torch.arange(C, dtype=torch.int32).expand(S, C)
    return _blocks(x_SQC, mask.seeds(S), mask.rows(S, Q), columns, mask)


def _blocks(
    x_BRK: Tensor, seeds_B: Tensor, rows_BR: Tensor, columns_BK: Tensor, mask: Mask
) -> Iterator[tuple[Index, Tensor | None]]:
    """Cut [B, R, K] into blocks; yield each with its factors, 0 or 1 / (1 - p), in the dtype of x, or None at p = 0."""
    B, R, K = x_BRK.shape
    step_b, step_r = max(1, _BLOCK // (R * K)), max(1, _BLOCK // K)
    row_words = hash_words(hash_words(rows_BR) ^ seeds_B.unsqueeze(-1))
    column_words = hash_words(columns_BK)
    # As tensors, or every operation of a block would convert a Python number.
    rounds = [
        [torch.tensor(number, dtype=torch.int32) for number in (shift, (1 << (32 - shift)) - 1, signed(factor))]
        for shift, factor in ROUNDS
    ]
    for b in range(0, B, step_b):
        for r in range(0, R, step_r):
            at = slice(b, b + step_b), slice(r, r + step_r)
            if mask.probability == 0:
                yield at, None
                continue
            words = row_words[at].unsqueeze(-1) ^ column_words[at[0]].unsqueeze(1)
            _hash_in_place(words, rounds)
            factors = torch.empty(words.shape, dtype=wide_dtype(x_BRK))
            yield at, torch.ge(words, threshold(mask.probability), out=factors).mul_(1 / (1 - mask.probability))


def _hash_in_place(words: Tensor, rounds: list[list[Tensor]]) -> None:
    """Compute `hash_words` with one more tensor of the same size."""
    shifted = torch.empty_like(words)
    for shift, low_bits, factor in rounds:
        torch.bitwise_right_shift(words, shift, out=shifted)
        words.bitwise_xor_(shifted.bitwise_and_(low_bits)).mul_(factor)
    torch.bitwise_right_shift(words, LAST_SHIFT, out=shifted)
    words.bitwise_xor_(shifted.bitwise_and_((1 << (32 - LAST_SHIFT)) - 1))
