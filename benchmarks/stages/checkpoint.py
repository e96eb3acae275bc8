"""Measures saving the state of bs4096.json on one rank: how long training waits and how long the save takes, beside torch.save.

The state is that of ResNet-50 + BatchFormer with LARS. Cases: what training waits for an asynchronous and for a synchronous
save; the whole time of an asynchronous one; torch.save of the same tensors with fsync, as one would do it by hand; reading and
checking a checkpoint. Then what a save that is under way costs whoever computes meanwhile: matrix products for about as long as
it takes. Files go to the system's temporary folder.
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
from crossbatch.engine.config import to_dict
from crossbatch.engine.runtime.distributed import process_group, world_from_environment
from crossbatch.engine.sharding import Backend

SMALL = ['crossbatch.model.backbone_args={"width": 8}', "crossbatch.model.mlp_dim=256"]


def run(effort: Effort) -> Iterator[Row]:
    """Yield the rows of saving and reading, then those of who computes meanwhile."""
    overrides = effort.pick(SMALL, [], [])
    cfg = recipe.load("bs4096", overrides)
    config = {**to_dict(cfg.config), "world_size": 1}
    with (
        process_group(world_from_environment(), cfg.device.type, threads=torch.get_num_threads()) as device,
        tempfile.TemporaryDirectory() as folder,
    ):
        times, size = _times(recipe.build(cfg, device), config, Path(folder), device, rounds=effort.pick(2, 1, 7))
    facts = recipe.settings("bs4096", overrides, cfg, gigabytes=size / 1e9)
    waits = {name: values for name, values in times.items() if "product" not in name}
    products = {name: values for name, values in times.items() if "product" in name}
    yield from summarise(waits, "synchronous: training waits", facts)
    yield from summarise(products, "a matrix product", facts)


def _times(
    backend: Backend, config: dict, folder: Path, device: torch.device, rounds: int
) -> tuple[dict[str, list[float]], int]:
    """Return milliseconds by case, and the bytes of a checkpoint.

    The first save, which allocates host memory, does not count.
    """
    saver = checkpoint.AsyncCheckpointWriter(folder / "checkpoints", checkpoint.Keep(1), "0")
    matrix = torch.randn(512, 512, device=device)
    names = ("asynchronous: training waits", "asynchronous: until it is safe", "synchronous: training waits")
    names += ("torch.save and fsync", "read", "a matrix product", "a matrix product while a save is under way")
    times: dict[str, list[float]] = {name: [] for name in names}
    size = 0
    for step in range(0, 4 * (rounds + 1), 4):
        asynchronous, until_safe, synchronous, by_hand, read, product, product_meanwhile = times.values()
        snapshots = [_snapshot(backend, config, step + i) for i in range(3)]
        by_hand.append(host_ms(lambda snapshots=snapshots: _save_by_hand(snapshots[0], folder / "by hand")))
        synchronous.append(host_ms(lambda snapshots=snapshots: saver.save(*snapshots[0], wait=True)))
        asynchronous.append(host_ms(lambda snapshots=snapshots: saver.save(*snapshots[1])))
        saver.wait()
        outcome = saver.finished()
        assert outcome is not None and outcome.error is None, outcome
        until_safe.append(1000 * outcome.seconds)
        size = outcome.num_bytes
        candidates = checkpoint.candidates(folder, "auto")
        read.append(host_ms(lambda candidates=candidates: resume(candidates, backend, config, 1)))
        product += [host_ms(lambda: _product(matrix)) for _ in range(10)]
        saver.save(*snapshots[2])
        while saver.busy:
            product_meanwhile.append(host_ms(lambda: _product(matrix)))
        saver.finished()
        if step == 0:
            for values in times.values():
                values.clear()
    saver.close()
    return times, size


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
