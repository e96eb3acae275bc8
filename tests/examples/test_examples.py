"""Every script of examples/ and the Python of the README run as they are, and are as short as they promise to be."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PUBLIC_CALLS = {"InputError", "RunStopped"}  # exceptions need no example of their own


def run(*command: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example_runs(script, tmp_path):
    assert run(sys.executable, str(script), cwd=tmp_path).strip(), "an example prints what it shows"


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
        run(sys.executable, "-c", block, cwd=tmp_path)


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
