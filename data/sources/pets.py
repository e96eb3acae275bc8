"""Oxford-IIIT Pets as its authors pack it: 3680 images of 37 breeds to train on (trainval), 3669 to evaluate on (test).

    DIR/annotations/trainval.txt, test.txt    lines "Abyssinian_100 1 1 1": name, label from 1, species, breed of the species
    DIR/images/Abyssinian_100.jpg ...

Labels are torchvision's (OxfordIIITPet): the file's less 1. There are always 37 classes, also where a folder holds images of
fewer, so that a head trained on a part of the data set fits the whole; breeds that no line names are called by number.
"""

from pathlib import Path

import numpy as np

from crossbatch.data.sources.image_list import ImageList, Layout

LAYOUT = Layout(
    "pets",
    "oxford-iiit-pet",
    {
        "annotations/trainval.txt": "lines 'Abyssinian_100 1 1 1': name, label, species, breed",
        "annotations/test.txt": "the same of the test images",
        "images/": "Abyssinian_100.jpg, ...",
    },
    "https://www.robots.ox.ac.uk/~vgg/data/pets/",
)
_NUM_CLASSES = 37
_LISTS = {"train": "trainval.txt", "eval": "test.txt"}


def open_pets(directory: str | Path, split: str, key: str = "crossbatch.data.path") -> ImageList:
    """The images of `split` ("train" or "eval"). Raises InputError, naming `key`, if `directory` holds anything else."""
    root = LAYOUT.root(directory, key)
    try:
        lists = {which: _read_list(root / "annotations" / name) for which, name in _LISTS.items()}
        images = lists[split]
        if not images:
            raise ValueError(f"annotations/{_LISTS[split]} lists no image")
        files, labels = [f"{name}.jpg" for name, _ in images], [label for _, label in images]
        class_names = _breeds([image for some in lists.values() for image in some])
        return ImageList(root / "images", files, np.array(labels, dtype=np.int64), class_names)
    except (OSError, ValueError) as error:
        raise LAYOUT.error(key, directory, str(error)) from error


def _read_list(file: Path) -> list[tuple[str, int]]:
    """(name, label from 0) of each line. Raises ValueError or OSError."""
    images = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 4 or not fields[1].isdecimal():
            raise ValueError(f"line {number} of {file.name} is {line[:80]!r}")
        if not 1 <= int(fields[1]) <= _NUM_CLASSES:
            raise ValueError(f"line {number} of {file.name} has label {fields[1]}; allowed: 1 to {_NUM_CLASSES}")
        images.append((fields[0], int(fields[1]) - 1))
    return images


def _breeds(images: list[tuple[str, int]]) -> list[str]:
    """The name of each class, of the names of its images: american_bulldog_100 is an American Bulldog."""
    breeds: dict[int, str] = {}
    for name, label in images:
        breed = name.rpartition("_")[0].replace("_", " ").title()
        if breeds.setdefault(label, breed) != breed:
            raise ValueError(f"label {label + 1} is {breeds[label]} and {breed}")
    return [breeds.get(label, f"Breed {label + 1}") for label in range(_NUM_CLASSES)]
