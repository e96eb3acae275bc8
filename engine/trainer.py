"""The run: opens data and model, trains, logs, evaluates and saves."""

import gc
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torchvision.utils import make_grid

from crossbatch import InputError, RunStopped
from crossbatch.data import Batch, Order, TrainLoader, has_evaluation_split, moco_v3_views, open_source, prepare
from crossbatch.engine import checkpoint
from crossbatch.engine.build import build_model
from crossbatch.engine.config import ResolvedConfig, to_dict
from crossbatch.engine.distributed import GroupCollective, World, mean_over_ranks, on_main
from crossbatch.engine.knn import KnnMonitor
from crossbatch.engine.memory import automatic_chunk, remember
from crossbatch.engine.sharding import build_backend
from crossbatch.engine.step import Progress, TrainStep, autocast
from crossbatch.engine.telemetry import Log, RunLog, StepClock
from crossbatch.models import Contrast

CHUNK = "chunk.json"  # in the run directory: what `train_micro_batch_size_per_gpu: "auto"` came to
MOST_SKIPPED_STEPS = 30  # in a row: a loss scale of 2^16 has fallen to 2^-14


class Trainer:
    """One run on this rank, inside a process group.

    Args:
        run: the resolved configuration.
        world: this rank among the others.
        device: where the model lives.
        out: the run directory, the same on all ranks.
        resume: "auto", "none" or a path, see `checkpoint.find`.
        stop_after: optimizer step to stop at, counted from the start of the run; None trains all epochs.
    """

    def __init__(
        self,
        run: ResolvedConfig,
        world: World,
        device: torch.device,
        out: Path,
        resume: str,
        stop_after: int | None = None,
    ):
        self.run, self.world, self.device, self.out = run, world, device, out
        self.ours = run.config.crossbatch
        source = self._open_data()
        self.steps_per_epoch = self.order.steps_per_epoch
        self.last_step = self.ours.schedule.epochs * self.steps_per_epoch
        self.stop = min(self.last_step, stop_after) if stop_after is not None else self.last_step
        resumed = on_main(lambda: self._open_run(resume))

        chunk, why = run.chunk, None
        if run.auto_chunk:
            chunk, why = automatic_chunk(run, world, device, lambda: autocast(run, device), out / CHUNK)
        self._build(resumed, chunk)
        if world.is_main:
            checkpoint.write_atomically(out / "config.json", json.dumps(self._config(), indent=2) + "\n")
        self.loader = TrainLoader(
            source,
            self.order,
            moco_v3_views(self.ours.data.image_size, self.ours.data.crop_min),
            self.ours.seed,
            workers=run.workers,
            max_skipped_fraction=self.ours.data.max_skipped_fraction,
        )
        self.log: Log = RunLog(out, self.step, self.stop) if world.is_main else Log()
        self.clock = StepClock()
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.knn_history: list[tuple[int, float]] = []
        if why is not None and chunk < run.local_batch:
            self.log.note(why)
        if resumed:
            self.log.note(f"resumed {resumed} at step {self.step}")

    @property
    def step(self) -> int:
        return self.train_step.progress.step

    def _build(self, resumed: Path | None, chunk: int) -> None:
        """Model, backend and step, as the seed or the checkpoint `resumed` says."""
        torch.manual_seed(self.ours.seed)
        model = build_model(self.run).to(self.device)
        model.set_collective(GroupCollective())
        self.backend = build_backend(model, self.run)
        self.train_step = TrainStep(self.backend, self.run, self.device, self.steps_per_epoch, chunk)
        self.resumed, self.chunk, self.fits = resumed, chunk, False
        if resumed:
            self.train_step.progress = Progress(**checkpoint.load(resumed, self.backend))

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

    def _open_run(self, resume: str) -> Path | None:
        found = checkpoint.find(self.out, resume)
        try:
            (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--out {self.out}: cannot be written: {error.strerror}; choose a writable folder"
            ) from None
        return found

    def train(self) -> None:
        """Trains up to the last step; saves at the end."""
        started, first = time.perf_counter(), self.step
        try:
            if self.step == 0:
                self._record({}, knn=self.monitor is not None)
            self._loop()
            if self.step > first:
                self._save()
            self._summarise(time.perf_counter() - started, self.step - first)
        finally:
            self.loader.close()
            self.log.close()

    def _loop(self) -> None:
        batches = self._batches()
        self.clock.restart()
        while self.step < self.stop:
            before = time.perf_counter()
            batch = next(batches)
            self.clock.waited(before)
            self._skip(batch.skipped)
            if self.step == 0:
                self.log.pictures("views", view_pairs(batch.views), 0)
            contrast, gradient_norm = self._train_on(batch.views)
            self._skip_step(gradient_norm)
            self.log.advance(self.step)
            knn = self._knn_due()
            if knn or self.step % self.ours.log.every_steps == 0 or self.step == self.stop:
                self._record(self._metrics(contrast, gradient_norm), knn)
            if self.step % self._save_every() == 0 and self.step < self.stop:
                self._save()

    def _train_on(self, views: torch.Tensor) -> tuple[Contrast, float]:
        """One step; if the first one of this process does not fit into memory, with smaller chunks."""
        while True:
            try:
                result = self.train_step(views)
                self.fits = True
                return result
            except torch.OutOfMemoryError:
                self._stop_unless_smaller_chunks_help()
            # Outside of the handler, whose traceback holds on to the memory of the step.
            del self.backend, self.train_step.backend
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._build(self.resumed, self.chunk // 2)
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

    def _save_every(self) -> int:
        every = self.ours.checkpoint.every_steps
        return self.steps_per_epoch if every == "auto" else every

    def _skip(self, names: list[str]) -> None:
        for name in names[: max(0, 10 - self.skipped)]:
            self.log.note(f"skipped a broken image: {name}")
        self.skipped += len(names)

    def _skip_step(self, gradient_norm: float) -> None:
        if math.isfinite(gradient_norm):
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        progress = self.train_step.progress
        scale = f"; loss scale now {progress.loss_scale:g}" if self.run.precision == "fp16" else ""
        self.log.note(f"step {self.step}: gradients are not finite, skipped{scale}")
        if self.skipped_in_a_row == MOST_SKIPPED_STEPS:
            raise RunStopped(
                f"the gradients of {MOST_SKIPPED_STEPS} steps in a row are not finite, up to step {self.step}; the last "
                f"checkpoint in {self.out / 'checkpoints'} is from before; lower optimizer.params.lr or set "
                f"crossbatch.precision to fp32"
            )

    def _metrics(self, contrast: Contrast, gradient_norm: float) -> dict:
        """One line of metrics: the losses and signals of this very step, averaged over ranks."""
        named = {"loss": contrast.loss, **contrast.signals, **contrast.terms}
        skipped = torch.tensor(float(self.skipped), device=self.device)
        values = torch.stack([*(value.float() for value in named.values()), skipped]).double()
        *means, skipped_mean = mean_over_ranks(values).tolist()
        mean = dict(zip(named, means, strict=True))
        if not math.isfinite(mean["loss"]):
            raise RunStopped(
                f"the loss is {mean['loss']} at step {self.step}; the last checkpoint in {self.out / 'checkpoints'} is from "
                f"before; lower optimizer.params.lr or lengthen crossbatch.schedule.warmup_epochs"
            )
        progress = self.train_step.progress
        return {
            "loss": mean["loss"],
            "lr": self.train_step.learning_rate(max(0, progress.updates - 1)),
            "momentum": self.train_step.momentum(max(0, progress.updates - 1)),
            "grad_norm": gradient_norm if math.isfinite(gradient_norm) else None,
            **({"loss_scale": progress.loss_scale} if self.run.precision == "fp16" else {}),
            "skipped_steps": progress.step - progress.updates,
            **self.clock.reading(self.run.config.train_batch_size),
            **{name: mean[name] for name in contrast.signals},
            "loss_terms": {name: mean[name] for name in contrast.terms},
            "skipped_images": round(skipped_mean * self.world.size),
        }

    def _record(self, metrics: dict, knn: bool) -> None:
        if knn:
            assert self.monitor is not None
            metrics["knn_top1"] = self.monitor.top1(self.backend, self.train_step.autocast)
            self.knn_history.append((self.step, metrics["knn_top1"]))
        if metrics:
            where = {
                "step": self.step,
                "epoch": self.step / self.steps_per_epoch,
                "images_seen": self.step * self.run.config.train_batch_size,
            }
            self.log.record({**where, **metrics})
        self.clock.restart()

    def _save(self) -> None:
        before = time.perf_counter()
        progress = asdict(self.train_step.progress)
        checkpoint.save(self.out / "checkpoints", self.backend, progress, self._config(), self.ours.checkpoint.keep)
        self.clock.paused(before)

    def _config(self) -> dict:
        """As resolved, for who wants to repeat the run."""
        config = {**to_dict(self.run.config), "world_size": self.world.size}
        return {**config, "train_micro_batch_size_per_gpu": self.chunk}

    def _summarise(self, seconds: float, steps: int) -> None:
        images = steps * self.run.config.train_batch_size
        rows = [
            ("steps", f"{self.step} of {self.last_step}"),
            ("images", f"{images:,} in {seconds:.0f} s ({images / seconds:.0f} images/s, evaluation included)"),
            *((f"k-NN top-1 at step {step}", f"{top1:.2f} %") for step, top1 in _first_and_last(self.knn_history)),
            ("run directory", str(self.out)),
        ]
        commands = [f"tensorboard --logdir {self.out}"]
        if self.step < self.last_step:
            commands.insert(
                0, f"the same command with --out {self.out} --resume auto  (goes on to step {self.last_step})"
            )
        self.log.summary(rows, commands)


def view_pairs(views: torch.Tensor, count: int = 16) -> torch.Tensor:
    """uint8 views [2, n, 3, H, W] -> one picture [3, ., .]; view 1 above its view 2, eight images a row."""
    pairs = [row for some in zip(*(view[:count].split(8) for view in views), strict=True) for row in some]
    return make_grid(torch.cat(pairs), nrow=8, pad_value=255)


def _first_and_last(history: list) -> list:
    return history if len(history) < 2 else [history[0], history[-1]]
