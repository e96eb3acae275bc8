"""Runs that are killed, stopped, starved and misled: what is left, and what resuming makes of it."""

import importlib.util
import json
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

from crossbatch.engine import checkpoint
from crossbatch.engine.config import schema
from tests.jobs import Job, Nursery, metrics
from tests.small_runs import ADAMW, BASE, LARS, RESNET, VIT, fsdp, losses, name_of, zero

EVERY_2 = ["crossbatch.checkpoint.every_steps=2"]
ONE_CHUNK = ["train_micro_batch_size_per_gpu=12"]  # at most; "auto" takes each start longer than the steps


def flags(out: Path, *settings: str) -> list[str]:
    return [f"--out={out}", *(f"--set={setting}" for setting in (*BASE, *EVERY_2, *ONE_CHUNK, *settings))]


def finish(nursery: Nursery, out: Path, settings: list[str], ranks: int, steps: int) -> Job:
    """Runs or resumes, to the end."""
    job = nursery.start(out / "logs", ranks, *flags(out, *settings), f"--steps={steps}")
    assert job.wait() == [0] * ranks, job.output()
    assert not (out / "stopped.json").exists()
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


MOMENTS = [("  loss ", 0, 1), ("  loss ", 0, 2), ("  loss ", 0, 3), ("  loss ", 0, 4), ("saved step", 0, 1)]


def kill_again_and_again(
    nursery: Nursery, out: Path, settings: list[str], kills: int, steps: int, victims: list[tuple[int, ...]], seed: int
) -> list[int]:
    """A run of two ranks, `kills` times one of `victims` killed; returns the steps of the checkpoints that the attempts left.

    One attempt in four dies while it starts or resumes, the others during or after the next steps: there is a save every two.
    """
    chance = random.Random(seed)
    whole = nursery.start(out / "whole" / "logs", 2, *flags(out / "whole", *settings), f"--steps={steps}")
    started = time.monotonic()
    whole.wait_for("step 1/")
    seconds_to_start = time.monotonic() - started
    assert whole.wait() == [0, 0], whole.output()
    left = []
    for _ in range(kills):
        job = nursery.start(out / "cut" / "logs", 2, *flags(out / "cut", *settings), f"--steps={steps}")
        if chance.random() < 0.25:
            time.sleep(chance.uniform(0, seconds_to_start))
        else:
            job.wait_for(*chance.choice(MOMENTS))
            time.sleep(chance.uniform(0, 0.3))
        job.kill(signal.SIGKILL, *chance.choice(victims))
        job.wait()
        candidates = checkpoint.candidates(out / "cut", "auto")
        left.append(int(candidates[0].name.removeprefix("step-")) if candidates else 0)
    assert left[-1] < steps  # all of them were kills
    finish(nursery, out / "cut", settings, 2, steps)
    assert_same(out / "cut", out / "whole", steps)
    return left


def test_a_killed_run_continues_bit_for_bit(tmp_path, nursery):
    """Killed soon after its first save, which is what this seed draws."""
    left = kill_again_and_again(nursery, tmp_path, [*VIT, *ADAMW, *zero(2)], 1, 12, victims=[(0, 1)], seed=19)
    assert left[-1] > 0


def has_dali() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "optimizer", "data"),
    [
        (zero(0), LARS, "torchvision"),
        (zero(0), ADAMW, "opencv"),
        (zero(2), LARS, "dali"),
        (zero(2), ADAMW, "torchvision"),
        (fsdp(3), LARS, "opencv"),
        (fsdp(3), ADAMW, "dali"),
    ],
    ids=lambda case: case if isinstance(case, str) else name_of(case),
)
def test_twenty_kills(tmp_path, nursery, backend, optimizer, data):
    if data not in typing.get_args(typing.get_type_hints(schema.DataConfig)["backend"]):
        pytest.skip(f"this version has no data backend {data}")
    if data == "dali" and not has_dali():
        pytest.skip("DALI is not installed")
    model = RESNET if optimizer is LARS else VIT
    settings = [*model, *optimizer, *backend, f"crossbatch.data.backend={data}", "crossbatch.data.workers=1"]
    settings += ["crossbatch.batchformer.dropout=0.5", "crossbatch.schedule.epochs=20"]  # 80 steps
    left = kill_again_and_again(nursery, tmp_path, settings, 20, 80, [(0, 1), (0, 1), (0,), (1,)], seed=1)
    print(f"{name_of(backend)} {name_of(optimizer)} {data}: checkpoints left by the killed attempts: {left}")
    assert len(set(left)) > 8


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
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"signal": number.name, "step": last}


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
    """Stopped, as by a debugger or a frozen host. (Alive but stuck: tests/engine/test_watchdog.py.)"""
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


@pytest.fixture
def two_hosts():
    """Two network namespaces, with a cable between two interfaces of that name: 10.77.0.1 and 10.77.0.2."""
    names = [f"host{number}-{os.getpid()}" for number in (1, 2)]
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add cable netns {names[0]} type veth peer name cable netns {names[1]}",
        *(f"ip -n {name} address add 10.77.0.{number}/24 dev cable" for number, name in enumerate(names, start=1)),
        *(f"ip -n {name} link set {end} up" for name in names for end in ("cable", "lo")),
    ]
    made = subprocess.run(" && ".join(commands), shell=True, capture_output=True)
    if made.returncode == 0:
        yield names
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to make network namespaces")


@pytest.mark.slow
def test_two_hosts_that_lose_each_other_both_stop(tmp_path, nursery, two_hosts):
    timeout_s = 10
    settings = [*VIT, *ADAMW, *zero(1), f"crossbatch.watch.timeout_s={timeout_s}", "crossbatch.schedule.epochs=500"]
    network = {"NETWORKS": ",".join(two_hosts), "MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "cable"}
    job = nursery.start(tmp_path / "logs", 2, *flags(tmp_path, *settings), **network)
    job.wait_for("step 5/")
    subprocess.run(["ip", "-n", two_hosts[0], "link", "set", "cable", "down"], check=True)
    cut = time.monotonic()
    assert job.wait() == [3, 3], job.output()
    assert time.monotonic() - cut < timeout_s + 20  # each notices within timeout_s + 10 s; the machine may be busy
    assert "stopped (rank 0): rank 1 is gone" in job.output(0)
    assert "stopped (rank 1): rank 0 " in job.output(1)


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


WITH_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")

# --- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [fsdp(1), pytest.param(zero(1), marks=WITH_DEEPSPEED)], ids=name_of)
@pytest.mark.parametrize(("model", "optimizer"), [(RESNET, LARS), (VIT, ADAMW)], ids=name_of)
def test_a_resumed_run_on_a_gpu_is_the_same_with_the_deterministic_switch(tmp_path, model, optimizer, backend):
    """In processes of their own: the switch is for a whole process, and tests hide the GPU from the nursery."""
    settings = [*model, *optimizer, *backend, "crossbatch.deterministic=true", "crossbatch.batchformer.dropout=0.5"]
    for out, steps in (("whole", 6), ("cut", 3), ("cut", 6)):
        command = [sys.executable, "launch/pretrain.py", *flags(tmp_path / out, *settings), f"--steps={steps}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert_same(tmp_path / "cut", tmp_path / "whole", 6)
