"""Former names of keys, which recipes, --set and the config.json of old runs may use."""

from typing import Any

from crossbatch import InputError
from crossbatch.models.loss import loss_from_add_bf

# The path of an alias -> the name of its key, which stands in the same section.
ALIASES = {
    "optimizer.params.lr": "base_lr",
    "optimizer.params.clip": "clip_trust_ratio",
    "crossbatch.model.dim": "projection_dim",
    "crossbatch.batchformer.add_bf": "loss",
    "crossbatch.evaluate.knn_images": "knn_bank_size",
    "crossbatch.finetune.average": "ema_decay",
}


def current_path(path: str) -> str:
    """Return the path of the key that `path`, which may be an alias, means."""
    return f"{path.rpartition('.')[0]}.{ALIASES[path]}" if path in ALIASES else path


def current_value(path: str, value: Any) -> Any:
    """Return what a value given under `path`, which may be an alias, is for its key. Raises InputError."""
    if path != "crossbatch.batchformer.add_bf":
        return value
    if type(value) is not int:
        raise InputError(f"{path}: given {value!r}; allowed: a whole number; or set crossbatch.batchformer.loss")
    return loss_from_add_bf(value)


def rename(raw: dict[str, Any]) -> dict[str, str]:
    """Replace the aliases in a recipe, in place, by the keys that they mean.

    Returns:
        {path of the key: the alias that it was given as}, for messages.

    Raises:
        InputError: if an alias and its key are both given, with different values.
    """
    given = {}
    for alias in ALIASES:
        *parents, old = alias.split(".")
        section: Any = raw
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and old in section:
            name, path, value = ALIASES[alias], current_path(alias), current_value(alias, section.pop(old))
            if name in section and section[name] != value:
                raise contradiction(alias, value, path, section[name])
            section[name], given[path] = value, alias
    return given


def contradiction(path: str, value: Any, other: str, other_value: Any) -> InputError:
    """Return the error for one key that is given under two names with two values."""
    return InputError(
        f"{path}: means {value!r}, but {other}, another name of the same key, means {other_value!r}; allowed: one of the two; "
        f"remove {path if path in ALIASES else other}"
    )
