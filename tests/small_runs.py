"""Small pretraining runs: their settings, and what a test does with them on the ranks of a pool."""

import contextlib
import json
from pathlib import Path
from unittest import mock

import pytest

from crossbatch import InputError, RunStopped
from crossbatch.engine import checkpoint
from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.engine.runtime.world import world_from_environment

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
    "train_batch_size=12",
    "train_micro_batch_size_per_gpu=12",  # to compute the chunk takes a second in every process
    "crossbatch.data.path=synthetic://48?size=20&classes=4",
    "crossbatch.data.image_size=16",
    "crossbatch.precision=fp32",
    "crossbatch.data.workers=0",
    "crossbatch.data.backend=torchvision",
    "crossbatch.model.dim=16",
    "crossbatch.model.mlp_dim=32",
    "crossbatch.model.temperature=0.2",
    "crossbatch.batchformer.add_bf=1",
    "crossbatch.batchformer.group_size=12",
    "crossbatch.batchformer.dropout=0.0",
    "crossbatch.schedule.epochs=5",
    "crossbatch.schedule.warmup_epochs=1",
    "crossbatch.momentum.base=0.9",
    "crossbatch.evaluate.knn_every_epochs=0",
    "crossbatch.evaluate.every_epochs=0",
    "crossbatch.log.every_steps=1",
]
LARS = [
    "optimizer.type=LARS",
    "optimizer.params.lr=0.05",
    "optimizer.params.weight_decay=1e-2",
    "optimizer.params.trust_coefficient=0.1",
]
# The large eps: some gradients are 0 but for rounding (the bias of attention's keys), and Adam would blow that up.
ADAMW = ["optimizer.type=AdamW", "optimizer.params.lr=1e-2", "optimizer.params.eps=0.1"]


def zero(stage, offload="none"):
    device = f"zero_optimization.offload_optimizer.device={offload}"
    return ["crossbatch.sharding=zero", f"zero_optimization.stage={stage}", device]


def fsdp(stage):
    return ["crossbatch.sharding=fsdp", f"zero_optimization.stage={stage}"]


def name_of(case) -> str:
    """Of a model, an optimizer or a backend."""
    if case in (RESNET, VIT):
        return "resnet" if case is RESNET else "vit"
    if case in (LARS, ADAMW):
        return case[0].split("=")[1]
    return "".join(part.split("=")[1] for part in case).replace("none", "")


def pretrainer(cfg, out: str, *arguments, **more):
    """The trainer of a run on this rank of a pool; further arguments are those of `build_trainer`."""
    import torch

    from crossbatch.engine.start import build_trainer
    from crossbatch.engine.tasks.pretrain import pretrain_task

    where = world_from_environment(), torch.device("cpu"), Path(out)
    return build_trainer(pretrain_task(cfg, *where), *where, *arguments, **more)


def train(overrides: list[str], out: str, steps: int) -> None:
    """One run on this rank of a pool."""
    cfg = resolve(load_config(None, [*BASE, *overrides]), world_from_environment().size, Device("cpu"))
    pretrainer(cfg, out, "auto", steps).train()


def losses(out) -> list[float]:
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]  # the first evaluation is before any step


def parameters(out) -> dict:
    return checkpoint.read(sorted(Path(out).glob("checkpoints/step-*"))[-1], "parameters.")


EVERY_2 = ["crossbatch.checkpoint.every_steps=2"]


def run(
    overrides: list[str], out: str, steps: int, resume: str = "auto", allow: tuple = (), patches: tuple = ()
) -> str:
    """One run on this rank of a pool; returns the message it stopped with, and leaves what it told in OUT.told.

    `patches` are (target, factory of a replacement).
    """
    world = world_from_environment()
    settings = resolve(load_config(None, [*BASE, *EVERY_2, *overrides]), world.size, Device("cpu"))
    told: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("crossbatch.engine.run_log.RunLog.note", lambda _, text: told.append(text)))
        for target, factory in patches:
            stack.enter_context(mock.patch(target, factory()))
        try:
            pretrainer(settings, out, resume, steps, allow).train()
        except (InputError, RunStopped) as stopped:
            return f"{type(stopped).__name__}: {stopped}"
        finally:
            if world.is_main:
                Path(f"{out}.told").write_text("\n".join(told))
    return ""


def slow_unless(often: bool):
    return () if often else pytest.mark.slow
