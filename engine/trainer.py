"""Runs the training loop: fetch a batch, agree on signals, train, log, evaluate, save, stop. What is trained is a `Task`."""

import contextlib
import json
import math
import signal
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from crossbatch import InputError, RunStopped
from crossbatch.data import Batch, WaitInterrupted
from crossbatch.engine.checkpoint.memory import MemoryCopies
from crossbatch.engine.checkpoint.schedule import CheckpointSchedule
from crossbatch.engine.config import ResolvedConfig, usable_cores
from crossbatch.engine.datasets import log_skipped_images, stop_on_lost_images
from crossbatch.engine.gradient_noise import describe_batch
from crossbatch.engine.nested import nest
from crossbatch.engine.run_log import Log, StepClock, finite_or_none, replay_command, score_rows
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.engine.runtime.distributed import broadcast_object, mean_over_ranks
from crossbatch.engine.runtime.nonfinite import LOSS_JUMPED, LossMonitor, describe_nonfinite, largest_weights
from crossbatch.engine.runtime.profiling import RunProfile
from crossbatch.engine.runtime.signals import Interrupted, Signals, StepSync
from crossbatch.engine.runtime.timing import cpu_s, descendants, mean_ms
from crossbatch.engine.runtime.watchdog import Watchdog
from crossbatch.engine.runtime.world import may_be_restarted
from crossbatch.engine.tasks.task import Task, TrainResult
from crossbatch.engine.train_state import CHUNK_KEY, TrainState

NONFINITE = "nonfinite.json"  # in the run directory, if steps that were not finite ended the run
RESTART_S = 10.0  # for torchrun to stop this rank, too, after it has stopped another


