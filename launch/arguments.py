"""Declare the flags that commands share, and the flags of MoCo v3's and BatchFormer's released code as aliases of keys."""

import argparse
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from crossbatch import InputError

# The names of a flag, the path of the key that it sets, and its type; None is a switch that sets true.
Alias = tuple[tuple[str, ...], str, Callable[[str], Any] | None]


def number(text: str) -> float:
    """Return a number from a command line, as an int where it is one."""
    return int(text) if text.isdecimal() else float(text)


# The aliases of pretraining.
ALIASES: list[Alias] = [
    (("-a", "--arch"), "crossbatch.model.arch", str),
    (("-b", "--batch-size"), "train_batch_size", int),
    (("-j", "--workers"), "crossbatch.data.workers", int),
    (("-p", "--print-freq"), "crossbatch.log.every_steps", int),
    (("--epochs",), "crossbatch.schedule.epochs", number),
    (("--warmup-epochs",), "crossbatch.schedule.warmup_epochs", float),
    (("--optimizer",), "optimizer.type", lambda name: {"lars": "LARS", "adamw": "AdamW"}.get(name, name)),
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
    """Parses flags only as they are spelt in its help, shows the description with its line breaks, and keeps errors short.

    argparse takes any unambiguous beginning of a flag, so that a flag that is added later can break a command that ran.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        settings = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **settings}
        super().__init__(*arguments, **settings)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong without the usage, which can fill a screen, and exit with code 2."""
        self.exit(2, f"error: {message}; {self.prog} --help lists the flags\n")


def add_config_flags(
    parser: argparse.ArgumentParser,
    aliases: list[Alias] = ALIASES,
    title: str = "flags of MoCo v3's and BatchFormer's released code",
) -> None:
    """Add --deepspeed_config, --set, --data and the aliases; `overrides` turns them into key=value pairs."""
    from crossbatch.engine.config.aliases import current_path  # late: `crossbatch --help` should not import torch

    add = parser.add_argument
    add("--deepspeed_config", metavar="F", help="recipe, e.g. ds_configs/bs4096.json")
    what = "override any key; repeatable, applied last"
    add("--set", metavar="path=value", action="append", default=[], help=what)
    add(
        "--data",
        metavar="DIR",
        help="the images: a folder, list://FILE, hf://NAME, s3://BUCKET/DIR, cifar10://DIR, ...; sets crossbatch.data.path",
    )
    add("data_positional", metavar="DATA", nargs="?", help=argparse.SUPPRESS)
    # DeepSpeed's own help shows this switch before --deepspeed_config; its launcher adds the next one.
    add("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    group = parser.add_argument_group(f"{title}, as aliases of configuration keys")
    for flags, path, kind in aliases:
        key = current_path(path)
        meaning = key if key == path else f"{key}, given as the released code's number"
        if kind is None:
            group.add_argument(*flags, dest=path, action="store_const", const="true", help=meaning)
        else:
            group.add_argument(*flags, dest=path, type=kind, metavar="X", help=meaning)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a command whose result can be continued: --out and --resume."""
    parser.add_argument("--out", metavar="DIR", type=Path, help="run directory (default runs/<recipe>-<time>)")
    what = "auto (default): continue what is in --out; none: start anew; or a path to continue from"
    # The released code of MoCo v3 writes '' for none.
    parser.add_argument("--resume", metavar="X", type=lambda text: text or "none", default="auto", help=what)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a command that trains step by step: --out, --resume, --steps, --allow-change."""
    add_output_flags(parser)
    what = "stop at optimizer step N, counted from the start of the run"
    parser.add_argument("--steps", metavar="N", type=positive, help=what)
    what = "resume even though the value of KEY has changed; repeatable"
    parser.add_argument("--allow-change", metavar="KEY", action="append", default=[], help=what)


def positive(text: str) -> int:
    """Read a whole number of at least 1, as a type for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"given {text}; allowed: a whole number >= 1")
    return int(text)


def overrides(arguments: argparse.Namespace, aliases: list[Alias] = ALIASES) -> list[str]:
    """Return what the flags say as key=value pairs: data, aliases, then --set in its order.

    Raises InputError if the data are given twice.
    """
    if arguments.data and arguments.data_positional:
        raise InputError(
            f"DATA: given {shown_path(arguments.data_positional)} beside --data {shown_path(arguments.data)}; allowed: one of "
            f"the two; leave one out"
        )
    data = arguments.data or arguments.data_positional
    pairs = [f"crossbatch.data.path={json.dumps(data)}"] if data else []
    for _, path, kind in aliases:
        value = getattr(arguments, path)
        if value is not None:
            pairs.append(f"{path}={json.dumps(value) if kind is str else value}")
    return pairs + arguments.set


def shown_path(path: str) -> str:
    """Return a data path for a message, without the credentials that an address may hold."""
    return re.sub(r"://[^/@]*@", "://", path.partition("?")[0]) if "://" in path else path


def output_folder(arguments: argparse.Namespace, name: str) -> Path:
    """Return --out or, without it, runs/<recipe>-<time>; `name` stands in for the recipe's.

    Raises:
        InputError: if it cannot be created or written; this is checked before any data is opened.
    """
    recipe = Path(arguments.deepspeed_config or name).stem
    path = arguments.out or Path("runs") / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"--out {path}: {existing} is not a writable folder; choose another with --out")
    return path
