"""Translate former names of keys, which recipes, --set and the config.json of old runs may use."""

from typing import Any

from crossbatch import InputError
from crossbatch.engine.config.keys import join
from crossbatch.models.loss import loss_from_add_bf

# The path of a former name -> the name of its key, which stands in the same section.
ALIASES = {
    "optimizer.params.lr": "base_lr",
    "optimizer.params.clip": "clip_trust_ratio",
    "crossbatch.model.dim": "projection_dim",
    "crossbatch.batchformer.add_bf": "loss",
    "crossbatch.evaluate.knn_images": "knn_bank_size",
    "crossbatch.finetune.average": "ema_decay",
}


class Pairs(list):
    """Holds a JSON object as its (key, value) pairs, so that a key that is given twice can still be seen."""


def current_path(path: str) -> str:
    """Return the path of the key that `path`, which may be a former name, means."""
    return join(path.rpartition(".")[0], ALIASES[path]) if path in ALIASES else path


def former_name(path: str) -> str:
    """Return the end of a message about the key at `path`: its former name, by which the user may know it."""
    return "".join(f"; its former name is {alias}" for alias in ALIASES if current_path(alias) == path)


def rename(value: Any, path: str = "") -> Any:
    """Return a recipe, or what it gives at `path`, under the current names of its keys.

    Raises:
        InputError: if a key is given twice, or under both of its names with different values.
    """
    if path == "crossbatch.batchformer.add_bf":
        if type(value) is not int or value < 0:
            raise InputError(
                f"{path}: given {value!r}; allowed: a whole number >= 0; or set crossbatch.batchformer.loss"
            )
        return loss_from_add_bf(value)
    if not isinstance(value, (dict, Pairs)):
        return value
    section: dict[str, Any] = {}
    names: set[str] = set()
    for name, inner in value.items() if isinstance(value, dict) else value:
        given = join(path, name)
        if name in names:
            raise InputError(f"{given}: given twice; allowed: once; remove one of the two")
        names.add(name)
        current, inner = current_path(given), rename(inner, given)
        key = current.rpartition(".")[2]
        if key in section:
            check_agreement(current, section[key], inner)
        section[key] = inner
    return section


def check_agreement(path: str, value: Any, other: Any) -> None:
    """Raise InputError if a key that is given under both of its names has two values."""
    if value != other:
        raise InputError(
            f"{path}: given twice, as {value!r} and as {other!r}; allowed: once; remove one of the two{former_name(path)}"
        )
