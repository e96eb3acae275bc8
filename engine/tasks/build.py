"""Build what a configuration describes: model, parameter groups, optimizer, sharding backend; and the numbers of a dry run."""

import re
from typing import Any

import torch
from torch import nn

from crossbatch import InputError
from crossbatch.engine.config import AdamWConfig, Config, FinetuneConfig, LarsConfig, Resolved, ResolvedConfig
from crossbatch.engine.optimizers import LARS, split_parameters
from crossbatch.engine.sharding import Backend
from crossbatch.models import MoCo, ShardableModel

# Parameters of a ViT that are added to every image alike, as biases are, whatever their shape.
POSITIONS = ("*cls_token", "*pos_embed")


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
            projection_dim=ours.model.projection_dim,
            mlp_dim=ours.model.mlp_dim,
            temperature=ours.model.temperature,
            batchformer_loss=ours.batchformer.loss,
            group_size=run.group_size or 1,
            dropout=ours.batchformer.dropout,
            batchformer_mode=ours.batchformer.mode,
            batchformer_kernel=ours.batchformer.kernel,
            cuda_graph=ours.model.cuda_graph,
        )
    except ValueError as error:
        raise InputError(add_key(error)) from None


def add_key(error: ValueError) -> str:
    """Return the message with the configuration key of the argument of MoCo or `build_backbone` that it begins with."""
    sections = {"image_size": "data", "kernel": "batchformer", "group_size": "batchformer", "dropout": "batchformer"}
    argument = re.split(r"[ .]", str(error), maxsplit=1)[0]
    return f"crossbatch.{sections.get(argument, 'model')}.{error}"


def parameter_groups(model: nn.Module, config: Config | FinetuneConfig) -> list[dict[str, Any]]:
    """Return the trainable parameters in up to four groups: decayed or not, at BatchFormer's rate or at that of the rest.

    Each group carries `adapts` (for LARS), `weight_decay`, and `lr_scale` (relative to the schedule). DeepSpeed steps group by
    group, so a BatchFormer with a rate of its own costs LARS one more all-reduce.
    """
    params = config.optimizer.params
    is_adamw = isinstance(params, AdamWConfig)
    decays_1d = isinstance(params, AdamWConfig) and params.decay_1d
    split = split_parameters(model, config.crossbatch.lr_scales, POSITIONS if is_adamw else ())
    return [
        {
            "params": parameters,
            "adapts": is_matrix,
            "weight_decay": params.weight_decay if is_matrix or decays_1d else 0.0,
            "lr_scale": lr_scale,
        }
        for (lr_scale, is_matrix), parameters in split.items()
    ]


def build_optimizer(groups: list[dict[str, Any]], config: Config | FinetuneConfig) -> torch.optim.Optimizer:
    """Return the configured optimizer over `parameter_groups`; its learning rate is 0 until `set_learning_rate`."""
    params = config.optimizer.params
    if isinstance(params, LarsConfig):
        return LARS(
            groups,
            lr=0.0,
            momentum=params.momentum,
            trust_coefficient=params.trust_coefficient,
            variant=params.variant,
            eps=params.eps,
            clip_trust_ratio=params.clip_trust_ratio,
            decay_after_momentum=params.decay_after_momentum,
        )
    return torch.optim.AdamW(groups, lr=0.0, betas=params.betas, eps=params.eps, fused=True)


def build_backend(model: ShardableModel, run: Resolved) -> Backend:
    """Shard `model` (already on its device, equal on all ranks) and build its optimizer.

    A backend is imported only where it is used, because DeepSpeed takes seconds.
    """
    config = run.config

    def make_optimizer(module: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(parameter_groups(module, config), config)

    if config.crossbatch.sharding == "fsdp":
        from crossbatch.engine.sharding.fsdp import FsdpBackend

        return FsdpBackend(model, make_optimizer, config.zero_optimization.stage, config.gradient_clipping)
    from crossbatch.engine.sharding.zero import ZeroBackend

    return ZeroBackend(model, make_optimizer, deepspeed_config(run))


def deepspeed_config(run: Resolved) -> dict[str, Any]:
    """Return the dict that DeepSpeed sees, without "auto" and without our section."""
    zero = {name: value for name, value in vars(run.config.zero_optimization).items() if value is not None}
    offload = vars(zero.pop("offload_optimizer"))
    if offload["device"] != "none":
        zero["offload_optimizer"] = offload
    if zero["stage"] == 3:
        # Parameters that stay gathered would miss the momentum update, which works on the shards.
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "train_batch_size": run.config.train_batch_size,
        "train_micro_batch_size_per_gpu": run.local_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": run.config.gradient_clipping,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # an offloaded optimizer steps on the CPU with our own kernels
        "zero_allow_untested_optimizer": True,  # LARS, which has read the cut
    }


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
