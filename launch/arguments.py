"""Flags that the commands share, and the flags of the released code of MoCo v3 and BatchFormer as aliases of keys."""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crossbatch import InputError

# The names of a flag, the path of the key that it sets, and its type; None is a switch that sets true.
Alias = tuple[tuple[str, ...], str, Callable[[str], Any] | None]

# The aliases of pretraining.
ALIASES: list[Alias] = [
    (("-a", "--arch"), "crossbatch.model.arch", str),
    (("-b", "--batch-size"), "train_batch_size", int),
    (("-j", "--workers"), "crossbatch.data.workers", int),
    (("-p", "--print-freq"), "crossbatch.log.every_steps", int),
    (("--epochs",), "crossbatch.schedule.epochs", int),
    (("--warmup-epochs",), "crossbatch.schedule.warmup_epochs", float),
    (("--optimizer",), "optimizer.type", str),
    (("--lr", "--learning-rate"), "optimizer.params.base_lr", float),
    (("--wd", "--weight-decay"), "optimizer.params.weight_decay", float),
    (("--momentum",), "optimizer.params.momentum", float),
    (("--moco-dim",), "crossbatch.model.projection_dim", int),
    (("--moco-mlp-dim",), "crossbatch.model.mlp_dim", int),
    (("--moco-t",), "crossbatch.model.temperature", float),
    (("--stop-grad-conv1",), "crossbatch.model.stop_grad_conv1", None),
    (("--moco-m",), "crossbatch.momentum.base", float),
    (("--moco-m-cos",), "crossbatch.momentum.cosine", None),
    (("--crop-min",), "crossbatch.data.crop_min", float),
    (("--add_bf", "--add-bf"), "crossbatch.batchformer.add_bf", int),
    (("--seed",), "crossbatch.seed", int),
]


class ArgumentParser(argparse.ArgumentParser):
    """A parser that takes flags only as they are spelt in its help, and shows the description with its line breaks.

    argparse takes any unambiguous beginning of a flag, so that a flag that is added later can break a command that ran.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        settings = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **settings}
        super().__init__(*arguments, **settings)


def add_config_flags(
    parser: argparse.ArgumentParser, aliases: list[Alias] = ALIASES, title: str = "the originals' flags"
) -> None:
    """Add --deepspeed_config, --set, --data and the aliases; `overrides` turns them into key=value pairs."""
    parser.add_argument("--deepspeed_config", metavar="F", help="recipe, e.g. ds_configs/bs4096.json")
    parser.add_argument(
        "--set", metavar="path=value", action="append", default=[], help="override a key; repeatable, applied last"
    )
    parser.add_argument("--data", metavar="DIR", help="crossbatch.data.path")
    parser.add_argument("data_positional", metavar="DATA", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher adds it
    group = parser.add_argument_group(f"{title}, as aliases of configuration keys")
    for flags, path, kind in aliases:
        if kind is None:
            group.add_argument(*flags, dest=path, action="store_const", const="true", help=path)
        else:
            group.add_argument(*flags, dest=path, type=kind, metavar="X", help=path)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a command that trains step by step: --out, --steps, --resume, --allow-change."""
    parser.add_argument("--out", metavar="DIR", type=Path, help="run directory (default runs/<recipe>-<time>)")
    parser.add_argument(
        "--steps", metavar="N", type=positive, help="stop at optimizer step N, counted from the start of the run"
    )
    parser.add_argument(
        "--resume", metavar="auto|none|DIR", type=resume, default="auto", help="what to continue (default auto)"
    )
    parser.add_argument(
        "--allow-change", metavar="KEY", action="append", default=[], help="resume although KEY changed; repeatable"
    )


def positive(text: str) -> int:
    """Read a whole number of at least 1, as a type for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"given {text}; allowed: >= 1")
    return int(text)


def resume(text: str) -> str:
    """Read the value of --resume, as a type for argparse; the released code of MoCo v3 writes '' for none."""
    return text or "none"


def overrides(arguments: argparse.Namespace, aliases: list[Alias] = ALIASES) -> list[str]:
    """Return what the flags say as key=value pairs: data, aliases, then --set in its order."""
    pairs = []
    data = arguments.data or arguments.data_positional
    if data:
        pairs.append(f"crossbatch.data.path={json.dumps(data)}")
    for _, path, kind in aliases:
        value = getattr(arguments, path)
        if value is not None:
            value = {"lars": "LARS", "adamw": "AdamW"}.get(value, value) if path == "optimizer.type" else value
            pairs.append(f"{path}={json.dumps(value) if kind is str else value}")
    return pairs + arguments.set


def default_out(recipe: str | None, name: str) -> Path:
    """Return the folder that a command writes to without --out; `name` stands in for the recipe's."""
    return Path("runs") / f"{Path(recipe).stem if recipe else name}-{time.strftime('%Y%m%d-%H%M%S')}"


def writable_folder(path: Path) -> Path:
    """Return `path` if it can be created and written; checked before any data is opened. Raises InputError."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"--out {path}: {existing} is not a writable folder; choose another with --out")
    return path
