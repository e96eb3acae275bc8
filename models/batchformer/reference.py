"""The layer's three pieces in a few lines, at least fp32: what the other kernels are measured against.

Every kernel is a module with these three functions. Shapes: S sequences (views x groups), H heads, Q own rows, G images of a
group, D features of a head, C features.
"""

import torch
from torch.nn import functional as F

from crossbatch.models.batchformer.dropout import Mask, keep_mask


def attention(q_SHQD: torch.Tensor, k_SHGD: torch.Tensor, v_SHGD: torch.Tensor, mask: Mask) -> torch.Tensor:
    """dropout(softmax(q k^T / sqrt(D))) v, as [S, H, Q, D] (Vaswani et al. 2017, section 3.2.1)."""
    S, H, Q, D = q_SHQD.shape
    with torch.autocast(q_SHQD.device.type, enabled=False):
        probabilities = (wide(q_SHQD) @ wide(k_SHGD).mT * D**-0.5).softmax(dim=-1)
        if mask.probability:
            rows, columns = mask.attention_rows(S, H, Q), mask.columns(S, k_SHGD.shape[2]).unsqueeze(1)
            keep = keep_mask(mask.words(S).unsqueeze(1), rows, columns, mask.probability)
            probabilities = probabilities * keep / (1 - mask.probability)
        return (probabilities @ wide(v_SHGD)).to(q_SHQD.dtype)


def bias_relu(x_SQC: torch.Tensor, bias_C: torch.Tensor, mask: Mask) -> torch.Tensor:
    """dropout(relu(x + bias)), as [S, Q, C] in the dtype of x."""
    return _drop(F.relu(wide(x_SQC) + bias_C), mask).to(x_SQC.dtype)


def add_norm(
    x_SQC: torch.Tensor, y_SQC: torch.Tensor, weight_C: torch.Tensor, bias_C: torch.Tensor, eps: float, mask: Mask
) -> torch.Tensor:
    """LayerNorm(x + dropout(y)), as [S, Q, C] in at least fp32 (Ba et al. 2016; post-norm)."""
    total = wide(x_SQC) + _drop(wide(y_SQC), mask)
    return F.layer_norm(total, total.shape[-1:], weight_C.to(total.dtype), bias_C.to(total.dtype), eps)


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(wide_dtype(x))


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """At least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def _drop(x_SQC: torch.Tensor, mask: Mask) -> torch.Tensor:
    if not mask.probability:
        return x_SQC
    S, Q, C = x_SQC.shape
    columns = torch.arange(C, dtype=torch.int32, device=x_SQC.device)
    return x_SQC * keep_mask(mask.words(S), mask.rows(S, Q), columns, mask.probability) / (1 - mask.probability)
