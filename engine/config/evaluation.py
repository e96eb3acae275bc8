"""Declare the keys of the commands that use a frozen backbone: k-NN, the linear probe, export.

A key that also exists in pretraining has the same name and meaning. Defaults are those of MoCo v3's linear evaluation.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le, MinLen

from crossbatch.engine.config import schema
from crossbatch.engine.config.keys import Auto, Section, key
from crossbatch.engine.config.schema import Count, CountOrZero, ImageSize, LogConfig

Precision = Literal["fp32", "bf16", "fp16"]
LearningRate = Annotated[float, Gt(0), Le(1e6)]
CHECKPOINT = "a run, one of its checkpoints, or a file of weights of moco-v3, DeiT, timm or torchvision"
IMAGE_SIZE = "side of an image in pixels; auto: that of pretraining"
NOT_SAID = "if the checkpoint does not say"


class FrozenModelConfig(Section):
    """Declares the keys that describe a network. They may repeat, but not contradict, what its checkpoint says."""

    checkpoint: str | None = key(None, CHECKPOINT, resumable=True)
    arch: str | None = key(None, f"backbone, {NOT_SAID}")
    stem: schema.Stem | None = key(None, f"first layers of a ResNet, {NOT_SAID}")
    backbone_args: Mapping[str, Any] | None = key(None, f"arguments of the backbone, {NOT_SAID}")
    encoder: Literal["online", "momentum"] = key("online", "which of the two encoders of pretraining to use")


class ExportModelConfig(Section):
    model: FrozenModelConfig = FrozenModelConfig()


class ExportConfig(Section):
    """Declares the keys of `launch/convert.py export`."""

    crossbatch: ExportModelConfig = ExportModelConfig()


class KnnImagesConfig(schema.PathConfig):
    image_size: ImageSize | Auto = key("auto", IMAGE_SIZE)
    workers: CountOrZero | Auto = key("auto", "loader processes per rank; 0 loads in the evaluating process")


class VotesConfig(Section):
    k: Annotated[tuple[Count, ...], MinLen(1)] = key(
        (20, 10, 100, 200), "numbers of neighbours that vote; top1 in the results is for the first"
    )
    temperature: schema.Positive = key(
        0.07, "a neighbour of cosine similarity s votes with weight exp(s / temperature)"
    )


class EmbedSection(Section):
    model: FrozenModelConfig = FrozenModelConfig()
    data: KnnImagesConfig = KnnImagesConfig()
    precision: Precision = key("fp32", "autocast precision of the backbone")


class KnnSection(EmbedSection):
    knn: VotesConfig = VotesConfig()


class KnnConfig(Section):
    """Declares the keys of `launch/knn.py`."""

    train_micro_batch_size_per_gpu: Count = key(256, "images that the backbone sees at once")
    crossbatch: KnnSection = KnnSection()


class EmbedConfig(Section):
    """Declares the keys of `launch/embed.py`."""

    train_micro_batch_size_per_gpu: Count = key(256, "images that the backbone sees at once")
    crossbatch: EmbedSection = EmbedSection()


class TrainImagesConfig(schema.ImageConfig):
    backend: schema.Backend = key("auto", schema.BACKEND, resumable=True)
    image_size: ImageSize | Auto = key("auto", IMAGE_SIZE)


class SgdConfig(Section):
    base_lr: LearningRate | Annotated[tuple[LearningRate, ...], MinLen(1)] | Auto = key(
        "auto",
        "first learning rate: base_lr * train_batch_size / reference_batch; auto: 0.1 (ResNet) or 3 (ViT); a list trains a "
        "classifier with each of its rates",
    )
    reference_batch: Count = key(256, schema.REFERENCE_BATCH)
    momentum: schema.Fraction = key(0.9, "momentum of the velocity")
    weight_decay: schema.NotNegative = key(0.0, "weight decay of the classifier's weight and bias")


class ProbeOptimizerConfig(Section):
    type: Literal["SGD"] = key("SGD", "stochastic gradient descent with momentum")
    params: SgdConfig = SgdConfig()


class ProbeScheduleConfig(Section):
    epochs: Count = key(90, "epochs to train; the learning rate falls along half a cosine, once an epoch")


class ProbeConfig(Section):
    norm: bool = key(
        False, "batch norm without parameters before the classifier (He et al. 2022), for any feature scale"
    )
    cache: bool = key(
        False, "compute the training features only once, from central views, without augmentation; faster"
    )


class LinearSection(Section):
    model: FrozenModelConfig = key(FrozenModelConfig(), resumable=True)  # its weights are compared
    data: TrainImagesConfig = TrainImagesConfig()
    linear: ProbeConfig = ProbeConfig()
    schedule: ProbeScheduleConfig = ProbeScheduleConfig()
    log: LogConfig = key(LogConfig(), resumable=True)
    precision: Precision = key("fp32", "autocast precision of the backbone; the classifier is always fp32")
    seed: CountOrZero = key(0, "seed of the classifier, the data order and the augmentation")


class LinearConfig(Section):
    """Declares the keys of `launch/linear.py`."""

    train_batch_size: Count = key(1024, "images of one optimizer step over all ranks")
    train_micro_batch_size_per_gpu: Count = key(256, "images that the backbone sees at once", resumable=True)
    optimizer: ProbeOptimizerConfig = ProbeOptimizerConfig()
    crossbatch: LinearSection = LinearSection()
