"""Replay: faults are traced to rank, image and layer; a step made again is the step that was made; wrong input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from crossbatch.data import GlobalBatchSampler
from crossbatch.engine import checkpoint
from tests.replays import (
    NORMALIZE,
    TRAIN_ON,
    divided_by_contrast,
    edit_checkpoint,
    flips_a_bit,
    nan_in_views_of,
    replay,
    verdict,
    view_of,
    write_images,
    writer,
)
from tests.small_runs import ADAMW, LARS, RESNET, VIT, fsdp, run, slow_unless, zero

DATA = "synthetic://48?size=20&classes=4"  # that of BASE
BACKENDS = [zero(2), fsdp(3), zero(0), zero(3), zero(1), fsdp(1)]
STOP = ["crossbatch.watch.max_nonfinite_steps=1"]


def settings_of(number: int) -> tuple[list[str], int]:
    """The settings of a faulty run, and on how many ranks it runs."""
    model = (VIT, RESNET)[number // 4 % 2]
    optimizer = (ADAMW, LARS)[number // 4 % 2]
    return [*model, *optimizer, *BACKENDS[number // 4 % len(BACKENDS)], *STOP], 2 - (number // 8 % 3 == 2)


def command_in(message: str, out: Path, step: int) -> str:
    """The command that a stopped run names, or the one to type where it went on."""
    if message:
        assert message.count(f"python launch/replay.py --run {out} --step {step}") == 1, message
        return message.rpartition("look into it: ")[2]
    return f"python launch/replay.py --run {out} --step {step}"


def assert_image(found: dict, index: int, position: int, ranks: int) -> None:
    assert found["kind"] in ("not finite", "jump") and found["layer"] == "input", found
    assert [(image["index"], image["position"]) for image in found["images"]] == [(index, position)], found
    assert found["rank"] == position // (12 // ranks) == found["images"][0]["rank"]


def nan_pixel(number, out, pools, chance) -> None:
    """In one view of one image, in one step."""
    settings, ranks = settings_of(number)
    step, position, view = int(chance.integers(2, 7)), int(chance.integers(12)), int(chance.integers(2))
    index, target = view_of(DATA, *divmod(step - 1, 4), position, view)
    pixel = (int(chance.integers(3)), int(chance.integers(16)), int(chance.integers(16)))
    patches = ((NORMALIZE, nan_in_views_of(target, pixel)),)
    messages = pools(ranks).run(run, settings, str(out), 8, "auto", (), patches)
    assert all("1 steps in a row were skipped: non-finite" in message for message in messages)
    assert pools(1).run(replay, command_in(messages[0], out, step), patches) == [""]
    found = verdict(out, step)
    assert_image(found, index, position, ranks)
    assert found["kind"] == "not finite"


def poisoned_image(number, out, pools, chance) -> None:
    """A flat frame among the files, in a run that divides by contrast."""
    settings, ranks = settings_of(number)
    index, level = int(chance.integers(48)), int(chance.choice([0, 30, 77, 128, 200, 255]))
    write_images(out.parent / "images", 48, {index: level})
    order = GlobalBatchSampler(0, 48, 12)
    step = next(step for step in range(4) if index in order.batch(0, step)) + 1
    patches = ((NORMALIZE, divided_by_contrast(float(chance.choice([0.0, 1e-30, 1e-12])))),)
    settings = [*settings, f"crossbatch.data.path={out.parent / 'images'}"]
    messages = pools(ranks).run(run, settings, str(out), 4, "auto", (), patches)
    assert pools(1).run(replay, command_in(messages[0], out, step), patches) == [""]
    found = verdict(out, step)
    assert_image(found, index, order.batch(0, step - 1).tolist().index(index), ranks)
    assert found["images"][0]["name"] == f"class{index * 2 // 48}/{index:04d}.png"


def assert_weight(found: dict, name: str, element: int, rank: int, shape: list[int]) -> None:
    assert found["kind"] == "state" and found["images"] == [], found
    assert found["state"]["name"] == name, found
    assert found["layer"] == name.removeprefix("parameters.").rpartition(".")[0]
    assert np.ravel_multi_index(found["state"]["element"], shape) == element
    assert found["rank"] == rank


def exploding_weight(number, out, pools, chance) -> None:
    """In a checkpoint from which the run is resumed."""
    settings, ranks = settings_of(number)
    assert set(pools(ranks).run(run, settings, str(out), 4)) == {""}
    folder = out / "checkpoints" / "step-00000004"
    shapes = checkpoint.read_manifest(folder)[0].shapes
    names = [name for name in shapes if name.startswith(("parameters.online", "parameters.batch", "parameters.pred"))]
    name = str(chance.choice([name for name in names if name.endswith("weight")]))
    element, factor = int(chance.integers(np.prod(shapes[name]))), float(chance.choice([1e8, 1e20, 1e30, np.nan]))

    def explode(weight: torch.Tensor) -> None:
        weight[element] = (float(weight[element]) or 0.1) * factor

    edit_checkpoint(folder, name, explode)
    messages = pools(ranks).run(run, settings, str(out), 6)
    assert pools(1).run(replay, command_in(messages[0], out, 5)) == [""]
    assert_weight(verdict(out, 5), name, element, writer(folder, name, element), shapes[name])


def flipped_bit(number, out, pools, chance) -> None:
    """In a weight on one rank, between steps 3 and 4."""
    settings, ranks = settings_of(number)
    rank, bit = int(chance.integers(ranks)), int(chance.choice([30, 30, 31, 26, 25]))
    flip = flips_a_bit(rank, 4, bit, number, f"{out}.flipped")
    messages = pools(ranks).run(run, settings, str(out), 6, "auto", (), ((TRAIN_ON, flip),))
    name, element = json.loads(Path(f"{out}.flipped").read_text())
    assert pools(1).run(replay, command_in(messages[0], out, 4)) == [""]
    found = verdict(out, 4)
    shape = checkpoint.read_manifest(
        out / "checkpoints" / "step-00000004" if not messages[0] else out / "checkpoints" / "step-00000003"
    )[0].shapes[name]
    assert_weight(found, name, element, rank, shape)


FAULTS = [nan_pixel, poisoned_image, exploding_weight, flipped_bit]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=slow_unless(number < len(FAULTS)), id=f"{FAULTS[number % 4].__name__}-{number}")
        for number in range(50)
    ],
)
def test_a_fault_is_traced_to_rank_image_and_layer(number, tmp_path, pools):
    FAULTS[number % 4](number, tmp_path / "run", pools, np.random.default_rng(100 + number))
