"""The parts of a step: that they add up, that chunks show where they should, and that looking changes nothing."""

import contextlib

import pytest
import torch

from crossbatch.engine.runtime.timing import StepTimer, mean_ms

SMALL = [
    "train_batch_size=16",
    "crossbatch.data.image_size=32",
    "crossbatch.model.arch=resnet18",
    "crossbatch.model.stem=small",
    'crossbatch.model.backbone_args={"width": 8}',
    "crossbatch.model.mlp_dim=64",
    "crossbatch.batchformer.add_bf=1",
    "crossbatch.batchformer.group_size=8",
]
ALWAYS = {
    "host to device",
    "online features",
    "momentum features",
    "batch-wide part",
    "backward",
    "optimizer",
    "moving average",
    "other",
    "step",
}


def profiled(sharding: str, stage: int, chunk: int, steps: int) -> dict:
    """On the rank: losses with and without a timer, what it measured, and what a span does outside of a step."""
    from benchmarks.stages.recipe import build
    from crossbatch.engine.config import Device, load_config, resolve
    from crossbatch.engine.runtime.timing import StepTimer
    from crossbatch.engine.step import TrainStep

    overrides = [f"crossbatch.sharding={sharding}", f"zero_optimization.stage={stage}"]
    cfg = resolve(load_config(None, [*SMALL, *overrides, f"train_micro_batch_size_per_gpu={chunk}"]), 1, Device("cpu"))
    torch.manual_seed(1)
    views = torch.randint(0, 256, (2, 16, 3, 32, 32), dtype=torch.uint8)
    device, losses = torch.device("cpu"), []
    plain = TrainStep(build(cfg, device), cfg, device, steps_per_epoch=10, chunk=cfg.chunk)
    losses.append([plain(views).output.loss.item() for _ in range(steps)])
    timer = StepTimer(device)
    step = TrainStep(build(cfg, device), cfg, device, steps_per_epoch=10, chunk=cfg.chunk, timer=timer)
    losses.append([step(views).output.loss.item() for _ in range(steps)])
    step.backend("features", torch.zeros(2, 3, 32, 32), False)  # a span outside of a step
    parts, again = timer.read(), timer.read()
    step.use_timer(None)
    step(views)
    return {"losses": losses, "parts": parts, "again": again, "unmeasured": timer.read()}


@pytest.mark.parametrize(
    ("sharding", "stage", "chunk"),
    [
        ("zero", 1, 16),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("zero", 1, 4), ("zero", 3, 4), ("fsdp", 1, 16), ("fsdp", 3, 4))
        ),
    ],
)
def test_parts_add_up_and_change_nothing(one_rank, sharding, stage, chunk):
    (seen,) = one_rank.run(profiled, sharding, stage, chunk, 3)
    assert seen["losses"][0] == seen["losses"][1]
    assert len(seen["parts"]) == 3 and seen["again"] == []
    for parts in seen["parts"]:
        assert set(parts) == (ALWAYS if chunk == 16 else ALWAYS | {"second pass"})
        whole = parts["step"]
        assert sum(parts.values()) - whole == pytest.approx(whole)
        assert all(milliseconds > 0 for milliseconds in parts.values())
    # Of the sums, because a step of milliseconds can be interrupted anywhere.
    assert sum(p["other"] for p in seen["parts"]) < 0.25 * sum(p["step"] for p in seen["parts"])
    assert seen["unmeasured"] == []


def test_a_span_within_a_part_counts_for_that_part_and_a_failed_step_for_nothing():
    timer = StepTimer(torch.device("cpu"))

    def step(fails: bool) -> None:
        with timer.span("step"), timer.span("backward"), timer.span("momentum features"):
            if fails:
                raise torch.OutOfMemoryError

    for fails in (False, True, False):
        with pytest.raises(torch.OutOfMemoryError) if fails else contextlib.nullcontext():
            step(fails)
        with timer.span("optimizer"):  # outside of a step
            pass
    parts = timer.read()
    assert [set(part) for part in parts] == [{"backward", "other", "step"}] * 2


def test_means_by_hand():
    steps = [{"batch-wide part": 1.0, "step": 4.0}, {"batch-wide part": 2.0, "second pass": 1.0, "step": 6.0}]
    assert mean_ms(steps) == {"batch_wide_part": 1.5, "second_pass": 0.5}
