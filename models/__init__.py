"""The network, on one device: MoCo v3, backbones, heads, batch norm, BatchFormer, losses.

Nothing here imports the engine or the data; the few places that talk to other ranks take a `Collective`. A new backbone goes
into `backbones` (and a file of its own), a new loss term into `loss`, a BatchFormer kernel into `batchformer/`.
"""

from crossbatch.models.backbones import ARCHS, build_backbone
from crossbatch.models.batchformer import BatchFormer
from crossbatch.models.collective import Collective
from crossbatch.models.loss import chance_loss, contrastive_loss
from crossbatch.models.moco import NUM_VIEWS, MoCo, MoCoOutput
from crossbatch.models.norm import Statistics, reuse_batch_stats, set_num_chunks
from crossbatch.models.shardable import ShardableModel, autocast

__all__ = [
    "ARCHS",
    "NUM_VIEWS",
    "BatchFormer",
    "Collective",
    "MoCo",
    "MoCoOutput",
    "ShardableModel",
    "Statistics",
    "autocast",
    "build_backbone",
    "chance_loss",
    "contrastive_loss",
    "reuse_batch_stats",
    "set_num_chunks",
]
