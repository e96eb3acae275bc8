"""Weighted k-NN on frozen backbone features, the monitor of training (Wu et al. 2018; DINO's settings).

An evaluation image takes the votes of its k nearest training images by cosine similarity s, each with weight exp(s / 0.07).
Shapes: M queries, N bank images, C features, K neighbours.
"""

import numpy as np
import torch
from torch.nn import functional as F

from crossbatch.data import EvaluationLoader, Source, evaluation_share, normalize
from crossbatch.engine.config import ResolvedConfig
from crossbatch.engine.distributed import GroupCollective
from crossbatch.engine.sharding import Backend

TEMPERATURE = 0.07
QUERIES_AT_ONCE = 512


def weighted_votes(queries_MC, bank_NC, bank_labels_N, k: int, num_classes: int) -> torch.Tensor:
    """Class scores [M, num_classes]; rows of both feature tensors have unit length."""
    similarity, neighbours = (queries_MC @ bank_NC.T).topk(min(k, len(bank_NC)), dim=1)
    votes = queries_MC.new_zeros(len(queries_MC), num_classes)
    return votes.scatter_add_(1, bank_labels_N[neighbours], (similarity / TEMPERATURE).exp())


class KnnMonitor:
    """Scores the evaluation images against (a spread sample of) the training images, spread over the ranks."""

    def __init__(self, run: ResolvedConfig, train: Source, evaluation: Source, device: torch.device):
        self.settings = run.config.crossbatch
        self.batch_size = min(256, max(run.chunk, 32))
        self.train, self.evaluation, self.device = train, evaluation, device
        self.collective = GroupCollective()
        bank = min(len(train), self.settings.evaluate.knn_images)
        self.bank_indices = np.arange(bank) * len(train) // bank
        self.workers = run.workers

    @torch.no_grad()
    def top1(self, backend: Backend, autocast) -> float:
        """Percent of evaluation images whose heaviest class is right; every rank must call it and gets the same number."""
        backend.model.eval()
        bank, bank_labels = self._gathered(*self._features(backend, autocast, self.train, self.bank_indices))
        queries, labels = self._features(backend, autocast, self.evaluation, np.arange(len(self.evaluation)))
        backend.model.train()
        classes = len(self.train.class_names)
        counts = torch.zeros(2, dtype=torch.int64, device=self.device)  # right, all
        for some, truth in zip(queries.split(QUERIES_AT_ONCE), labels.split(QUERIES_AT_ONCE), strict=True):
            votes = weighted_votes(some, bank, bank_labels, self.settings.evaluate.knn_k, classes)
            counts += torch.stack(((votes.argmax(1) == truth).sum(), torch.tensor(len(truth), device=self.device)))
        right, everything = self.collective.all_reduce(counts).tolist()
        return 100 * right / everything

    def _features(
        self, backend: Backend, autocast, source: Source, indices: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit-length features [m, C] and labels [m] of this rank's share.

        All ranks make the same number of forward passes (a sharded model gathers its parameters in each); a rank that has
        run out of images repeats its last ones and throws the result away.
        """
        collective, data = self.collective, self.settings.data
        mine = indices[evaluation_share(len(indices), collective.world_size, collective.rank)]
        largest_share = -(-len(indices) // collective.world_size)
        loader = iter(EvaluationLoader(source, data.image_size, mine, self.batch_size, self.workers))
        images = torch.zeros(1, 3, data.image_size, data.image_size, dtype=torch.uint8)
        features, read = [], []
        for _ in range(-(-largest_share // self.batch_size)):
            images, numbers = next(loader, (images, None))
            with autocast():
                output = backend(
                    "embed", normalize(images.to(self.device)).to(memory_format=torch.channels_last)
                ).float()
            features.append(F.normalize(output, dim=1) if numbers is not None else output[:0])
            read += [numbers] if numbers is not None else []
        labels = source.labels[np.concatenate(read)] if read else source.labels[:0]
        return torch.cat(features), torch.as_tensor(labels, device=self.device)

    def _gathered(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All ranks' rows; shares differ by one row at most, so they are padded to equal length and cut again."""
        world = self.collective.world_size
        if world == 1:
            return features, labels
        counts = self.collective.all_gather(torch.tensor([len(labels)], device=self.device)).flatten().tolist()
        pad = max(counts) - len(labels)
        features = self.collective.all_gather(F.pad(features, (0, 0, 0, pad)))
        labels = self.collective.all_gather(F.pad(labels, (0, pad)))
        rows = [(features[r, :count], labels[r, :count]) for r, count in enumerate(counts)]
        return torch.cat([f for f, _ in rows]), torch.cat([label for _, label in rows])
