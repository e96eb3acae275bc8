"""Run a command by its name: `crossbatch pretrain ...` and `python -m crossbatch.launch pretrain ...`.

Each command is the module of this package with its name, the same that `python launch/pretrain.py` runs.
"""

import importlib
import sys

from crossbatch import __version__

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
    """Dispatch `sys.argv[1]` to the command of that name; exit code 2 for any other."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        print(__version__)
        return
    if name not in COMMANDS:
        lines = [f"  {command:<10} {what}" for command, what in COMMANDS.items()]
        text = "\n".join(["usage: crossbatch COMMAND [--help] ...", "", *lines])
        if name in ("-h", "--help"):
            print(text)
            return
        print(f"error: crossbatch: given {name!r}; allowed: {', '.join(COMMANDS)}\n\n{text}", file=sys.stderr)
        sys.exit(2)
    from crossbatch.engine.runtime.exit_codes import run_main

    module = importlib.import_module(f"crossbatch.launch.{name}")
    sys.argv[:2] = [str(module.__file__)]  # what starts the ranks of a node runs this file again
    run_main(module.main)


if __name__ == "__main__":
    main()
