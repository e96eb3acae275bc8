"""Builds the trainer of a task in a run directory, from its newest checkpoint or from the start."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from crossbatch.engine import checkpoint
from crossbatch.engine.checkpoint import AsyncCheckpointWriter, Keep, Resumed
from crossbatch.engine.checkpoint.directory import step_of
from crossbatch.engine.checkpoint.memory import MemoryCopies
from crossbatch.engine.checkpoint.recovery import NOTHING, recover
from crossbatch.engine.checkpoint.schedule import CheckpointSchedule
from crossbatch.engine.config import Resolved, to_dict
from crossbatch.engine.run_log import Log, RunLog
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.engine.runtime.distributed import on_main, shared_token
from crossbatch.engine.runtime.nonfinite import LossMonitor
from crossbatch.engine.runtime.profiling import RunProfile, check_steps_left
from crossbatch.engine.runtime.same_run import facts_of
from crossbatch.engine.runtime.signals import StepSync
from crossbatch.engine.runtime.watchdog import Watchdog
from crossbatch.engine.runtime.world import World, may_be_restarted
from crossbatch.engine.tasks.task import Task
from crossbatch.engine.trackers import check_trackers
from crossbatch.engine.train_state import CHUNK_KEY, TrainState
from crossbatch.engine.trainer import Trainer


def build_trainer(
    task: Task[Any],
    world: World,
    device: torch.device,
    out: Path,
    resume: str = "auto",
    stop_after: int | None = None,
    allow_change: Iterable[str] = (),
    watchdog: Watchdog | None = None,
    profile_steps: int = 0,
) -> Trainer:
    """Return a trainer of `task` that goes on from a checkpoint, or starts; all ranks of a process group call it.

    The order matters: the step comes before the log, which drops the lines of steps that are repeated.

    Args:
        task: what is trained.
        world: this rank among the others.
        device: where the model lives.
        out: the run directory, the same on all ranks.
        resume: "auto", "none" or a path, see `checkpoint.candidates`.
        stop_after: optimizer step to stop at, counted from the start of the run; None trains all epochs.
        allow_change: configuration keys that may differ from those of the checkpoint.
        watchdog: is told what this rank is doing; None if nobody watches.
        profile_steps: how many steps to profile, see `engine.runtime.profiling`; 0 for none.

    Raises:
        InputError: if the run directory cannot be written, or if the run may not continue from what is in it.
    """
    cfg = task.cfg
    on_main(lambda: check_trackers(cfg.crossbatch.log.to))
    candidates, timeout_s = on_main(lambda: _open_run_directory(out, resume)), cfg.crossbatch.watch.timeout_s
    memory_every_steps = cfg.crossbatch.checkpoint.memory_every_steps
    if memory_every_steps == "auto":
        memory_every_steps = int(may_be_restarted())
    recovered, fingerprint = NOTHING, _fingerprint(cfg)
    if memory_every_steps and resume == "auto":
        saved_step = step_of(candidates[0]) if candidates else 0
        recovered = recover(out, fingerprint, saved_step, world, timeout_s)
        candidates = [*([recovered.checkpoint] if recovered.checkpoint else []), *candidates]
    state = TrainState(task, device, candidates, allow_change)
    resumed = state.build(cfg.chunk)
    notes = [*cfg.choices, *task.on_start(state.step, resumed, state.allow_change)]
    if device.type == "cuda":
        timed = "the fastest for each shape, timed where it first occurs (cudnn.benchmark)"
        notes.append(f"convolutions: {timed if torch.backends.cudnn.benchmark else 'deterministic, as configured'}")
    first_step = state.step.progress.step
    last_step = state.total_steps if stop_after is None else min(state.total_steps, stop_after)
    if profile_steps:
        check_steps_left(profile_steps, last_step - first_step)
    log: Log = Log()
    if world.is_main:
        write_atomically(out / "config.json", json.dumps(state.config(), indent=2) + "\n")
        log = RunLog(out, first_step, last_step, cfg.crossbatch.log.to, state.config())
    for note in notes:
        log.note(note)
    if resumed:
        for reason in resumed.passed_over:
            log.warn(reason)
        log.note(f"resumed {resumed.checkpoint} at step {resumed.manifest.step}")
    if recovered.note:
        log.note(recovered.note)
    is_recovered = resumed is not None and resumed.checkpoint == recovered.checkpoint
    if is_recovered:
        log.complete(recovered.line)
    copies = None
    if memory_every_steps:
        copies = MemoryCopies(state, world, out, fingerprint, memory_every_steps, timeout_s, log, is_recovered)
    profile = None
    if profile_steps:
        profile = RunProfile(out / "profile", profile_steps, world.rank, cfg.train_batch_size, log.note)
    return Trainer(
        task,
        state,
        log,
        saves=_open_saves(state, log, out, resumed),
        copies=copies,
        sync=StepSync(timeout_s),
        loss_monitor=LossMonitor(cfg.crossbatch.watch),
        watchdog=watchdog or Watchdog(world, timeout_s),
        out=out,
        last_step=last_step,
        profile=profile,
    )


def _open_run_directory(out: Path, resume: str) -> list[Path]:
    """Return the checkpoints to continue from, after creating the run directory."""
    candidates = checkpoint.candidates(out, resume)
    checkpoint.create_run_directory(out)
    return candidates


def _open_saves(state: TrainState, log: Log, out: Path, resumed: Resumed | None) -> CheckpointSchedule:
    settings, folder = state.task.cfg.crossbatch.checkpoint, out / "checkpoints"
    keep = Keep(settings.keep, settings.keep_every_steps)
    writer = AsyncCheckpointWriter(folder, keep, shared_token(), settings.asynchronous)
    every_steps = state.task.data.steps_per_epoch if settings.every_steps == "auto" else settings.every_steps
    saved_step = resumed.manifest.step if resumed and resumed.checkpoint.parent == folder else None
    return CheckpointSchedule(writer, every_steps, state.snapshot, log, saved_step)


def _fingerprint(cfg: Resolved) -> str:
    """Return a digest of configuration, code and versions, the same for any number of ranks."""
    facts = {name: fact for name, fact in facts_of(to_dict(cfg.config)).items() if name != CHUNK_KEY}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
