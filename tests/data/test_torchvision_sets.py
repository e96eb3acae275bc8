"""Tests torchvision_sets.py on small files in the formats of the data sets, beside torchvision's own reading of the same."""

import hashlib
import os
import pickle
import socket
import sys
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision import datasets

from crossbatch.data.decode import decode
from crossbatch.data.sources import has_evaluation_split, open_source, prepare
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.launch import preview

REAL_DATA = os.environ.get("CROSSBATCH_REAL_DATA")
needs_real_data = pytest.mark.skipif(REAL_DATA is None, reason="CROSSBATCH_REAL_DATA names no folder with real files")


def both(path: str):
    """Return training and evaluation images, the latter as a worker gets them."""
    assert has_evaluation_split(path)
    return open_source(path), pickle.loads(pickle.dumps(open_source(path, "eval")))


@pytest.fixture(autouse=True)
def network(monkeypatch) -> list:
    """Let all attempts to reach a network fail; return a list that collects their timeouts."""
    timeouts = []

    def refused(*args, **options):
        timeouts.append(socket.getdefaulttimeout())
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refused)
    return timeouts


# ---- CIFAR ----

CLASSES = ["airplane", "bird", "cat"]


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def cifar(tmp_path, monkeypatch, pixels) -> Path:
    """Write seven training and three test images, with checksums of their own."""

    def write(name: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        (tmp_path / "files" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    flat, labels = pixels.reshape(10, -1), [i % 3 for i in range(10)]
    train = [write(f"{a}", {"data": flat[a:b], "labels": labels[a:b]}) for a, b in ((0, 4), (4, 7))]
    test = [write("test", {"data": flat[7:], "fine_labels": labels[7:]})]
    meta, md5 = write("meta", {"label_names": CLASSES})
    monkeypatch.setattr(datasets.CIFAR10, "base_folder", "files")
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": meta, "md5": md5, "key": "label_names"})
    return tmp_path


def test_cifar(cifar, pixels, network):
    path = f"cifar10://{cifar}"
    prepare(path)
    train, evaluation = both(path)
    assert (len(train), len(evaluation), network) == (7, 3, [])
    assert train.class_names == evaluation.class_names == CLASSES and train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert train.labels.dtype == np.int64 and evaluation.labels.tolist() == [1, 2, 0]
    assert train.name(4) == "train/bird/00004" and evaluation.name(0) == "test/bird/00000"
    for source, index, number in ((train, 5, 5), (evaluation, 1, 8)):
        assert np.array_equal(np.asarray(source.open(index)), pixels[number].transpose(1, 2, 0))
        assert np.array_equal(np.asarray(decode(source.read(index))), pixels[number].transpose(1, 2, 0))


def test_a_damaged_file(cifar):
    file = cifar / "files/test"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"cifar10://.* cannot be opened .*not found or corrupted"):
        open_source(f"cifar10://{cifar}")


@pytest.mark.parametrize("scheme", ["cifar10", "cifar100", "flowers", "pets"])
def test_not_there_and_no_network(tmp_path, network, scheme):
    path = f"{scheme}://{tmp_path}"
    with pytest.raises(ValueError, match=rf"^{scheme}://.*no network.*run torchvision.datasets.*copy {tmp_path}/"):
        open_source(path, download=True)
    assert network and None not in network and socket.getdefaulttimeout() is None
    with pytest.raises(ValueError, match=rf"^{scheme}://.* \(Dataset not found.*torchvision.datasets.*download=True"):
        open_source(path)


# ---- Flowers-102 ----

LABELS = [7, 102, 1, 54, 54, 2, 9, 8, 102, 77, 30, 1]
PARTS = {"trnid": [3, 1], "valid": [7, 4], "tstid": [2, 12, 5, 9]}


@pytest.fixture
def flowers(tmp_path, monkeypatch) -> Path:
    """Write a set as the authors pack it; torchvision accepts any content."""
    root = tmp_path / "flowers"
    (root / "jpg").mkdir(parents=True)
    scipy.io.savemat(root / "setid.mat", {name: np.array([ids], dtype=np.uint16) for name, ids in PARTS.items()})
    scipy.io.savemat(root / "imagelabels.mat", {"labels": np.array([LABELS], dtype=np.uint8)})
    for number in range(1, len(LABELS) + 1):
        Image.new("L" if number == 1 else "RGB", (8, 6), number).save(root / f"jpg/image_{number:05d}.jpg")
    monkeypatch.setattr(
        datasets.Flowers102, "_check_integrity", lambda self: (self._base_folder / "imagelabels.mat").exists()
    )
    return root


def test_flowers_train_on_train_and_val(flowers, network):
    path = f"flowers://{flowers}"
    prepare(path, cache=flowers / "cache")
    train, evaluation = both(path)
    assert (len(train), len(evaluation), network) == (4, 4, [])
    assert [train.name(i) for i in range(4)] == [f"jpg/image_0000{number}.jpg" for number in (3, 1, 7, 4)]
    assert train.labels.tolist() == [0, 6, 8, 53] and evaluation.labels.tolist() == [101, 0, 53, 101]
    assert train.labels.dtype == np.int64 == evaluation.labels.dtype
    assert train.class_names == evaluation.class_names and len(train.class_names) == 102
    assert train.class_names[53] == "sunflower"
    assert train.open(1).mode == "RGB" and train.open(1).size == (8, 6)
    assert train.read(1) == (flowers / "jpg/image_00001.jpg").read_bytes()


def test_flowers_in_the_folder_of_torchvision(flowers):
    root = flowers.parent
    expected = {split: open_source(f"flowers://{flowers}", split) for split in ("train", "eval")}
    flowers.rename(root / "flowers-102")
    for split, theirs in (("train", ("train", "val")), ("eval", ("test",))):
        ours = open_source(f"flowers://{root}", split)
        parts = [datasets.Flowers102(str(root), name) for name in theirs]
        assert ours.labels.tolist() == [label for part in parts for label in part._labels]
        files = [str(Path(file).relative_to(root / "flowers-102")) for part in parts for file in part._image_files]
        assert [ours.name(i) for i in range(len(ours))] == files
        assert ours.read(0) == (root / "flowers-102" / files[0]).read_bytes()
        assert ours.labels.tolist() == expected[split].labels.tolist()


@needs_real_data
def test_the_real_flowers(tmp_path):
    """The images are not among the files, so they are made up."""
    for name in ("setid.mat", "imagelabels.mat"):
        (tmp_path / name).symlink_to(Path(REAL_DATA or "", "flowers", name).absolute())
    (tmp_path / "jpg").mkdir()
    for number in range(1, 8190):
        (tmp_path / f"jpg/image_{number:05d}.jpg").touch()
    train, evaluation = both(f"flowers://{tmp_path}")
    assert (len(train), len(evaluation)) == (2040, 6149)
    assert len({source.name(i) for source in (train, evaluation) for i in range(len(source))}) == 8189
    assert np.array_equal(np.bincount(train.labels), np.full(102, 20))  # ten to train, ten to validate
    assert set(evaluation.labels) == set(range(102))


def test_flowers_without_an_image(flowers):
    (flowers / "jpg/image_00007.jpg").unlink()
    with pytest.raises(ValueError, match=r"flowers://.*1 of 4 images are not in .*, the first: image_00007.jpg"):
        open_source(f"flowers://{flowers}")
    with pytest.raises(ValueError, match=rf"holds setid.mat but no folder 'train'; give flowers://{flowers}"):
        open_source(flowers)


def test_exit_code(flowers, monkeypatch, capsys, network):
    """Files of the authors that are damaged are reported, and not downloaded again."""
    (flowers / "imagelabels.mat").unlink()
    monkeypatch.setattr(sys, "argv", ["preview.py", "--data", f"flowers://{flowers}"])
    with pytest.raises(SystemExit) as stop:
        run_main(preview.main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"error: --data: flowers://{flowers} cannot be opened (Dataset not")
    assert network == []


# ---- Oxford-IIIT Pets ----

TRAIN = "Abyssinian_100 1 1 1\nAbyssinian_101 1 1 1\namerican_pit_bull_terrier_7 3 2 2\n"
TEST = "Bengal_12 6 1 2\nAbyssinian_2 1 1 1\n"


@pytest.fixture
def pets(tmp_path) -> Path:
    root = tmp_path / "pets"
    (root / "annotations").mkdir(parents=True)
    (root / "annotations/trainval.txt").write_text(TRAIN)
    (root / "annotations/test.txt").write_text(TEST)
    (root / "images").mkdir()
    for line in (TRAIN + TEST).splitlines():
        Image.new("RGBA", (8, 6), (200, 30, 60, 90)).save(root / f"images/{line.split()[0]}.jpg", "PNG")
    return root


def test_pets_have_37_classes(pets, network):
    """Some of the real files are PNGs or GIFs with other modes under the name of a JPEG."""
    path = f"pets://{pets}"
    prepare(path, cache=pets / "cache")
    train, evaluation = both(path)
    assert (len(train), len(evaluation), network) == (3, 2, [])
    assert train.labels.tolist() == [0, 0, 2] and evaluation.labels.tolist() == [5, 0]
    assert train.labels.dtype == np.int64 == evaluation.labels.dtype
    assert train.name(2) == "images/american_pit_bull_terrier_7.jpg"
    assert train.open(2).mode == "RGB" and train.open(2).size == (8, 6)
    assert train.read(2) == (pets / train.name(2)).read_bytes()
    assert train.class_names == evaluation.class_names and len(train.class_names) == 37
    assert train.class_names[:6] == [
        "Abyssinian",
        "Breed 2",
        "American Pit Bull Terrier",
        "Breed 4",
        "Breed 5",
        "Bengal",
    ]


def test_pets_in_the_folder_of_torchvision(pets):
    root = pets.parent
    pets.rename(root / "oxford-iiit-pet")
    for split, name in (("train", "trainval"), ("eval", "test")):
        ours, theirs = open_source(f"pets://{root}", split), datasets.OxfordIIITPet(root, name)
        assert ours.labels.tolist() == theirs._labels
        assert {ours.class_names[label] for label in ours.labels} == set(theirs.classes)
        assert [root / "oxford-iiit-pet" / ours.name(i) for i in range(len(ours))] == theirs._images


@needs_real_data
def test_the_real_pets(tmp_path):
    with tarfile.open(Path(REAL_DATA or "", "pets-sample.tar")) as archive:
        archive.extractall(tmp_path, filter="data")
    for split in ("train", "eval"):
        source = open_source(f"pets://{tmp_path}/pets", split)
        assert len(source) == 60 and np.bincount(source.labels).tolist() == [20, 20, 0, 0, 0, 20]
        assert {source.class_names[label] for label in source.labels} == {"Abyssinian", "American Bulldog", "Bengal"}
        assert source.open(59).mode == "RGB"


def listed(text: str, name: str = "trainval"):
    return lambda root: (root / f"annotations/{name}.txt").write_text(text)


BAD = {
    "no list": (lambda root: (root / "annotations/test.txt").unlink(), "train", r"test.txt"),
    "no images": (lambda root: (root / "images").rename(root / "jpg"), "train", "Dataset not found"),
    "one image": (lambda root: (root / "images/Abyssinian_101.jpg").unlink(), "train", "1 of 3 images .*Abyssinian_101.jpg"),
    "label": (listed("Abyssinian_100 38 1 1\n"), "train", "a label that is not from 1 to 37"),
    "label 0": (listed("Bengal_12 0 1 2\n", "test"), "eval", "a label that is not from 1 to 37"),
    "no number": (listed("Abyssinian_100 one 1 1\n"), "train", "invalid literal"),
    "fields": (listed("Abyssinian_100 1\n"), "train", "values to unpack"),
    "no test": (listed("", "test"), "eval", "lists no image"),
    "bytes": (lambda root: (root / "annotations/test.txt").write_bytes(b"\xff\xfe\x00"), "eval", "can't decode byte"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "split", "message"), BAD.values(), ids=BAD)
def test_bad_pets(pets, damage, split, message):
    damage(pets)
    with pytest.raises(ValueError, match=rf"^pets://.* cannot be opened \(.*{message}.*oxford-iiit-pet"):
        open_source(f"pets://{pets}", split)


def test_pets_given_as_a_folder_of_images(pets):
    with pytest.raises(ValueError, match=rf"holds annotations/trainval.txt but no folder 'train'; give pets://{pets}"):
        open_source(pets)
