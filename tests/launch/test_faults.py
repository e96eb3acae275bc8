"""Runs that are killed, stopped, starved and misled: what is left, and what resuming makes of it."""

import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import torch

from crossbatch.engine import checkpoint
from crossbatch.engine.config import schema
from tests.engine.test_equivalence import ADAMW, BASE, LARS, RESNET, VIT, fsdp, losses, name_of, zero
from tests.jobs import Job, Nursery, metrics

EVERY_2 = ["crossbatch.checkpoint.every_steps=2"]


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.close()


def flags(out: Path, *settings: str) -> list[str]:
    return [f"--out={out}", *(f"--set={setting}" for setting in (*BASE, *EVERY_2, *settings))]


def finish(nursery: Nursery, out: Path, settings: list[str], ranks: int, steps: int) -> Job:
    """Runs or resumes, to the end."""
    job = nursery.start(out / "logs", ranks, *flags(out, *settings), f"--steps={steps}")
    assert job.wait() == [0] * ranks, job.output()
    return job


def weights(out: Path, step: int) -> dict:
    folder = out / "checkpoints" / f"step-{step:08d}"
    return {part: checkpoint.read(folder, part) for part in ("parameters.", "buffers.", "optimizer.")}


def assert_same(out: Path, whole: Path, step: int) -> None:
    """Every line of metrics and every bit of the last state."""
    assert metrics(out) == metrics(whole)
    ours, theirs = weights(out, step), weights(whole, step)
    for part, tensors in theirs.items():
        assert tensors and tensors.keys() == ours[part].keys()
        assert [name for name, tensor in tensors.items() if not tensor.equal(ours[part][name])] == []


# --- killed at any moment ----------------------------------------------------------------------------------------------


def kill_again_and_again(
    nursery: Nursery, out: Path, settings: list[str], kills: int, steps: int, victims: list[tuple[int, ...]], seed: int
) -> list[str]:
    """A run of two ranks, `kills` times one of `victims` killed; returns the checkpoints that the attempts left."""
    chance = random.Random(seed)
    found = []
    start = time.monotonic()
    finish(nursery, out / "whole", settings, 2, steps)
    seconds = time.monotonic() - start
    for _ in range(kills):
        job = nursery.start(out / "cut" / "logs", 2, *flags(out / "cut", *settings), f"--steps={steps}")
        time.sleep(chance.uniform(0, seconds))
        job.kill(signal.SIGKILL, *chance.choice(victims))
        job.wait()
        candidates = checkpoint.candidates(out / "cut", "auto")
        found.append(candidates[0].name if candidates else "none")
    finish(nursery, out / "cut", settings, 2, steps)
    assert_same(out / "cut", out / "whole", steps)
    return found


def test_a_killed_run_continues_bit_for_bit(tmp_path, nursery):
    kill_again_and_again(nursery, tmp_path, [*VIT, *ADAMW, *zero(2)], kills=3, steps=8, victims=[(0, 1)], seed=0)


def data_backends() -> list:
    """Those that this version has; DALI where it is installed."""
    known = typing.get_args(typing.get_type_hints(schema.DataConfig)["backend"])
    missing = pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="DALI is not installed")
    return [pytest.param(name, marks=missing if name == "dali" else ()) for name in known if name != "auto"]


@pytest.mark.slow
@pytest.mark.parametrize("data", data_backends())
@pytest.mark.parametrize("optimizer", [LARS, ADAMW], ids=name_of)
@pytest.mark.parametrize("backend", [zero(0), zero(2), fsdp(3)], ids=name_of)
def test_twenty_kills(tmp_path, nursery, backend, optimizer, data):
    model = RESNET if optimizer is LARS else VIT
    settings = [*model, *optimizer, *backend, f"crossbatch.data.backend={data}", "crossbatch.data.workers=1"]
    settings += ["crossbatch.batchformer.dropout=0.5"]
    found = kill_again_and_again(nursery, tmp_path, settings, 20, 20, [(0, 1), (0, 1), (0,), (1,)], seed=1)
    print(f"{name_of(backend)} {name_of(optimizer)} {data}: resumed from {found}")
    assert len(set(found)) > 3


# --- asked to stop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_both_after_the_same_step(tmp_path, nursery, number):
    settings = [*VIT, *LARS, *fsdp(3)]
    job = nursery.start(tmp_path / "logs", 2, *flags(tmp_path, *settings))
    job.wait_for("step 3/")
    job.kill(number, 1)
    sent = time.monotonic()
    assert job.wait() == [0, 0]
    assert time.monotonic() - sent < 10 + 5  # steps of this run take less than a second, but the machine may be busy
    last = metrics(tmp_path)[-1]["step"]
    assert last < 20
    assert checkpoint.candidates(tmp_path, "auto")[0].name == f"step-{last:08d}"
    assert f"resume with: the same command, --out {tmp_path}" in job.output(0).replace("\n", "")
    assert number.name in job.output(0)


