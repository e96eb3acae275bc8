"""The run: opens data and model, trains, logs, evaluates and saves."""

import gc
import itertools
import json
import math
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torchvision.utils import make_grid

from crossbatch import InputError, RunStopped
from crossbatch.data import (
    Batch,
    Order,
    TrainLoader,
    choose_backend,
    has_evaluation_split,
    moco_v3_views,
    open_source,
    prepare,
)
from crossbatch.engine import checkpoint
from crossbatch.engine.build import build_model
from crossbatch.engine.config import ResolvedConfig, to_dict
from crossbatch.engine.distributed import GroupCollective, World, mean_over_ranks, on_main, shared_token
from crossbatch.engine.faults import Alarms, NonFiniteSteps, blame
from crossbatch.engine.knn import KnnMonitor
from crossbatch.engine.memory import automatic_chunk, remember
from crossbatch.engine.saves import Saves, Snapshot
from crossbatch.engine.sharding import build_backend
from crossbatch.engine.signals import Agreement, Signals
from crossbatch.engine.step import Progress, TrainStep, autocast
from crossbatch.engine.telemetry import Log, RunLog, StepClock
from crossbatch.engine.watch import Watch
from crossbatch.models import Contrast

CHUNK = "chunk.json"  # in the run directory: what `train_micro_batch_size_per_gpu: "auto"` came to


