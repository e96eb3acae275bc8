"""Calls a command's main in the process of the test."""

import sys
from collections.abc import Callable
from types import ModuleType

from crossbatch.engine.runtime.exit_codes import run_main


def caller(command: ModuleType) -> Callable[..., int]:
    """Return `call(monkeypatch, *arguments)`, which runs a module of crossbatch.launch and returns its exit code."""

    def call(monkeypatch, *arguments) -> int:
        monkeypatch.setattr(sys, "argv", [f"{command.__name__.rpartition('.')[2]}.py", *map(str, arguments)])
        try:
            run_main(command.main)
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return call
