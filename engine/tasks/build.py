"""Builds what a configuration describes: model, parameter groups, optimizer, sharding backend; and the numbers of a dry run."""

from typing import Any

import torch
from torch import nn

from crossbatch.data.augment.parameters import channels_of
from crossbatch.engine.config import (
    AdamWConfig,
    Config,
    FinetuneConfig,
    LarsConfig,
    Resolved,
    ResolvedConfig,
    user_input,
)
from crossbatch.engine.config.schema import PRINTED_BY_DEEPSPEED
from crossbatch.engine.optimizers import LARS, freeze_at_first, split_parameters
from crossbatch.engine.runtime.distributed import GroupCollective, consecutive_ranks
from crossbatch.engine.sharding import Backend
from crossbatch.models import MoCo, ShardableModel

# Parameters of a ViT that are added to every image alike, as biases are, whatever their shape.
POSITIONS = ("*cls_token", "*pos_embed")

FROZEN_FIRST = "backbone"  # name of the groups that `schedule.freeze_backbone_epochs` freezes

# Arguments of MoCo that are not in the section crossbatch.model.
KEYS_ELSEWHERE = {"image_size": "crossbatch.data.image_size"} | {
    name: f"crossbatch.batchformer.{name}" for name in ("kernel", "group_size", "dropout")
}


def build_model(cfg: ResolvedConfig) -> MoCo:
    """Build the network of a resolved configuration on the current default device.

    Raises:
        InputError: for an unknown architecture or arguments that it does not take.
    """
    model, batchformer, data = cfg.crossbatch.model, cfg.crossbatch.batchformer, cfg.crossbatch.data
    with user_input("crossbatch.data."):
        channels_of(data.channels, data.mean, data.std)
    with user_input("crossbatch.model.", **KEYS_ELSEWHERE):
        return MoCo(
            model.arch,
            **model.model_dump(exclude={"arch", "norm_ranks", "compile", "init"}),
            image_size=data.image_size,
            in_channels=data.channels,
            batchformer_loss=batchformer.loss,
            group_size=cfg.group_size or 1,
            dropout=batchformer.dropout,
            batchformer_mode=batchformer.mode,
            batchformer_kernel=batchformer.kernel,
        )


def connect(model: MoCo, cfg: ResolvedConfig) -> None:
    """Connect `model` with all ranks, and its norms with those that share statistics; every rank must call it."""
    # The default group fails a minute later with NCCL, for the watchdog's sake, and so must this one.
    timeout_s = cfg.crossbatch.watch.timeout_s + (60 if cfg.device.type == "cuda" else 0)
    model.set_collective(GroupCollective(), norms=GroupCollective(consecutive_ranks(cfg.norm_ranks, timeout_s)))


def parameter_groups(model: nn.Module, config: Config | FinetuneConfig) -> list[dict[str, Any]]:
    """Return the trainable parameters in up to four groups: decayed or not, at BatchFormer's rate or at that of the rest.

    With `schedule.freeze_backbone_epochs`, the backbone has groups of its own, named so. Each group carries `adapts`
    (for LARS), `weight_decay`, and `lr_scale`, relative to the schedule. DeepSpeed steps group by group, so a BatchFormer with
    a rate of its own, and a frozen backbone, cost LARS one more all-reduce each.
    """
    params = config.optimizer.params
    decays_1d = isinstance(params, AdamWConfig) and params.decay_1d
    positions = POSITIONS if isinstance(params, AdamWConfig) else ()
    lr_scales = {"batchformer.": config.crossbatch.batchformer.lr_scale} if isinstance(config, Config) else {}
    split = split_parameters(model, lr_scales, positions)
    backbone: set[nn.Parameter] = set()
    if _freezes(config):
        assert isinstance(model, MoCo)
        backbone = set(model.online.backbone.parameters())
    return [
        {
            "name": name,
            "params": members,
            "adapts": is_matrix,
            "weight_decay": params.weight_decay if is_matrix or decays_1d else 0.0,
            "lr_scale": lr_scale,
        }
        for (lr_scale, is_matrix), parameters in split.items()
        for name in (FROZEN_FIRST, "")
        if (members := [parameter for parameter in parameters if (parameter in backbone) == (name == FROZEN_FIRST)])
    ]


