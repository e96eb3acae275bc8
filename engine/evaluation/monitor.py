"""Scores the features of a network while it is pretrained: by k-NN where there are labels, and without labels."""

from collections.abc import Callable, Collection
from functools import partial

import numpy as np
import torch

from crossbatch.data import Source
from crossbatch.data.augment.parameters import channels_of
from crossbatch.engine.config import ResolvedConfig, user_input
from crossbatch.engine.datasets import log_skipped_images, longest_wait_s, view_augmentations
from crossbatch.engine.evaluation.features import EvalLoaderConfig, FeatureSet, extract, gathered
from crossbatch.engine.evaluation.knn import score
from crossbatch.engine.evaluation.quality import alignment_and_uniformity, ranks
from crossbatch.engine.runtime.distributed import GroupCollective
from crossbatch.engine.sharding import Backend

KNN, QUALITY = "knn", "quality"
PAIRS = 1024  # images whose two views are compared: half a million pairs, and little time to augment


class FeatureMonitor:
    """Scores the features of evenly spread training images, and of the evaluation images if there are any, on all ranks.

    Images are read as `launch/knn.py` reads them, so both give a checkpoint the same score. The workers that read them
    live until `close`.

    Attributes:
        every_epochs: epochs between two scores, by KNN and QUALITY, without what is off.
        bank_indices: training images among which k-NN looks for neighbours.
        sample_indices: those of them whose features are measured without labels.
    """

    def __init__(self, cfg: ResolvedConfig, train: Source, evaluation: Source | None, device: torch.device):
        self.settings = cfg.crossbatch.evaluate
        every_epochs = {
            QUALITY: self.settings.every_epochs,
            KNN: 0 if evaluation is None else self.settings.knn_every_epochs,
        }
        self.every_epochs = {name: epochs for name, epochs in every_epochs.items() if epochs}
        data = cfg.crossbatch.data
        with user_input("crossbatch.data."):
            channels = channels_of(data.channels, data.mean, data.std)
        self.reading = EvalLoaderConfig(
            data.image_size,
            min(256, max(cfg.chunk, 32)),
            cfg.workers,
            device,
            wait_s=longest_wait_s(cfg),
            channels=channels,
            augmentations=view_augmentations(data),
            seed=cfg.crossbatch.seed,
        )
        self.train, self.evaluation = train, evaluation
        self.loader = self.reading.open(train, *([evaluation] if evaluation is not None else []))
        self.collective = GroupCollective()
        self.bank_indices = _evenly_spread(np.arange(len(train)), self.settings.knn_bank_size)
        self.sample_indices = _evenly_spread(self.bank_indices, self.settings.sample_size)
        self.named: set[str] = set()  # broken images that the log names already

    def scores(
        self,
        backend: Backend,
        due: Collection[str],
        between_batches: Callable[[int], object] = lambda images: None,
    ) -> dict[str, float]:
        """Return the scores that are `due` (KNN, QUALITY) by name in metrics.jsonl, equal on all ranks; all must call it.

        `between_batches`: see `extract`.
        """

        def features(source: Source, indices: np.ndarray, augmented: bool = False) -> FeatureSet:
            embed = partial(backend, "embed")
            rows = extract(
                embed, source, indices, self.reading, self.collective, between_batches, self.loader, augmented
            )
            log_skipped_images(rows.skipped, self.named)
            return rows

        found = {}
        backend.model.eval()
        bank = features(self.train, self.bank_indices if KNN in due else self.sample_indices)
        if KNN in due:
            assert self.evaluation is not None
            queries = features(self.evaluation, np.arange(len(self.evaluation)))
            k, classes = self.settings.knn_k, len(self.train.class_names)
            found["knn_top1"] = score(bank, queries, [k], classes, self.collective).top1(k)
        if QUALITY in due:
            pairs = features(self.train, _evenly_spread(self.sample_indices, PAIRS), augmented=True)
            in_sample = torch.isin(bank.indices_N, torch.as_tensor(self.sample_indices, device=bank.indices_N.device))
            found |= ranks(bank.features_NC[in_sample], self.collective)
            found |= alignment_and_uniformity(*gathered(pairs, self.collective).features_NC.chunk(2, dim=1))
        backend.model.train()
        return found

    def close(self) -> None:
        """End the processes that load images."""
        self.loader.close()


def _evenly_spread(indices: np.ndarray, largest: int) -> np.ndarray:
    """Return all `indices`, or `largest` of them."""
    count = min(len(indices), largest)
    return indices[np.arange(count) * len(indices) // count]
