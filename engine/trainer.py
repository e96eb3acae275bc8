"""The loop of a run: trains, logs, evaluates, saves, obeys signals. What is trained is in pretraining.py and finetuning.py."""

import gc
import itertools
import json
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from crossbatch import InputError, RunStopped
from crossbatch.data import Batch, GlobalBatchSampler, TrainLoader
from crossbatch.engine import checkpoint
from crossbatch.engine.checkpoint.schedule import CheckpointSchedule, Snapshot
from crossbatch.engine.config import Resolved, to_dict
from crossbatch.engine.run_log import SCORES, Log, RunLog, StepClock
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.engine.runtime.distributed import World, mean_over_ranks, on_main, shared_token
from crossbatch.engine.runtime.nonfinite import NonFiniteSteps
from crossbatch.engine.runtime.signals import Signals, StepSync
from crossbatch.engine.runtime.watchdog import Watch
from crossbatch.engine.sharding import Backend
from crossbatch.engine.step import Progress


class Step(Protocol):
    """What a subclass trains with."""

    backend: Backend
    progress: Progress


class Trainer(ABC):
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
        run: Resolved,
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
        self.notes = list(run.choices)  # for the log, which opens last
        self.order, self.loader = self.open_data()
        self.steps_per_epoch = self.count_steps()
        self.last_step = self.ours.schedule.epochs * self.steps_per_epoch
        self.stop = min(self.last_step, stop_after) if stop_after is not None else self.last_step
        self.candidates = on_main(lambda: self._open_run(resume))
        resumed = self._build(self.choose_chunk())
        if world.is_main:
            write_atomically(out / "config.json", json.dumps(self._config(), indent=2) + "\n")
        self.log: Log = RunLog(out, self.step, self.stop) if world.is_main else Log()
        self.clock = StepClock()
        self.skipped = 0
        self.skipped_before = resumed.manifest.skipped_images if resumed else 0
        self.signals, self.agreement = Signals(), StepSync(self.ours.watch.timeout_s)
        self.saves = self._open_saves(resumed)
        self.scores: list[tuple[int, dict[str, float]]] = []  # (step, what `evaluate` found)
        for note in self.notes:
            self.log.note(note)
        if resumed:
            for reason in resumed.passed_over:
                self.log.warn(reason)
            self.log.note(f"resumed {resumed.checkpoint} at step {self.step}")

    # --- what a subclass knows -----------------------------------------------------------------------------------------

    @abstractmethod
    def open_data(self) -> tuple[GlobalBatchSampler, TrainLoader]:
        """The training images, and whatever `evaluate` needs."""

    def count_steps(self) -> int:
        """Steps of an epoch."""
        return self.order.steps_per_epoch

    def choose_chunk(self) -> int:
        """Images that the backbone sees at once."""
        return self.run.chunk

    def remember_chunk(self) -> None:
        """After `self.chunk` had to become smaller."""
        return

    @abstractmethod
    def build_step(self, chunk: int) -> Step:
        """Model, sharding backend and step, as the seed says."""

    @abstractmethod
    def train_on(self, batch: Batch) -> tuple[Any, float]:
        """One step -> what `values` and `describe_nonfinite` take, and the global gradient norm."""

    @abstractmethod
    def values(self, result: Any) -> dict[str, torch.Tensor]:
        """Scalars of this rank for a line of metrics, the "loss" first; "a/b" becomes b in a section a."""

    @abstractmethod
    def rates(self) -> dict[str, float]:
        """The learning rate and what else the last step was made with."""

    @abstractmethod
    def describe_nonfinite(self, result: Any) -> str:
        """Whose fault a step that is not finite is; all ranks call it."""

    @abstractmethod
    def evaluation_due(self) -> bool:
        """After this step."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Percentages by their name in metrics.jsonl; all ranks call it."""

    def stage_ms(self) -> dict[str, float]:
        """Milliseconds a step of its parts, on this rank since the last line of metrics."""
        return {}

    def started(self, batch: Batch) -> None:
        """Before the very first step of a run."""
        return

    def recorded(self, metrics: dict[str, Any]) -> None:
        """After a line of metrics."""
        return

    def ended(self) -> None:
        """After the last step."""
        return

    def next_commands(self) -> list[str]:
        """What to type after a run that is finished."""
        return []

    # --- the run -------------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        return self.train_step.progress.step

    def train(self) -> None:
        """Trains up to the last step, or until a signal asks to stop; saves at the end."""
        started, first = time.perf_counter(), self.step
        try:
            with self.signals:
                if self.step == 0:
                    self._record({}, self.evaluation_due())
                received = self._loop()
                if self.step > first:
                    self._save()
            self.ended()
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
            received, saving, failed_rank = self.agreement.exchange(
                self.signals.received, self.saves.busy, failure is not None
            )
            if failed_rank is not None:
                self._save()
                if isinstance(failure, torch.OutOfMemoryError):
                    raise RunStopped(
                        f"out of memory while images were prepared; step {self.step} is saved; lower "
                        f"train_micro_batch_size_per_gpu, or use crossbatch.data.backend=opencv"
                    ) from failure
                raise failure or RunStopped(f"rank {failed_rank} got no more data; step {self.step} is saved")
            if received is not None:
                return received
            self._save_if_due(saving)
            assert batch is not None
            self._skip(batch.skipped)
            if self.step == 0:
                self.started(batch)
            self._at("training")
            result, gradient_norm = self._train_on(batch)
            del batch  # before the loader makes another one of its size
            self._skip_step(result, gradient_norm)
            self.log.advance(self.step)
            evaluation = self.evaluation_due()
            if evaluation or self.step % self.ours.log.every_steps == 0 or self.step == self.stop:
                self._record(self._metrics(result, gradient_norm), evaluation)
        return None

    def _batches(self) -> Iterator[Batch]:
        epoch, step = divmod(self.step, self.order.steps_per_epoch)
        yield from self.loader.epoch(epoch, step)
        for later in itertools.count(epoch + 1):
            yield from self.loader.epoch(later)

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

    # --- a step --------------------------------------------------------------------------------------------------------

    def _build(self, chunk: int) -> checkpoint.Resumed | None:
        """Model, backend and step, as the seed or a checkpoint says."""
        torch.manual_seed(self.ours.seed)
        self.train_step = self.build_step(chunk)
        self.chunk, self.fits = chunk, False
        backend = self.train_step.backend
        resumed = checkpoint.resume(
            self.candidates, backend, self._config(), self.order.size, self.allow_change, type(self.run.config)
        )
        if resumed:
            self.train_step.progress = Progress(**resumed.manifest.progress).in_precision(
                self.run.precision, before=resumed.config["crossbatch"]["precision"]
            )
        self.nonfinite = NonFiniteSteps(backend.model)
        return resumed

    def _train_on(self, batch: Batch) -> tuple[Any, float]:
        """One step; if the first one of this process does not fit into memory, with smaller chunks."""
        while True:
            before = replace(self.train_step.progress)
            self.nonfinite.remember()
            try:
                result, gradient_norm = self.train_on(batch)
                self.nonfinite.count(math.isfinite(gradient_norm), before)
                self.fits = True
                return result, gradient_norm
            except torch.OutOfMemoryError:
                self._stop_unless_smaller_chunks_help()
            # Outside of the handler, whose traceback holds on to the memory of the step.
            del self.train_step.backend
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.allow_change += ("train_micro_batch_size_per_gpu",)
            self._build(self.chunk // 2)
            self.remember_chunk()
            self.log.note(f"out of memory: trying again with chunks of {self.chunk} images")

    def _stop_unless_smaller_chunks_help(self) -> None:
        remedy = f"set train_micro_batch_size_per_gpu to {self.chunk // 2}" if self.chunk > 1 else "use more ranks"
        if self.fits:
            saved = "the last checkpoint is older"
            if self.world.size == 1:  # the others may be anywhere
                self.train_step.backend.zero_grad()
                self._save()
                saved = "saved"
            raise RunStopped(
                f"out of memory in step {self.step + 1} with chunks of {self.chunk} images; {saved}; {remedy}"
            )
        if self.chunk == 1 or self.world.size > 1:
            raise RunStopped(f"out of memory in the first step with chunks of {self.chunk} images; {remedy}")

    def _skip_step(self, result: Any, gradient_norm: float) -> None:
        if math.isfinite(gradient_norm):
            return
        progress = self.train_step.progress
        scale = f"; loss scale now {progress.loss_scale:g}" if self.run.precision == "fp16" else ""
        whose = self.describe_nonfinite(result)
        self.log.note(f"step {self.step} changes nothing: {whose}{scale}")
        if self.nonfinite.in_a_row == self.ours.watch.max_nonfinite_steps:
            assert self.nonfinite.progress_before is not None
            self.train_step.progress = self.nonfinite.progress_before
            self._save()
            raise RunStopped(
                f"{self.nonfinite.in_a_row} steps in a row were not finite ({whose}); step {self.step}, before them, is saved; "
                f"lower optimizer.params.lr, lengthen crossbatch.schedule.warmup_epochs or set crossbatch.precision to fp32"
            )

    # --- what is told --------------------------------------------------------------------------------------------------

    def _skip(self, names: list[str]) -> None:
        for name in names[: max(0, 10 - self.skipped)]:
            self.log.note(f"skipped a broken image: {name}")
        self.skipped += len(names)

    def _metrics(self, result: Any, gradient_norm: float) -> dict[str, Any]:
        """One line of metrics: what `values` says of this very step, averaged over ranks."""
        named = self.values(result)
        skipped = torch.tensor(float(self.skipped), device=self.device)
        values = torch.stack([*(value.float() for value in named.values()), skipped]).double()
        *means, skipped_mean = mean_over_ranks(values).tolist()
        mean = dict(zip(named, means, strict=True))
        loss, progress, stages = mean.pop("loss"), self.train_step.progress, self.stage_ms()
        return {
            "loss": loss if math.isfinite(loss) else None,
            **self.rates(),
            "grad_norm": gradient_norm if math.isfinite(gradient_norm) else None,
            **({"loss_scale": progress.loss_scale} if self.run.precision == "fp16" else {}),
            "skipped_steps": progress.step - progress.updates,
            **self.clock.reading(self.run.config.train_batch_size),
            **({"stage_ms": stages} if stages else {}),
            **_sections({name: value if math.isfinite(value) else None for name, value in mean.items()}),
            "skipped_images": self.skipped_before + round(skipped_mean * self.world.size),
        }

    def _record(self, metrics: dict[str, Any], evaluation: bool) -> None:
        if evaluation:
            self._at("evaluating")
            found = self.evaluate()
            metrics |= found
            self.scores.append((self.step, found))
        if metrics:
            where = {
                "step": self.step,
                "epoch": self.step / self.steps_per_epoch,
                "images_seen": self.step * self.run.config.train_batch_size,
            }
            self.log.record({**where, **metrics})
            self.recorded(metrics)
        self.clock.restart()

    def _summarise(self, seconds: float, steps: int, received: signal.Signals | None) -> None:
        images = steps * self.run.config.train_batch_size
        first_and_last = self.scores if len(self.scores) < 2 else [self.scores[0], self.scores[-1]]
        rows = [
            ("steps", f"{self.step} of {self.last_step}"),
            ("images", f"{images:,} in {seconds:.0f} s ({images / seconds:.0f} images/s, evaluation included)"),
            *(
                (f"{SCORES[name]} at step {step}", f"{found[name]:.2f} %")
                for step, found in first_and_last
                for name in found
            ),
            ("run directory", str(self.out)),
            *([("stopped by", received.name)] if received else []),
        ]
        commands = self.next_commands()
        if self.step < self.last_step:
            commands = [
                f"resume with: the same command, --out {self.out}  (goes on from step {self.step} to {self.last_step})"
            ]
        self.log.summary(rows, commands)

    # --- what is kept --------------------------------------------------------------------------------------------------

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

    def _open_saves(self, resumed: checkpoint.Resumed | None) -> CheckpointSchedule:
        settings, folder = self.ours.checkpoint, self.out / "checkpoints"
        keep = checkpoint.Keep(settings.keep, settings.keep_every_steps)
        saver = checkpoint.AsyncCheckpointWriter(folder, keep, shared_token(), settings.asynchronous)
        every = self.steps_per_epoch if settings.every_steps == "auto" else settings.every_steps
        saved = self.step if resumed and resumed.checkpoint.parent == folder else None
        return CheckpointSchedule(saver, every, self._snapshot, self.log, saved)

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
            self.train_step.backend,
            progress=asdict(self.train_step.progress),
            config=self._config(),
            images=self.order.size,
            steps_per_epoch=self.steps_per_epoch,
            skipped_images=self.skipped_before + round(float(mean_over_ranks(skipped)) * self.world.size),
        )

    def _config(self) -> dict[str, Any]:
        """As resolved, for who wants to repeat the run."""
        config = {**to_dict(self.run.config), "world_size": self.world.size}
        return {**config, "train_micro_batch_size_per_gpu": self.chunk}


def _sections(values: dict[str, float | None]) -> dict[str, Any]:
    """{"a": 1, "b/c": 2} -> {"a": 1, "b": {"c": 2}}."""
    nested: dict[str, Any] = {}
    for path, value in values.items():
        section, _, name = path.rpartition("/")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested
