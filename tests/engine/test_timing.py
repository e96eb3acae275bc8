"""The parts of a step: that they add up, that chunks show where they should, and that looking changes nothing."""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
    """On the rank: losses with and without the ranges, what they measured, and what a range does outside of a step."""
    from benchmarks.recipe import build
    from crossbatch.engine.config import Device, load_config, resolve
    from crossbatch.engine.runtime.timing import StepParts
    from crossbatch.engine.step import TrainStep

    overrides = [f"crossbatch.sharding={sharding}", f"zero_optimization.stage={stage}"]
    run = resolve(load_config(None, [*SMALL, *overrides, f"train_micro_batch_size_per_gpu={chunk}"]), 1, Device("cpu"))
    torch.manual_seed(1)
    views = torch.randint(0, 256, (2, 16, 3, 32, 32), dtype=torch.uint8)
    device, losses = torch.device("cpu"), []
    plain = TrainStep(build(run, device), run, device, steps_per_epoch=10, chunk=run.chunk)
    losses.append([plain(views)[0].loss.item() for _ in range(steps)])
    step = TrainStep(build(run, device), run, device, steps_per_epoch=10, chunk=run.chunk)
    untouched = sorted(vars(step)), sorted(vars(step.backend))
    timed = StepParts(step)
    losses.append([timed(views)[0].loss.item() for _ in range(steps)])
    timed.step.backend("embed", torch.zeros(2, 3, 32, 32))  # as the monitor does between two steps
    parts = timed.read()
    again = timed.read()
    timed.close()
    model: Any = step.backend.model
    return {
        "losses": losses,
        "parts": parts,
        "again": again,
        "restored": (sorted(vars(step)), sorted(vars(step.backend))) == untouched,
        "hooks": len(model.momentum.backbone._forward_hooks),
    }


@pytest.mark.parametrize(
    ("sharding", "stage", "chunk"),
    [
        ("zero", 1, 16),
        ("zero", 1, 4),
        ("fsdp", 3, 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("zero", 3, 4), ("fsdp", 1, 16))),
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
    assert seen["restored"]


def test_a_failed_step_is_not_counted_and_leaves_no_open_range():
    from crossbatch.engine.runtime.timing import StepParts

    class Step:
        device = torch.device("cpu")

        def __init__(self):
            self.backend = Backend()
            self.fails = True

        def __call__(self, views):
            self.backend.backward()
            if self.fails:
                raise torch.OutOfMemoryError
            return None, 0.0

        def _to_device(self): ...

        def _features_again(self): ...

    class Model:
        def __init__(self):
            self.momentum = SimpleNamespace(backbone=torch.nn.Identity())

        def embed(self): ...

        def contrast(self): ...

    class Backend:
        def __init__(self):
            self.model = Model()

        def backward(self):
            self.model.momentum.backbone(torch.ones(1))  # within another part: counts for that

        def step(self): ...

        def update_momentum(self): ...

    step = Step()
    timed = StepParts(step)  # pyright: ignore[reportArgumentType]
    with pytest.raises(torch.OutOfMemoryError):
        timed(torch.zeros(1))
    step.fails = False
    timed(torch.zeros(1))
    (parts,) = timed.read()
    assert set(parts) == {"backward", "other", "step"}
    # A run that is out of memory drops the backend and tries smaller chunks.
    backend = weakref.ref(step.backend)
    del step.backend
    gc.collect()
    assert backend() is None