@pytest.mark.slow
def test_ctrl_c_saves_and_a_second_one_does_not_wait(tmp_path, nursery):
    settings = [*VIT, *LARS]
    job = nursery.start(tmp_path / "logs", 1, *flags(tmp_path, *settings))
    job.wait_for("step 3/")
    job.kill(signal.SIGINT)
    assert job.wait() == [0]
    last = metrics(tmp_path)[-1]["step"]
    job = nursery.start(tmp_path / "logs", 1, *flags(tmp_path, *settings))
    job.wait_for("resumed")
    job.wait_for("step 1")  # of it, some
    job.kill(signal.SIGINT)
    job.kill(signal.SIGINT)
    assert job.wait()[0] in (0, 1)  # 1: interrupted where it was
    finish(nursery, tmp_path, settings, 1, 20)
    assert last < 20 and [line["step"] for line in metrics(tmp_path)] == list(range(1, 21))


# --- another rank is gone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_by_the_other(tmp_path, nursery, victim):
    timeout_s = 5
    settings = [*VIT, *LARS, *fsdp(3), f"crossbatch.watch.timeout_s={timeout_s}"]
    job = nursery.start(tmp_path / "logs", 2, *flags(tmp_path, *settings))
    job.wait_for("step 3/")
    job.kill(signal.SIGKILL, victim)
    sent = time.monotonic()
    assert job.wait(1 - victim) == [3]
    assert time.monotonic() - sent < timeout_s + 10
    assert f"stopped (rank {1 - victim}): rank {victim} " in job.output(1 - victim)


@pytest.mark.slow
def test_a_rank_that_does_not_move_is_named_by_the_others(tmp_path, nursery):
    """Stopped as a debugger or a frozen host would, and then, alive, stuck in its data."""
    timeout_s = 6
    settings = [*VIT, *LARS, *zero(1), f"crossbatch.watch.timeout_s={timeout_s}"]
    job = nursery.start(tmp_path / "logs", 3, *flags(tmp_path, *settings))
    job.wait_for("step 3/")
    job.kill(signal.SIGSTOP, 1)
    sent = time.monotonic()
    assert job.wait(0, 2) == [3, 3]
    assert time.monotonic() - sent < timeout_s + 10
    assert "rank 1 is gone or does not answer" in job.output(0) and "rank 1 is gone" in job.output(2)


TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node=2", "--max-restarts=1"]


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_rank(tmp_path, nursery):
    settings = [*VIT, *ADAMW, *zero(1), "crossbatch.watch.timeout_s=20"]
    finish(nursery, tmp_path / "whole", settings, 2, 20)
    out = tmp_path / "cut"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "--master_port=29613", "launch/pretrain.py", *flags(out, *settings)]
    with (tmp_path / "log").open("w") as log:
        torchrun = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    while not (out / "metrics.jsonl").exists() or len(losses(out)) < 5:
        assert torchrun.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    ranks = subprocess.run(
        ["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    assert torchrun.wait(240) == 0, (tmp_path / "log").read_text()
    text = (tmp_path / "log").read_text()
    assert "resumed" in text
    assert metrics(out) == metrics(tmp_path / "whole")


def test_torchrun_may_only_restart_what_it_finds_again(tmp_path, nursery):
    settings = [f"--set={setting}" for setting in (*BASE, *VIT)]
    job = nursery.start(tmp_path / "logs", 1, *settings, TORCHELASTIC_MAX_RESTARTS="3")
    assert job.wait() == [2]
    assert "--out: not given" in job.output()


# --- the disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB: one checkpoint of 0.8 MB fits, and the next one beside it, but not a third."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(nursery, small_disk):
    """The run trains to its end, says so, and stops with 3; what it saved before is good; with room it ends as it should."""
    settings = [*VIT, *LARS, *zero(1), "crossbatch.checkpoint.keep=1"]
    out = small_disk / "run"
    job = nursery.start(small_disk.parent / "logs", 2, *flags(out, *settings), "--steps=8")
    job.wait_for("saved step 2")
    (small_disk / "somebody else's").write_bytes(bytes(2**20 // 2))
    fill = (small_disk / "more").open("wb", buffering=0)
    try:
        while fill.write(bytes(4096)):
            pass
    except OSError:
        fill.close()
    assert job.wait() == [3, 3], job.output()
    assert "step 8/8" in job.output(0)
    assert "could not be saved: rank" in job.output(0) and "No space left on device" in job.output(0)
    assert "step 8 is done but cannot be saved" in job.output(0)
    good = checkpoint.candidates(out, "auto")[0]
    assert checkpoint.read(good, "parameters.")
    for other in ("more", "somebody else's"):
        (small_disk / other).unlink()
    finish(nursery, out, settings, 2, 8)
    assert [line["step"] for line in metrics(out)] == list(range(1, 9))


# --- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("model", "optimizer"), [(RESNET, LARS), (VIT, ADAMW)], ids=name_of)
def test_a_resumed_run_on_a_gpu_is_the_same_with_the_deterministic_switch(tmp_path, model, optimizer):
    """In processes of their own: the switch is for a whole process, and tests hide the GPU from the nursery."""
    settings = [*model, *optimizer, *zero(1), "crossbatch.deterministic=true", "crossbatch.batchformer.dropout=0.5"]
    for out, steps in (("whole", 6), ("cut", 3), ("cut", 6)):
        command = [sys.executable, "launch/pretrain.py", *flags(tmp_path / out, *settings), f"--steps={steps}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert_same(tmp_path / "cut", tmp_path / "whole", 6)
