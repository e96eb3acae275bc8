"""Trains the classifiers of a linear probe: epochs, metrics, and the file that an interrupted probe goes on from."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossbatch import InputError, RunStopped
from crossbatch.data import GlobalBatchSampler
from crossbatch.engine.checkpoint.changes import fixed_values
from crossbatch.engine.config import Resolved, to_dict
from crossbatch.engine.config.evaluation import LinearConfig
from crossbatch.engine.evaluation.batches import AugmentedFeatures, CachedFeatures
from crossbatch.engine.evaluation.features import FeatureSet
from crossbatch.engine.evaluation.linear_probe import LinearProbe
from crossbatch.engine.nested import nest
from crossbatch.engine.pretrained.files import read_torch, write_torch
from crossbatch.engine.pretrained.weights import PROBE, PROBE_FILE
from crossbatch.engine.run_log import Log, StepClock
from crossbatch.engine.runtime.distributed import mean_over_ranks, on_main
from crossbatch.models.collective import Collective


class ProbeTraining:
    """Trains a probe on this rank; all ranks must call `train_epoch` and `save`.

    Args:
        probe: one classifier for each of `base_lrs`.
        cfg: a resolved `LinearConfig`.
        class_names: are kept beside the weights.
        fingerprint: of the frozen backbone, see `frozen.fingerprint`.
        out: folder that the probe is saved in.

    Attributes:
        history: for each epoch done, {"loss": mean training loss, "top1": percent}, with a value for each classifier.
    """

    def __init__(
        self,
        probe: LinearProbe,
        base_lrs: tuple[float, ...],
        order: GlobalBatchSampler,
        cfg: Resolved,
        class_names: list[str],
        fingerprint: str,
        out: Path,
        collective: Collective,
    ):
        self.probe, self.base_lrs, self.order, self.cfg, self.out = probe, base_lrs, order, cfg, out
        self.class_names, self.fingerprint, self.collective = class_names, fingerprint, collective
        self.clock = StepClock()
        self.history: list[dict[str, list[float]]] = []

    def train_epoch(
        self, epoch: int, batches: AugmentedFeatures | CachedFeatures, queries: FeatureSet, log: Log
    ) -> None:
        """Train epoch number `epoch`, from 0, and evaluate on this rank's `queries`."""
        self.probe.start_epoch(epoch, self.cfg.crossbatch.schedule.epochs)
        steps, every = self.order.steps_per_epoch, self.cfg.crossbatch.log.every_steps
        total_L = torch.zeros(len(self.base_lrs), dtype=torch.float64, device=queries.labels_N.device)
        self.clock.restart()
        for number, (features, labels) in enumerate(batches.epoch(epoch), 1):
            losses = self.probe.step(features, labels)
            total_L += losses
            step = epoch * steps + number
            log.advance(step)
            if step % every == 0 and number < steps:
                self._record(log, step, mean_over_ranks(losses.double()).tolist())
        top1 = self._top1(queries)
        self.history.append({"loss": mean_over_ranks(total_L / steps).tolist(), "top1": top1})
        self._record(log, (epoch + 1) * steps, self.history[-1]["loss"], top1)

    def best(self) -> int:
        """Return the number of the classifier that was best in the last epoch; a diverged one never is."""
        scores = zip(self.history[-1]["top1"], self.probe.diverged(), strict=True)
        return int(np.argmax([-1.0 if diverged else top1 for top1, diverged in scores]))

    def by_lr(self) -> list[dict[str, Any]]:
        """Return how each classifier did, for results.json. Raises RunStopped if all have diverged."""
        diverged = self.probe.diverged()
        if all(diverged):
            raise RunStopped(
                "every classifier diverged; lower optimizer.params.base_lr, or set crossbatch.linear.norm to true"
            )
        curves = zip(*(epoch["top1"] for epoch in self.history), strict=True)
        return [
            {
                "lr": lr,
                "last_top1": curve[-1],
                "best_top1": max(curve),
                "best_epoch": int(np.argmax(curve)) + 1,
                "last_loss": finite_or_none(self.history[-1]["loss"][i]),
                "diverged": diverged[i],
            }
            for i, (lr, curve) in enumerate(zip(self.base_lrs, curves, strict=True))
        ]

    def save(self, log: Log, last: bool) -> None:
        """Save the probe on rank 0. If that fails, warn, or raise RunStopped after the last epoch, on all ranks."""
        error = on_main(self._write)
        if error is not None and last:
            raise RunStopped(f"the probe could not be saved: {error}")
        if error is not None:
            log.warn(f"the probe was not saved after epoch {len(self.history)}: {error}")

    def resume(self, resume: str) -> None:
        """Load the probe that `resume` means, with its history.

        "auto" is the probe in `out`, if there is one; "none" starts anew; anything else is a file, or the folder that holds it.

        Raises:
            InputError: if that is no probe, or one of other weights, data or settings.
        """
        file = self.out / PROBE_FILE if resume == "auto" else Path(resume)
        file = file / PROBE_FILE if file.is_dir() else file
        if resume == "none" or (resume == "auto" and not file.exists()):
            return
        content = read_torch(file)
        if not isinstance(content, dict) or content.get("kind") != PROBE:
            raise InputError(f"--resume {file}: is no linear probe; allowed: auto, none, an --out of launch/linear.py")
        before = dict(content["identity"])
        counts = {name: before.pop(name, None) for name in self._data_counts()}
        before = {**fixed_values(nest(before), LinearConfig), **counts}
        changed = [
            f"{name}: was {before.get(name)}, is {value}"
            for name, value in self._identity().items()
            if before.get(name) != value
        ]
        if content["backbone"] != self.fingerprint:
            changed.append("the weights of the backbone: were others")
        if changed:
            raise InputError(
                f"--resume {file}: is another probe: {'; '.join(changed)}; choose another --out, or start anew with "
                f"--resume none"
            )
        self.probe.load(content)
        self.history = list(content["history"])

    def _top1(self, queries: FeatureSet) -> list[float]:
        """Return the percentage of evaluation images of all ranks that each classifier gets right."""
        right = (self.probe.predict(queries.features_NC) == queries.labels_N).sum(1)
        count = torch.tensor([len(queries)], device=right.device)
        *counts, images = self.collective.all_reduce(torch.cat((right, count))).tolist()
        return [100 * count / images for count in counts]

    def _record(self, log: Log, step: int, losses: list[float], top1: list[float] | None = None) -> None:
        """Log the metrics of the classifier that is best so far, and with several classifiers, those of each."""
        best = self.best() if self.history else 0
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

    def _identity(self) -> dict[str, Any]:
        """Return, by key path, all that must stay as it is when the probe is resumed."""
        return {**fixed_values(to_dict(self.cfg.config), LinearConfig), **self._data_counts()}

    def _data_counts(self) -> dict[str, int]:
        return {"images": self.order.num_images, "classes": len(self.class_names)}

    def _write(self) -> str | None:
        """Write the probe; return why that failed, or None."""
        content = {
            "kind": PROBE,
            "history": self.history,
            "identity": self._identity(),
            "backbone": self.fingerprint,
            "class_names": list(self.class_names),
            **self.probe.state(),
        }
        try:
            write_torch(self.out / PROBE_FILE, content, "--out")
        except InputError as error:
            return str(error)
        return None


def finite_or_none(value: float) -> float | None:
    """Return `value`, or None if it is infinite or NaN, which JSON does not have."""
    return value if np.isfinite(value) else None
