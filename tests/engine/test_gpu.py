"""The engine on one NVIDIA GPU, in one process, without DeepSpeed and DALI: each path against one that is known to be right."""

import gc
import json
import os
import shutil
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

from crossbatch.data import TrainLoader, open_source
from crossbatch.engine import checkpoint
from crossbatch.engine.checkpoint import AsyncCheckpointWriter, Keep, async_writer
from crossbatch.engine.checkpoint.memory import folder_of, read_attempts, run_of
from crossbatch.engine.checkpoint.recovery import recover
from crossbatch.engine.checkpoint.store import Manifest
from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.engine.memory_model import GIB, StepMemory
from crossbatch.engine.runtime import chunk_size
from crossbatch.engine.runtime.distributed import process_group
from crossbatch.engine.runtime.world import World
from crossbatch.engine.sharding import LocalShards
from crossbatch.engine.start import build_trainer
from crossbatch.engine.step import TrainStep
from crossbatch.engine.tasks.build import build_backend, build_model
from crossbatch.engine.tasks.pretrain import pretrain_task
from tests.small_runs import ADAMW, BASE, LARS, RESNET, VIT, fsdp, losses, name_of, parameters

# Warnings are no errors here, as they are none in the processes of other tests of whole runs.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

ALONE = World(0, 1, 0, 1)
HERE = [*fsdp(0), "crossbatch.data.backend=opencv", "crossbatch.data.workers=1", "crossbatch.precision=fp32"]
# Of the memory that the model predicts: below, it wastes memory; above, the share that `chunk_size.MARGIN` leaves is used up.
LEAST, MOST = 0.6, 1.15
LR_PEAK = 0.05 * 12 / 256  # of LARS and BASE


@pytest.fixture(scope="module")
def device():
    with (
        mock.patch.dict(os.environ),
        pytest.MonkeyPatch.context() as patch,  # unittest's cannot restore what is set here
        process_group(ALONE, "cuda") as device,
    ):
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        del os.environ["DS_ACCELERATOR"]  # which is for this process alone
        yield device


def train(device: torch.device, out: Path, steps: int, *overrides: str) -> list[dict]:
    """Train on the GPU, and return the lines of metrics."""
    cfg = resolve(load_config(None, [*BASE, *HERE, *overrides]), 1, Device.detect())
    build_trainer(pretrain_task(cfg, ALONE, device, out), ALONE, device, out, "none", steps).train()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("model", "optimizer"), [(VIT, LARS), (VIT, ADAMW), (RESNET, LARS)], ids=name_of)
def test_a_run_on_a_gpu_is_that_on_a_cpu(tmp_path, device, one_rank, model, optimizer):
    from tests.small_runs import train as train_on_cpu

    overrides = [*model, *optimizer]
    train(device, tmp_path / "gpu", 6, *overrides)
    one_rank.run(train_on_cpu, [*overrides, *HERE], str(tmp_path / "cpu"), 6)
    want, end = losses(tmp_path / "cpu"), parameters(tmp_path / "cpu")
    assert len(want) == 6 and losses(tmp_path / "gpu") == pytest.approx(want, rel=1e-3)
    for name, tensor in parameters(tmp_path / "gpu").items():
        assert (tensor - end[name]).norm() <= 1e-2 * end[name].norm() + 1e-5, name


def test_chunks_are_one_chunk(tmp_path, device):
    """Of a ViT, with dropout in BatchFormer; the batch of 12 images in four chunks."""
    overrides = [*VIT, *LARS, "crossbatch.batchformer.dropout=0.5"]
    train(device, tmp_path / "one", 6, *overrides)
    train(device, tmp_path / "four", 6, *overrides, "train_micro_batch_size_per_gpu=3")
    want, end = losses(tmp_path / "one"), parameters(tmp_path / "one")
    assert losses(tmp_path / "four") == pytest.approx(want, rel=1e-4)
    for name, tensor in parameters(tmp_path / "four").items():
        assert (tensor - end[name]).norm() <= 1e-3 * end[name].norm() + 1e-6, name


@pytest.mark.parametrize("model", [VIT, RESNET], ids=name_of)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_is_near_fp32(tmp_path, device, model, precision):
    if precision == "bf16" and not Device.detect().has_bf16:
        pytest.skip("this GPU has no bf16")
    overrides = [*model, *ADAMW]
    with mock.patch("crossbatch.engine.step.INITIAL_LOSS_SCALE", 2.0**8):  # which does not overflow
        mixed = train(device, tmp_path / "mixed", 6, *overrides, f"crossbatch.precision={precision}")
    train(device, tmp_path / "fp32", 6, *overrides)
    assert mixed[-1]["skipped_steps"] == 0
    assert losses(tmp_path / "mixed") == pytest.approx(losses(tmp_path / "fp32"), rel=2e-2)
    assert losses(tmp_path / "mixed") != losses(tmp_path / "fp32")
    assert {tensor.dtype for tensor in parameters(tmp_path / "mixed").values()} == {torch.float32}


@pytest.mark.parametrize("chunks", [1, 4])
def test_fp16_skips_until_the_loss_scale_fits(tmp_path, device, chunks):
    overrides = [
        *RESNET,
        *LARS,
        "crossbatch.precision=fp16",
        "crossbatch.schedule.epochs=100000",  # no decay to speak of; the warm-up takes an epoch, 4 steps
        "crossbatch.watch.max_nonfinite_steps=100",
        f"train_micro_batch_size_per_gpu={12 // chunks}",
    ]
    with mock.patch("crossbatch.engine.step.INITIAL_LOSS_SCALE", 2.0**40):
        lines = train(device, tmp_path, 40, *overrides)
    overflowed, skipped = [line["grad_norm"] is None for line in lines], lines[-1]["skipped_steps"]
    assert overflowed[0] and sum(overflowed) == skipped < 35
    assert lines[-1]["loss_scale"] == 2.0 ** (40 - skipped)
    updates = 0
    for line, overflow in zip(lines, overflowed, strict=True):
        assert line["lr"] == pytest.approx(LR_PEAK * min(1, updates / 4))
        assert (line["momentum"] is None) == overflow
        updates += not overflow


