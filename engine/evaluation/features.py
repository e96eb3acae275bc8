"""Features of whole data sets by a network that does not change meanwhile, spread over the ranks.

Who has the network is asked for `embed`: normalised images [m, 3, H, W] on the device -> features [m, C]. In training that is
the sharded model, which gathers its parameters at every call; outside it is a plain backbone. Hence the one rule here: all
ranks call `embed` equally often.

Shapes: N images, C features, W ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from crossbatch.data import EvaluationLoader, Source, evaluation_share, normalize
from crossbatch.engine.datasets import stop_on_lost_images
from crossbatch.models.collective import Collective

Embed = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class FeatureSet:
    """Features of some images of a source, in its order."""

    features_NC: torch.Tensor  # fp32
    labels_N: torch.Tensor  # int64
    indices_N: torch.Tensor  # int64, in the source
    skipped: list[str]  # names of the broken images among them, which have no row

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True)
class EvalLoaderConfig:
    """How images are read and shown to the network."""

    image_size: int
    batch_size: int  # of a rank
    workers: int
    device: torch.device


@torch.no_grad()
def extract(
    embed: Embed,
    source: Source,
    indices: np.ndarray,
    reading: EvalLoaderConfig,
    collective: Collective,
    advance: Callable[[int], None] | None = None,
) -> FeatureSet:
    """This rank's share of the rows of `indices`, by the images' central views; every rank must call it.

    All ranks make the same number of forward passes; a rank that has run out of images repeats its last ones and throws the
    result away. `advance` is told how many images of this rank came in. A broken image has no row.
    """
    mine = indices[evaluation_share(len(indices), collective.world_size, collective.rank)]
    largest_share = -(-len(indices) // collective.world_size)
    loader = EvaluationLoader(source, reading.image_size, mine, reading.batch_size, reading.workers)
    batches = iter(loader)
    images = torch.zeros(1, 3, reading.image_size, reading.image_size, dtype=torch.uint8)
    features, read = [], [mine[:0]]
    for _ in range(-(-largest_share // reading.batch_size)):
        with stop_on_lost_images():
            images, numbers = next(batches, (images, None))
        output = embed(prepared(images, reading.device)).float()
        features.append(output[:0] if numbers is None else output)
        if numbers is not None:
            read.append(numbers)
            if advance is not None:
                advance(len(numbers))
    with stop_on_lost_images():
        next(batches, None)  # lets the loader end its workers
    numbers = np.concatenate(read)
    labels, numbers = (torch.as_tensor(array, device=reading.device) for array in (source.labels[numbers], numbers))
    return FeatureSet(torch.cat(features), labels, numbers, loader.skipped)


def prepared(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 [m, 3, H, W] as a backbone takes them."""
    return normalize(images.to(device, non_blocking=True)).to(memory_format=torch.channels_last)


def gathered(rows: FeatureSet, collective: Collective) -> FeatureSet:
    """All ranks' rows, in the order of the ranks, on every rank. Names of broken images stay with the rank that met them."""
    if collective.world_size == 1:
        return rows
    counts = collective.all_gather(torch.tensor([len(rows)], device=rows.labels_N.device)).flatten().tolist()

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        """Shares differ in length, so they are padded to the longest one and cut again."""
        padding = (0, 0) * (tensor.dim() - 1) + (0, max(counts) - len(tensor))
        padded = collective.all_gather(F.pad(tensor, padding))
        return torch.cat([part[:count] for part, count in zip(padded, counts, strict=True)])

    return FeatureSet(whole(rows.features_NC), whole(rows.labels_N), whole(rows.indices_N), rows.skipped)
