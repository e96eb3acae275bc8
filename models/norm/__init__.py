"""Defines the batch norm that normalises each view by its own statistics, in one call and with one collective.

view_batch_norm   the module, and what a network does with all of its norms
operators         its passes over the images as operators of torch, and their gradients
passes_torch      the passes, of torch's kernels
passes_triton     the passes for images in channels last on a GPU
"""

from crossbatch.models.norm.view_batch_norm import (
    Deferred,
    Statistics,
    ViewBatchNorm,
    convert_norms,
    for_two_consumers,
    recomputed,
    reuse_batch_stats,
    set_num_chunks,
    set_num_views,
    synchronize_norms,
)

__all__ = [
    "Deferred",
    "Statistics",
    "ViewBatchNorm",
    "convert_norms",
    "for_two_consumers",
    "recomputed",
    "reuse_batch_stats",
    "set_num_chunks",
    "set_num_views",
    "synchronize_norms",
]
