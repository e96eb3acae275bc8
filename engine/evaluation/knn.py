"""Weighted k-NN on frozen backbone features (Wu et al. 2018; DINO's settings): the monitor of training, and a command.

An evaluation image takes the votes of its k nearest training images by cosine similarity s, each with weight exp(s / 0.07).
Each rank keeps the features of its share of the training images (the bank). All ranks ask for the neighbours of all
evaluation images: each finds the k best in its share, and the best of these W * k are the neighbours. So no rank holds the
whole bank, and the result is the same on all of them.

Shapes: M queries, N bank images of a rank, C features, K neighbours, W ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from crossbatch.data import Source
from crossbatch.engine.config import ResolvedConfig
from crossbatch.engine.evaluation.features import EvalLoaderConfig, FeatureSet, extract, gathered
from crossbatch.engine.runtime.distributed import GroupCollective
from crossbatch.engine.sharding import Backend
from crossbatch.models.collective import Collective

TEMPERATURE = 0.07
SCORES_AT_ONCE = 2**27  # similarities held at a time: 512 MiB


@dataclass
class Neighbours:
    """The nearest of the bank for each query, nearest first. Where the bank is smaller than K, similarity -inf."""

    similarity_MK: torch.Tensor
    labels_MK: torch.Tensor
    indices_MK: torch.Tensor  # of images in the source of the bank


@dataclass
class Scored:
    """What k-NN says about the evaluation images; the same on all ranks."""

    queries: FeatureSet
    neighbours: Neighbours
    predictions: dict[int, torch.Tensor]  # k -> [M] classes

    def top1(self, k: int) -> float:
        """Percent of the images whose heaviest class is right."""
        return 100 * (self.predictions[k] == self.queries.labels_N).double().mean().item()


def nearest(queries_MC: torch.Tensor, bank: FeatureSet, k: int, collective: Collective) -> Neighbours:
    """The k nearest by cosine in all ranks' banks; features have unit length. `queries_MC` must be alike on all ranks."""
    images = collective.all_reduce(torch.tensor(len(bank), device=queries_MC.device)).item()
    at_once = max(1, SCORES_AT_ONCE * collective.world_size // max(int(images), 1))  # the same number on all ranks
    found = [_merged(_nearest_here(some, bank, k), k, collective) for some in queries_MC.split(at_once)]
    return Neighbours(*(torch.cat(parts) for parts in zip(*(vars(one).values() for one in found), strict=True)))


def _nearest_here(queries_MC: torch.Tensor, bank: FeatureSet, k: int) -> Neighbours:
    """In this rank's bank, filled up to k."""
    similarity, rows = (queries_MC @ bank.features_NC.T).topk(min(k, len(bank)), dim=1)
    absent = (0, k - similarity.shape[1])
    return Neighbours(
        F.pad(similarity, absent, value=-torch.inf),
        F.pad(bank.labels_N[rows], absent),
        F.pad(bank.indices_N[rows], absent, value=-1),
    )


def _merged(here: Neighbours, k: int, collective: Collective) -> Neighbours:
    if collective.world_size == 1:
        return here
    everywhere = [collective.all_gather(part).movedim(0, 1).flatten(1) for part in vars(here).values()]  # [M, W * K]
    similarity, best = everywhere[0].topk(k, dim=1)
    return Neighbours(similarity, *(part.gather(1, best) for part in everywhere[1:]))


def votes(neighbours: Neighbours, k: int, num_classes: int, temperature: float = TEMPERATURE) -> torch.Tensor:
    """Class scores [M, num_classes] by the first k neighbours; the vote of the nearest is 1."""
    similarity, labels = neighbours.similarity_MK[:, :k], neighbours.labels_MK[:, :k]
    scores = similarity.new_zeros(len(similarity), num_classes)
    # Less the similarity of the nearest: that divides all votes alike, and nothing overflows at small temperatures.
    return scores.scatter_add_(1, labels, ((similarity - similarity[:, :1]) / temperature).exp())


def score(
    bank: FeatureSet,
    queries: FeatureSet,
    ks: Sequence[int],
    num_classes: int,
    collective: Collective,
    temperature: float = TEMPERATURE,
) -> Scored:
    """Classifies all ranks' `queries` by all ranks' `bank`; every rank must call it."""
    queries = gathered(_unit(queries), collective)
    neighbours = nearest(queries.features_NC, _unit(bank), max(ks), collective)
    predictions = {k: votes(neighbours, k, num_classes, temperature).argmax(1) for k in ks}
    return Scored(queries, neighbours, predictions)


def _unit(rows: FeatureSet) -> FeatureSet:
    return replace(rows, features_NC=F.normalize(rows.features_NC, dim=1))


class KnnMonitor:
    """Scores the evaluation images against (a spread sample of) the training images, spread over the ranks."""

    def __init__(self, run: ResolvedConfig, train: Source, evaluation: Source, device: torch.device):
        self.settings = run.config.crossbatch.evaluate
        size = run.config.crossbatch.data.image_size
        self.reading = EvalLoaderConfig(size, min(256, max(run.chunk, 32)), run.workers, device)
        self.train, self.evaluation = train, evaluation
        self.collective = GroupCollective()
        bank = min(len(train), self.settings.knn_bank_size)
        self.bank_indices = np.arange(bank) * len(train) // bank

    def top1(self, backend: Backend) -> float:
        """Percent of evaluation images whose heaviest class is right; every rank must call it and gets the same number."""

        def embed(images: torch.Tensor) -> torch.Tensor:
            return backend("embed", images)

        backend.model.eval()
        bank = extract(embed, self.train, self.bank_indices, self.reading, self.collective)
        queries = extract(embed, self.evaluation, np.arange(len(self.evaluation)), self.reading, self.collective)
        backend.model.train()
        k = self.settings.knn_k
        return score(bank, queries, [k], len(self.train.class_names), self.collective).top1(k)
