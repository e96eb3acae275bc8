"""Measures what copies of the state in host memory cost a step: quickstart.json on two CPU ranks that count as two nodes.

Under ZeRO-0 both nodes have nearly all of the state, so next to nothing is sent; under ZeRO-1 each sends its half of the
optimizer's.

Within one run every fourth step is copied. So of four steps the first makes the copy, the second runs while it is sent to the
other rank, and the other two have nothing to do with it: they are the baseline. Each sample is the mean of two steps, so a copy
costs twice the difference: that is the median over all fours, with its standard error in the settings.

Gloo on one machine has no network in it, but both ends of every message take time of the cores that compute.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.measure import summarise
from benchmarks.rows import Row
from benchmarks.stages import Effort, recipe
from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.engine.runtime.distributed import process_group
from crossbatch.engine.runtime.world import World, world_from_environment
from crossbatch.engine.start import build_trainer
from crossbatch.engine.tasks.pretrain import pretrain_task

RANKS, EVERY = 2, 4  # ranks, and steps between two copies
STAGES = (0, 1)  # of ZeRO
WARM_UP = 2  # copies that do not count: the first one makes room


def run(effort: Effort) -> Iterator[Row]:
    """Yield steps without and with a copy, what training waits for a copy, and its size."""
    for stage in STAGES:
        yield from _stage(effort, stage)


def _stage(effort: Effort, stage: int) -> Iterator[Row]:
    overrides = [
        *effort.pick(['crossbatch.model.backbone_args={"width": 8}', "train_batch_size=16"], [], []),
        *effort.pick(["crossbatch.batchformer.group_size=16"], [], []),
        f"zero_optimization.stage={stage}",
        "crossbatch.data.path=synthetic://6000?size=64,classes=4",
        "crossbatch.schedule.epochs=100",
        "crossbatch.evaluate.knn_every_epochs=0",
        "crossbatch.evaluate.every_epochs=0",
        "crossbatch.log.every_steps=1",
        "crossbatch.checkpoint.every_steps=100000",
        f"crossbatch.checkpoint.memory_every_steps={EVERY}",
    ]
    copies = WARM_UP + effort.pick(2, 10, 120)
    launch = LaunchConfig(
        1, 1, RANKS, run_id="memory", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    with tempfile.TemporaryDirectory() as folder:
        measured = elastic_launch(launch, _train)(overrides, folder, EVERY * (copies + 1) - 1)[0]
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert measured.num_copies == copies, "copies were given up; the output above says why"
    ms = {line["step"] - 1: line["step_ms"] for line in lines}  # by the step before: its copy is in it
    first = range(EVERY * (1 + WARM_UP), max(ms) - 3, EVERY)
    cfg = recipe.load("quickstart", overrides)
    size = {"bytes_a_rank": measured.num_bytes, "of_them_sent": measured.sent_bytes}
    settings = recipe.settings("quickstart", overrides, cfg, ranks=RANKS, backend="gloo", **size)
    without, with_ = f"ZeRO-{stage}: a step without a copy", f"ZeRO-{stage}: a step with a copy, and the next one"
    for what, samples in (("", ms), (", CPU time of rank 0", measured.cpu_ms)):
        cases = {
            without + what: [(samples[step + 2] + samples[step + 3]) / 2 for step in first],
            with_ + what: [(samples[step] + samples[step + 1]) / 2 for step in first],
        }
        yield from summarise(cases, settings)
        costs = np.array([2 * (ours - theirs) for theirs, ours in zip(*cases.values(), strict=True)])
        low, high = np.percentile(costs, [16, 84])
        error = 1.25 * (high - low) / 2 / math.sqrt(len(costs))  # of a median: 1.25 of a mean's
        cost = f"ZeRO-{stage}: a copy costs{what}"
        yield Row.of_one(cost, float(np.median(costs)), "ms", {**settings, "standard_error_ms": float(error)})
    yield Row.of_one(f"ZeRO-{stage}: training waits for a copy", measured.wait_ms, "ms", settings)


@dataclass
class Measured:
    """Holds what a rank found out about its copies."""

    num_copies: int
    wait_ms: float  # mean time for which training waited for a copy
    num_bytes: int
    sent_bytes: int  # to the other node
    cpu_ms: dict[int, float]  # of all threads, by step: from the start of its copy to that of the next step's


def _train(overrides: list[str], out: str, steps: int) -> Measured:
    """Train on this rank."""
    found = world_from_environment()
    world, device = World(found.rank, found.size, 0, 1), torch.device("cpu")  # a node of its own
    cfg = resolve(load_config(recipe.FOLDER / "quickstart.json", overrides), world.size, Device("cpu"), found.size)
    began, waited_s = {}, {}  # by step
    with process_group(world, "cpu", cfg.threads):
        trainer = build_trainer(pretrain_task(cfg, world, device, Path(out)), world, device, Path(out), "auto", steps)
        copies = trainer.copies
        assert copies is not None

        def after(step: int, line: dict | None, copy: Callable[[int, dict | None], None] = copies.after) -> None:
            began[step] = 1000 * time.process_time()
            copy(step, line)
            waited_s[step] = copies.seconds

        with mock.patch.object(copies, "after", after):
            trainer.train()
    cpu_ms = {step: began[step + 1] - began[step] for step in began if step + 1 in began}
    wait_ms = 1000 * (copies.seconds - waited_s[EVERY * WARM_UP]) / max(copies.num_copies - WARM_UP, 1)
    return Measured(copies.num_copies, wait_ms, copies.num_bytes, copies.sent_bytes, cpu_ms)
