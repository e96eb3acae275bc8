"""The keys of what looks at a frozen backbone: k-NN and the linear probe. Where a key means what it means in pretraining, it
has the same name. Defaults are the originals' linear evaluation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from crossbatch.engine.config.schema import Auto, LogConfig, key

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class FrozenModelConfig:
    """A checkpoint of ours, and mostly one of the originals, says all of this itself; what it says must not be contradicted."""

    checkpoint: str | None = key(
        None, "a run, one of its checkpoints, or a file of weights of moco-v3, DeiT, timm or torchvision"
    )
    arch: str | None = key(None, "backbone, where the checkpoint does not say")
    stem: Literal["imagenet", "small"] | None = key(None, "first layers of a ResNet, where the checkpoint does not say")
    backbone_args: Mapping[str, Any] | None = key(None, "arguments of the backbone, where the checkpoint does not say")
    encoder: Literal["online", "momentum"] = key("online", "which of the two encoders of pretraining")


@dataclass(frozen=True)
class ImagesConfig:
    path: str | None = key(None, "folder with train/ and val/ or test/; or cifar10://, shapes://, ...")
    image_size: int | Auto = key("auto", "side of a view in pixels; auto: that of pretraining", low=8)
    workers: int | Auto = key("auto", "loader processes of a rank; 0 loads in the evaluating process", low=0)


@dataclass(frozen=True)
class ExportModelConfig:
    model: FrozenModelConfig = key(FrozenModelConfig, "the network")


@dataclass(frozen=True)
class ExportConfig:
    """Of `launch/convert.py export`."""

    crossbatch: ExportModelConfig = key(ExportModelConfig, "everything")


@dataclass(frozen=True)
class VotesConfig:
    k: tuple[int, ...] = key((20, 10, 100, 200), "neighbours that vote; the first is reported as top1", low=1)
    temperature: float = key(0.07, "a neighbour of cosine similarity s weighs exp(s / temperature)", above=0.0)


@dataclass(frozen=True)
class KnnSection:
    model: FrozenModelConfig = key(FrozenModelConfig, "the network")
    data: ImagesConfig = key(ImagesConfig, "images")
    knn: VotesConfig = key(VotesConfig, "the vote")
    precision: Precision = key("fp32", "autocast of the backbone")


@dataclass(frozen=True)
class KnnConfig:
    """Of `launch/knn.py`."""

    train_micro_batch_size_per_gpu: int = key(256, "images that the backbone sees at once", low=1)
    crossbatch: KnnSection = key(KnnSection, "everything that DeepSpeed has no key for")


@dataclass(frozen=True)
class TrainImagesConfig(ImagesConfig):
    backend: Literal["auto", "dali", "opencv", "torchvision"] = key(
        "auto", "who decodes and augments; auto: DALI where it is installed and there is a GPU, else OpenCV"
    )
    crop_min: float = key(0.08, "smallest crop as a share of the image's area", above=0.0, high=1.0)
    max_skipped_fraction: float = key(0.001, "share of broken images above which the run stops", low=0.0, high=1.0)


@dataclass(frozen=True)
class SgdConfig:
    lr: float | tuple[float, ...] | Auto = key(
        "auto",
        "per 256 images: peak = lr * train_batch_size / 256; auto: 0.1 (ResNet), 3 (ViT); a list: a classifier for each",
        above=0.0,
        high=1e6,
    )
    momentum: float = key(0.9, "of the velocity", low=0.0, high=1.0)
    weight_decay: float = key(0.0, "on weight and bias of the classifier", low=0.0)


@dataclass(frozen=True)
class ProbeOptimizerConfig:
    type: Literal["SGD"] = key("SGD", "stochastic gradient descent with momentum")
    params: SgdConfig = key(SgdConfig, "of the optimizer")


@dataclass(frozen=True)
class ProbeScheduleConfig:
    epochs: int = key(90, "epochs to train; the rate falls along half a cosine, epoch by epoch", low=1)


@dataclass(frozen=True)
class ProbeConfig:
    norm: bool = key(
        False, "a batch norm without parameters before the classifier (He et al. 2022), for any scale of features"
    )
    cache: bool = key(
        False,
        "compute the features of the training images once, from central views, instead of augmenting; for quick looks",
    )


@dataclass(frozen=True)
class LinearSection:
    model: FrozenModelConfig = key(FrozenModelConfig, "the network")
    data: TrainImagesConfig = key(TrainImagesConfig, "images")
    linear: ProbeConfig = key(ProbeConfig, "the probe")
    schedule: ProbeScheduleConfig = key(ProbeScheduleConfig, "epochs")
    log: LogConfig = key(LogConfig, "progress")
    precision: Precision = key("fp32", "autocast of the backbone; the classifier is always fp32")
    seed: int = key(0, "of the classifier, the data order and the augmentation", low=0)


@dataclass(frozen=True)
class LinearConfig:
    """Of `launch/linear.py`."""

    train_batch_size: int = key(1024, "images of one optimizer step over all ranks", low=1)
    train_micro_batch_size_per_gpu: int = key(256, "images that the backbone sees at once", low=1)
    optimizer: ProbeOptimizerConfig = key(ProbeOptimizerConfig, "SGD")
    crossbatch: LinearSection = key(LinearSection, "everything that DeepSpeed has no key for")
