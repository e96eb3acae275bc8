"""Measures a whole run of launch/pretrain.py on generated JPEGs: loader, steps, k-NN and saves together, as a user gets them.

It is bs4096.json with the 256 images that a rank has of 16, in a process of its own with `--profile`; on a CPU a small network.
The parts of an iteration are those of the profile, so "data wait" is what training waits for images; `data_wait_ms` is the same
as metrics.jsonl has it, of the steps that are not traced. A save lies between two steps: how long training waited for it, and
how long until it was safe on the disk. k-NN is the whole evaluation after the last step, with its own loader.

The JPEGs lie in the page cache, so the disk is not measured. MFU does not count what the run computes beside its steps.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import flops
from benchmarks.measure import clocks
from benchmarks.rows import Row
from benchmarks.stages import Effort, recipe
from benchmarks.stages.plain_data import image_folder
from crossbatch.engine.config import Device
from crossbatch.engine.runtime.profiling import ITERATION, steps_needed

LAUNCH = recipe.FOLDER.parent / "launch" / "pretrain.py"
SMALL = ["crossbatch.model.arch=resnet18", "crossbatch.data.image_size=64"]
AFTER = 6  # steps behind the traced ones, the first of which begins with a save


def run(effort: Effort) -> Iterator[Row]:
    """Yield the iteration and its parts, then what metrics.jsonl and TensorBoard's file say of data, saves and k-NN."""
    on_gpu = Device.detect().type == "cuda"
    batch, profiled = (effort.pick(64, 256, 256), effort.pick(3, 6, 20)) if on_gpu else (16, effort.pick(1, 2, 5))
    traced = steps_needed(profiled)
    steps, pictures = traced + AFTER, effort.pick(16, 128, 512)
    overrides = [
        *([] if on_gpu else SMALL),
        f"train_batch_size={batch}",
        f"crossbatch.batchformer.group_size={batch}",
        "crossbatch.evaluate.knn_every_epochs=1",
        "crossbatch.evaluate.every_epochs=0",
        "crossbatch.log.every_steps=1",
        f"crossbatch.checkpoint.every_steps={traced + 1}",
    ]
    cfg = recipe.load("bs4096", overrides)
    settings = recipe.settings("bs4096", overrides, cfg, images=batch, precision=cfg.precision, pictures=pictures)
    with image_folder(None, pictures) as root:
        _spread(root, steps * batch, batch)
        out = root / "run"
        _pretrain([*overrides, f"crossbatch.sharding={cfg.crossbatch.sharding}"], root, out, profiled, steps)
        rows = list(rows_of(out, settings, traced))
    flops.with_rates(rows[:1], flops.of_step(cfg), cfg.precision)
    yield from rows


def _spread(root: Path, train: int, val: int) -> None:
    """Link the pictures of train/pictures into two classes, as often as an epoch needs, and some into val/."""
    pictures = sorted((root / "train" / "pictures").iterdir())
    names = itertools.cycle(pictures)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            os.link(next(names), folder / f"{number:06}.jpg")
    for picture in pictures:
        picture.unlink()
    (root / "train" / "pictures").rmdir()


def _pretrain(overrides: list[str], data: Path, out: Path, profiled: int, steps: int) -> None:
    """Train as a user would; what it prints is shown if it fails."""
    command = [
        sys.executable,
        LAUNCH,
        "--deepspeed_config",
        recipe.FOLDER / "bs4096.json",
        "--data",
        data,
        "--out",
        out,
    ]
    command += ["--profile", profiled, "--steps", steps, *(f"--set={item}" for item in overrides)]
    paths = os.pathsep.join(filter(None, [str(LAUNCH.parents[1]), os.environ.get("PYTHONPATH")]))
    words = [str(word) for word in command]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stdout[-3000:] + done.stderr[-3000:]
        raise RuntimeError(f"launch/pretrain.py ended with exit code {done.returncode}:\n{said}")


def rows_of(out: Path, settings: dict[str, Any], traced: int) -> Iterator[Row]:
    """Yield the rows of a run directory; the first `traced` steps were profiled."""
    profile, now = json.loads((out / "profile" / "stages.json").read_text()), clocks()
    case = f"trainer, {settings['images']} images a step"
    parts = dict(sorted(profile["ms"].items(), key=lambda item: item[0] != ITERATION))
    for part, found in parts.items():
        figures = found["p20"], found["p50"], found["p80"], profile["steps"]
        if part == ITERATION:
            yield Row(case, *figures, settings=settings, clocks=now)
        else:
            facts = {**settings, "part": part, "of": case, "share": found["share"]}
            yield Row(f"{case}: {part}", *figures, settings=facts, clocks=now)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    waits = [line["data_wait_ms"] for line in lines if line["step"] > traced]
    yield Row.of_samples(f"{case}: data_wait_ms of metrics.jsonl", waits, settings={**settings, "part": "data_wait_ms"})
    events = EventAccumulator(str(out)).Reload()
    for name, what in (("stalled_s", "training waited"), ("seconds", "until it was safe")):
        save = events.Scalars(f"checkpoint/{name}")[0]
        facts = {**settings, "part": "save", "step": save.step}
        yield Row.of_one(f"{case}: a save, {what}", 1000 * save.value, "ms", facts)
    ends = [event.wall_time for event in events.Scalars("run/loss")]
    *between, last = (1000 * (after - before) for before, after in itertools.pairwise(ends))
    facts = {**settings, "part": "k-NN", "bank": settings["images"] * len(lines)}
    yield Row.of_one(f"{case}: k-NN after the last step", last - statistics.median(between), "ms", facts)
