"""Run a command by its name: `crossbatch pretrain ...` and `python -m crossbatch.launch pretrain ...`.

Each command is the module of this package with its name. Its process begins with `run`, as that of `launch/pretrain.py` does.
"""

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from crossbatch import InputError, __version__
from crossbatch.engine.runtime.launchers import end_with_launcher
from crossbatch.engine.runtime.output import protect_streams
from crossbatch.engine.runtime.world import require_meeting_point, world_from_environment
from crossbatch.launch.arguments import ArgumentParser

COMMANDS = {
    "pretrain": "pretrain a backbone with MoCo v3 and BatchFormer",
    "knn": "classify by the nearest neighbours of a frozen backbone's features",
    "linear": "train a linear classifier on a frozen backbone",
    "finetune": "train a backbone and a new classifier on labelled images",
    "embed": "write the features of images to a .npy or .parquet file",
    "convert": "import, export, and pack images into tar shards",
    "plan": "predict whether a recipe fits, how long it takes, and what limits it",
    "replay": "make a step of a pretraining run again, and say what went wrong in it first",
    "preview": "draw the augmented views of a data set",
    "doctor": "print what this machine has and which path each stage takes",
}

# Commands whose processes are ranks, if the environment says so, and the flags that say so instead, or do without.
RANKED = ("pretrain", "knn", "linear", "finetune", "embed", "replay")
OTHERWISE = {"-h", "--help", "--dry-run", "--dist-url", "--multiprocessing-distributed", "--rank", "--world-size"}


def main() -> None:
    """Run the command that `sys.argv[1]` names with the arguments that follow; exit code 2 for any other name."""
    what = "\n".join(f"  {command:<10} {meaning}" for command, meaning in COMMANDS.items())
    parser = ArgumentParser(prog="crossbatch", description=what, usage="crossbatch COMMAND [--help] ...")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    name = parser.parse_args(sys.argv[1:2] or ["--help"]).command
    sys.argv[:2] = [str(Path(__file__).with_name(f"{name}.py"))]  # what starts the ranks of a node runs this file again
    run(name)


def run(name: str) -> NoReturn:
    """Run the command `name` with the arguments in `sys.argv`, and end this process with its exit code.

    Its imports take seconds. A Ctrl-C meanwhile ends the process at once, because a KeyboardInterrupt would show a traceback,
    or get lost in a library that tests whether it can import another.
    """
    end_with_launcher()
    protect_streams()
    if name in RANKED and not OTHERWISE & {argument.partition("=")[0] for argument in sys.argv}:
        _check_world()
    interactive = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else: a shell has started it with &
    if interactive:
        signal.signal(signal.SIGINT, _leave)
    module = importlib.import_module(f"crossbatch.launch.{name}")
    from crossbatch.engine.runtime.exit_codes import run_main

    if interactive:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run_main(module.main)
    sys.exit(0)


def _check_world() -> None:
    """End with code 2 if what a launcher has set cannot be, before the imports."""
    try:
        require_meeting_point(world_from_environment())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    print("stopped: interrupted before it began", file=sys.stderr, flush=True)
    os._exit(3)


if __name__ == "__main__":
    main()
