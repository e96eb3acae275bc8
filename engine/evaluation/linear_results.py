"""The linear probe as a command: epochs, resuming, results.

The backbone is frozen and evaluation images are seen by their central views, so their features never change: they are computed
once, each rank those of its share, and every epoch classifies them anew. Training images are augmented in every epoch as the
originals do it, unless `crossbatch.linear.cache` keeps their features, too.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossbatch import InputError, RunStopped
from crossbatch.data import GlobalBatchSampler, Source
from crossbatch.engine.checkpoint.changes import fixed_values
from crossbatch.engine.config import Resolved, to_dict
from crossbatch.engine.config.evaluation import LinearConfig, TrainImagesConfig
from crossbatch.engine.config.finetune import FinetuneDataConfig
from crossbatch.engine.datasets import input_errors, labelled_images
from crossbatch.engine.evaluation import pictures
from crossbatch.engine.evaluation import results as report
from crossbatch.engine.evaluation.batches import Augmented, Cached
from crossbatch.engine.evaluation.features import EvalLoaderConfig, FeatureSet, extract, gathered
from crossbatch.engine.evaluation.frozen import FrozenBackbone, load_configured
from crossbatch.engine.evaluation.linear_probe import LinearProbe
from crossbatch.engine.nested import nest
from crossbatch.engine.pretrained.files import read_torch, write_torch
from crossbatch.engine.pretrained.load import PROBE, PROBE_FILE
from crossbatch.engine.run_log import Log, RunLog, StepClock, command, print_summary
from crossbatch.engine.runtime.distributed import GroupCollective, World, mean_over_ranks, on_main
from crossbatch.models.backbones import family

AUTO_LR = {"resnet": 0.1, "vit": 3.0}  # the originals'
ON_TEST = "best epoch and best rate are selected on the evaluation images themselves"


class LinearEvaluation:
    """One probe on this rank, inside a process group; writes to `out`.

    Args:
        resolved: a `LinearConfig`.
        resume: "auto" continues what `out` holds, "none" starts anew, a folder or file is another probe to continue.

    Raises:
        InputError, RunStopped.
    """

    def __init__(self, resolved: Resolved, world: World, device: torch.device, out: Path, resume: str):
        self.resolved, self.config = resolved, resolved.config
        self.ours, self.world, self.device, self.out = self.config.crossbatch, world, device, out
        self.collective = GroupCollective()
        _check(self.config)
        self.pretrained = load_configured(self.ours.model, self.ours.data.image_size)
        on_main(lambda: report.create_output_dir(out, "linear"))
        self.train, self.evaluation = labelled_images(self.ours.data.path, out / "data_index")
        self.names = self.train.class_names
        batch = self.config.train_batch_size
        with input_errors("train_batch_size"):
            self.order = GlobalBatchSampler(self.ours.seed, len(self.train), batch, world.size, world.rank)
        self.frozen = FrozenBackbone(self.pretrained, device, self.ours.precision)
        self.reading = EvalLoaderConfig(
            self.pretrained.image_size, self.config.train_micro_batch_size_per_gpu, resolved.workers, device
        )
        self.lrs = _learning_rates(self.config, self.pretrained.arch)
        params = self.config.optimizer.params
        self.probe = LinearProbe(
            self.frozen.num_features,
            len(self.names),
            [lr * batch / params.reference_batch for lr in self.lrs],
            momentum=params.momentum,
            weight_decay=params.weight_decay,
            norm=self.ours.linear.norm,
            seed=self.ours.seed,
            device=device,
            collective=self.collective,
        )
        self.history: list[dict[str, Any]] = self._resume(resume)
        self.clock = StepClock()

    def run(self) -> dict[str, Any]:
        """Trains what is left of the epochs; returns what results.json holds."""
        started = time.perf_counter()
        epochs, steps = self.ours.schedule.epochs, self.order.steps_per_epoch
        if self.world.is_main:
            print(f"loaded {self.pretrained}", flush=True)
        queries = self._features(self.evaluation, "evaluation images")
        batches = self._batches()
        done = len(self.history)
        log: Log = RunLog(self.out, done * steps, epochs * steps) if self.world.is_main else Log()
        try:
            if isinstance(batches, Augmented):
                log.note(self.resolved.choices[0])
            if done:
                log.note(f"resumed after epoch {done}")
            for epoch in range(done, epochs):
                self._train(epoch, batches, log, queries)
                self._save(log, last=epoch + 1 == epochs)
        finally:
            batches.close()
            log.close()
        self.frozen.check()
        report.log_skipped_images([*queries.skipped, *sorted(batches.broken)])
        return self._finish(queries, batches.replaced, time.perf_counter() - started)

    # --- data ------------------------------------------------------------------------------------------------------

    def _features(self, source: Source, what: str) -> FeatureSet:
        share = -(-len(source) // self.world.size)
        with report.progress_bar(f"features: {what}", share, self.world.is_main) as advance:
            return extract(self.frozen, source, np.arange(len(source)), self.reading, self.collective, advance)

    def _batches(self) -> Augmented | Cached:
        if self.ours.linear.cache:
            rows = gathered(self._features(self.train, "training images"), self.collective)
            return Cached(rows, self.order, self.clock)
        return Augmented(self.frozen, self.train, self.order, self.reading, self.resolved, self.clock)

    # --- training --------------------------------------------------------------------------------------------------

    def _train(self, epoch: int, batches: Augmented | Cached, log: Log, queries: FeatureSet) -> None:
        """One epoch, and what it came to."""
        self.probe.start_epoch(epoch, self.ours.schedule.epochs)
        steps, every = self.order.steps_per_epoch, self.ours.log.every_steps
        total_L = torch.zeros(len(self.lrs), dtype=torch.float64, device=self.device)
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

    def _top1(self, queries: FeatureSet) -> list[float]:
        """Percent of the evaluation images of all ranks, by classifier."""
        right = (self.probe.predict(queries.features_NC) == queries.labels_N).sum(1)
        everything = torch.tensor([len(queries)], device=self.device)
        *counts, images = self.collective.all_reduce(torch.cat((right, everything))).tolist()
        return [100 * count / images for count in counts]

    def _record(self, log: Log, step: int, losses: list[float], top1: list[float] | None = None) -> None:
        """One line of metrics: of the classifier that is best so far, and with several, of each of them."""
        best = self._best() if self.history else 0
        batch = self.config.train_batch_size
        line = {
            "step": step,
            "epoch": step / self.order.steps_per_epoch,
            "images_seen": step * batch,
            "loss": _number(losses[best]),
            "lr": self.probe.rates[best],
            **({"top1": top1[best]} if top1 else {}),
            **self.clock.reading(batch),
        }
        if len(self.lrs) > 1:
            line["loss_by_lr"] = {f"{lr:g}": _number(loss) for lr, loss in zip(self.lrs, losses, strict=True)}
            if top1:
                line["top1_by_lr"] = {f"{lr:g}": value for lr, value in zip(self.lrs, top1, strict=True)}
        log.record(line)
        self.clock.restart()

    def _best(self) -> int:
        """The classifier that was best in the last epoch."""
        scores = zip(self.history[-1]["top1"], self.probe.diverged(), strict=True)
        return int(np.argmax([-1.0 if diverged else top1 for top1, diverged in scores]))

    # --- resuming --------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """Return what makes this probe the one that it is, by key path."""
        return {**fixed_values(to_dict(self.config), LinearConfig), **self._data_counts()}

    def _data_counts(self) -> dict[str, int]:
        return {"images": self.order.num_images, "classes": len(self.names)}

    def _save(self, log: Log, last: bool) -> None:
        """A full disk is told, and is the end only after the last epoch; all ranks come to the same."""
        error = on_main(self._write_probe)
        if error is not None and last:
            raise RunStopped(f"the probe could not be saved: {error}")
        if error is not None:
            log.warn(f"the probe was not saved after epoch {len(self.history)}: {error}")

    def _write_probe(self) -> str | None:
        """On rank 0; why it could not, if so."""
        try:
            content = {
                "kind": PROBE,
                "history": self.history,
                "identity": self._identity(),
                "backbone": self.frozen.fingerprint,
                "class_names": list(self.names),
                **self.probe.state(),
            }
            write_torch(self.out / PROBE_FILE, content, "--out")
        except InputError as error:
            return str(error)
        return None

    def _resume(self, resume: str) -> list[dict[str, Any]]:
        """Loads the probe that `resume` means; the history of its epochs."""
        file = self.out / PROBE_FILE if resume == "auto" else Path(resume)
        file = file / PROBE_FILE if file.is_dir() else file
        if resume == "none" or (resume == "auto" and not file.exists()):
            return []
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
        if content["backbone"] != self.frozen.fingerprint:
            changed.append("the weights of the backbone: were others")
        if changed:
            raise InputError(
                f"--resume {file}: is another probe: {'; '.join(changed)}; choose another --out, or start anew with "
                f"--resume none"
            )
        self.probe.load(content)
        return list(content["history"])

    # --- results ---------------------------------------------------------------------------------------------------

    def _finish(self, queries: FeatureSet, replaced: int, seconds: float) -> dict[str, Any]:
        diverged = self.probe.diverged()
        if all(diverged):
            raise RunStopped(
                "every classifier diverged; lower optimizer.params.base_lr, or set crossbatch.linear.norm to true"
            )
        best = self._best()
        curves = {lr: [epoch["top1"][i] for epoch in self.history] for i, lr in enumerate(self.lrs)}
        by_lr = [
            {
                "lr": lr,
                "last_top1": curve[-1],
                "best_top1": max(curve),
                "best_epoch": int(np.argmax(curve)) + 1,
                "last_loss": _number(self.history[-1]["loss"][i]),
                "diverged": diverged[i],
            }
            for i, (lr, curve) in enumerate(curves.items())
        ]
        counts = torch.tensor([len(queries), len(queries.skipped), replaced], device=self.device)
        images, skipped, replaced = self.collective.all_reduce(counts).tolist()
        seen = {
            "train": self.order.num_images,
            "evaluation": images,
            "evaluation_skipped": skipped,
            "train_replaced": replaced,
        }
        results = {
            "command": "linear",
            "top1": by_lr[best]["last_top1"],
            "lr": self.lrs[best],
            "best_top1": max(one["best_top1"] for one in by_lr),
            "by_lr": by_lr,
            "selection": ON_TEST,
            "images": seen,
            "classes": len(self.names),
            "backbone_unchanged": True,  # or `check` would have raised
            "pretrained": self.pretrained.summary(),
            "seconds": seconds,
            "config": {**to_dict(self.config), "world_size": self.world.size},
        }
        truth = gathered(queries, self.collective)
        said = self.probe.predict(truth.features_NC)[best]
        if self.world.is_main:
            self._write(results, curves, truth.labels_N.cpu().numpy(), said.cpu().numpy())
        return results

    def _write(
        self, results: dict[str, Any], curves: dict[float, list[float]], truth: np.ndarray, said: np.ndarray
    ) -> None:
        title = f"linear probe, lr {results['lr']:g}, top-1 {results['top1']:.2f} % after {len(self.history)} epochs"
        matrix = pictures.confusion_counts(truth, said, len(self.names))
        lines = {f"lr {lr:g}": curve for lr, curve in curves.items()}
        epochs = list(range(1, len(self.history) + 1))
        figures = {
            "confusion": pictures.confusion_matrix(matrix, self.names, title),
            "accuracy": pictures.curves(lines, epochs, title),
        }
        report.save_figures(self.out, figures, epochs[-1])
        report.write_results(self.out, results)
        rows = [
            *(
                (
                    f"top-1, lr {one['lr']:g}",
                    f"{one['last_top1']:.2f} % at the end; best {one['best_top1']:.2f} % after epoch {one['best_epoch']}",
                )
                for one in results["by_lr"]
            ),
            ("note", ON_TEST),
            ("images", f"{results['images']['evaluation']:,}, trained on {self.order.num_images:,}"),
            ("backbone", "unchanged, to the bit"),
            ("results", str(self.out / report.RESULTS)),
        ]
        print_summary(rows, [self._finetuning()], self.out)

    def _finetuning(self) -> str:
        """The command, without what its defaults would do to this backbone or to images of this size."""
        size = self.pretrained.image_size
        resnet = ["--drop-path", "0"] if family(self.pretrained.arch) == "resnet" else []
        small = ["--input-size", str(size)] if size != FinetuneDataConfig().image_size else []
        return command("finetune", self.ours.model, self.ours.data.path, *small, *resnet)


def _check(config: LinearConfig) -> None:
    """Nothing that would do nothing."""
    crop_min = config.crossbatch.data.crop_min
    if config.crossbatch.linear.cache and crop_min != TrainImagesConfig().crop_min:
        raise InputError(
            f"crossbatch.data.crop_min: given {crop_min:g} with crossbatch.linear.cache, which does not augment; leave one of "
            f"the two out"
        )


def _learning_rates(config: LinearConfig, arch: str) -> tuple[float, ...]:
    given = config.optimizer.params.base_lr
    if given == "auto":
        return (AUTO_LR[family(arch)],)
    return tuple(dict.fromkeys(given)) if isinstance(given, tuple) else (given,)


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if np.isfinite(value) else None