@dataclass
class Trainer:
    """Trains a task on this rank, inside a process group; `build_trainer` makes one from a run directory.

    Attributes:
        task: what is trained.
        state: its step and progress.
        log: prints, and writes metrics; does nothing on ranks other than 0.
        saves: writes the checkpoints.
        copies: keeps the last steps in host memory; None where nothing does.
        sync: lets the ranks agree between two steps.
        loss_monitor: warns about lines of metrics.
        watchdog: is told what this rank is doing.
        out: the run directory.
        last_step: the step at which to stop, at the latest.
        profile: is told how long every step took.
    """

    task: Task[Any]
    state: TrainState
    log: Log
    saves: CheckpointSchedule
    copies: MemoryCopies | None
    sync: StepSync
    loss_monitor: LossMonitor
    watchdog: Watchdog
    out: Path
    last_step: int
    profile: RunProfile | None = None
    signals: Signals = field(default_factory=Signals, init=False)
    clock: StepClock = field(default_factory=StepClock, init=False)
    scores: list[tuple[int, dict[str, float]]] = field(default_factory=list, init=False)  # by number of steps
    named: set[str] = field(default_factory=set, init=False)  # broken images that the log names already
    step_times: list[dict[str, float]] = field(default_factory=list, init=False)  # read since the last line of metrics

    @property
    def num_steps(self) -> int:
        """Return the number of steps done since the start of the run."""
        return self.state.step.progress.step

    def train(self) -> None:
        """Train up to the last step, or until a signal asks to stop, and save the state there.

        Raises:
            RunStopped: if training cannot go on: no more data, no memory, or too many steps in a row that are not finite;
                or if the last state or the results cannot be written, after everything else is.
        """
        start_s, start_cpu_s, first_step = time.perf_counter(), cpu_s(descendants()), self.num_steps
        failure, commands = None, []
        try:
            with self.signals:
                received = self._loop()
                try:
                    if self.num_steps > first_step or (self.copies is not None and self.copies.recovered):
                        self._save()
                except RunStopped as error:
                    failure = error
                if received is not None:
                    self.log.stopped(received.name, self.num_steps)
                    if may_be_restarted():
                        # By torchrun on one node, which starts all anew; on another it may not know yet, and take this rank's
                        # end for that of the run.
                        self.signals.wait(RESTART_S)
            try:
                commands = self.task.on_end(self.scores)
            except OSError as error:
                failure = failure or RunStopped(
                    f"{error.filename} cannot be written: {error.strerror}; make room, and repeat the command"
                )
            if failure is not None:
                self.log.failed()
            seconds = time.perf_counter() - start_s
            busy = (cpu_s(descendants()) - start_cpu_s) / seconds
            self._print_summary(seconds, busy, self.num_steps - first_step, received, commands)
            if failure is not None:
                raise failure
            if self.copies is not None:
                self.copies.close()
            self.saves.writer.close()
            self.sync.close()
        except BaseException:
            self.log.failed()
            raise
        finally:
            self.task.close()
            self.log.close()

    def _loop(self) -> signal.Signals | None:
        """Train step by step; return the signal that ended it, or None at the last step."""
        try:
            self._evaluate_what_is_left()
            return self._train_steps()
        except Interrupted as stop:
            return stop.received

    def _evaluate_what_is_left(self) -> None:
        """Evaluate before the first step, or after the last one of a process that was interrupted meanwhile."""
        due = self.task.evaluations_due(self.num_steps, self.num_steps == self.last_step)
        if due and not (self.num_steps and broadcast_object(self.log.has_scores(self.num_steps))):
            self._evaluate(due)

    def _train_steps(self) -> signal.Signals | None:
        batches = self.task.data.batches(self.num_steps)
        self.clock.restart()
        while self.num_steps < self.last_step:
            self._set_phase("waiting for data")
            before_s = time.perf_counter()
            batch, failure = _fetch(batches)
            self.clock.waited(before_s)

            agreed = self.sync.exchange(self.signals.received, self.saves.writer.busy, failure is not None)
            if agreed.received is not None:
                return agreed.received  # first: a signal to the whole process group can end what loads images, too
            if agreed.failed_rank is not None:
                self._stop_without_data(failure, agreed.failed_rank)

            self._set_phase("saving")
            before_s = time.perf_counter()
            self.saves.boundary(self.num_steps, agreed.saving)
            self.clock.paused(before_s)

            assert batch is not None
            self._log_images(batch)
            self._set_phase("training")
            result = self._train_on(batch)
            del batch  # before the loader makes another one of its size
            self._after_step(result)
        return None

    def _train_on(self, batch: Batch) -> TrainResult:
        """Train on a batch; if the first step of this process does not fit into memory, with smaller chunks."""
        while True:
            try:
                return self.state.train_on(batch)
            except torch.OutOfMemoryError:
                if self.state.has_trained or self.state.chunk == 1 or self.task.cfg.world_size > 1:
                    self._stop_without_memory()
            except ValueError as error:
                if self.state.has_trained:
                    raise
                remedy = "raise it, or crossbatch.data.image_size"
                raise InputError(f"{CHUNK_KEY}: given {self.state.chunk}: {error}; {remedy}") from error
            # Outside of the handler, whose traceback holds on to the memory of the step.
            self.state.build_with_smaller_chunks()
            self.log.note(f"out of memory: trying again with chunks of {self.state.chunk} images")

    def _after_step(self, result: TrainResult) -> None:
        """Report a step, and save and evaluate where that is due. Raises Interrupted."""
        if self.profile is not None and self.task.timer is not None:
            self.step_times += self.task.timer.read()
            self.profile.stepped(self.step_times[-1], self.clock.last_wait_s)
        is_last = self.num_steps == self.last_step
        due = self.task.evaluations_due(self.num_steps, is_last)
        line = None
        if due or is_last or self.num_steps % self.task.cfg.crossbatch.log.every_steps == 0:
            line = self._line(self._metrics(result))
            self.clock.restart()
        if self.copies is not None:
            self.copies.after(self.num_steps, line)  # with the line, which a rank 0 that dies now has not written
        if not math.isfinite(result.grad_norm):
            self._on_nonfinite(result)
        self.log.advance(self.num_steps)
        if line is not None:
            self._record(line)
        if due:
            self._set_phase("evaluating")
            agreed = self.sync.exchange(self.signals.received, self.saves.writer.busy, False)
            self.saves.boundary(self.num_steps, agreed.saving, is_last)  # an evaluation may take long
            self._evaluate(due)

    def _evaluate(self, due: Collection[str]) -> None:
        """Evaluate the task, record its scores, and keep them for the end. Raises Interrupted."""
        self._set_phase("evaluating")
        found = self.task.evaluate(self.state.step, due, self._between_batches)
        self.scores.append((self.num_steps, found))
        self._record(self._line(found))
        self.clock.restart()

    def _between_batches(self, images: int) -> None:
        """Raise Interrupted if any rank has received a signal; an evaluation calls it for every batch, on all ranks."""
        agreed = self.sync.exchange(self.signals.received, False, False)
        if agreed.received is not None:
            self.log.note(f"step {self.num_steps}: the evaluation is left for the next start")
            raise Interrupted(agreed.received)

    def _metrics(self, result: TrainResult) -> dict[str, Any]:
        """Return a line of metrics: values of this very step averaged over ranks, rates, times and counts."""
        skipped = torch.tensor(float(self.state.num_skipped_images), device=self.state.device)
        parts = [result.noise.part_square().to(skipped)] if result.noise else []
        values = torch.stack([*(value.float() for value in result.metrics.values()), skipped, *parts]).double()
        means = mean_over_ranks(values).tolist()
        named = {name: finite_or_none(mean) for name, mean in zip(result.metrics, means, strict=False)}
        skipped_per_rank, *part_squares = means[len(named) :]
        cfg, progress = self.task.cfg, self.state.step.progress
        if result.noise:
            named |= result.noise.read(part_squares[0], progress)
        stages, self.step_times = self.step_times + (self.task.timer.read() if self.task.timer else []), []
        return {
            "loss": named.pop("loss"),
            **result.rates,
            "grad_norm": finite_or_none(result.grad_norm),
            **({"loss_scale": progress.loss_scale} if cfg.precision == "fp16" else {}),
            "skipped_steps": progress.step - progress.updates,
            **self.clock.reading(cfg.train_batch_size),
            **({"stage_ms": mean_ms(stages)} if stages else {}),
            **nest(named, "/"),
            "skipped_images": self.state.skipped_images(skipped_per_rank),
        }

    def _line(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a line of metrics of this step."""
        epoch, images = self.num_steps / self.task.data.steps_per_epoch, self.num_steps * self.task.cfg.train_batch_size
        return {"step": self.num_steps, "epoch": epoch, "images_seen": images, **values}

    def _record(self, metrics: dict[str, Any]) -> None:
        """Log a line of metrics, and warn of what is odd about it."""
        self.log.record(metrics)
        rank = metrics.get("effective_rank") if self.num_steps else None  # random weights may have a low one
        for warning in self.loss_monitor.check(metrics.get("loss"), metrics.get("feature_std"), rank):
            look = self._look_into(self.num_steps) if warning.startswith(LOSS_JUMPED) else ""
            self.log.warn(f"step {self.num_steps}: {warning}{look}")

    def _log_images(self, batch: Batch) -> None:
        """Log each broken image once, with the reason, and show the very first batch of a run in TensorBoard."""
        broken = self.task.data.loader.broken
        say = self.log.note if dist.get_rank() == 0 else None  # the log of other ranks says nothing
        log_skipped_images((str(broken[name]) for name in batch.skipped), self.named, say)
        if self.num_steps == 0:
            self.log.first_views(batch.views)

    def _on_nonfinite(self, result: TrainResult) -> None:
        """Log a step that was skipped; stop after too many of them in a row."""
        cfg, skipped = self.task.cfg, self.state.nonfinite_in_a_row
        described = describe_nonfinite(result.suspects)
        scale = f"; loss scale now {self.state.step.progress.loss_scale:g}" if cfg.precision == "fp16" else ""
        self.log.note(f"step {self.num_steps} skipped: {described}{scale}")
        if skipped == cfg.crossbatch.watch.max_nonfinite_steps:
            self.state.restore_progress()
            self._save()
            self._keep_weights(described)
            raise RunStopped(
                f"{skipped} steps in a row were skipped: {described}; step {self.num_steps}, before them, is saved; lower "
                f"optimizer.params.base_lr, raise crossbatch.schedule.warmup_epochs or set crossbatch.precision to fp32"
                f"{self._look_into(self.num_steps + 1)}"
            )

    def _keep_weights(self, described: str) -> None:
        """Write down for a replay what was not finite, and the largest value of each weight on any rank."""
        weights = largest_weights(self.state.step.backend.local_parameters())
        content = {"step": self.num_steps + 1, "described": described, "weights": weights}
        with contextlib.suppress(OSError):  # a full disk
            if dist.get_rank() == 0:
                write_atomically(self.out / NONFINITE, json.dumps(content) + "\n")

    def _look_into(self, step: int) -> str:
        """Say how to find what went wrong in a step; only pretraining can be replayed."""
        return f"; look into it: {replay_command(self.out, step)}" if isinstance(self.task.cfg, ResolvedConfig) else ""

    def _stop_without_data(self, failure: Exception | None, failed_rank: int) -> NoReturn:
        """Stop where a rank has got no batch, after saving the state."""
        self._save()
        if isinstance(failure, torch.OutOfMemoryError):
            raise RunStopped(
                f"out of memory while images were prepared; step {self.num_steps} is saved; lower {CHUNK_KEY}, or use "
                f"crossbatch.data.backend=opencv"
            ) from failure
        if isinstance(failure, RunStopped):
            raise RunStopped(f"{failure}; step {self.num_steps} is saved") from failure
        raise failure or RunStopped(f"rank {failed_rank} could not load its next batch; step {self.num_steps} is saved")

    def _stop_without_memory(self) -> NoReturn:
        """Stop in a step that needs more memory than there is; save the state before it where no other rank has to help."""
        chunk, where, saved = self.state.chunk, "the first step", ""
        if self.state.has_trained:
            where, saved = f"step {self.num_steps + 1}", "; the last checkpoint is older"
            if self.task.cfg.world_size == 1:
                self.state.step.backend.zero_grad()
                self._save()
                saved = "; saved"
        remedy = f"set {CHUNK_KEY} to {chunk // 2}" if chunk > 1 else "use more ranks"
        raise RunStopped(f"out of memory in {where} with chunks of {chunk} images{saved}; {remedy}")

    def _print_summary(
        self, seconds: float, busy: float, steps: int, received: signal.Signals | None, commands: list[str]
    ) -> None:
        images, total_steps = steps * self.task.cfg.train_batch_size, self.state.total_steps
        whose = "this run" if self.task.cfg.world_size == 1 else "rank 0 and its loader"
        rows = [
            ("steps", f"{self.num_steps} of {total_steps}"),
            ("images", f"{images:,} in {seconds:.0f} s ({images / seconds:.0f} images/s, evaluation included)"),
            ("CPU cores", f"{busy:.1f} of {usable_cores()} busy with {whose}"),
        ]
        for step, found in self.scores[:1] + self.scores[1:][-1:]:
            rows += score_rows(step, found)
        if (noise_scale := self.state.step.progress.noise_scale) is not None:
            batch = self.task.cfg.train_batch_size
            rows.append(("gradient noise scale", f"{noise_scale:,.0f} images: {describe_batch(batch, noise_scale)}"))
        if self.copies is not None and self.copies.num_copies:
            ms, share = 1000 * self.copies.seconds / steps, 100 * self.copies.seconds / seconds
            megabytes = f"{self.copies.num_bytes / 1e6:.3g} MB a rank"
            rows.append(("copies in memory", f"{megabytes}; training waited {ms:.2g} ms a step ({share:.2g} %)"))
        rows.append(("run directory", str(self.out)))
        if received:
            rows.append(("stopped by", received.name))
        if self.num_steps < total_steps:
            goes_on = f"(goes on from step {self.num_steps} to {total_steps})"
            commands = [f"resume with: the same command, --out {self.out}  {goes_on}"]
        self.log.summary(rows, commands)

    def _save(self) -> None:
        self._set_phase("saving")
        self.saves.final(self.num_steps)
        if self.copies is not None:
            self.copies.forget()

    def _set_phase(self, phase: str) -> None:
        self.watchdog.set_phase(self.num_steps, phase)


def _fetch(batches: Iterator[Batch]) -> tuple[Batch | None, Exception | None]:
    """Return the next batch, or why there is none: the other ranks must learn of it before this one leaves."""
    try:
        with stop_on_lost_images():
            return next(batches), None
    except WaitInterrupted:
        return None, None  # by a signal, which the ranks learn of next
    except Exception as error:
        return None, error
