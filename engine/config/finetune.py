"""The keys of fine-tuning. Those that it shares with pretraining mean the same; defaults are those of the published transfer
of a ViT-B to CIFAR-10, which follow DeiT (Touvron et al., 2021, table 9).
"""

from dataclasses import dataclass
from typing import Any, Literal

from crossbatch import InputError
from crossbatch.engine.config.evaluation import FrozenModelConfig
from crossbatch.engine.config.resolve import Device, Resolved, check_training, resolve_training
from crossbatch.engine.config.schema import (
    AdamWConfig,
    Auto,
    CheckpointConfig,
    LogConfig,
    WatchConfig,
    ZeroConfig,
    key,
)

IMAGES_OF_LR = 512  # the learning rate is given per so many images


@dataclass(frozen=True)
class FinetuneAdamWConfig(AdamWConfig):
    lr: float = key(3e-4, "per 512 images: peak = lr * train_batch_size / 512", above=0.0)
    weight_decay: float = key(0.1, "decoupled", low=0.0)
    decay_1d: bool = key(False, "decay biases, norms, the class token and positions, too")


@dataclass(frozen=True)
class FinetuneOptimizerConfig:
    type: Literal["AdamW"] = key("AdamW", "AdamW")
    params: FinetuneAdamWConfig = key(FinetuneAdamWConfig, "of AdamW")


@dataclass(frozen=True)
class FinetuneScheduleConfig:
    epochs: int = key(100, "epochs to train", low=1)
    warmup_epochs: float = key(3, "epochs of linear warm-up from 1e-6; a half cosine to 1e-5 follows", low=0.0)
    deit_compat: bool = key(
        False,
        "DeiT's schedule to the letter: one rate an epoch, set one epoch late, on a cosine that ignores the warm-up",
    )


@dataclass(frozen=True)
class FinetuneDataConfig:
    path: str | None = key(
        None, "labelled images with an evaluation split; as for pretraining, or flowers://DIR, pets://DIR"
    )
    backend: Literal["auto", "dali", "opencv", "torchvision"] = key("auto", "as for pretraining")
    crop_min: float = key(0.05, "smallest crop as a share of the image's area", above=0.0, high=1.0)
    image_size: int = key(224, "side of an image in pixels; positions of a ViT are resampled to it", low=8)
    workers: int | Auto = key("auto", "loader processes (with DALI: threads) of a rank", low=0)
    max_skipped_fraction: float = key(0.001, "share of broken images above which the run stops", low=0.0, high=1.0)
    repeats: int = key(1, "repeated augmentation: crops of an image in a batch; a divisor of the local batch", low=1)


@dataclass(frozen=True)
class RegularisationConfig:
    drop_path: float = key(
        0.1, "chance of the last block of a ViT to be skipped, growing linearly over depth", low=0.0, high=0.9
    )
    mixup: float = key(0.8, "alpha of mixup; 0 off", low=0.0)
    cutmix: float = key(1.0, "alpha of CutMix; 0 off; with mixup, one of the two a batch, at random", low=0.0)
    label_smoothing: float = key(0.1, "of the targets, mixed ones too", low=0.0, high=0.9)
    random_erasing: float = key(0.0, "chance of a rectangle of an image to be replaced by noise", low=0.0, high=1.0)
    average: float = key(
        0.0, "momentum of a moving average of the network, which is evaluated, too; 0 none", low=0.0, high=1.0
    )


@dataclass(frozen=True)
class FinetuneEvaluateConfig:
    every_epochs: int = key(1, "epochs between two evaluations; the last epoch is always evaluated", low=1)


@dataclass(frozen=True)
class FinetuneSection:
    model: FrozenModelConfig = key(FrozenModelConfig, "what to start from")
    finetune: RegularisationConfig = key(RegularisationConfig, "against overfitting")
    schedule: FinetuneScheduleConfig = key(FinetuneScheduleConfig, "epochs and warm-up")
    data: FinetuneDataConfig = key(FinetuneDataConfig, "images")
    evaluate: FinetuneEvaluateConfig = key(FinetuneEvaluateConfig, "when")
    log: LogConfig = key(LogConfig, "metrics.jsonl and TensorBoard")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "what is kept")
    watch: WatchConfig = key(WatchConfig, "when a run stops itself or warns")
    sharding: Literal["zero", "fsdp"] = key("zero", "as for pretraining")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = key("auto", "as for pretraining")
    deterministic: bool = key(False, "as for pretraining")
    seed: int = key(0, "of the head, data order, augmentation, mixing and drop path", low=0)

    @property
    def lr_scales(self) -> dict[str, float]:
        """By prefix of a parameter's name; see `optimizers.parameter_groups`."""
        return {}


@dataclass(frozen=True)
class FinetuneConfig:
    train_batch_size: int = key(128, "images of one optimizer step over all ranks", low=2)
    train_micro_batch_size_per_gpu: int | Auto = key(
        "auto", "images that the network sees at once; gradients add up", low=1
    )
    gradient_clipping: float = key(0.0, "largest global gradient norm; 0 off", low=0.0)
    optimizer: FinetuneOptimizerConfig = key(FinetuneOptimizerConfig, "AdamW")
    zero_optimization: ZeroConfig = key(ZeroConfig, "how state is sharded")
    crossbatch: FinetuneSection = key(FinetuneSection, "everything that DeepSpeed has no key for")


@dataclass(frozen=True)
class ResolvedFinetune(Resolved):
    config: FinetuneConfig

    @property
    def lr_peak(self) -> float:
        """Learning rate after warm-up."""
        return self.config.optimizer.params.lr * self.config.train_batch_size / IMAGES_OF_LR


def resolve_finetune(
    config: FinetuneConfig, world_size: int, device: Device, local_world_size: int = 1
) -> ResolvedFinetune:
    """Raises InputError where the configuration cannot run on `world_size` ranks of `device`."""
    check_training(config, world_size)
    shared = resolve_training(config, world_size, device, local_world_size)
    repeats = config.crossbatch.data.repeats
    if shared.local_batch % repeats:
        raise InputError(
            f"crossbatch.data.repeats: given {repeats} for {shared.local_batch} images a rank; allowed: a divisor; set it to 1"
        )
    if shared.local_batch % 2 and _mixes(config):
        raise InputError(
            f"train_batch_size: given {config.train_batch_size}, {shared.local_batch} images a rank; mixing needs an even "
            f"number of them; set train_batch_size to {config.train_batch_size + world_size}, or finetune.mixup and cutmix to 0"
        )
    return ResolvedFinetune(**vars(shared))


def _mixes(config: Any) -> bool:
    return bool(config.crossbatch.finetune.mixup or config.crossbatch.finetune.cutmix)
