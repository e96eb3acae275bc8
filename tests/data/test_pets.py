"""pets.py: the authors' layout, torchvision's reading of the same, and whatever else may lie there."""

import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from crossbatch import InputError
from crossbatch.data.sources import has_evaluation_split, open_source, prepare

TRAIN = "Abyssinian_100 1 1 1\nAbyssinian_101 1 1 1\namerican_pit_bull_terrier_7 3 2 2\n"
TEST = "Bengal_12 6 1 2\nAbyssinian_2 1 1 1\n"


@pytest.fixture
def pets(tmp_path) -> Path:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/trainval.txt").write_text(TRAIN)
    (tmp_path / "annotations/test.txt").write_text(TEST)
    (tmp_path / "images").mkdir()
    for line in (TRAIN + TEST).splitlines():
        Image.new("RGBA", (8, 6), (200, 30, 60, 90)).save(tmp_path / f"images/{line.split()[0]}.jpg", "PNG")
    return tmp_path


def test_images_and_labels(pets):
    """Some of the real files are PNGs or GIFs with other modes under the name of a JPEG."""
    path = f"pets://{pets}"
    prepare(path, cache=pets / "cache")
    train, evaluation = open_source(path, "train"), pickle.loads(pickle.dumps(open_source(path, "eval")))
    assert has_evaluation_split(path) and (len(train), len(evaluation)) == (3, 2)
    assert train.labels.tolist() == [0, 0, 2] and evaluation.labels.tolist() == [5, 0]
    assert train.labels.dtype == np.int64 == evaluation.labels.dtype
    assert train.name(2) == "images/american_pit_bull_terrier_7.jpg"
    assert train.open(2).mode == "RGB" and train.open(2).size == (8, 6)
    assert train.read(2) == (pets / train.name(2)).read_bytes()


def test_37_classes_with_the_same_names_in_both_splits(pets):
    names = open_source(f"pets://{pets}", "train").class_names
    assert names == open_source(f"pets://{pets}", "eval").class_names and len(names) == 37
    assert names[:6] == ["Abyssinian", "Breed 2", "American Pit Bull Terrier", "Breed 4", "Breed 5", "Bengal"]


def test_the_same_as_torchvision(pets):
    """In its own folder, too."""
    root = pets.with_name(f"{pets.name}-torchvision")
    root.mkdir()
    pets.rename(root / "oxford-iiit-pet")
    for split, name in (("train", "trainval"), ("eval", "test")):
        ours, theirs = open_source(f"pets://{root}", split), datasets.OxfordIIITPet(root, name)
        assert ours.labels.tolist() == theirs._labels
        assert {ours.class_names[label] for label in ours.labels} == set(theirs.classes)
        assert [root / "oxford-iiit-pet" / ours.name(i) for i in range(len(ours))] == theirs._images


@pytest.mark.skipif(
    "CROSSBATCH_REAL_DATA" not in os.environ, reason="CROSSBATCH_REAL_DATA names no folder with pets-sample.tar"
)
def test_the_real_sample(tmp_path):
    with tarfile.open(Path(os.environ["CROSSBATCH_REAL_DATA"], "pets-sample.tar")) as archive:
        archive.extractall(tmp_path, filter="data")
    for split in ("train", "eval"):
        source = open_source(f"pets://{tmp_path}/pets", split)
        assert len(source) == 60 and np.bincount(source.labels).tolist() == [20, 20, 0, 0, 0, 20]
        assert {source.class_names[label] for label in source.labels} == {"Abyssinian", "American Bulldog", "Bengal"}
        for index, label in enumerate(source.labels):
            breed = source.class_names[label].replace(" ", "_")
            assert source.name(index).lower().startswith(f"images/{breed.lower()}_")
            assert source.open(index).mode == "RGB"


def listed(text: str, name: str = "trainval"):
    return lambda root: (root / f"annotations/{name}.txt").write_text(text)


BAD = {
    "no list": (lambda root: (root / "annotations/test.txt").unlink(), "train", r"annotations/test.txt missing in "),
    "no images": (lambda root: (root / "images").rename(root / "jpg"), "train", r"images/ missing in "),
    "nothing": (lambda root: root.rename(f"{root}-gone"), "eval", "trainval.txt, annotations/test.txt, images/ missing"),
    "one image": (
        lambda root: (root / "images/Abyssinian_101.jpg").unlink(), "train", "1 of 3 images are not in .*: Abyssinian_101.jpg"
    ),
    "label": (listed("Abyssinian_100 38 1 1\n"), "train", "line 1 of trainval.txt has label 38; allowed: 1 to 37"),
    "label 0": (listed(f"{TRAIN}Bengal_12 0 1 2\n"), "eval", "line 4 of trainval.txt has label 0; allowed: 1 to 37"),
    "no number": (listed("Abyssinian_100 one 1 1\n"), "train", "line 1 of trainval.txt is 'Abyssinian_100 one 1 1'"),
    "fields": (listed("Abyssinian_100 1\n"), "train", "line 1 of trainval.txt is 'Abyssinian_100 1'"),
    "two breeds": (listed(f"{TRAIN}Bengal_12 1 1 2\n"), "train", "label 1 is Abyssinian and Bengal"),
    "no test": (listed("\n", "test"), "eval", "annotations/test.txt lists no image"),
    "bytes": (lambda root: (root / "annotations/test.txt").write_bytes(b"\xff\xfe\x00"), "eval", "can't decode byte"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "split", "message"), BAD.values(), ids=BAD)
def test_bad_input(pets, damage, split, message):
    damage(pets)
    with pytest.raises(InputError, match=rf"^--data: pets://.* cannot be opened \(.*{message}") as caught:
        open_source(f"pets://{pets}", split, "--data")
    for part in ("annotations/trainval.txt", "annotations/test.txt", "images/"):
        assert f"\n  {pets}/{part} " in str(caught.value)


def test_its_folder_given_as_one_of_images(pets):
    with pytest.raises(InputError, match=rf"holds annotations/trainval.txt but no folder 'train'; give pets://{pets}"):
        open_source(pets, "train")
