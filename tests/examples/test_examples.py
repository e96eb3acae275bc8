"""Every script of examples/ and the Python of the README run as they are, and are as short as they promise to be."""

import multiprocessing
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.jobs import IMPORTED_ONCE

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PUBLIC_CALLS = {"InputError", "RunStopped"}  # exceptions need no example of their own


def run(script: Path, folder: Path) -> str:
    """Run a script in a process that has the large packages imported already, and return what it printed."""
    output, errors = folder / "output", folder / "errors"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED_ONCE])
    process = context.Process(target=_run, args=(str(script), str(folder), str(output), str(errors)))
    process.start()
    process.join(240)
    alive = process.is_alive()
    process.kill()
    printed = output.read_text()
    assert not alive and process.exitcode == 0, printed + errors.read_text()
    return printed


def _run(script: str, folder: str, *streams: str) -> None:
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    sys.argv = [script]
    runpy.run_path(script, run_name="__main__")


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example_runs(script, tmp_path):
    printed = run(script, tmp_path)
    assert printed.strip(), "an example prints what it shows"
    differences = re.findall(r"differ.*(?:by|:) (\S+)$", printed, flags=re.MULTILINE)
    assert bool(differences) == ("difference" in script.read_text())
    assert all(float(difference) < 1e-4 for difference in differences), printed
    assert "other pixels" not in printed


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example_is_short(script):
    assert len(script.read_text().splitlines()) <= 40


def test_every_public_name_has_an_example():
    import crossbatch

    text = "\n".join(script.read_text() for script in EXAMPLES)
    missing = [name for name in crossbatch.__all__ if name not in PUBLIC_CALLS and name not in text]
    assert missing == []


def test_python_of_the_readme_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "block.py").write_text(block)
        run(tmp_path / "block.py", tmp_path)


def test_examples_in_the_documentation_are_the_files():
    """If this fails: paste the example into the page that shows it."""
    shown = 0
    for page in (ROOT / "docs").glob("*.md"):
        for name, code in re.findall(
            r'```python title="(examples/\w+\.py)"\n(.*?)```', page.read_text(), flags=re.DOTALL
        ):
            assert code == (ROOT / name).read_text(), f"{page.name}: {name}"
            shown += 1
    assert shown > 0
