"""cifar.py, on files in torchvision's format that are small and have checksums of their own."""

import hashlib
import pickle
import socket
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from torchvision import datasets

from crossbatch import InputError
from crossbatch.data.decode import decode
from crossbatch.data.sources import has_evaluation_split, open_source, prepare
from crossbatch.data.sources.cifar import Cifar

NAMES = ["airplane", "bird", "cat"]


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def stored(tmp_path, monkeypatch, pixels) -> Path:
    """Seven training and three test images."""

    def write(name: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        (tmp_path / "files" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    flat, labels = pixels.reshape(10, -1), [i % 3 for i in range(10)]
    train = [write(f"{a}", {"data": flat[a:b], "labels": labels[a:b]}) for a, b in ((0, 4), (4, 7))]
    test = [write("test", {"data": flat[7:], "fine_labels": labels[7:]})]
    meta, md5 = write("meta", {"label_names": NAMES})
    monkeypatch.setattr(datasets.CIFAR10, "base_folder", "files")
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": meta, "md5": md5, "key": "label_names"})
    return tmp_path


def test_images_and_labels(stored, pixels):
    path = f"cifar10://{stored}"
    prepare(path)
    train, evaluation = open_source(path, "train"), pickle.loads(pickle.dumps(open_source(path, "eval")))
    assert has_evaluation_split(path) and (len(train), len(evaluation)) == (7, 3)
    assert train.class_names == NAMES and train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert train.labels.dtype == np.int64 and evaluation.labels.tolist() == [1, 2, 0]
    assert train.name(4) == "train/bird/00004" and evaluation.name(0) == "test/bird/00000"
    for source, index, number in ((train, 5, 5), (evaluation, 1, 8)):
        assert np.array_equal(np.asarray(source.open(index)), pixels[number].transpose(1, 2, 0))
        assert np.array_equal(np.asarray(decode(source.read(index))), pixels[number].transpose(1, 2, 0))


def test_not_there_and_no_network(tmp_path, monkeypatch):
    timeouts = []

    def refused(*args, **options):
        timeouts.append(socket.getdefaulttimeout())
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refused)
    message = r"(?s)^--data: cifar10://.*the download failed: .*download https://www.cs.toronto.edu.*unpack it in"
    with pytest.raises(InputError, match=message) as caught:
        prepare(f"cifar10://{tmp_path}", "--data")
    assert f"{tmp_path}/cifar-10-batches-py/data_batch_5\n" in str(caught.value) + "\n"
    assert timeouts and None not in timeouts and socket.getdefaulttimeout() is None
    with pytest.raises(InputError, match=r"(?s)^--data: cifar100://.*not found or corrupted.*/cifar-100-python/meta"):
        open_source(f"cifar100://{tmp_path}", "train", "--data")


def test_a_damaged_file(stored):
    file = stored / "files/test"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="not found or corrupted"):
        Cifar("cifar10", stored, "train")
