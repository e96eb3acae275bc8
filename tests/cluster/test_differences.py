"""Two nodes that were not started for the same run: both end with 2, and say which rank and what."""

import json
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.cluster.conftest import two_commands

pytestmark = pytest.mark.slow


def copied_checkout(folder: Path) -> str:
    """Return a checkout with a line that does nothing."""
    for name in ("crossbatch", "engine", "models", "data", "launch", "ds_configs"):
        shutil.copytree(name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "models" / "loss.py").open("a") as file:
        file.write("\n")
    return str(folder)


DIFFERENCES = {
    "lr": (["--lr=0.7"], "optimizer.params.base_lr: 0.7"),
    "batch": (["-b=24"], "train_batch_size: 24"),
    "batch that does not fit": (["-b=13"], "rank 1 on node2: train_batch_size"),
    "seed": (["--seed=1"], "crossbatch.seed: 1"),
    "steps": (["--steps=3"], "--steps: 3"),
    "arch": (["--set=crossbatch.model.stop_grad_conv1=false"], "crossbatch.model.stop_grad_conv1: False"),
    "resume": (["--resume=none"], "--resume: none"),
}


def both_refuse(nodes, message: str) -> None:
    started = time.monotonic()
    codes = [node.wait() for node in nodes]
    said = "\n".join(node.text() for node in nodes)
    assert codes == [2, 2], said
    assert message in said and "Traceback" not in said
    print(f"both refused after {time.monotonic() - started:.0f} s")


@pytest.mark.parametrize(("flags", "message"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_a_different_command(box, tmp_path, flags, message):
    nodes = two_commands(box, tmp_path / "out", "--steps=2", second=tuple(flags))
    both_refuse(nodes, message)
    assert not (tmp_path / "out").exists()


def test_different_code(box, tmp_path):
    nodes = two_commands(box, tmp_path / "out", "--steps=2", PYTHONPATH=copied_checkout(tmp_path / "checkout"))
    both_refuse(nodes, "the code of crossbatch: ")


def test_a_run_directory_that_is_not_shared(box, tmp_path):
    """/tmp/local is another one on each node."""
    nodes = two_commands(box, Path("/tmp/local/out"), "--steps=2")
    both_refuse(
        nodes, "rank 1: --out: /tmp/local/out on node2 is not the folder of rank 0; give a folder that all nodes share"
    )


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
        (renamed, "rank 1 finds other file names than rank 0"),
        (another, "rank 1 finds other file contents than rank 0"),
        (missing, "rank 1 finds 23 images, but rank 0 finds 24"),
    ],
)
def test_different_images(box, tmp_path, images, change, message):
    change(images[1])
    nodes = two_commands(box, tmp_path / "out", "--steps=2", f"--data={images[0]}", second=(f"--data={images[1]}",))
    both_refuse(nodes, message)


def test_copies_of_the_images_in_other_folders(box, tmp_path, images):
    nodes = two_commands(box, tmp_path / "out", "--steps=2", f"--data={images[0]}", second=(f"--data={images[1]}",))
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["crossbatch"]["data"]["path"] == str(images[0])
