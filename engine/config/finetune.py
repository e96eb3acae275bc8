"""Declare the keys of fine-tuning, and resolve them. A key that also exists in pretraining has the same name and meaning.

Defaults are those of the published transfer of a ViT-B to CIFAR-10, which follow DeiT (Touvron et al., 2021, table 9).
"""

from typing import Annotated, Literal

from annotated_types import Ge, Le

from crossbatch import InputError
from crossbatch.engine.config import schema
from crossbatch.engine.config.evaluation import FrozenModelConfig
from crossbatch.engine.config.keys import Section, key
from crossbatch.engine.config.resolve import Device, Resolved, check_training, resolve_training
from crossbatch.engine.config.schema import Count, Fraction, NotNegative

UpTo90Percent = Annotated[float, Ge(0), Le(0.9)]


class FinetuneAdamWConfig(schema.AdamWConfig):
    base_lr: schema.Positive = key(3e-4, schema.BASE_LR)
    reference_batch: Count = key(512, schema.REFERENCE_BATCH)
    decay_1d: bool = key(False, "decay biases, norms, the class token and positions, too")


class FinetuneOptimizerConfig(Section):
    type: Literal["AdamW"] = key("AdamW", "optimizer")
    params: FinetuneAdamWConfig = FinetuneAdamWConfig()


class FinetuneScheduleConfig(Section):
    epochs: Count = key(100, "epochs to train")
    warmup_epochs: NotNegative = key(3.0, "epochs of linear warm-up from 1e-6; a half cosine to 1e-5 follows")
    deit_compat: bool = key(
        False,
        "follow DeiT's schedule exactly: one rate an epoch, set one epoch late, on a cosine that ignores the warm-up",
    )


class FinetuneDataConfig(schema.ImageConfig):
    crop_min: schema.PositiveFraction = key(0.05, "smallest crop, as a fraction of the image's area")
    image_size: schema.ImageSize = key(
        224, "side of an image in pixels, or [height, width]; the positions of a ViT are resampled to it"
    )
    interpolation: Literal["bilinear", "bicubic"] = key("bilinear", "of resized crops, in training and evaluation")
    color_jitter: Fraction = key(0.0, "largest change of brightness, contrast and saturation, as in timm; 0: none")
    auto_augment: str | None = key(
        None,
        "timm's name of an automatic augmentation: RandAugment as in DeiT is rand-m9-mstd0.5-inc1; it replaces color_jitter",
    )
    repeats: Count = key(1, "repeated augmentation: crops of each image in a batch; must divide the local batch")


class RegularisationConfig(Section):
    drop_path: UpTo90Percent = key(0.1, "probability of skipping the last block of a ViT; it grows linearly over depth")
    mixup: NotNegative = key(0.8, "alpha of mixup; 0: off")
    cutmix: NotNegative = key(1.0, "alpha of CutMix; 0: off; with mixup, each batch gets one of the two at random")
    label_smoothing: UpTo90Percent = key(0.1, "label smoothing, also of mixed targets")
    random_erasing: Fraction = key(0.0, "random erasing: probability of replacing a rectangle of an image by noise")
    ema_decay: Fraction = key(0.0, "decay of a moving average of the weights, which is evaluated too; 0: no average")


class FinetuneEvaluateConfig(Section):
    every_epochs: Count = key(1, "epochs between two evaluations; the last epoch is always evaluated")


class FinetuneSection(schema.TrainingConfig):
    model: FrozenModelConfig = FrozenModelConfig()
    finetune: RegularisationConfig = RegularisationConfig()
    schedule: FinetuneScheduleConfig = FinetuneScheduleConfig()
    data: FinetuneDataConfig = FinetuneDataConfig()
    evaluate: FinetuneEvaluateConfig = key(FinetuneEvaluateConfig(), resumable=True)


class FinetuneConfig(schema.DeepSpeedConfig):
    """Declares the keys of `launch/finetune.py`."""

    train_batch_size: schema.AtLeastTwo = key(128, "images of one optimizer step over all ranks")
    optimizer: FinetuneOptimizerConfig = FinetuneOptimizerConfig()
    crossbatch: FinetuneSection = FinetuneSection()


ResolvedFinetune = Resolved[FinetuneSection, FinetuneOptimizerConfig]


def resolve_finetune(
    config: FinetuneConfig, world_size: int, device: Device, local_world_size: int = 1
) -> ResolvedFinetune:
    """Replace every "auto" of `config`.

    Raises:
        InputError: if the configuration cannot run on `world_size` ranks of `device`.
    """
    check_training(config)
    cfg = resolve_training(_without_dali(config), world_size, device, local_world_size)
    data, repeats = cfg.crossbatch.data, cfg.crossbatch.data.repeats
    if data.auto_augment is not None and data.color_jitter:
        raise InputError(
            f"crossbatch.data.color_jitter: given {data.color_jitter:g} with crossbatch.data.auto_augment, which replaces "
            f"it, as in timm; allowed: one of the two; set it to 0"
        )
    if cfg.local_batch % repeats:
        raise InputError(
            f"crossbatch.data.repeats: given {repeats} for {cfg.local_batch} images per rank; allowed: a divisor of "
            f"these; set it to 1"
        )
    if cfg.local_batch % 2 and (cfg.crossbatch.finetune.mixup or cfg.crossbatch.finetune.cutmix):
        raise InputError(
            f"train_batch_size: given {cfg.train_batch_size}, or {cfg.local_batch} images per rank; mixup and CutMix need an "
            f"even number; set train_batch_size to {cfg.train_batch_size + world_size}, or crossbatch.finetune.mixup and "
            f"cutmix to 0"
        )
    return cfg


def _without_dali(config: FinetuneConfig) -> FinetuneConfig:
    """Return `config` with a backend that can apply its augmentation. Raises InputError if it names another."""
    data = config.crossbatch.data
    if data.backend not in ("auto", "dali") or (data.interpolation == "bilinear" and data.auto_augment is None):
        return config
    if data.backend == "dali":
        raise InputError(
            "crossbatch.data.backend: given dali, which has neither crossbatch.data.interpolation bicubic nor "
            "crossbatch.data.auto_augment; allowed: auto, opencv, torchvision"
        )
    data = data.model_copy(update={"backend": "opencv"})
    return config.model_copy(update={"crossbatch": config.crossbatch.model_copy(update={"data": data})})
