"""The linear probe as a command.

The backbone is frozen and evaluation images are seen in their central views, so their features never change: each rank computes
those of its share once, and classifies them anew after every epoch. Training images are augmented in every epoch, as in MoCo
v3's linear evaluation, unless `crossbatch.linear.cache` keeps their features, too.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossbatch import InputError
from crossbatch.data import GlobalBatchSampler
from crossbatch.engine.config import Resolved, user_input
from crossbatch.engine.config.evaluation import LinearConfig, TrainImagesConfig
from crossbatch.engine.config.finetune import FinetuneDataConfig
from crossbatch.engine.evaluation.batches import AugmentedFeatures, CachedFeatures
from crossbatch.engine.evaluation.evaluation import Evaluation, Report
from crossbatch.engine.evaluation.features import FeatureSet, gathered
from crossbatch.engine.evaluation.linear_probe import LinearProbe
from crossbatch.engine.evaluation.pictures import confusion_counts, confusion_matrix, curves
from crossbatch.engine.evaluation.probe_training import ProbeTraining
from crossbatch.engine.evaluation.results import log_skipped_images
from crossbatch.engine.run_log import Log, RunLog, command
from crossbatch.engine.runtime.distributed import World
from crossbatch.models.backbones import family

AUTO_LR = {"resnet": 0.1, "vit": 3.0}  # of MoCo v3's linear evaluation
SELECTION = "best epoch and best rate are selected on the evaluation images themselves"


class LinearEvaluation(Evaluation):
    """Trains a linear probe on frozen features; see `Evaluation`.

    Args:
        cfg: a resolved `LinearConfig`.
        resume: "auto" continues the probe in `out`, "none" starts anew; a folder or a file is another probe to continue.
    """

    config: LinearConfig

    def __init__(self, cfg: Resolved, world: World, device: torch.device, out: Path, resume: str):
        _check_crop(cfg.config)
        super().__init__("linear", cfg.config, world, device, cfg.workers, out)
        self.cfg = cfg
        with user_input("train_batch_size"):
            self.order = GlobalBatchSampler(
                cfg.crossbatch.seed, len(self.train), cfg.train_batch_size, world.size, world.rank
            )
        params, base_lrs = cfg.optimizer.params, base_learning_rates(self.config, self.pretrained.arch)
        probe = LinearProbe(
            self.frozen.num_features,
            len(self.class_names),
            [lr * cfg.train_batch_size / params.reference_batch for lr in base_lrs],
            momentum=params.momentum,
            weight_decay=params.weight_decay,
            norm=cfg.crossbatch.linear.norm,
            seed=cfg.crossbatch.seed,
            device=device,
            collective=self.collective,
        )
        fingerprint = self.frozen.fingerprint
        self.training = ProbeTraining(
            probe, base_lrs, self.order, cfg, self.class_names, fingerprint, out, self.collective
        )
        self.training.resume(resume)

    def _evaluate(self) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
        """Train the epochs that are left; return the scores, and true and predicted classes."""
        training, epochs, steps = self.training, self.cfg.crossbatch.schedule.epochs, self.order.steps_per_epoch
        queries = self._features(self.evaluation, "evaluation images")
        batches = self._batches()
        done = len(training.history)
        log: Log = RunLog(self.out, done * steps, epochs * steps) if self.world.is_main else Log()
        try:
            if isinstance(batches, AugmentedFeatures):
                log.note(self.cfg.choices[0])
            if done:
                log.note(f"resumed after epoch {done}")
            for epoch in range(done, epochs):
                training.train_epoch(epoch, batches, queries, log)
                training.save(log, last=epoch + 1 == epochs)
        finally:
            batches.close()
            log.close()
        self.frozen.check()
        log_skipped_images([*queries.skipped, *sorted(batches.broken)])
        by_lr, best = training.by_lr(), training.best()
        scores = {
            "top1": by_lr[best]["last_top1"],
            "lr": by_lr[best]["lr"],
            "best_top1": max(one["best_top1"] for one in by_lr),
            "by_lr": by_lr,
            "selection": SELECTION,
            "images": {
                "train": self.order.num_images,
                **self._sum_over_ranks(
                    evaluation=len(queries), evaluation_skipped=len(queries.skipped), train_replaced=batches.replaced
                ),
            },
            "backbone_unchanged": True,  # or `check` would have raised
        }
        everything: FeatureSet = gathered(queries, self.collective)
        predicted = training.probe.predict(everything.features_NC)[best]
        return scores, (everything.labels_N.cpu().numpy(), predicted.cpu().numpy())

    def _batches(self) -> AugmentedFeatures | CachedFeatures:
        clock = self.training.clock
        if self.cfg.crossbatch.linear.cache:
            rows = gathered(self._features(self.train, "training images"), self.collective)
            return CachedFeatures(rows, self.order, clock)
        return AugmentedFeatures(self.frozen, self.train, self.order, self.reading, self.cfg, clock)

    def _report(self, results: dict[str, Any], details: tuple[np.ndarray, np.ndarray]) -> Report:
        history, names = self.training.history, self.class_names
        title = f"linear probe, lr {results['lr']:g}, top-1 {results['top1']:.2f} % after {len(history)} epochs"
        top1 = {f"lr {lr:g}": [epoch["top1"][i] for epoch in history] for i, lr in enumerate(self.training.base_lrs)}
        return Report(
            figures={
                "confusion": confusion_matrix(confusion_counts(*details, len(names)), names, title),
                "accuracy": curves(top1, range(1, len(history) + 1), title),
            },
            rows=[
                *(
                    (
                        f"top-1, lr {one['lr']:g}",
                        f"{one['last_top1']:.2f} % at the end; best {one['best_top1']:.2f} % after epoch {one['best_epoch']}",
                    )
                    for one in results["by_lr"]
                ),
                ("note", SELECTION),
                ("images", f"{results['images']['evaluation']:,}, trained on {self.order.num_images:,}"),
                ("backbone", "unchanged, to the bit"),
            ],
            next_command=self._finetune_command(),
            step=len(history),
        )

    def _finetune_command(self) -> str:
        """Return the command that fine-tunes this backbone, with what its defaults would get wrong for it."""
        size, section = self.pretrained.image_size, self.config.crossbatch
        resnet = ["--drop-path", "0"] if family(self.pretrained.arch) == "resnet" else []
        small = ["--input-size", str(size)] if size != FinetuneDataConfig().image_size else []
        return command("finetune", section.model, section.data.path, *small, *resnet)


def _check_crop(config: LinearConfig) -> None:
    """Raise InputError for a crop that cached features would ignore."""
    crop_min = config.crossbatch.data.crop_min
    if config.crossbatch.linear.cache and crop_min != TrainImagesConfig().crop_min:
        raise InputError(
            f"crossbatch.data.crop_min: given {crop_min:g} with crossbatch.linear.cache, which does not augment; leave one of "
            f"the two out"
        )


def base_learning_rates(config: LinearConfig, arch: str) -> tuple[float, ...]:
    """Return the rate of each classifier for `reference_batch` images; "auto" depends on the architecture."""
    given = config.optimizer.params.base_lr
    if given == "auto":
        return (AUTO_LR[family(arch)],)
    return tuple(dict.fromkeys(given)) if isinstance(given, tuple) else (given,)
