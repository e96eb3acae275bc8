"""The three functions as fused operators: see `ops` for what they keep, `tiles` for the attention."""

from torch import Tensor

from crossbatch.models.batchformer import ops
from crossbatch.models.batchformer.dropout import Mask


def attention(q_SHQD: Tensor, k_SHGD: Tensor, v_SHGD: Tensor, mask: Mask) -> Tensor:
    """See `reference.attention`."""
    return ops.attention(q_SHQD, k_SHGD, v_SHGD, mask.seeds_V, mask.probability, mask.first_row, mask.first_column)[0]


def bias_relu(x_SQC: Tensor, bias_C: Tensor, mask: Mask) -> Tensor:
    """See `reference.bias_relu`."""
    return ops.bias_relu(x_SQC, bias_C, mask.seeds_V, mask.probability, mask.first_row)


def add_norm(x_SQC: Tensor, y_SQC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, mask: Mask) -> Tensor:
    """See `reference.add_norm`."""
    return ops.add_norm(x_SQC, y_SQC, weight_C, bias_C, eps, mask.seeds_V, mask.probability, mask.first_row)[0]
