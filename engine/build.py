"""Configuration -> model."""

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
            dim=ours.model.dim,
            mlp_dim=ours.model.mlp_dim,
            temperature=ours.model.temperature,
            add_bf=ours.batchformer.add_bf,
            group_size=run.group_size or 1,
            dropout=ours.batchformer.dropout,
            batchformer_mode=ours.batchformer.mode,
        )
    except ValueError as error:
        raise InputError(f"crossbatch.{error}") from None
