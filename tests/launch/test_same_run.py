"""Ranks that were not started for the same run all end with 2 at once, and say which rank and what."""

import os
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.jobs import Job
from tests.small_runs import BASE, LARS, VIT, fsdp

# Not with --set, which would win over the flags of a test.
FLAGS = ["-b=12", "--moco-t=0.2", "--lr=0.05", "--steps=2", "--data=synthetic://48?size=20,classes=4"]
BY_FLAG = ("train_batch_size=", "crossbatch.model.temperature=", "optimizer.params.lr=", "crossbatch.data.path=")
FLAGS += [f"--set={setting}" for setting in (*BASE, *VIT, *LARS, *fsdp(1)) if not setting.startswith(BY_FLAG)]


def refused(job: Job, message: str) -> None:
    """All ranks have ended with 2, and rank 0 alone has said why."""
    started = time.monotonic()
    assert job.wait() == [2] * len(job.pids), job.output()
    print(f"{time.monotonic() - started:.1f} s")
    assert message in job.output(0)
    assert job.output(0).count("error: ") == 1 and "error: " not in job.output(1) and "Traceback" not in job.output()


DIFFERENCES = {
    "rate": (["--lr=0.7"], "optimizer.params.base_lr: 0.7 on rank 1 ("),
    "batch": (["-b=24"], "train_batch_size: 24 on rank 1 ("),
    "batch that cannot be": (["-b=13"], "rank 1 on "),
    "value that cannot be": (["--moco-t=0"], "crossbatch.model.temperature"),
    "seed": (["--seed=1"], "crossbatch.seed: 1 on rank 1 ("),
    "steps": (["--steps=3"], "--steps: 3 on rank 1 ("),
    "resume": (["--resume=none"], "--resume: none on rank 1 ("),
    "model": (["--set=crossbatch.model.mlp_dim=64"], "crossbatch.model.mlp_dim: 64 on rank 1 ("),
}


@pytest.mark.parametrize(("flags", "message"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_a_rank_with_another_command(nursery, tmp_path, flags, message):
    job = nursery.start(tmp_path / "logs", 2, *FLAGS, f"--out={tmp_path / 'out'}", last=tuple(flags))
    refused(job, message)
    assert not (tmp_path / "out").exists()


def test_wrong_input_of_all_ranks_is_said_once(nursery, tmp_path):
    job = nursery.start(tmp_path / "logs", 2, *FLAGS, f"--out={tmp_path / 'out'}", "-b=13")
    refused(job, "error: train_batch_size")


@pytest.mark.slow
def test_a_rank_that_comes_alone_says_itself_what_is_wrong(nursery, tmp_path):
    """Rank 0, which would say it, is not there: refuse waits for it no longer than REFUSAL_S."""
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    job = nursery.start(tmp_path / "logs", 1, *FLAGS, f"--out={tmp_path / 'out'}", "-b=13", **environment)
    assert job.wait() == [2] and job.output().count("error: train_batch_size") == 1


def test_an_unknown_meeting_point_is_not_tried(nursery, tmp_path):
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "no-such-host.invalid"}
    job = nursery.start(tmp_path / "logs", 1, *FLAGS, f"--out={tmp_path / 'out'}", **environment)
    assert job.wait() == [2] and job.output().count("error: no-such-host.invalid, where") == 1
    assert "c10d" not in job.output()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount a tmpfs")
def test_a_rank_that_does_not_see_the_run_directory(nursery, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    job = nursery.start(tmp_path / "logs", 2, *FLAGS, f"--out={shared / 'out'}", PRIVATE=str(shared))
    refused(job, f"rank 1: --out: {shared / 'out'} on ")
    assert "is not the folder of rank 0; give a folder that all nodes share" in job.output(0)


@pytest.fixture
def images(tmp_path) -> tuple[Path, Path]:
    """Two copies of a folder of images."""
    for number in range(24):
        file = tmp_path / "one" / "train" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (number, 0, 0)).save(file)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    return tmp_path / "one", tmp_path / "two"


def renamed(folder: Path) -> None:
    (folder / "train/a/0.png").rename(folder / "train/a/91.png")


def another(folder: Path) -> None:
    Image.new("RGB", (20, 20), (99, 99, 99)).save(folder / "train/a/0.png")


def missing(folder: Path) -> None:
    (folder / "train/a/0.png").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(renamed, "rank 1 finds other files or labels than rank 0", marks=pytest.mark.slow),
        (another, "rank 1 finds other file contents than rank 0"),
        (missing, "rank 1 finds 23 images, but rank 0 finds 24"),
    ],
)
def test_a_rank_with_other_images(nursery, tmp_path, images, change, message):
    change(images[1])
    flags = [*FLAGS, f"--out={tmp_path / 'out'}", f"--data={images[0]}"]
    refused(nursery.start(tmp_path / "logs", 2, *flags, last=(f"--data={images[1]}",)), message)


def test_a_rank_with_a_copy_of_the_images(nursery, tmp_path, images):
    flags = [*FLAGS, f"--out={tmp_path / 'out'}", f"--data={images[0]}"]
    job = nursery.start(tmp_path / "logs", 2, *flags, last=(f"--data={images[1]}",))
    assert job.wait() == [0, 0], job.output()
