"""Extracts the features of whole data sets on all ranks, with a network that does not change meanwhile.

The network is a function `embed`: normalised images [m, 3, H, W] on the device -> features [m, C]. For pretrained weights it is
a `FrozenBackbone`. During training it is the sharded model, which gathers its parameters in every call, so all ranks must call
`embed` equally often.

Shapes: N images, C features, W ranks.
"""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from crossbatch.data import (
    EvaluationLoader,
    Source,
    ViewAugmentation,
    WaitInterrupted,
    evaluation_share,
    normalize,
)
from crossbatch.data.augment.parameters import RGB, Channels, ImageSize, height_width
from crossbatch.data.worker_batches import EvaluationDataset
from crossbatch.data.workers import WAIT_S
from crossbatch.engine.config import autocast_dtype
from crossbatch.engine.datasets import stop_on_lost_images
from crossbatch.models import autocast
from crossbatch.models.backbones import Backbone
from crossbatch.models.collective import Collective

Embed = Callable[[torch.Tensor], torch.Tensor]


class FrozenBackbone:
    """Maps normalised images [m, 3, H, W] to features [m, C]: no gradients, running statistics stay as they are.

    Args:
        backbone: the network, which is moved to `device`.
        precision: "fp32", "bf16" or "fp16", for autocast.
    """

    def __init__(self, backbone: Backbone, device: torch.device, precision: str = "fp32"):
        self.num_features = backbone.num_features
        self.backbone: nn.Module = backbone.to(device).eval().requires_grad_(False)
        self._dtype = autocast_dtype(precision)
        self.fingerprint = fingerprint(self.backbone)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        with autocast(images.device.type, self._dtype):
            return self.backbone(images)


def fingerprint(module: nn.Module) -> str:
    """Return the SHA-256 of the names and bits of all parameters and buffers."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


@dataclass
class FeatureSet:
    """Holds the features of images of one source, in the order of their indices."""

    features_NC: torch.Tensor  # fp32
    labels_N: torch.Tensor  # int64
    indices_N: torch.Tensor  # int64, in the source
    skipped: list[str]  # name and reason of broken images, which have no row

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True)
class EvalLoaderConfig:
    """Says how evaluation images are loaded and passed to the network."""

    image_size: ImageSize
    batch_size: int  # images that the network of a rank sees at once
    workers: int
    device: torch.device
    interpolation: str = "bilinear"
    wait_s: float = WAIT_S  # for images, at most
    channels: Channels = RGB
    augmentations: tuple[ViewAugmentation, ...] = ()  # of augmented views
    seed: int = 0  # of those

    def open(self, *sources: Source) -> EvaluationLoader:
        """Return a loader of images of `sources`; the caller closes it."""
        channels = len(self.channels.mean)
        views = EvaluationDataset(sources, self.image_size, self.interpolation, channels, self.augmentations, self.seed)
        return EvaluationLoader(views, self.batch_size, self.workers, self.wait_s)


@torch.no_grad()
def extract(
    embed: Embed,
    source: Source,
    indices: np.ndarray,
    reading: EvalLoaderConfig,
    collective: Collective,
    between_batches: Callable[[int], object] = lambda images: None,
    loader: EvaluationLoader | None = None,
    augmented: bool = False,
) -> FeatureSet:
    """Return the features of this rank's share of `indices`, from central or augmented views; every rank must call it.

    Features of `augmented` images are those of their v views side by side, [N, v * C]. All ranks make the same number of
    forward passes: a rank without further images repeats its last ones and drops the result.

    Args:
        indices: images of `source`, [N], the same on all ranks.
        between_batches: is called with the number of images that this rank has just loaded, before they go through the
            network. It may raise, on all ranks.
        loader: reads the images, and stays open; of `reading`, with `source`. Without one, workers start and end here.

    Raises:
        RunStopped: if images were lost.
    """
    mine = indices[evaluation_share(len(indices), collective.world_size, collective.rank)]
    largest_share = -(-len(indices) // collective.world_size)
    features, read, num_views = [], [], len(reading.augmentations) if augmented else 1
    with contextlib.nullcontext(loader) if loader else reading.open(source) as ours:
        batches = ours.read(source, mine, augmented)
        shape = num_views, 1, len(reading.channels.mean), *height_width(reading.image_size)
        images = torch.zeros(shape if augmented else shape[1:], dtype=torch.uint8)
        for _ in range(-(-largest_share // ours.images_at_once(augmented))):
            numbers = mine[:0]
            with stop_on_lost_images(), contextlib.suppress(WaitInterrupted):  # of which the ranks learn next
                images, numbers = next(batches, (images, numbers))
            between_batches(len(numbers))
            views = [embed(prepared(view, reading)).float() for view in (images if augmented else [images])]
            features.append(torch.cat(views, dim=1)[: len(numbers)])
            read.append(numbers)
        with stop_on_lost_images(), contextlib.suppress(WaitInterrupted):
            next(batches, None)  # the end, where it raises if not one image could be read
    numbers = np.concatenate(read)
    labels, numbers = (torch.as_tensor(array, device=reading.device) for array in (source.labels[numbers], numbers))
    return FeatureSet(torch.cat(features), labels, numbers, ours.skipped)


def prepared(images: torch.Tensor, reading: EvalLoaderConfig) -> torch.Tensor:
    """Return uint8 images [m, C, H, W] as a backbone takes them: normalised, on the device of `reading`, channels last."""
    images = images.to(reading.device, non_blocking=True)
    return normalize(images, channels=reading.channels).to(memory_format=torch.channels_last)


def gathered(rows: FeatureSet, collective: Collective) -> FeatureSet:
    """Return the rows of all ranks, in the order of the ranks, on every rank; `skipped` stays that of this rank."""
    if collective.world_size == 1:
        return rows
    counts = collective.all_gather(torch.tensor([len(rows)], device=rows.labels_N.device)).flatten().tolist()

    def concatenated(tensor: torch.Tensor) -> torch.Tensor:
        """Gather shares of different lengths, padded to the longest one and cut again."""
        padding = (0, 0) * (tensor.dim() - 1) + (0, max(counts) - len(tensor))
        padded = collective.all_gather(F.pad(tensor, padding))
        return torch.cat([part[:count] for part, count in zip(padded, counts, strict=True)])

    fields = (concatenated(tensor) for tensor in (rows.features_NC, rows.labels_N, rows.indices_N))
    return FeatureSet(*fields, skipped=rows.skipped)
