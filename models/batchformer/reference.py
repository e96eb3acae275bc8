"""Computes the layer's three functions in a few lines of at least fp32, the reference for the other kernels.

Every kernel is a module with these three functions. Shapes: S sequences (views x groups), H heads, Q own rows, G images of a
group, D features of a head, C features.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from crossbatch.models.batchformer.dropout import Mask, keep_mask


def attention(q_SHQD: Tensor, k_SHGD: Tensor, v_SHGD: Tensor, mask: Mask) -> Tensor:
    """Return dropout(softmax(q k^T / sqrt(D))) v, as [S, H, Q, D] (Vaswani et al. 2017, section 3.2.1)."""
    S, H, Q, D = q_SHQD.shape
    with torch.autocast(q_SHQD.device.type, enabled=False):
        probabilities = (wide(q_SHQD) @ wide(k_SHGD).mT * D**-0.5).softmax(dim=-1)
        if mask.probability:
            rows, columns = mask.attention_rows(S, H, Q), mask.columns(S, k_SHGD.shape[2]).unsqueeze(1)
            keep = keep_mask(mask.seeds(S).unsqueeze(1), rows, columns, mask.probability)
            probabilities = probabilities * keep / (1 - mask.probability)
        return (probabilities @ wide(v_SHGD)).to(q_SHQD.dtype)


def bias_relu(x_SQC: Tensor, bias_C: Tensor, mask: Mask) -> Tensor:
    """Return dropout(relu(x + bias)), as [S, Q, C] in the dtype of x."""
    return _drop(F.relu(wide(x_SQC) + bias_C), mask).to(x_SQC.dtype)


def add_norm(x_SQC: Tensor, y_SQC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, mask: Mask) -> Tensor:
    """Return LayerNorm(x + dropout(y)), as [S, Q, C] in at least fp32 (Ba et al. 2016; post-norm)."""
    total = wide(x_SQC) + _drop(wide(y_SQC), mask)
    return F.layer_norm(total, total.shape[-1:], weight_C.to(total.dtype), bias_C.to(total.dtype), eps)


def wide(x: Tensor) -> Tensor:
    """Return `x` in at least fp32."""
    return x.to(wide_dtype(x))


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of `x`, but at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def _drop(x_SQC: Tensor, mask: Mask) -> Tensor:
    if not mask.probability:
        return x_SQC
    S, Q, C = x_SQC.shape
    columns = torch.arange(C, dtype=torch.int32, device=x_SQC.device)
    return x_SQC * keep_mask(mask.seeds(S), mask.rows(S, Q), columns, mask.probability) / (1 - mask.probability)
