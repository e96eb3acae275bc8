"""launch/convert.py: `shards` writes what `--data` can name, and says what it cannot."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossbatch.data.sources import open_source
from crossbatch.launch import convert
from crossbatch.launch.exits import run_main


def call(monkeypatch, *arguments) -> int:
    """Runs the launcher in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    try:
        run_main(convert.main)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def images(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("train/a/1.jpg", "train/a/2.jpg", "train/b/3.png", "test/a/4.jpg", "test/b/5.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / "images" / name)
    (tmp_path / "images/train/b/empty.jpg").touch()
    return tmp_path / "images"


def test_shards(monkeypatch, capsys, images, tmp_path):
    out = tmp_path / "shards"
    assert call(monkeypatch, "shards", "--data", images, "--output", out, "--images-per-shard", 2) == 0
    said = capsys.readouterr()
    assert f"{out}/train: 3 images in 2 shards, 1 broken images left out" in said.out and f"--data {out}" in said.out
    assert "left out, broken: b/empty.jpg: not an image" in said.err
    assert sorted(path.name for path in (out / "train").iterdir()) == [
        "index.npz", "train-000000.tar", "train-000001.tar"
    ]  # fmt: skip
    for split, numbers in (("train", (0, 1, 2)), ("eval", (0, 1))):
        before, after = open_source(images, split), open_source(out, split)
        assert before.class_names == after.class_names
        assert sorted((after.read(i), int(after.labels[i])) for i in range(len(after))) == sorted(
            (before.read(i), int(before.labels[i])) for i in numbers
        )


def test_bad_input(monkeypatch, capsys, images, tmp_path):
    def refused(*arguments) -> str:
        assert call(monkeypatch, "shards", *arguments) == 2
        return capsys.readouterr().err

    assert "--data: " in refused("--data", tmp_path / "absent", "--output", tmp_path / "out")
    assert "--images-per-shard: given 0" in refused("--data", images, "--output", tmp_path, "--images-per-shard", 0)
    (tmp_path / "out/val").mkdir(parents=True)
    assert "out/val exists already; remove it" in refused("--data", images, "--output", tmp_path / "out")
    assert not (tmp_path / "out/train").exists()
    (tmp_path / "file").touch()
    assert "--output: cannot write" in refused("--data", images, "--output", tmp_path / "file/out")
    shutil.rmtree(images / "test")
    for image in images.rglob("*.*g"):
        image.write_bytes(b"")
    assert "none of the 4 images" in refused("--data", images, "--output", tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_help_has_an_example(monkeypatch, capsys):
    assert call(monkeypatch, "shards", "--help") == 0
    assert "example: python launch/convert.py shards --data" in capsys.readouterr().out
