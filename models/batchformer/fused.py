"""The pieces as fused operators: see `ops` for what they keep, `tiles` and `flash` for the two ways of the attention."""

import torch
from torch import Tensor

from crossbatch.models.batchformer import ops
from crossbatch.models.batchformer.dispatch import reason_against_flash
from crossbatch.models.batchformer.dropout import Mask


def attention(q_SHQD: Tensor, k_SHGD: Tensor, v_SHGD: Tensor, mask: Mask) -> Tensor:
    """See `reference.attention`."""
    numbers = mask.words_V, mask.probability, mask.first_row, mask.first_column
    out, _ = ops.attention(q_SHQD, k_SHGD, v_SHGD, *numbers, _takes_flash(q_SHQD, k_SHGD))
    return out


def bias_relu(x_SQC: Tensor, bias_C: Tensor, mask: Mask) -> Tensor:
    """See `reference.bias_relu`."""
    return ops.bias_relu(x_SQC, bias_C, mask.words_V, mask.probability, mask.first_row)


def add_norm(x_SQC: Tensor, y_SQC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, mask: Mask) -> Tensor:
    """See `reference.add_norm`."""
    out, *_ = ops.add_norm(x_SQC, y_SQC, weight_C, bias_C, eps, mask.words_V, mask.probability, mask.first_row)
    return out


def _takes_flash(q_SHQD: Tensor, k_SHGD: Tensor) -> bool:
    device, (images, features) = q_SHQD.device, k_SHGD.shape[2:]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return reason_against_flash(device.type, capability, q_SHQD.dtype, features, images) is None
