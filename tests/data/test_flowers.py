"""flowers.py: .mat files of the real types, torchvision's reading of the same, and whatever else may lie there."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision import datasets

from crossbatch import InputError
from crossbatch.data.sources import has_evaluation_split, open_source, prepare
from crossbatch.data.sources.flowers import read_split
from crossbatch.launch import preview

LABELS = [7, 102, 1, 54, 54, 2, 9, 8, 102, 77, 30, 1]
SPLITS = {"trnid": [3, 1], "valid": [7, 4], "tstid": [2, 12, 5, 9]}


def write(root: Path, splits: dict = SPLITS, labels=LABELS, number_type: type = np.uint16, label_type: type = np.uint8):
    root.mkdir(exist_ok=True)
    scipy.io.savemat(root / "setid.mat", {name: np.array([ids], dtype=number_type) for name, ids in splits.items()})
    scipy.io.savemat(root / "imagelabels.mat", {"labels": np.array([labels], dtype=label_type)})


def write_images(root: Path, count: int = len(LABELS)):
    (root / "jpg").mkdir(parents=True)
    for number in range(1, count + 1):
        Image.new("L" if number == 1 else "RGB", (8, 6), number).save(root / f"jpg/image_{number:05d}.jpg")


@pytest.fixture
def flowers(tmp_path) -> Path:
    write(tmp_path)
    write_images(tmp_path)
    return tmp_path


def test_images_and_labels(flowers):
    path = f"flowers://{flowers}"
    prepare(path, cache=flowers / "cache")
    train, evaluation = open_source(path, "train"), pickle.loads(pickle.dumps(open_source(path, "eval")))
    assert has_evaluation_split(path) and (len(train), len(evaluation)) == (4, 4)
    assert [train.name(i) for i in range(4)] == [f"jpg/image_0000{number}.jpg" for number in (3, 1, 7, 4)]
    assert train.labels.tolist() == [0, 6, 8, 53] and evaluation.labels.tolist() == [101, 0, 53, 101]
    assert train.labels.dtype == np.int64 == evaluation.labels.dtype
    assert len(train.class_names) == 102 and train.class_names[53] == "sunflower"
    assert train.open(1).mode == "RGB" and train.open(1).size == (8, 6)
    assert train.read(1) == (flowers / "jpg/image_00001.jpg").read_bytes()


def test_the_same_as_torchvision(flowers, monkeypatch):
    """In its own folder, too."""
    root = flowers.with_name(f"{flowers.name}-torchvision")
    root.mkdir()
    flowers.rename(root / "flowers-102")
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)
    for split, theirs in (("train", ("train", "val")), ("eval", ("test",))):
        ours = open_source(f"flowers://{root}", split)
        parts = [datasets.Flowers102(str(root), name) for name in theirs]
        assert ours.labels.tolist() == [label for part in parts for label in part._labels]
        files = [str(Path(file).relative_to(root / "flowers-102")) for part in parts for file in part._image_files]
        assert [ours.name(i) for i in range(len(ours))] == files


def test_the_real_sizes(tmp_path):
    numbers = 1 + np.random.default_rng(0).permutation(8189)
    splits = {"trnid": numbers[:1020], "valid": numbers[1020:2040], "tstid": numbers[2040:]}
    write(tmp_path, splits, labels=1 + np.arange(8189) % 102)
    (tmp_path / "jpg").mkdir()
    for number in numbers:
        (tmp_path / f"jpg/image_{number:05d}.jpg").touch()
    train, evaluation = (open_source(f"flowers://{tmp_path}", split) for split in ("train", "eval"))
    assert (len(train), len(evaluation)) == (2040, 6149)
    assert train.name(1020) == f"jpg/image_{numbers[1020]:05d}.jpg"
    for source, where in ((train, numbers[:2040]), (evaluation, numbers[2040:])):
        assert np.array_equal(source.labels, (where - 1) % 102)


@pytest.mark.skipif(
    "CROSSBATCH_REAL_DATA" not in os.environ, reason="CROSSBATCH_REAL_DATA names no folder with flowers/setid.mat"
)
def test_the_real_files():
    root = Path(os.environ["CROSSBATCH_REAL_DATA"], "flowers")
    (train, labels), (evaluation, more_labels) = (read_split(root, split) for split in ("train", "eval"))
    assert (len(train), len(evaluation)) == (2040, 6149)
    assert np.array_equal(np.sort(np.concatenate([train, evaluation])), 1 + np.arange(8189))
    assert np.array_equal(np.bincount(labels), np.full(102, 20))  # ten to train, ten to validate
    assert set(more_labels) == set(range(102))


def test_doubles_are_numbers_too(flowers):
    write(flowers, number_type=np.float64, label_type=np.float64)
    assert open_source(f"flowers://{flowers}", "train").labels.tolist() == [0, 6, 8, 53]


def damaged(root: Path, file: str, content: bytes | None):
    if content is None:
        (root / file).unlink()
    else:
        (root / file).write_bytes(content)


MATLAB_7_3 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(384) + b"\x89HDF\r\n\x1a\n" + bytes(100)
BAD = {
    "no splits": (lambda root: damaged(root, "setid.mat", None), "train", r"setid.mat missing in "),
    "no labels": (lambda root: damaged(root, "imagelabels.mat", None), "eval", r"imagelabels.mat missing in "),
    "no images": (lambda root: (root / "jpg").rename(root / "jpeg"), "train", r"jpg/ missing in "),
    "nothing": (lambda root: root.rename(f"{root}-gone"), "train", "setid.mat, imagelabels.mat, jpg/ missing"),
    "one image": (
        lambda root: damaged(root, "jpg/image_00007.jpg", None), "train", "1 of 4 images are not in .*: image_00007.jpg"
    ),
    "label": (lambda root: write(root, labels=[103, *LABELS[1:]]), "train", "1 labels .*such as 103; allowed: 1 to 102"),
    "label 0": (lambda root: write(root, labels=[0] * 12), "train", "12 labels .*such as 0; allowed: 1 to 102"),
    "number": (lambda root: write(root, {**SPLITS, "valid": [13]}), "train", "such as 13; allowed: 1 to 12"),
    "no test": (lambda root: write(root, {**SPLITS, "tstid": []}), "eval", "tstid of setid.mat list no image"),
    "array": (lambda root: write(root, {"trnid": [1], "tstid": [2]}), "train", "setid.mat has no array 'valid'"),
    "halves": (
        lambda root: write(root, {**SPLITS, "valid": [1.5]}, number_type=np.float64), "train", "does not hold whole numbers"
    ),
    "text": (
        lambda root: scipy.io.savemat(root / "imagelabels.mat", {"labels": "rose"}), "train", "does not hold whole numbers"
    ),
    "cut off": (
        lambda root: damaged(root, "setid.mat", (root / "setid.mat").read_bytes()[:150]), "train", "setid.mat cannot be read as"
    ),
    "empty": (lambda root: damaged(root, "setid.mat", b""), "train", "setid.mat cannot be read as"),
    "foreign": (lambda root: damaged(root, "imagelabels.mat", b"%PDF" * 99), "train", "imagelabels.mat cannot be read as"),
    "newer": (lambda root: damaged(root, "setid.mat", MATLAB_7_3), "train", "setid.mat cannot be read as"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "split", "message"), BAD.values(), ids=BAD)
def test_bad_input(flowers, damage, split, message):
    damage(flowers)
    with pytest.raises(InputError, match=rf"^--data: flowers://.* cannot be opened \(.*{message}") as caught:
        open_source(f"flowers://{flowers}", split, "--data")
    for part in ("setid.mat", "imagelabels.mat", "jpg/"):
        assert f"\n  {flowers}/{part} " in str(caught.value)


def test_any_damage_is_an_input_error(flowers):
    whole, random = (flowers / "setid.mat").read_bytes(), np.random.default_rng(0)
    for number in range(150):
        content = bytearray(whole)
        for place in random.integers(0, len(whole), 1 + number % 3):
            content[place] ^= 1 << int(random.integers(8))
        (flowers / "setid.mat").write_bytes(content[: random.integers(len(whole))] if number % 2 else content)
        try:
            source = open_source(f"flowers://{flowers}", "train")
        except InputError:
            continue
        assert set(source.labels) <= set(range(102))


def test_its_folder_given_as_one_of_images(flowers, tmp_path):
    with pytest.raises(InputError, match=rf"holds setid.mat but no folder 'train'; give flowers://{flowers}"):
        open_source(flowers, "train")


def test_exit_code(flowers, monkeypatch, capsys):
    (flowers / "setid.mat").unlink()
    monkeypatch.setattr(sys, "argv", ["preview.py", "--data", f"flowers://{flowers}"])
    with pytest.raises(SystemExit) as stop:
        preview.main()
    assert stop.value.code == 2 and "setid.mat missing" in capsys.readouterr().err
