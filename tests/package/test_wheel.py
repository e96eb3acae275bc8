"""The wheel holds what the checkout has: commands, recipes, types; and importing a name loads no more than it needs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import crossbatch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked where nothing else of this checkout is."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)], check=True
    )
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def run(installed: Path, cwd: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_pretrains_from_the_wheel_with_a_recipe_inside_of_it(installed, tmp_path):
    out = run(
        installed,
        tmp_path,
        *("-m", "crossbatch.launch", "pretrain", "--deepspeed_config", "quickstart", "--steps", "2", "--out", "run"),
        *(
            "--data",
            "synthetic://64?size=32",
            "--set",
            "train_batch_size=16",
            "--set",
            "crossbatch.batchformer.group_size=16",
        ),
        *("--set", "crossbatch.evaluate.knn_every_epochs=0"),
    )
    assert "crossbatch linear --checkpoint run" in out or (tmp_path / "run" / "metrics.jsonl").exists()
    assert (tmp_path / "run" / "config.json").exists()


def test_wheel_has_types_and_everything_of_the_checkout(installed, tmp_path):
    assert (installed / "crossbatch" / "py.typed").exists()
    code = "import crossbatch; print(crossbatch.__file__); [getattr(crossbatch, name) for name in crossbatch.__all__]"
    assert run(installed, tmp_path, "-c", code).startswith(str(installed))


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_documentation_lists_every_public_name(page):
    text = (ROOT / page).read_text()
    assert [name for name in crossbatch.__all__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize(
    ("name", "unwanted"),
    [
        ("LARS", "cv2 timm torchvision PIL scipy nvidia deepspeed triton matplotlib tensorboard"),
        ("BatchFormer", "cv2 timm torchvision PIL scipy nvidia deepspeed matplotlib tensorboard"),
        ("convert_norms", "cv2 timm torchvision PIL scipy nvidia deepspeed matplotlib tensorboard"),
        ("chunked_backward", "cv2 timm torchvision PIL scipy nvidia deepspeed matplotlib tensorboard"),
        ("open_source", "cv2 timm deepspeed nvidia triton matplotlib tensorboard"),
    ],
)
def test_importing_a_name_loads_what_it_needs(installed, tmp_path, name, unwanted):
    code = "import sys, torch; before = set(sys.modules); import crossbatch; "
    code += f"crossbatch.{name}; print(*set(sys.modules) - before)"
    loaded = {module.split(".")[0] for module in run(installed, tmp_path, "-c", code).split()}
    assert loaded & set(unwanted.split()) == set()
