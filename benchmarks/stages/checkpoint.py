"""Measures saving the state of bs4096.json on one rank: how long training waits and how long the save takes, beside torch.save.

The state is that of ResNet-50 + BatchFormer with LARS, and real steps of a few images are trained meanwhile. Cases: torch.save
of the same tensors with fsync, as one would do it by hand; what training waits for a synchronous save, and for an asynchronous
one; the latter as a run's log has it; how long it takes until it is safe; reading and checking a checkpoint. Then what a save
costs the steps meanwhile: a step alone, and those behind the first one while a save is under way.

What training waits for an asynchronous save is the time of its call and of the step that follows, to the end of the GPU's work,
less a step alone: so it holds copies that the step had to wait for. Files go to the system's temporary folder.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import call_ms, summarise
from benchmarks.rows import Row
from benchmarks.stages import Effort, recipe
from crossbatch.engine import checkpoint
from crossbatch.engine.checkpoint.resume import resume
from crossbatch.engine.checkpoint.schedule import Snapshot
from crossbatch.engine.config import Device, to_dict
from crossbatch.engine.sharding import Backend
from crossbatch.engine.step import TrainStep

LOGGED = "asynchronous: training waits, by the log"


def run(effort: Effort) -> Iterator[Row]:
    """Yield the rows of saving and reading, then those of steps alone and during a save."""
    images, size = (32, 224) if Device.detect().type == "cuda" else (8, 32)
    sizes = [f"train_batch_size={images}", f"train_micro_batch_size_per_gpu={images}"]
    sizes += [f"crossbatch.batchformer.group_size={images}", f"crossbatch.data.image_size={size}"]
    overrides = [*effort.pick(recipe.SMALL, [], []), *sizes]
    cfg = recipe.load("bs4096", overrides)
    settings = recipe.settings("bs4096", overrides, cfg)
    config = {**to_dict(cfg.config), "world_size": 1}
    with recipe.one_rank() as device, tempfile.TemporaryDirectory() as folder:
        backend = recipe.build(cfg, device)
        step = TrainStep(backend, cfg, device, steps_per_epoch=1000, chunk=cfg.chunk)
        views = torch.zeros(2, images, 3, size, size, dtype=torch.uint8)
        train = partial(step, views.pin_memory() if device.type == "cuda" else views)
        saver = checkpoint.AsyncCheckpointWriter(Path(folder) / "checkpoints", checkpoint.Keep(1), "0")
        number = 1 + effort.pick(2, 3, 7)
        rounds = [_round(saver, backend, train, config, Path(folder), 2 * i) for i in range(number)]
        saver.close()
    settings["gigabytes"] = rounds[0][1] / 1e9
    # The first round, in which a save allocates host memory, does not count.
    times = {case: [ms for found, _ in rounds[1:] for ms in found[case]] for case in rounds[0][0]}
    yield Row.of_samples(LOGGED, times.pop(LOGGED), settings=settings)
    yield from summarise({case: ms for case, ms in times.items() if not case.startswith("a step")}, settings)
    yield from summarise({case: ms for case, ms in times.items() if case.startswith("a step") and ms}, settings)


def _round(
    saver: checkpoint.AsyncCheckpointWriter,
    backend: Backend,
    train: Callable[[], object],
    config: dict,
    folder: Path,
    step: int,
) -> tuple[dict[str, list[float]], int]:
    """Save in every way and read; return milliseconds by case, and the bytes of a checkpoint."""
    first, second = (_snapshot(backend, config, step + i) for i in range(2))
    times: dict[str, list[float]] = {
        "torch.save and fsync": [call_ms(lambda: _save_by_hand(first, folder / "by hand"))],
        "synchronous: training waits": [call_ms(lambda: saver.save(*first, wait=True))],
    }
    saver.finished()
    train()
    alone: list[float] = [call_ms(train) for _ in range(5)]
    times["asynchronous: training waits"] = [stall_ms(lambda: saver.save(*second), train, alone)]
    meanwhile: list[float] = []
    while saver.busy:
        meanwhile.append(call_ms(train))
    saver.wait()
    outcome = saver.finished()
    assert outcome is not None and outcome.error is None, outcome
    times[LOGGED] = [1000 * outcome.stalled_s]
    times["asynchronous: until it is safe"] = [1000 * outcome.seconds]
    candidates = checkpoint.candidates(folder, "auto")
    times["read"] = [call_ms(lambda: resume(candidates, backend, config, 1))]
    return times | {"a step": alone, "a step while a save is under way": meanwhile}, outcome.num_bytes


def stall_ms(save: Callable[[], None], train: Callable[[], object], alone_ms: list[float]) -> float:
    """Return by how many milliseconds a save delays the end of the step that follows it; 0 where noise is larger."""

    def both() -> None:
        save()
        train()

    return max(0.0, call_ms(both) - statistics.median(alone_ms))


def _snapshot(backend: Backend, config: dict, step: int) -> Snapshot:
    progress = {"step": step, "updates": 0, "loss_scale": 1.0, "clean_steps": 0}
    return Snapshot.of(backend, config, progress=progress, images=1, steps_per_epoch=1, skipped_images=0)


def _save_by_hand(snapshot: Snapshot, file: Path) -> None:
    with file.open("wb") as stream:
        torch.save({name: held.slices[0].local for name, held in snapshot.held.items()}, stream)
        stream.flush()
        os.fsync(stream.fileno())
