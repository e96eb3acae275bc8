"""Tests shapes.py: deterministic, written whole or not at all, and not solvable by comparing pixels."""

import numpy as np
import pytest

from crossbatch.data.sources import shapes
from crossbatch.data.sources.image_folder import ImageFolder
from crossbatch.data.sources.shapes import SHAPES, draw_shape, write_shapes


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


def test_deterministic_in_the_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_shapes(tmp_path / name, train=16, val=8, size=32, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys() and all(a[name] != c[name] for name in a)
    assert len(set(a.values())) == 24  # train and val share no image


def test_layout(tmp_path):
    write_shapes(tmp_path / "s", train=20, val=9, size=24, seed=0)
    train = ImageFolder(tmp_path / "s/train")
    assert train.class_names == sorted(SHAPES) and len(train.class_names) == 8
    assert np.bincount(train.labels).tolist() == [3, 3, 3, 3, 2, 2, 2, 2]
    assert train.name(0) == "checkered/00000.jpg" and train.open(0).size == (24, 24)
    assert {path.name for path in tmp_path.iterdir()} == {"s"}


def test_an_existing_set_is_kept_and_any_other_folder_refused(tmp_path):
    write_shapes(tmp_path / "s", train=8, val=8, size=16, seed=0)
    marker = tmp_path / "s/train/disc/00002.jpg"
    marker.write_bytes(b"kept")
    write_shapes(tmp_path / "s", train=8, val=8, size=16, seed=0)
    assert marker.read_bytes() == b"kept"
    with pytest.raises(ValueError, match=r"'size': 16.*'size': 32"):
        write_shapes(tmp_path / "s", train=8, val=8, size=32, seed=0)
    with pytest.raises(ValueError, match="was not written by shapes://"):
        write_shapes(tmp_path, train=8, val=8, size=16, seed=0)
    with pytest.raises(ValueError, match="at least 8"):
        write_shapes(tmp_path / "t", train=8, val=7, size=16, seed=0)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "draw_shape", fail)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / "s", train=8, val=8, size=16, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_raw_pixels_say_little():
    """1-NN and 20-NN on raw pixels stay low; 6000 + 800 images of 64 px give 30 % and 29 %, chance is 12.5 %."""
    names = list(SHAPES)

    def pixels(split: int, count: int) -> np.ndarray:
        images = [np.asarray(draw_shape(names[i % 8], 32, 0, split, i)) for i in range(count)]
        return np.stack(images).reshape(count, -1).astype(np.float32)

    train, val = pixels(0, 1600), pixels(1, 400)
    distances = (train**2).sum(1) - 2 * val @ train.T
    nearest = np.argsort(distances, axis=1)[:, :20] % 8  # labels
    for k in (1, 20):
        votes = np.array([np.bincount(row[:k], minlength=8).argmax() for row in nearest])
        accuracy = (votes == np.arange(400) % 8).mean()
        assert accuracy < 0.35, f"{k}-NN on raw pixels: {accuracy:.1%}"
