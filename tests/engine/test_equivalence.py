"""Sharding changes nothing: ten steps of one process against two ranks, for every backend and optimizer that is allowed."""

import json
from pathlib import Path

import pytest

from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.engine.distributed import world_from_environment

RESNET = [
    "crossbatch.model.stem=small",
    "crossbatch.model.arch=resnet18",
    'crossbatch.model.backbone_args={"width": 8}',
]
VIT = [
    "crossbatch.model.arch=vit_small",
    'crossbatch.model.backbone_args={"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}',
    "crossbatch.model.stop_grad_conv1=true",
]
BASE = [
    "train_batch_size=16",
    "crossbatch.data.path=synthetic://64?size=20&classes=4",
    "crossbatch.data.image_size=16",
    "crossbatch.data.workers=0",
    "crossbatch.model.dim=16",
    "crossbatch.model.mlp_dim=32",
    "crossbatch.model.temperature=0.2",
    "crossbatch.batchformer.add_bf=1",
    "crossbatch.batchformer.group_size=8",
    "crossbatch.batchformer.dropout=0.0",
    "crossbatch.schedule.epochs=5",
    "crossbatch.schedule.warmup_epochs=1",
    "crossbatch.momentum.base=0.9",
    "crossbatch.evaluate.knn_every_epochs=0",
    "crossbatch.log.every_steps=1",
]
LARS = [
    "optimizer.type=LARS",
    "optimizer.params.lr=0.5",
    "optimizer.params.weight_decay=1e-2",
    "optimizer.params.trust_coefficient=0.1",
]
ADAMW = ["optimizer.type=AdamW", "optimizer.params.lr=5e-2"]


def zero(stage):
    return ["crossbatch.sharding=zero", f"zero_optimization.stage={stage}"]


def fsdp(stage):
    return ["crossbatch.sharding=fsdp", f"zero_optimization.stage={stage}"]


def train(overrides: list[str], out: str, steps: int) -> None:
    """One run on this rank of a pool."""
    import torch

    from crossbatch.engine.trainer import Trainer

    world = world_from_environment()
    run = resolve(load_config(None, [*BASE, *overrides]), world.size, Device("cpu"))
    Trainer(run, world, torch.device("cpu"), Path(out), "auto", steps).train()


def losses(out) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, one_rank):
    """Losses of the one-process run, computed once per model and optimizer."""
    known = {}

    def get(model, optimizer):
        key = (*model, *optimizer)
        if key not in known:
            out = tmp_path_factory.mktemp("one")
            one_rank.run(train, [*model, *optimizer, *zero(0)], str(out), 10)
            known[key] = losses(out)
        return known[key]

    return get


ADAMW_BACKENDS = [zero(0), zero(1), zero(2), zero(3), fsdp(0), fsdp(1), fsdp(3)]
LARS_BACKENDS = [zero(0), fsdp(0), fsdp(1), fsdp(3)]
CASES = [(ADAMW, b) for b in ADAMW_BACKENDS] + [(LARS, b) for b in LARS_BACKENDS]


@pytest.mark.parametrize("model", [RESNET, VIT], ids=["resnet", "vit"])
@pytest.mark.parametrize(("optimizer", "backend"), CASES, ids=lambda case: case[0].split("=")[1] + case[-1][-1])
def test_two_ranks_lose_what_one_process_loses(tmp_path, one_process, two_ranks, model, optimizer, backend):
    want = one_process(model, optimizer)
    two_ranks.run(train, [*model, *optimizer, *backend], str(tmp_path), 10)
    assert len(want) == 10
    assert losses(tmp_path) == pytest.approx(want, rel=1e-5)
    assert abs(want[0] - want[-1]) > 1e-2  # something was trained


@pytest.mark.parametrize("backend", ADAMW_BACKENDS, ids=lambda b: b[0].split("=")[1] + b[1][-1])
def test_an_interrupted_run_continues_with_the_same_losses(tmp_path, two_ranks, backend):
    overrides = [*RESNET, *ADAMW, *backend, "crossbatch.batchformer.dropout=0.5"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    two_ranks.run(train, overrides, str(whole), 7)
    two_ranks.run(train, overrides, str(cut), 3)
    two_ranks.run(train, overrides, str(cut), 7)
    assert losses(cut) == losses(whole)


def test_a_checkpoint_fits_another_world_and_backend(tmp_path, one_rank, two_ranks):
    overrides = [*VIT, *ADAMW]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    one_rank.run(train, [*overrides, *zero(0)], str(whole), 8)
    two_ranks.run(train, [*overrides, *zero(1)], str(moved), 2)
    two_ranks.run(train, [*overrides, *fsdp(3)], str(moved), 4)
    two_ranks.run(train, [*overrides, *zero(3)], str(moved), 6)
    one_rank.run(train, [*overrides, *fsdp(0)], str(moved), 8)
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-5)
