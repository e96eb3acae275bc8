"""Flowers-102 as its authors pack it. Training is on `trnid` and `valid` together (2040 images), evaluation on `tstid` (6149),
as in the published transfer results.

    DIR/setid.mat          trnid, valid, tstid: the numbers of their images, from 1 (uint16 [1, n])
    DIR/imagelabels.mat    labels: the class of every image, from 1 (uint8 [1, 8189])
    DIR/jpg/image_00001.jpg ...

The files hold no names of the classes; those are torchvision's.
"""

from pathlib import Path

import numpy as np
import scipy.io
from torchvision import datasets

from crossbatch.data.sources.image_list import ImageList, Layout

LAYOUT = Layout(
    "flowers",
    "flowers-102",
    {
        "setid.mat": "which images are for training and which for testing",
        "imagelabels.mat": "the class of each image",
        "jpg/": "image_00001.jpg, image_00002.jpg, ...",
    },
    "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
)
_VARIABLES = {"train": ("trnid", "valid"), "eval": ("tstid",)}
_CLASSES = datasets.Flowers102.classes


def open_flowers(directory: str | Path, split: str, key: str = "crossbatch.data.path") -> ImageList:
    """The images of `split` ("train" or "eval"). Raises InputError, naming `key`, if `directory` holds anything else."""
    root = LAYOUT.root(directory, key)
    try:
        numbers, labels = read_split(root, split)
        files = [f"image_{number:05d}.jpg" for number in numbers]
        return ImageList(root / "jpg", files, labels, list(_CLASSES))
    except (OSError, ValueError) as error:
        raise LAYOUT.error(key, directory, str(error)) from error


def read_split(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of its images (int64 [n], from 1) and their classes (int64 [n], from 0). Raises ValueError or OSError."""
    variables = _VARIABLES[split]
    numbers = np.concatenate([_whole_numbers(root / "setid.mat", name) for name in variables])
    labels = _whole_numbers(root / "imagelabels.mat", "labels")
    if not len(numbers):
        raise ValueError(f"{' and '.join(variables)} of setid.mat list no image")
    _require_within(numbers, len(labels), f"numbers in {' and '.join(variables)} of setid.mat")
    _require_within(labels, len(_CLASSES), "labels in imagelabels.mat")
    return numbers, labels[numbers - 1] - 1


def _whole_numbers(file: Path, name: str) -> np.ndarray:
    """The array `name` of a .mat file, whatever its type (MATLAB's default is double), as int64 [n]."""
    try:
        stored = scipy.io.loadmat(file, variable_names=[name])
    except Exception as error:  # damage makes scipy's parser raise anything
        raise ValueError(f"{file.name} cannot be read as a .mat file: {type(error).__name__}: {error}") from error
    if name not in stored:
        raise ValueError(f"{file.name} has no array {name!r}")
    array = np.asarray(stored[name])
    if array.dtype.kind not in "iuf" or (array != np.rint(array)).any():
        raise ValueError(f"{name!r} in {file.name} does not hold whole numbers")
    return array.astype(np.int64).ravel()


def _require_within(numbers: np.ndarray, last: int, what: str) -> None:
    outside = numbers[(numbers < 1) | (numbers > last)]
    if len(outside):
        raise ValueError(f"{len(outside)} {what} are out of range, such as {outside[0]}; allowed: 1 to {last}")
