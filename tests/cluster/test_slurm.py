"""launch/pretrain.slurm comes back by itself until the last step is done, and never after it."""

import contextlib
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.cluster.conftest import (
    DATA,
    FLAGS,
    STEPS,
    assert_prefix,
    job_state,
    wait_for_checkpoint,
    wait_for_step,
    wait_until,
    was_signalled,
)

pytestmark = pytest.mark.slow


def submit(slurm, out, *options: str, flags: tuple[str, ...] = (f"--steps={STEPS}",)) -> str:
    """Queue the run as one rank a node, and return its job."""
    options = ("--ntasks-per-node=1", f"--output={slurm.folder}/job-%j", *options)
    said = slurm.ask(
        "login", "sbatch", "--parsable", *options, "launch/pretrain.slurm", *FLAGS, DATA, f"--out={out}", *flags
    )
    assert said, "sbatch did not take the job"
    return said.strip()


def finish(slurm, job: str, out, whole) -> str:
    """Wait until the job is done, check the run, and return what it printed."""
    done = ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED", "PREEMPTED")
    wait_until(lambda: job_state(slurm, job) in done, f"job {job} does not end")
    text = (slurm.folder / f"job-{job}").read_text()
    assert job_state(slurm, job) == "COMPLETED", text
    assert not slurm.ask("login", "squeue", "--noheader"), text
    assert assert_prefix(out, whole) == STEPS and not (out / "stopped.json").exists()
    return text


def restarts(slurm, job: str) -> int:
    found = re.search(r"Restarts=(\d+)", slurm.ask("login", "scontrol", "show", "job", job))
    assert found
    return int(found[1])


def test_usr1_to_the_job(slurm, tmp_path, whole):
    job = submit(slurm, tmp_path / "out")
    wait_for_step(tmp_path / "out", 3)
    slurm.ask("login", "scancel", "--signal=USR1", job)
    assert "stopped by" in finish(slurm, job, tmp_path / "out", whole) and restarts(slurm, job) == 1


def test_the_time_limit(slurm, tmp_path, whole):
    """The signal comes two minutes before; the ranks wait for it, or they would be done by then."""
    job = submit(slurm, tmp_path / "out", "--time=3")
    wait_for_step(tmp_path / "out", 3)
    ranks = [
        int(line.split()[0])
        for line in slurm.running(tmp_path / "out")
        if re.match(r"\s*\d+ \S*python", line) and line.split()[0] in slurm.pids("node1") | slurm.pids("node2")
    ]
    assert len(ranks) == 2
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    wait_until(
        lambda: all(was_signalled(rank, signal.SIGUSR1) for rank in ranks), "no signal before the time limit", 180
    )
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGCONT)
    text = finish(slurm, job, tmp_path / "out", whole)
    assert "stopped by" in text and "resumed" in text and restarts(slurm, job) >= 1  # a slow machine is stopped twice


def test_a_more_urgent_job(slurm, tmp_path, whole):
    job = submit(slurm, tmp_path / "out")
    wait_for_step(tmp_path / "out", 3)
    sleep = [
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 5",
    ]
    slurm.ask("login", *sleep)
    text = finish(slurm, job, tmp_path / "out", whole)
    assert restarts(slurm, job) >= 1 and "resumed" in text


def test_requeued_by_hand(slurm, tmp_path, whole):
    job = submit(slurm, tmp_path / "out")
    wait_for_checkpoint(tmp_path / "out")
    slurm.ask("login", "scontrol", "requeue", job)
    finish(slurm, job, tmp_path / "out", whole)
    assert restarts(slurm, job) == 1


def test_a_lost_rank(slurm, tmp_path, whole):
    """As a node without memory loses it: queued again, once for each newer checkpoint."""
    job = submit(slurm, tmp_path / "out")
    wait_for_checkpoint(tmp_path / "out")
    slurm.ask("login", "scancel", "--signal=KILL", f"{job}.0")
    finish(slurm, job, tmp_path / "out", whole)
    assert restarts(slurm, job) == 1


def test_a_lost_node(slurm, tmp_path, whole):
    job = submit(slurm, tmp_path / "out")
    wait_for_checkpoint(tmp_path / "out")
    slurm.script("nodes", "cut", "node2")
    try:
        wait_until(lambda: restarts(slurm, job) == 1, "not queued again")
    finally:
        slurm.script("nodes", "plug", "node2")
    finish(slurm, job, tmp_path / "out", whole)


def test_an_array(slurm, tmp_path, whole):
    """Three runs with folders of their own, each of which comes back after a signal."""
    options = (
        "--ntasks-per-node=1",
        "--array=0-2",
        f"--output={slurm.folder}/job-%A_%a",
        f"--job-name={tmp_path.name}",
    )
    job = slurm.ask(
        "login", "sbatch", "--parsable", *options, "launch/pretrain.slurm", *FLAGS, DATA, "--steps=40"
    ).strip()
    outs = [Path("runs", f"{tmp_path.name}-{job}_{number}") for number in range(3)]
    try:
        wait_for_step(outs[0], 3)
        slurm.ask("login", "scancel", "--signal=USR1", job)
        wait_until(lambda: not slurm.ask("login", "squeue", "--noheader"), f"{job} does not end")
        for out in outs:
            assert assert_prefix(out, whole) == 40 and not (out / "stopped.json").exists()
    finally:
        for out in outs:
            shutil.rmtree(out, ignore_errors=True)


def test_wrong_input_is_not_queued_again(slurm, tmp_path):
    job = submit(slurm, tmp_path / "out", flags=("--set=train_batch_size=13",))
    wait_until(lambda: job_state(slurm, job) == "FAILED", "does not fail")
    assert "ExitCode=2:0" in slurm.ask("login", "scontrol", "show", "job", job) and restarts(slurm, job) == 0
