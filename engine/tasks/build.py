"""Configuration -> model, and the numbers of a dry run."""

import torch

from crossbatch import InputError
from crossbatch.engine.config import ResolvedConfig
from crossbatch.models import MoCo


def build_model(run: ResolvedConfig) -> MoCo:
    """The network of a resolved configuration, on the current default device.

    Raises:
        InputError: for an unknown architecture or arguments that it does not take.
    """
    ours = run.config.crossbatch
    try:
        return MoCo(
            ours.model.arch,
            image_size=ours.data.image_size,
            stem=ours.model.stem,
            stop_grad_conv1=ours.model.stop_grad_conv1,
            backbone_args=dict(ours.model.backbone_args),
            checkpoint_activations=ours.model.checkpoint_activations,
            dim=ours.model.projection_dim,
            mlp_dim=ours.model.mlp_dim,
            temperature=ours.model.temperature,
            add_bf=ours.batchformer.add_bf,
            group_size=run.group_size or 1,
            dropout=ours.batchformer.dropout,
            batchformer_mode=ours.batchformer.mode,
            batchformer_kernel=ours.batchformer.kernel,
            cuda_graph=ours.model.cuda_graph,
        )
    except ValueError as error:
        raise InputError(f"crossbatch.{error}") from None


def describe(run: ResolvedConfig, steps_per_epoch: int | None) -> dict:
    """What `--dry-run` prints: the numbers that follow from a configuration, without data or processes."""
    with torch.device("meta"):
        model = build_model(run)
    parameters = list(model.parameters())
    return {
        "world_size": run.world_size,
        "train_batch_size": run.config.train_batch_size,
        "local_batch": run.local_batch,
        "chunk": run.chunk,
        "chunks": run.chunks,
        "group_size": run.group_size,
        "lr_peak": run.lr_peak,
        "steps_per_epoch": steps_per_epoch,
        "parameters_total": sum(p.numel() for p in parameters),
        "parameters_trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "chance_loss": round(run.chance_loss, 2),
        "optimizer": run.config.optimizer.type,
        "sharding": run.config.crossbatch.sharding,
        "zero_stage": run.config.zero_optimization.stage,
        "precision": run.precision,
    }
