"""Classifies images by weighted k-NN on backbone features (Wu et al. 2018; DINO's settings), also during pretraining.

The k training images that are nearest to an evaluation image by cosine similarity s vote for their classes, each with the
weight exp(s / 0.07). Each rank keeps the features of its share of the training images (the bank), finds the k nearest in it for
all evaluation images, and the best of these W * k are the neighbours. So no rank holds the whole bank, and all ranks come to
the same result.

Shapes: M queries, N bank images of a rank, C features, K neighbours, W ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from crossbatch.engine.evaluation.features import FeatureSet, gathered
from crossbatch.models.collective import Collective

TEMPERATURE = 0.07
SCORES_AT_ONCE = 2**27  # similarities held at a time: 512 MiB


class NearestNeighbours(NamedTuple):
    """Holds the K nearest bank images of each query, nearest first; a smaller bank is filled up with similarity -inf."""

    similarity_MK: torch.Tensor
    labels_MK: torch.Tensor
    indices_MK: torch.Tensor  # in the source of the bank; -1 where there is no image


@dataclass
class KnnResult:
    """Holds the predictions for the evaluation images of all ranks; it is the same on every rank."""

    queries: FeatureSet
    neighbours: NearestNeighbours
    predictions: dict[int, torch.Tensor]  # k -> [M] classes

    def top1(self, k: int) -> float:
        """Return the percentage of images for which the class with most votes is right."""
        return 100 * (self.predictions[k] == self.queries.labels_N).double().mean().item()


def nearest(queries_MC: torch.Tensor, bank: FeatureSet, k: int, collective: Collective) -> NearestNeighbours:
    """Find the k nearest images in the banks of all ranks by cosine similarity; every rank must call it.

    `queries_MC` must be the same on all ranks; features have unit length.
    """
    images = collective.all_reduce(torch.tensor(len(bank), device=queries_MC.device)).item()
    at_once = max(1, SCORES_AT_ONCE * collective.world_size // max(int(images), 1))  # the same number on all ranks
    found = [_merged(_nearest_here(some, bank, k), k, collective) for some in queries_MC.split(at_once)]
    return NearestNeighbours(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _nearest_here(queries_MC: torch.Tensor, bank: FeatureSet, k: int) -> NearestNeighbours:
    """Find the k nearest images in the bank of this rank, filled up to k."""
    similarity, rows = (queries_MC @ bank.features_NC.T).topk(min(k, len(bank)), dim=1)
    absent = (0, k - similarity.shape[1])
    return NearestNeighbours(
        F.pad(similarity, absent, value=-torch.inf),
        F.pad(bank.labels_N[rows], absent),
        F.pad(bank.indices_N[rows], absent, value=-1),
    )


def _merged(here: NearestNeighbours, k: int, collective: Collective) -> NearestNeighbours:
    """Return the k nearest of those that all ranks have found in their banks."""
    if collective.world_size == 1:
        return here
    everywhere = [collective.all_gather(part).movedim(0, 1).flatten(1) for part in here]  # [M, W * K]
    similarity, best = everywhere[0].topk(k, dim=1)
    return NearestNeighbours(similarity, *(part.gather(1, best) for part in everywhere[1:]))


def votes(neighbours: NearestNeighbours, k: int, num_classes: int, temperature: float = TEMPERATURE) -> torch.Tensor:
    """Return class scores [M, num_classes] by the first k neighbours; the vote of the nearest one is 1."""
    similarity, labels = neighbours.similarity_MK[:, :k], neighbours.labels_MK[:, :k]
    scores = similarity.new_zeros(len(similarity), num_classes)
    # The similarity of the nearest is subtracted: that divides all votes alike, and exp cannot overflow.
    return scores.scatter_add_(1, labels, ((similarity - similarity[:, :1]) / temperature).exp())


def score(
    bank: FeatureSet,
    queries: FeatureSet,
    ks: Sequence[int],
    num_classes: int,
    collective: Collective,
    temperature: float = TEMPERATURE,
) -> KnnResult:
    """Classify the `queries` of all ranks by the `bank` of all ranks, for each k of `ks`; every rank must call it."""
    bank, queries = (replace(rows, features_NC=F.normalize(rows.features_NC, dim=1)) for rows in (bank, queries))
    queries = gathered(queries, collective)
    neighbours = nearest(queries.features_NC, bank, max(ks), collective)
    at_once = max(1, SCORES_AT_ONCE // num_classes)
    parts = [NearestNeighbours(*some) for some in zip(*(part.split(at_once) for part in neighbours), strict=True)]
    classes = {k: [votes(some, k, num_classes, temperature).argmax(1) for some in parts] for k in ks}
    return KnnResult(queries, neighbours, {k: torch.cat(found) for k, found in classes.items()})


def too_few_neighbours(ks: Sequence[int], images: int, key: str) -> list[str]:
    """Return a warning if some of `ks`, the value of the key `key`, are larger than the number of training images."""
    larger = ", ".join(str(k) for k in ks if k > images)
    return [f"{key}: {larger}, but there are {images} training images; all of them vote"] if larger else []