class Trainer:
    """One run on this rank, inside a process group.

    Args:
        run: the resolved configuration.
        world: this rank among the others.
        device: where the model lives.
        out: the run directory, the same on all ranks.
        resume: "auto", "none" or a path, see `checkpoint.candidates`.
        stop_after: optimizer step to stop at, counted from the start of the run; None trains all epochs.
        allow_change: configuration keys that may differ from those of the checkpoint.
        watch: is told what this rank is doing.
    """

    def __init__(
        self,
        run: ResolvedConfig,
        world: World,
        device: torch.device,
        out: Path,
        resume: str,
        stop_after: int | None = None,
        allow_change: Iterable[str] = (),
        watch: Watch | None = None,
    ):
        self.run, self.world, self.device, self.out = run, world, device, out
        self.allow_change, self.watch = tuple(allow_change), watch
        self.ours = run.config.crossbatch
        source = self._open_data()
        self.steps_per_epoch = self.order.steps_per_epoch
        self.last_step = self.ours.schedule.epochs * self.steps_per_epoch
        self.stop = min(self.last_step, stop_after) if stop_after is not None else self.last_step
        self.candidates = on_main(lambda: self._open_run(resume))

        chunk, why = run.chunk, None
        if run.auto_chunk:
            chunk, why = automatic_chunk(run, world, device, lambda: autocast(run, device), out / CHUNK)
        resumed = self._build(chunk)
        if world.is_main:
            checkpoint.write_atomically(out / "config.json", json.dumps(self._config(), indent=2) + "\n")
        backend, why_backend = choose_backend(self.ours.data.backend, device.type)
        self.loader = TrainLoader(
            source,
            self.order,
            moco_v3_views(self.ours.data.image_size, self.ours.data.crop_min),
            self.ours.seed,
            workers=run.workers,
            max_skipped_fraction=self.ours.data.max_skipped_fraction,
            backend=backend,
            device=device,
        )
        self.log: Log = RunLog(out, self.step, self.stop) if world.is_main else Log()
        self.clock = StepClock()
        self.skipped = 0
        self.skipped_before = resumed.manifest.skipped_images if resumed else 0
        self.signals, self.agreement, self.alarms = (
            Signals(),
            Agreement(self.ours.watch.timeout_s),
            Alarms(self.ours.watch),
        )
        self.saves = self._open_saves(resumed)
        self.knn_history: list[tuple[int, float]] = []
        self.log.note(f"images: {backend} ({why_backend})")
        if why is not None and chunk < run.local_batch:
            self.log.note(why)
        if resumed:
            for reason in resumed.passed_over:
                self.log.warn(reason)
            self.log.note(f"resumed {resumed.checkpoint} at step {self.step}")

    @property
    def step(self) -> int:
        return self.train_step.progress.step

    def _build(self, chunk: int) -> checkpoint.Resumed | None:
        """Model, backend and step, as the seed or a checkpoint says."""
        torch.manual_seed(self.ours.seed)
        model = build_model(self.run).to(self.device)
        model.set_collective(GroupCollective())
        self.backend = build_backend(model, self.run)
        self.train_step = TrainStep(self.backend, self.run, self.device, self.steps_per_epoch, chunk)
        self.chunk, self.fits = chunk, False
        images = self.order.size
        resumed = checkpoint.resume(self.candidates, self.backend, self._config(), images, self.allow_change)
        if resumed:
            self.train_step.progress = Progress(**resumed.manifest.progress)
        self.nonfinite = NonFiniteSteps(model)
        return resumed

    def _open_saves(self, resumed: checkpoint.Resumed | None) -> Saves:
        settings, folder = self.ours.checkpoint, self.out / "checkpoints"
        keep = checkpoint.Keep(settings.keep, settings.keep_every_steps)
        saver = checkpoint.Saver(folder, keep, shared_token(), settings.asynchronous)
        every = self.steps_per_epoch if settings.every_steps == "auto" else settings.every_steps
        saved = self.step if resumed and resumed.checkpoint.parent == folder else None
        return Saves(saver, every, self._snapshot, self.log, saved)

    def _open_data(self):
        path = self.ours.data.path
        if path is None:
            raise InputError("crossbatch.data.path: not given; allowed: a folder with train/; give it with --data DIR")
        cache = self.out / "data_index"
        on_main(lambda: prepare(path, cache=cache))
        source = open_source(path, "train", cache=cache)
        self.order = Order(
            self.ours.seed,
            len(source),
            self.run.config.train_batch_size,
            self.world.size,
            self.world.rank,
            self.ours.data.shuffle_window,
        )
        self.monitor = None
        if self.ours.evaluate.knn_every_epochs and has_evaluation_split(path):
            self.monitor = KnnMonitor(self.run, source, open_source(path, "eval", cache=cache), self.device)
        return source

    def _open_run(self, resume: str) -> list[Path]:
        found = checkpoint.candidates(self.out, resume)
        try:
            (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
            checkpoint.clean(self.out / "checkpoints")
        except OSError as error:
            raise InputError(
                f"--out {self.out}: cannot be written: {error.strerror}; choose a writable folder"
            ) from None
        return found

    def train(self) -> None:
        """Trains up to the last step, or until a signal asks to stop; saves at the end."""
        started, first = time.perf_counter(), self.step
        try:
            with self.signals:
                if self.step == 0:
                    self._record({}, knn=self.monitor is not None)
                received = self._loop()
                if self.step > first:
                    self._save()
            self._summarise(time.perf_counter() - started, self.step - first, received)
            self.saves.close()
            self.agreement.close()
        finally:
            self.loader.close()
            self.log.close()

    def _loop(self) -> signal.Signals | None:
        """Returns the signal that ended it, if one did."""
        batches = self._batches()
        self.clock.restart()
        while self.step < self.stop:
            before = time.perf_counter()
            batch, failure = self._fetch(batches)
            self.clock.waited(before)
            received, saving, failed_rank = self.agreement.reach(
                self.signals.received, self.saves.busy, failure is not None
            )
            if failed_rank is not None:
                self._save()
                raise failure or RunStopped(f"rank {failed_rank} got no more data; step {self.step} is saved")
            if received is not None:
                return received
            self._save_if_due(saving)
            assert batch is not None
            self._skip(batch.skipped)
            if self.step == 0:
                self.log.pictures("views", view_pairs(batch.views), 0)
            self._at("training")
            contrast, gradient_norm = self._train_on(batch.views)
            self._skip_step(contrast, gradient_norm)
            self.log.advance(self.step)
            knn = self._knn_due()
            if knn or self.step % self.ours.log.every_steps == 0 or self.step == self.stop:
                self._record(self._metrics(contrast, gradient_norm), knn)
        return None

    def _fetch(self, batches: Iterator[Batch]) -> tuple[Batch | None, Exception | None]:
        """The next batch, or why there is none: the other ranks must learn of it before this one leaves."""
        self._at("waiting for data")
        try:
            return next(batches), None
        except Exception as error:
            return None, error

    def _at(self, phase: str) -> None:
        if self.watch is not None:
            self.watch.at(self.step, phase)

    def _train_on(self, views: torch.Tensor) -> tuple[Contrast, float]:
        """One step; if the first one of this process does not fit into memory, with smaller chunks."""
        while True:
            before = replace(self.train_step.progress)
            self.nonfinite.remember()
            try:
                contrast, gradient_norm = self.train_step(views)
                self.nonfinite.count(math.isfinite(gradient_norm), before)
                self.fits = True
                return contrast, gradient_norm
            except torch.OutOfMemoryError:
                self._stop_unless_smaller_chunks_help()
            # Outside of the handler, whose traceback holds on to the memory of the step.
            del self.backend, self.train_step.backend
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.allow_change += ("train_micro_batch_size_per_gpu",)
            self._build(self.chunk // 2)
            remember(self.out / CHUNK, self.run, self.chunk)
            self.log.note(f"out of memory: trying again with chunks of {self.chunk} images")

    def _stop_unless_smaller_chunks_help(self) -> None:
        remedy = f"set train_micro_batch_size_per_gpu to {self.chunk // 2}" if self.chunk > 1 else "use more ranks"
        if self.fits:
            saved = "the last checkpoint is older"
            if self.world.size == 1:  # the others may be anywhere
                self.backend.discard()
                self._save()
                saved = "saved"
            raise RunStopped(
                f"out of memory in step {self.step + 1} with chunks of {self.chunk} images; {saved}; {remedy}"
            )
        if self.chunk == 1 or self.world.size > 1:
            raise RunStopped(f"out of memory in the first step with chunks of {self.chunk} images; {remedy}")

    def _batches(self) -> Iterator[Batch]:
        epoch, step = divmod(self.step, self.steps_per_epoch)
        yield from self.loader.epoch(epoch, step)
        for later in itertools.count(epoch + 1):
            yield from self.loader.epoch(later)

    def _knn_due(self) -> bool:
        if self.monitor is None:
            return False
        return self.step == self.stop or self.step % (self.ours.evaluate.knn_every_epochs * self.steps_per_epoch) == 0

    def _skip(self, names: list[str]) -> None:
        for name in names[: max(0, 10 - self.skipped)]:
            self.log.note(f"skipped a broken image: {name}")
        self.skipped += len(names)

    def _skip_step(self, contrast: Contrast, gradient_norm: float) -> None:
        if math.isfinite(gradient_norm):
            return
        progress = self.train_step.progress
        scale = f"; loss scale now {progress.loss_scale:g}" if self.run.precision == "fp16" else ""
        whose = blame(contrast)
        self.log.note(f"step {self.step} changes nothing: {whose}{scale}")
        if self.nonfinite.in_a_row == self.ours.watch.max_nonfinite_steps:
            assert self.nonfinite.progress_before is not None
            self.train_step.progress = self.nonfinite.progress_before
            self._save()
            raise RunStopped(
                f"{self.nonfinite.in_a_row} steps in a row were not finite ({whose}); step {self.step}, before them, is saved; "
                f"lower optimizer.params.lr, lengthen crossbatch.schedule.warmup_epochs or set crossbatch.precision to fp32"
            )

    def _metrics(self, contrast: Contrast, gradient_norm: float) -> dict:
        """One line of metrics: the losses and signals of this very step, averaged over ranks."""
        named = {"loss": contrast.loss, **contrast.signals, **contrast.terms}
        skipped = torch.tensor(float(self.skipped), device=self.device)
        values = torch.stack([*(value.float() for value in named.values()), skipped]).double()
        *means, skipped_mean = mean_over_ranks(values).tolist()
        mean = dict(zip(named, means, strict=True))
        progress = self.train_step.progress
        return {
            "loss": mean["loss"] if math.isfinite(mean["loss"]) else None,
            "lr": self.train_step.learning_rate(max(0, progress.updates - 1)),
            "momentum": self.train_step.momentum(max(0, progress.updates - 1)),
            "grad_norm": gradient_norm if math.isfinite(gradient_norm) else None,
            **({"loss_scale": progress.loss_scale} if self.run.precision == "fp16" else {}),
            "skipped_steps": progress.step - progress.updates,
            **self.clock.reading(self.run.config.train_batch_size),
            **{name: mean[name] for name in contrast.signals},
            "loss_terms": {name: mean[name] for name in contrast.terms},
            "skipped_images": self.skipped_before + round(skipped_mean * self.world.size),
        }

    def _record(self, metrics: dict, knn: bool) -> None:
        if knn:
            assert self.monitor is not None
            self._at("evaluating")
            metrics["knn_top1"] = self.monitor.top1(self.backend, self.train_step.autocast)
            self.knn_history.append((self.step, metrics["knn_top1"]))
        if metrics:
            where = {
                "step": self.step,
                "epoch": self.step / self.steps_per_epoch,
                "images_seen": self.step * self.run.config.train_batch_size,
            }
            self.log.record({**where, **metrics})
        if metrics.get("loss") is not None:
            for alarm in self.alarms.check(metrics["loss"], metrics["feature_std"]):
                self.log.warn(f"step {self.step}: {alarm}")
        self.clock.restart()

    def _save_if_due(self, saving: bool) -> None:
        """`saving`: whether any rank is still busy with the last one."""
        before = time.perf_counter()
        self._at("saving")
        self.saves.boundary(self.step, saving)
        self.clock.paused(before)

    def _save(self) -> None:
        self._at("saving")
        self.saves.final(self.step)

    def _snapshot(self) -> Snapshot:
        skipped = torch.tensor([float(self.skipped)], device=self.device)
        return Snapshot.of(
            self.backend,
            progress=asdict(self.train_step.progress),
            config=self._config(),
            images=self.order.size,
            steps_per_epoch=self.steps_per_epoch,
            skipped_images=self.skipped_before + round(float(mean_over_ranks(skipped)) * self.world.size),
        )

    def _config(self) -> dict:
        """As resolved, for who wants to repeat the run."""
        config = {**to_dict(self.run.config), "world_size": self.world.size}
        return {**config, "train_micro_batch_size_per_gpu": self.chunk}

    def _summarise(self, seconds: float, steps: int, received: signal.Signals | None) -> None:
        images = steps * self.run.config.train_batch_size
        rows = [
            ("steps", f"{self.step} of {self.last_step}"),
            ("images", f"{images:,} in {seconds:.0f} s ({images / seconds:.0f} images/s, evaluation included)"),
            *((f"k-NN top-1 at step {step}", f"{top1:.2f} %") for step, top1 in _first_and_last(self.knn_history)),
            ("run directory", str(self.out)),
            *([("stopped by", received.name)] if received else []),
        ]
        commands = [f"tensorboard --logdir {self.out}"]
        if self.step < self.last_step:
            commands.insert(
                0,
                f"resume with: the same command, --out {self.out}  (goes on from step {self.step} to {self.last_step})",
            )
        self.log.summary(rows, commands)


def view_pairs(views: torch.Tensor, count: int = 16) -> torch.Tensor:
    """uint8 views [2, n, 3, H, W] -> one picture [3, ., .]; view 1 above its view 2, eight images a row."""
    pairs = [row for some in zip(*(view[:count].split(8) for view in views), strict=True) for row in some]
    return make_grid(torch.cat(pairs), nrow=8, pad_value=255)


def _first_and_last(history: list) -> list:
    return history if len(history) < 2 else [history[0], history[-1]]
