"""BatchFormer: attention in which the batch is the sequence."""

from crossbatch.models.batchformer.dropout import DropoutKey, keep_mask
from crossbatch.models.batchformer.layer import BatchFormer

__all__ = ["BatchFormer", "DropoutKey", "keep_mask"]
