"""Defines networks and losses: MoCo v3, backbones, heads, batch norm, BatchFormer.

Nothing here imports `engine` or `data`, or knows configuration keys. The code is single-device; the few places that talk to
other ranks hold a `Collective`. A new backbone goes into `backbones` (and a file of its own), a new loss term into `loss`, a
BatchFormer kernel into `batchformer/`. torchvision, timm and triton are imported when they are needed.
"""

from crossbatch.models.backbones import build_backbone
from crossbatch.models.batchformer import BatchFormer
from crossbatch.models.collective import Collective, GroupCollective
from crossbatch.models.cross_entropy import cross_entropy_over_keys
from crossbatch.models.loss import chance_loss, contrastive_loss, loss_from_add_bf
from crossbatch.models.moco import NUM_VIEWS, MoCo, MoCoOutput
from crossbatch.models.norm import ViewBatchNorm, convert_norms, set_num_chunks
from crossbatch.models.shardable import ShardableModel, autocast

__all__ = [
    "NUM_VIEWS",
    "BatchFormer",
    "Collective",
    "GroupCollective",
    "MoCo",
    "MoCoOutput",
    "ShardableModel",
    "ViewBatchNorm",
    "autocast",
    "build_backbone",
    "chance_loss",
    "contrastive_loss",
    "convert_norms",
    "cross_entropy_over_keys",
    "loss_from_add_bf",
    "set_num_chunks",
]
