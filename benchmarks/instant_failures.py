"""Prints a failure of a test when it happens, in case the run is ended from outside: `pytest -p benchmarks.instant_failures`"""

from typing import Any


def pytest_exception_interact(node: Any, report: Any) -> None:
    """Print where a test, or the collection of a file, has failed."""
    terminal = node.config.pluginmanager.get_plugin("terminalreporter")
    terminal.write_line(f"\nFAILED {report.nodeid}\n{report.longreprtext}", flush=True)
