"""What of a configuration a run may change when it is resumed.

Free is what only says how the same numbers are computed, watched or kept. Anything else, from the seed to the length of the
schedule, would make another run out of it, and has to be named with --allow-change.
"""

from collections.abc import Iterable
from typing import Any

from crossbatch import InputError
from crossbatch.engine.config import Config, key_paths, parse_config, to_dict
from crossbatch.models.backbones import family

FREE = (
    "zero_optimization",
    "crossbatch.sharding",
    "crossbatch.evaluate",
    "crossbatch.log",
    "crossbatch.checkpoint",
    "crossbatch.watch",
    "crossbatch.deterministic",
    "crossbatch.data.path",  # what counts is that it holds as many images
    "crossbatch.data.workers",
    "crossbatch.data.max_skipped_fraction",
    "crossbatch.model.checkpoint",  # what a fine-tuning started from
    "crossbatch.model.checkpoint_activations",
    "crossbatch.model.cuda_graph",
    "crossbatch.batchformer.kernel",
)
CHUNK = "train_micro_batch_size_per_gpu"


def check_allowed(keys: Iterable[str], schema: type = Config) -> None:
    """Raises InputError for a --allow-change that names no key or section of `schema`."""
    paths = key_paths(schema)
    for key in keys:
        if not any(_covers(key, path) for path in paths):
            raise InputError(
                f"--allow-change {key}: no such key; allowed: the path of a key or a section of config.json"
            )


def differences(
    saved: dict[str, Any], ours: dict[str, Any], allowed: Iterable[str] = (), schema: type = Config
) -> list[str]:
    """ "key: was A, is B" for each key that changes the run and is neither free nor allowed.

    Both are resolved configurations as a checkpoint's `config.json` holds them, with `world_size`. A saved "auto", as an
    imported checkpoint has it, is left to the run that goes on.
    """
    before, now = _flat(_with_defaults(saved, schema)), _flat(_with_defaults(ours, schema))
    free = [*FREE, *allowed]
    changed = [
        f"{path}: was {before.get(path)!r}, is {now.get(path)!r}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) not in ("auto", now.get(path)) and path != CHUNK
        if not any(_covers(key, path) for key in free)
    ]
    norms_saw, norms_see = _norm_batches(saved), _norm_batches(ours)
    if norms_saw not in (None, norms_see) and CHUNK not in free:
        changed.append(f"{CHUNK}: the norms of a ResNet saw {norms_saw}, and would see {norms_see}")
    return changed


def _norm_batches(config: dict[str, Any]) -> str | None:
    """Over which images the norms of the backbone take their statistics: of all, that is the same for any number of ranks."""
    world_size, chunk = config["world_size"], config[CHUNK]
    if chunk == "auto":
        return None
    chunks = -(-config["train_batch_size"] // world_size // chunk)
    if family(config["crossbatch"]["model"]["arch"]) == "vit" or chunks == 1:
        return "the whole batch"
    return f"one of {chunks} chunks of {world_size} ranks"


def _with_defaults(config: dict[str, Any], schema: type) -> dict[str, Any]:
    """A key that did not exist when the checkpoint was written had what is its default now."""
    return to_dict(parse_config({name: value for name, value in config.items() if name != "world_size"}, schema))


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in section.items():
        path = f"{prefix}{name}"
        flat |= _flat(value, f"{path}.") if isinstance(value, dict) and name != "backbone_args" else {path: value}
    return flat


def _covers(key: str, path: str) -> bool:
    return path == key or path.startswith(f"{key}.")