def _freezes(config: Config | FinetuneConfig) -> bool:
    return isinstance(config, Config) and config.crossbatch.schedule.freeze_backbone_epochs > 0


def build_optimizer(groups: list[dict[str, Any]], config: Config | FinetuneConfig) -> torch.optim.Optimizer:
    """Return the configured optimizer over `parameter_groups`; its learning rate is 0 until `set_learning_rate`."""
    params = config.optimizer.params
    if isinstance(params, LarsConfig):
        in_groups = {"base_lr", "reference_batch", "weight_decay"}
        optimizer = LARS(groups, lr=0.0, **params.model_dump(exclude=in_groups))
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=params.betas, eps=params.eps, fused=True)
    if _freezes(config):
        freeze_at_first(optimizer, FROZEN_FIRST)
    return optimizer


def build_backend(model: ShardableModel, cfg: Resolved) -> Backend:
    """Shard `model` (already on its device, equal on all ranks) and build its optimizer.

    A backend is imported only where it is used, because DeepSpeed takes seconds.

    Raises:
        InputError: if parts of the network are to be compiled, and torch.compile cannot do it here.
    """
    if isinstance(model, MoCo) and isinstance(cfg, ResolvedConfig) and cfg.crossbatch.model.compile:
        with user_input("crossbatch.model."):
            model.compile_regions()

    def make_optimizer(module: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(parameter_groups(module, cfg.config), cfg.config)

    if cfg.crossbatch.sharding == "fsdp":
        from crossbatch.engine.sharding.fsdp import FsdpBackend

        return FsdpBackend(model, make_optimizer, cfg.config.zero_optimization.stage, cfg.config.gradient_clipping)
    from crossbatch.engine.sharding.zero import ZeroBackend

    return ZeroBackend(model, make_optimizer, deepspeed_config(cfg, count(model, trained=True)))


def count(module: nn.Module, trained: bool = False) -> int:
    """Count the parameters of a module, all or the trained ones."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def deepspeed_config(cfg: Resolved, trained: int) -> dict[str, Any]:
    """Return the dict that DeepSpeed sees for a model with `trained` elements, without "auto" and without our section."""
    zero = {name: value for name, value in vars(cfg.config.zero_optimization).items() if value is not None}
    zero["reduce_bucket_size"] = cfg.config.zero_optimization.bucket_size(trained)
    offload = vars(zero.pop("offload_optimizer"))
    if offload["device"] != "none":
        zero["offload_optimizer"] = offload
    if zero["stage"] == 3:
        # Parameters that stay gathered would miss the momentum update, which works on the shards.
        zero["stage3_param_persistence_threshold"] = 0
    printed = {name: getattr(cfg.config, name) for name in PRINTED_BY_DEEPSPEED}
    return {
        **{name: value for name, value in printed.items() if value is not None},
        "train_batch_size": cfg.train_batch_size,
        "train_micro_batch_size_per_gpu": cfg.local_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": cfg.config.gradient_clipping,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # an offloaded optimizer steps on the CPU with our own kernels
        "zero_allow_untested_optimizer": True,  # our LARS, which knows how DeepSpeed cuts its tensors
    }


def describe(cfg: ResolvedConfig, steps_per_epoch: int | None) -> dict[str, Any]:
    """Return what `--dry-run` prints: the numbers that follow from a configuration, without data or processes."""
    with torch.device("meta"):
        model = build_model(cfg)
    zero, trained = cfg.config.zero_optimization, count(model, trained=True)
    has_buckets = cfg.crossbatch.sharding == "zero" and zero.stage > 0
    resolved = ("world_size", "train_batch_size", "local_batch", "chunk", "chunks", "group_size", "lr_peak")
    return {
        **{name: getattr(cfg, name) for name in resolved},
        "steps_per_epoch": steps_per_epoch,
        "parameters_total": count(model),
        "parameters_trainable": trained,
        "chance_loss": round(cfg.chance_loss, 2),
        "optimizer": cfg.optimizer.type,
        "sharding": cfg.crossbatch.sharding,
        "zero_stage": zero.stage,
        "reduce_bucket_size": zero.bucket_size(trained) if has_buckets else None,
        "precision": cfg.precision,
    }
