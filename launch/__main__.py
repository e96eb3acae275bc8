"""Run a command by its name: `crossbatch pretrain ...` and `python -m crossbatch.launch pretrain ...`.

Each command is the module of this package with its name, the same that `python launch/pretrain.py` runs.
"""

import argparse
import importlib
import sys

from crossbatch import __version__
from crossbatch.launch.arguments import ArgumentParser

COMMANDS = {
    "pretrain": "pretrain a backbone with MoCo v3 and BatchFormer",
    "knn": "classify by the nearest neighbours of a frozen backbone's features",
    "linear": "train a linear classifier on a frozen backbone",
    "finetune": "train a backbone and a new classifier on labelled images",
    "convert": "import, export, and pack images into tar shards",
    "plan": "predict whether a recipe fits, how long it takes, and what limits it",
    "preview": "draw the augmented views of a data set",
    "doctor": "print what this machine has and which path each stage takes",
}


def main() -> None:
    """Run the command that `sys.argv[1]` names with the arguments that follow; exit code 2 for any other name."""
    what = "\n".join(f"  {command:<10} {meaning}" for command, meaning in COMMANDS.items())
    parser = ArgumentParser(prog="crossbatch", description=what, usage="crossbatch COMMAND [--help] ...")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    name = parser.parse_args(sys.argv[1:2] or ["--help"]).command
    from crossbatch.engine.runtime.exit_codes import run_main

    module = importlib.import_module(f"crossbatch.launch.{name}")
    sys.argv[:2] = [str(module.__file__)]  # what starts the ranks of a node runs this file again
    run_main(module.main)


if __name__ == "__main__":
    main()
