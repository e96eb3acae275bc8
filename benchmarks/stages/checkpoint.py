"""Measures saving the state of bs4096.json on one rank: how long training waits and how long the save takes, beside torch.save.

The state is that of ResNet-50 + BatchFormer with LARS. Cases: what training waits for a synchronous and for an asynchronous
save; the whole time of an asynchronous one; torch.save of the same tensors with fsync, as one would do it by hand; reading and
checking a checkpoint. Then what a save costs the computation meanwhile: matrix products alone, and for as long as a save takes.
Files go to the system's temporary folder.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure import host_ms, summarise
from benchmarks.rows import Row
from benchmarks.stages import Effort, recipe
from crossbatch.engine import checkpoint
from crossbatch.engine.checkpoint.resume import resume
from crossbatch.engine.checkpoint.schedule import Snapshot
from crossbatch.engine.config import Device, to_dict
from crossbatch.engine.sharding import Backend


def run(effort: Effort) -> Iterator[Row]:
    """Yield the rows of saving and reading, then those of matrix products alone and during a save."""
    cfg, settings = recipe.load_main(effort)
    config = {**to_dict(cfg.config), "world_size": 1}
    with recipe.one_rank() as device, tempfile.TemporaryDirectory() as folder:
        backend = recipe.build(cfg, device)
        saver = checkpoint.AsyncCheckpointWriter(Path(folder) / "checkpoints", checkpoint.Keep(1), "0")
        rounds = [_round(saver, backend, config, Path(folder), 3 * i) for i in range(1 + effort.pick(2, 1, 7))]
        saver.close()
    settings["gigabytes"] = rounds[0][1] / 1e9
    # The first round, in which a save allocates host memory, does not count.
    times = {case: [ms for found, _ in rounds[1:] for ms in found[case]] for case in rounds[0][0]}
    yield from summarise({case: ms for case, ms in times.items() if "product" not in case}, settings)
    yield from summarise({case: ms for case, ms in times.items() if "product" in case}, settings)


def _round(
    saver: checkpoint.AsyncCheckpointWriter, backend: Backend, config: dict, folder: Path, step: int
) -> tuple[dict[str, list[float]], int]:
    """Save in every way and read; return milliseconds by case, and the bytes of a checkpoint."""
    first, second, third = (_snapshot(backend, config, step + i) for i in range(3))
    times = {
        "synchronous: training waits": [host_ms(lambda: saver.save(*first, wait=True))],
        "asynchronous: training waits": [host_ms(lambda: saver.save(*second))],
    }
    saver.wait()
    outcome = saver.finished()
    assert outcome is not None and outcome.error is None, outcome
    times["asynchronous: until it is safe"] = [1000 * outcome.seconds]
    times["torch.save and fsync"] = [host_ms(lambda: _save_by_hand(first, folder / "by hand"))]
    candidates = checkpoint.candidates(folder, "auto")
    times["read"] = [host_ms(lambda: resume(candidates, backend, config, 1))]
    matrix = torch.randn(512, 512, device=Device.detect().type)
    times["a matrix product"] = [host_ms(lambda: _product(matrix)) for _ in range(10)]
    saver.save(*third)
    times["a matrix product while a save is under way"] = meanwhile = []
    while saver.busy:
        meanwhile.append(host_ms(lambda: _product(matrix)))
    saver.finished()
    return times, outcome.num_bytes


def _snapshot(backend: Backend, config: dict, step: int) -> Snapshot:
    progress = {"step": step, "updates": 0, "loss_scale": 1.0, "clean_steps": 0}
    return Snapshot.of(backend, config, progress=progress, images=1, steps_per_epoch=1, skipped_images=0)


def _save_by_hand(snapshot: Snapshot, file: Path) -> None:
    with file.open("wb") as stream:
        torch.save({name: held.slices[0].local for name, held in snapshot.held.items()}, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _product(matrix: torch.Tensor) -> None:
    torch.mm(matrix, matrix)
    if matrix.is_cuda:
        torch.cuda.synchronize()
