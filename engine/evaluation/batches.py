"""Feeds the probe with batches of features, either of images augmented anew in every epoch or cached ones."""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from crossbatch.data import GlobalBatchSampler, Source
from crossbatch.data.augment.parameters import crop_and_flip
from crossbatch.engine.config import Resolved
from crossbatch.engine.datasets import stop_on_lost_images, train_loader
from crossbatch.engine.evaluation.features import EvalLoaderConfig, FeatureSet, FrozenBackbone, prepared
from crossbatch.engine.run_log import StepClock

Epoch = Iterator[tuple[torch.Tensor, torch.Tensor]]  # features [n, C] and labels [n] of this rank


class AugmentedFeatures:
    """Extracts the features of freshly augmented images in every epoch.

    Attributes:
        broken: name and reason of the images that this rank could not read.
    """

    def __init__(
        self,
        frozen: FrozenBackbone,
        source: Source,
        order: GlobalBatchSampler,
        reading: EvalLoaderConfig,
        cfg: Resolved,
        clock: StepClock,
    ):
        self.frozen, self.reading, self.clock = frozen, reading, clock
        self.broken: set[str] = set()
        view = crop_and_flip(reading.image_size, cfg.crossbatch.data.crop_min)
        views = [replace(view, channels=len(reading.channels.mean))]
        self.loader = train_loader(cfg, reading.device, source, order, views)

    @property
    def replaced(self) -> int:
        """Return how often this rank has put another image in the place of a broken one."""
        return self.loader.images_skipped

    def epoch(self, epoch: int) -> Epoch:
        """Yield this rank's batches of epoch number `epoch`, from 0."""
        before, batches = time.perf_counter(), self.loader.epoch(epoch)
        for _ in range(self.loader.steps_per_epoch):
            with stop_on_lost_images():
                batch = next(batches)
            self.clock.waited(before)
            self.broken.update(str(self.loader.broken[name]) for name in batch.skipped)
            images = batch.views[0].split(self.reading.batch_size)
            features = torch.cat([self.frozen(prepared(some, self.reading)).float() for some in images])
            assert batch.labels is not None
            yield features, batch.labels.to(self.reading.device)
            before = time.perf_counter()

    def close(self) -> None:
        """End the workers of the loader."""
        self.loader.close()


class CachedFeatures:
    """Serves features that were computed once, in the order of `AugmentedFeatures`; `rows` holds those of all ranks."""

    def __init__(self, rows: FeatureSet, order: GlobalBatchSampler, clock: StepClock):
        self.rows, self.order, self.clock = rows, order, clock
        self.broken, self.replaced = set(rows.skipped), len(rows.skipped)

    def epoch(self, epoch: int) -> Epoch:
        """Yield this rank's batches of epoch number `epoch`, from 0."""
        indices = self.rows.indices_N.cpu().numpy()
        for step in range(self.order.steps_per_epoch):
            self.clock.waited(time.perf_counter())
            # A broken image has no row; the next image that could be read takes its place, as in TrainLoader.
            places = np.searchsorted(indices, self.order.batch(epoch, step)) % len(indices)
            places = torch.as_tensor(places, device=self.rows.labels_N.device)
            yield self.rows.features_NC[places], self.rows.labels_N[places]

    def close(self) -> None:
        """Do nothing; there are no workers."""


Batches = AugmentedFeatures | CachedFeatures
