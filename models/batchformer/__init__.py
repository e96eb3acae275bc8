"""Defines BatchFormer: attention in which the batch is the sequence.

layer       the module, its groups and its linear layers
dropout     masks by position in the global batch
dispatch    which kernel computes what lies between the linear layers, and why no other
reference, sdpa, fused      the kernels; `fused` uses
    tiles                       for the attention, by tiles of the score matrix
    passes_cpu, passes_triton   for the passes between the products
"""

from crossbatch.models.batchformer.dropout import DropoutKey, keep_mask
from crossbatch.models.batchformer.layer import BatchFormer

__all__ = ["BatchFormer", "DropoutKey", "keep_mask"]
