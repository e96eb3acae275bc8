"""Says what a run may change in its configuration when it is resumed.

Keys that the schema declares `resumable` may change: they say only how the same numbers are computed, watched or kept. Any
other change, from the seed to the length of the schedule, makes a different run and must be accepted with --allow-change.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from crossbatch import InputError
from crossbatch.engine.config import Config, key_paths, parse_config, resumable_keys, to_dict
from crossbatch.engine.config.aliases import current_path
from crossbatch.engine.config.keys import covers
from crossbatch.engine.nested import flatten
from crossbatch.models.backbones import family

CHUNK = "train_micro_batch_size_per_gpu"
NORM_RANKS = "crossbatch.model.norm_ranks"


def check_allowed(keys: Iterable[str], schema: type = Config) -> None:
    """Raise InputError for a --allow-change that names no key or section of `schema`."""
    paths = key_paths(schema)
    for key in keys:
        if not any(covers(current_path(key), path) for path in paths):
            raise InputError(f"--allow-change {key}: no such key; allowed: the path of a key or section in config.json")


def is_allowed(path: str, keys: Iterable[str]) -> bool:
    """Return whether one of the keys and sections of --allow-change covers the key `path`."""
    return any(covers(current_path(key), path) for key in keys)


def fixed_values(config: Mapping[str, Any], schema: type, allowed: Iterable[str] = ()) -> dict[str, Any]:
    """Return {key path: value} of all keys that a resumed run must keep.

    Args:
        config: a configuration as a plain dict. A key that it lacks has its default, because it is newer than the checkpoint.
        schema: the class that declares the keys and says which of them are resumable.
        allowed: further keys and sections to leave out.
    """
    known = {name: value for name, value in config.items() if name != "world_size"}
    flat = flatten(to_dict(parse_config(known, schema)), leaves=("backbone_args",))
    free = [*resumable_keys(schema), *(current_path(key) for key in allowed)]
    return {path: value for path, value in flat.items() if not any(covers(key, path) for key in free)}


def differences(
    saved: dict[str, Any], config: dict[str, Any], allowed: Iterable[str] = (), schema: type = Config
) -> list[str]:
    """Return "key: was A, is B" for each key that changes the run and is neither resumable nor allowed.

    Both are resolved configurations with `world_size`: `saved` as a checkpoint's `config.json` holds it, `config` of the run
    that goes on. A saved "auto", as imported checkpoints have it, leaves the choice to that run.
    """
    allowed = list(allowed)
    before, now = fixed_values(saved, schema, allowed), fixed_values(config, schema, allowed)
    changed = [
        f"{path}: was {before.get(path)!r}, is {now.get(path)!r}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) not in ("auto", now.get(path)) and path != CHUNK
    ]
    norms_saw, norms_see = _norm_batches(saved), _norm_batches(config)
    if norms_saw not in (None, norms_see) and CHUNK in now:
        changed.append(f"{CHUNK}: the norms of a ResNet saw {norms_saw}, and would see {norms_see}")
    ranks, (then, today) = now.get(NORM_RANKS), (saved["world_size"], config["world_size"])
    if isinstance(ranks, int) and ranks == before.get(NORM_RANKS) and then != today:
        differ = "which see other shares of the batch"
        changed.append(f"{NORM_RANKS}: was {ranks} of {then} ranks, is {ranks} of {today}, {differ}")
    return changed


def _norm_batches(config: dict[str, Any]) -> str | None:
    """Describe the images over which the norms of the backbone take their statistics; None if that is not decided yet."""
    world_size, chunk = config["world_size"], config[CHUNK]
    if chunk == "auto":
        return None
    chunks = -(-config["train_batch_size"] // world_size // chunk)
    if family(config["crossbatch"]["model"]["arch"]) == "vit" or chunks == 1:
        return "the whole batch"
    return f"one of {chunks} chunks of {world_size} ranks"
