"""Runs the linear probe as a command.

The backbone is frozen and evaluation images are seen in their central views, so their features never change: each rank computes
those of its share once, and classifies them anew after every epoch. Training images are augmented in every epoch, as in MoCo
v3's linear evaluation, unless `crossbatch.linear.cache` keeps their features, too.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossbatch import InputError, RunStopped
from crossbatch.data import GlobalBatchSampler
from crossbatch.engine.config import Resolved, to_dict, user_input
from crossbatch.engine.config.evaluation import LinearConfig, TrainImagesConfig
from crossbatch.engine.config.finetune import FinetuneDataConfig
from crossbatch.engine.datasets import log_skipped_images
from crossbatch.engine.evaluation.batches import AugmentedFeatures, Batches, CachedFeatures
from crossbatch.engine.evaluation.evaluation import Evaluation, Report
from crossbatch.engine.evaluation.features import FeatureSet, fingerprint, gathered
from crossbatch.engine.evaluation.linear_probe import LinearProbe
from crossbatch.engine.evaluation.probe_file import identity, read_probe, save_probe
from crossbatch.engine.evaluation.results import confusion_matrix, curves
from crossbatch.engine.run_log import Log, RunLog, StepClock, command, finite_or_none
from crossbatch.engine.runtime.distributed import mean_over_ranks, on_main
from crossbatch.engine.runtime.world import World
from crossbatch.engine.trackers import check_trackers
from crossbatch.models.backbones import family

AUTO_LR = {"resnet": 0.1, "vit": 3.0}  # of MoCo v3's linear evaluation
SELECTION = "best epoch and best rate are selected on the evaluation images themselves"


class LinearEvaluation(Evaluation):
    """Trains a linear probe on frozen features, with a classifier for each learning rate; see `Evaluation`.

    Args:
        cfg: a resolved `LinearConfig`.
        resume: "auto" continues the probe in `out`, "none" starts anew; a folder or a file is another probe to continue.

    Attributes:
        history: for each epoch done, {"loss": mean training loss, "top1": percent}, with a value for each classifier.
    """

    name = "linear"
    config: LinearConfig

    def __init__(self, cfg: Resolved, world: World, device: torch.device, out: Path, resume: str):
        section, params = cfg.crossbatch, cfg.optimizer.params
        if section.linear.cache and section.data.crop_min != TrainImagesConfig().crop_min:
            raise InputError(
                f"crossbatch.data.crop_min: given {section.data.crop_min:g} with crossbatch.linear.cache, which does not "
                f"augment; leave one of the two out"
            )
        on_main(lambda: check_trackers(section.log.to))
        super().__init__(cfg.config, world, device, cfg.workers, out)
        self.cfg = cfg
        with user_input("train_batch_size"):
            self.order = GlobalBatchSampler(section.seed, len(self.train), cfg.train_batch_size, world.size, world.rank)
        self.base_lrs = base_learning_rates(self.config, self.pretrained.arch)
        self.probe = LinearProbe(
            self.frozen.num_features,
            len(self.class_names),
            [lr * cfg.train_batch_size / params.reference_batch for lr in self.base_lrs],
            momentum=params.momentum,
            weight_decay=params.weight_decay,
            norm=section.linear.norm,
            seed=section.seed,
            device=device,
            collective=self.collective,
        )
        self.clock = StepClock()
        self.history: list[dict[str, list[float]]] = []
        self.identity = identity(self.config, self.train)
        saved = on_main(lambda: read_probe(resume, out, self.identity, self.frozen.fingerprint))
        if saved is not None:
            self.probe.load(saved)
            self.history = saved["history"]

    def _evaluate(self) -> tuple[dict[str, Any], Report]:
        """Train the epochs that are left, and return the scores and the report."""
        queries = self._features(self.evaluation, "evaluation images")
        if self.cfg.crossbatch.linear.cache:
            rows = gathered(self._features(self.train, "training images"), self.collective)
            batches = CachedFeatures(rows, self.order, self.clock)
        else:
            batches = AugmentedFeatures(self.frozen, self.train, self.order, self.reading, self.cfg, self.clock)
        self._train(batches, queries)
        assert fingerprint(self.frozen.backbone) == self.frozen.fingerprint, "the frozen backbone has changed"
        log_skipped_images([*queries.skipped, *sorted(batches.broken)])
        by_lr, best, skipped = self._by_lr(), self._best(), len(queries.skipped)
        images = self._sum_over_ranks(
            evaluation=len(queries), evaluation_skipped=skipped, train_replaced=batches.replaced
        )
        scores = {
            "top1": by_lr[best]["last_top1"],
            "lr": by_lr[best]["lr"],
            "best_top1": max(one["best_top1"] for one in by_lr),
            "by_lr": by_lr,
            "selection": SELECTION,
            "images": {"train": self.order.num_images, **images},
            "backbone_unchanged": True,
        }
        everything = gathered(queries, self.collective)
        predicted = self.probe.predict(everything.features_NC)[best]
        return scores, self._report(scores, everything.labels_N.cpu().numpy(), predicted.cpu().numpy())

    def _train(self, batches: Batches, queries: FeatureSet) -> None:
        """Train the epochs that are left, and save the probe after each."""
        done, epochs, steps = len(self.history), self.cfg.crossbatch.schedule.epochs, self.order.steps_per_epoch
        log: Log = Log()
        if self.world.is_main:
            log = RunLog(self.out, done * steps, epochs * steps, self.cfg.crossbatch.log.to, to_dict(self.config))
        try:
            if isinstance(batches, AugmentedFeatures):
                log.note(self.cfg.choices[0])
            if done:
                log.note(f"resumed after epoch {done}")
            for epoch in range(done, epochs):
                self._train_epoch(epoch, batches, queries, log)
                content = {"history": self.history, "identity": self.identity, "backbone": self.frozen.fingerprint}
                content |= {"class_names": list(self.class_names), **self.probe.state()}
                save_probe(self.out, content, log, is_last=epoch + 1 == epochs)
        except BaseException:
            log.failed()
            raise
        finally:
            batches.close()
            log.close()

    def _train_epoch(self, epoch: int, batches: Batches, queries: FeatureSet, log: Log) -> None:
        """Train epoch number `epoch`, from 0, and evaluate on this rank's `queries`."""
        self.probe.start_epoch(epoch, self.cfg.crossbatch.schedule.epochs)
        steps, every = self.order.steps_per_epoch, self.cfg.crossbatch.log.every_steps
        total_L = torch.zeros(len(self.base_lrs), dtype=torch.float64, device=self.device)
        self.clock.restart()
        for step, (features, labels) in enumerate(batches.epoch(epoch), epoch * steps + 1):
            losses = self.probe.step(features, labels)
            total_L += losses
            log.advance(step)
            if step % every == 0 and step < (epoch + 1) * steps:
                self._record(log, step, mean_over_ranks(losses.double()).tolist())
        right = (self.probe.predict(queries.features_NC) == queries.labels_N).sum(1)
        count = torch.tensor([len(queries)], device=self.device)
        *counts, images = self.collective.all_reduce(torch.cat((right, count))).tolist()
        top1 = [100 * count / images for count in counts]
        self.history.append({"loss": mean_over_ranks(total_L / steps).tolist(), "top1": top1})
        self._record(log, (epoch + 1) * steps, self.history[-1]["loss"], top1)

    def _record(self, log: Log, step: int, losses: list[float], top1: list[float] | None = None) -> None:
        """Log the metrics of the classifier that is best so far, and with several classifiers, those of each."""
        best = self._best() if self.history else 0
        batch = self.cfg.train_batch_size
        line = {
            "step": step,
            "epoch": step / self.order.steps_per_epoch,
            "images_seen": step * batch,
            "loss": finite_or_none(losses[best]),
            "lr": self.probe.rates[best],
            **({"top1": top1[best]} if top1 else {}),
            **self.clock.reading(batch),
        }
        if len(self.base_lrs) > 1:
            names = [f"{lr:g}" for lr in self.base_lrs]
            line["loss_by_lr"] = dict(zip(names, map(finite_or_none, losses), strict=True))
            if top1:
                line["top1_by_lr"] = dict(zip(names, top1, strict=True))
        log.record(line)
        self.clock.restart()

    def _best(self) -> int:
        """Return the number of the classifier that was best in the last epoch; a diverged one never is."""
        scores = zip(self.history[-1]["top1"], self.probe.diverged(), strict=True)
        return int(np.argmax([-1.0 if diverged else top1 for top1, diverged in scores]))

    def _by_lr(self) -> list[dict[str, Any]]:
        """Return how each classifier did, for results.json. Raises RunStopped if all have diverged."""
        diverged = self.probe.diverged()
        if all(diverged):
            raise RunStopped(
                "every classifier diverged; lower optimizer.params.base_lr, or set crossbatch.linear.norm to true"
            )
        return [
            {
                "lr": lr,
                "last_top1": top1[-1],
                "best_top1": max(top1),
                "best_epoch": int(np.argmax(top1)) + 1,
                "last_loss": finite_or_none(self.history[-1]["loss"][i]),
                "diverged": diverged[i],
            }
            for i, (lr, top1) in enumerate(self._top1_by_lr())
        ]

    def _top1_by_lr(self) -> list[tuple[float, list[float]]]:
        """Return each rate with the top-1 of its classifier after every epoch."""
        return [(lr, [epoch["top1"][i] for epoch in self.history]) for i, lr in enumerate(self.base_lrs)]

    def _report(self, scores: dict[str, Any], truth: np.ndarray, predicted: np.ndarray) -> Report:
        epochs, images = len(self.history), scores["images"]["evaluation"]
        title = f"linear probe, lr {scores['lr']:g}, top-1 {scores['top1']:.2f} % after {epochs} epochs"
        lines = {f"lr {lr:g}": top1 for lr, top1 in self._top1_by_lr()}
        return Report(
            figures={
                "confusion": lambda: confusion_matrix(truth, predicted, self.class_names, title),
                "accuracy": lambda: curves(lines, range(1, epochs + 1), title),
            },
            rows=[
                *(
                    (
                        f"top-1, lr {one['lr']:g}",
                        f"{one['last_top1']:.2f} % at the end; best {one['best_top1']:.2f} % after epoch {one['best_epoch']}",
                    )
                    for one in scores["by_lr"]
                ),
                ("note", SELECTION),
                ("images", f"{images:,}, trained on {self.order.num_images:,}"),
                ("backbone", "unchanged, to the bit"),
            ],
            next_command=self._finetune_command(),
            step=epochs,
        )

    def _finetune_command(self) -> str:
        """Return the command that fine-tunes this backbone, with what its defaults would get wrong for it."""
        size, section = self.pretrained.image_size, self.config.crossbatch
        resnet = ["--drop-path", "0"] if family(self.pretrained.arch) == "resnet" else []
        given = (
            ["--input-size", str(size)] if isinstance(size, int) else ["--set", f"crossbatch.data.image_size={[*size]}"]
        )
        small = given if size != FinetuneDataConfig().image_size else []
        return command("finetune", section.model, section.data.path, *small, *resnet)


def base_learning_rates(config: LinearConfig, arch: str) -> tuple[float, ...]:
    """Return the rate of each classifier for `reference_batch` images; "auto" depends on the architecture."""
    given = config.optimizer.params.base_lr
    if given == "auto":
        return (AUTO_LR[family(arch)],)
    return tuple(dict.fromkeys(given)) if isinstance(given, tuple) else (given,)
