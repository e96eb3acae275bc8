"""Says what a class is: the only place where the classes of training and of evaluation images are compared.

A class is a name (of a folder, or from the index that `shard_writer` keeps) or a number (in shards of other tools, which hold
labels without names). Equal names are the same class, and so are equal numbers. A name can be compared with a number only if
the name is one, such as the folders 0 to 11: as text they sort as 0, 1, 10, 11, 2, ..., so their positions say nothing. Other
names and numbers cannot be matched, because each tool has its own convention for the order.

Labels of an opened source are positions in `class_names`, always those of the training images.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_LABEL = 10**6 - 1
_SHOWN = 5


@dataclass(frozen=True)
class Classes:
    """Holds the classes of the images in a folder or file: their names by label, and which labels occur."""

    folder: Path | str
    names: list[str]
    are_numbers: bool  # the names are only the labels, written out
    present: np.ndarray  # int64, sorted

    def keys(self, by_number: bool) -> dict[str | int, int]:
        """Return {class: label} of the classes that occur, as numbers if `by_number`; ValueError if a name is no number."""
        names = {self.names[label]: label for label in self.present.tolist()}
        if not by_number:
            return {**names}
        if not all(name.isascii() and name.isdecimal() for name in names):
            raise ValueError("not numbers")
        return {int(name): label for name, label in names.items()}

    def __str__(self) -> str:
        return f"{self.folder} has {'the numbers' if self.are_numbers else 'the names'} {_shown(self.keys(False))}"


def number_classes(given: Sequence[str] | None, count: int, where: str) -> tuple[np.ndarray, list[str], bool]:
    """Return labels (int64), class names, and whether these are names, of images with the labels `given` as text.

    Whole numbers are labels as they are; other texts are names, and their sorted positions are the labels. With None, all
    `count` images get the label 0 of a class "unlabelled". Raises ValueError, which begins with `where`, if a number is out
    of range.
    """
    if given is None:
        return np.zeros(count, dtype=np.int64), ["unlabelled"], True
    classes = {*given}
    if not all(re.fullmatch(r"-?\d+", name, re.ASCII) for name in classes):
        position = {name: label for label, name in enumerate(sorted(classes))}
        return np.array([position[name] for name in given], dtype=np.int64), [*position], True
    wrong = [name for name in given if not 0 <= int(name) <= MAX_LABEL]
    if wrong:
        raise ValueError(
            f"{where}: labels out of range: {len(wrong)}, the first {wrong[0]}; allowed: names, or numbers "
            f"from 0 to {MAX_LABEL}"
        )
    labels = np.array([int(name) for name in given], dtype=np.int64)
    return labels, [str(label) for label in range(int(labels.max()) + 1)], False


def training_labels(training: Classes, evaluation: Classes) -> np.ndarray:
    """Return for each label of `evaluation` the label of the same class in `training`, int64; -1 where no image has it.

    Raises ValueError, with the classes of both, unless each class of `evaluation` is one of `training`.
    """
    by_number = training.are_numbers or evaluation.are_numbers
    try:
        wanted, found = training.keys(by_number), evaluation.keys(by_number)
    except ValueError:
        raise ValueError(
            f"{training}, and {evaluation}; names and numbers cannot be matched; name the class folders by the numbers, or "
            f"write the shards from class folders with launch/convert.py shards, which keeps the names"
        ) from None
    if len(wanted) < len(training.present) or len(found) < len(evaluation.present):
        raise ValueError(f"{training}, and {evaluation}; two names are the same number; rename one of them")
    if not found.keys() <= wanted.keys():
        only = {training.folder: wanted.keys() - found.keys(), evaluation.folder: found.keys() - wanted.keys()}
        shown = "; ".join(f"only in {folder}: {_shown(classes)}" for folder, classes in only.items() if classes)
        raise ValueError(
            f"{training.folder} and {evaluation.folder} have different classes ({shown}), {len(wanted)} and {len(found)} in "
            f"all; each class to evaluate on must be a class of the training images; remove or rename the others"
        )
    labels = np.full(len(evaluation.names), -1, dtype=np.int64)
    for name, label in found.items():
        labels[label] = wanted[name]
    return labels


def _shown(classes: Iterable[str | int]) -> str:
    ordered = sorted(classes, key=lambda name: (int(name) if str(name).isdecimal() else -1, str(name)))
    return ", ".join(map(str, ordered[:_SHOWN])) + (", ..." if len(ordered) > _SHOWN else "")
