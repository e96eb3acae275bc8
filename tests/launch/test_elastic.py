"""Runs that lose ranks and nodes and go on from what the others keep in memory.

A node is a mount namespace with a /dev/shm of its own, which is gone with the last of its processes.
"""

import json
import re
import signal
from pathlib import Path

import pytest

from tests.jobs import Job, Nursery, metrics
from tests.small_runs import ADAMW, BASE, VIT, zero

# No save but the last one; what a run goes on from is in memory.
RARE_SAVES = ["crossbatch.checkpoint.every_steps=1000", "crossbatch.schedule.epochs=50"]
TWO_NODES = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "PRIVATE": "/dev/shm"}
RESTARTS = {"TORCHELASTIC_MAX_RESTARTS": "3"}


def flags(out: Path, *settings: str) -> list[str]:
    return [f"--out={out}", *(f"--set={setting}" for setting in (*BASE, *RARE_SAVES, *VIT, *ADAMW, *settings))]


def losses(out: Path) -> list[float]:
    """The losses of a run by step, each of which must be there once."""
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def start(nursery: Nursery, out: Path, ranks: int, steps: int, *settings: str, **environment: str) -> Job:
    return nursery.start(out / "logs", ranks, *flags(out, *settings), f"--steps={steps}", **RESTARTS, **environment)


def whole_run(nursery: Nursery, out: Path, ranks: int, steps: int, *settings: str) -> list[float]:
    job = nursery.start(out / "logs", ranks, *flags(out, *settings), f"--steps={steps}")
    assert job.wait() == [0] * ranks, job.output()
    return losses(out)


def resumed(text: str) -> list[tuple[str, int]]:
    """Where each attempt went on, and at which step."""
    return [(where, int(step)) for where, step in re.findall(r"resumed (\S+) at step (\d+)", text)]


def test_a_lost_node_costs_no_step_and_comes_back(tmp_path, nursery):
    """First a rank dies, then its node with all that is in its memory; the other goes on alone; then there are two again."""
    out, settings = tmp_path / "cut", zero(0)
    expected = whole_run(nursery, tmp_path / "whole", 2, 24, *settings)
    job = start(nursery, out, 2, 24, *settings, **TWO_NODES)
    job.wait_for("step 6/")
    job.kill(signal.SIGKILL, 1)
    assert job.wait(0) == [3], job.output()
    done = metrics(out)[-1]["step"]
    job = start(nursery, out, 1, done + 6, *settings)
    job.wait_for(f"step {done + 3}/")
    ((where, step),) = resumed(job.output(0))
    assert where.startswith("/dev/shm/crossbatch-") and step >= done - 1  # its last copy may still have been on its way
    job.kill(signal.SIGKILL)
    job.wait()
    done = metrics(out)[-1]["step"]
    job = start(nursery, out, 2, 24, *settings, **TWO_NODES)
    assert job.wait() == [0, 0], job.output()
    ((where, step),) = resumed(job.output(0))
    assert where.startswith("/dev/shm/crossbatch-") and step >= done
    assert losses(out) == pytest.approx(expected, rel=1e-5)
    assert not (out / "memory.json").exists()
    assert not [
        run for run in Path("/dev/shm").glob("crossbatch-*/run.json") if json.loads(run.read_text())["out"] == str(out)
    ]