@pytest.mark.parametrize(("arch", "optimizer"), [("resnet50", LARS), ("vit_small", ADAMW)])
def test_an_automatic_chunk_fits_and_fills(tmp_path, device, arch, optimizer):
    """A step of 512 images of 224 px within 12 GiB takes the memory that the model says."""
    limit = 12 * GIB
    overrides = [
        *fsdp(0),
        *optimizer,
        f"crossbatch.model.arch={arch}",
        "train_batch_size=512",
        "crossbatch.batchformer.add_bf=1",
        "crossbatch.batchformer.group_size=256",
        "crossbatch.data.backend=opencv",
    ]
    cfg = resolve(load_config(None, overrides), 1, Device.detect())
    with mock.patch.object(chunk_size, "free_bytes", lambda *_: limit):
        chunk, _ = chunk_size.automatic_chunk(cfg, ALONE, device, tmp_path / "chunk.json")
    assert 1 < chunk < 512
    gc.collect()  # of the test before
    before = torch.cuda.memory_allocated(device)
    step = TrainStep(build_backend(build_model(cfg).to(device), cfg), cfg, device, 10, chunk)
    views = torch.randint(0, 256, (2, 512, 224, 224, 3), dtype=torch.uint8).pin_memory().permute(0, 1, 4, 2, 3)
    step(views)  # in which cuDNN may try algorithms
    torch.cuda.reset_peak_memory_stats(device)
    step(views)
    peak = torch.cuda.max_memory_allocated(device) - before
    assert peak <= limit
    assert LEAST <= peak / StepMemory(cfg).at(chunk).without_context <= MOST


def test_an_asynchronous_save_holds_the_moment_it_was_asked_for(tmp_path, device):
    """While it is written, training changes everything; the file is that of a synchronous one, byte by byte."""
    weight = torch.nn.Parameter(torch.randn(64, 2**20, device=device))  # 256 MiB
    buffer = torch.randn(2**20, device=device)
    held = {"parameters.w": LocalShards.whole(weight), "buffers.b": LocalShards.whole(buffer)}
    shapes = {name: list(shards.shape) for name, shards in held.items()}

    def manifest() -> Manifest:
        return Manifest({"step": 1, "updates": 1}, shapes, 48, 4, 0, 1, {})

    writers = {name: AsyncCheckpointWriter(tmp_path / name, Keep(9), "t", name == "late") for name in ("now", "late")}
    optimizer, trained, write = torch.optim.SGD([weight], lr=1.0), threading.Event(), async_writer.write
    writers["now"].save(held, manifest(), {"world_size": 1}, optimizer)

    def write_later(*arguments) -> None:
        assert trained.wait(60)
        write(*arguments)

    with mock.patch.object(async_writer, "write", write_later):
        writers["late"].save(held, manifest(), {"world_size": 1}, optimizer)
        assert writers["late"].busy
        buffer.add_(1.0)
        weight.grad = torch.ones_like(weight)
        for _ in range(3):
            optimizer.step()
        torch.cuda.synchronize(device)
        trained.set()
        writers["late"].wait()
    for name, writer in writers.items():
        outcome = writer.finished()
        assert outcome is not None and outcome.error is None, name
        writer.close()
    now, late = (tmp_path / name / "step-00000001" / "0.bin" for name in ("now", "late"))
    assert now.read_bytes() == late.read_bytes()
    saved = checkpoint.read(late.parent, "buffers.")["b"]
    torch.testing.assert_close(saved + 1.0, buffer.cpu())


def test_a_copy_in_memory_is_what_a_checkpoint_holds(tmp_path, device):
    with mock.patch("crossbatch.engine.checkpoint.memory.MemoryCopies.forget", lambda self: None):
        train(device, tmp_path, 5, *VIT, *ADAMW, "crossbatch.checkpoint.memory_every_steps=1")
    (attempt,) = read_attempts(tmp_path)
    try:
        found = recover(tmp_path, run_of(folder_of(attempt))["fingerprint"], 4, ALONE, 60)
        assert found.checkpoint is not None and found.step == 5, found
        on_disk = max(tmp_path.glob("checkpoints/step-*"))
        ours, saved = (checkpoint.read(folder, "") for folder in (found.checkpoint, on_disk))
        assert ours.keys() == saved.keys() and all(ours[name].equal(saved[name]) for name in saved)
    finally:
        shutil.rmtree(folder_of(attempt), ignore_errors=True)


@pytest.mark.parametrize("backend", ["opencv", "torchvision"])
def test_a_loader_without_dali_gives_a_gpu_what_it_gives_a_cpu(device, backend):
    source = open_source("synthetic://48?size=20&classes=4")
    with (
        TrainLoader(source, 12, 16, workers=2, backend=backend, device=device) as loader,
        TrainLoader(source, 12, 16, backend=backend) as on_cpu,
    ):
        batches = list(zip(loader.epoch(0), on_cpu.epoch(0), strict=True))
    assert len(batches) == 4
    for batch, want in batches:
        assert batch.views.is_cuda or batch.views.is_pinned()
        assert batch.views.cpu().equal(want.views)
