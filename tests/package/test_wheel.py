"""The wheel holds what the checkout has: commands, recipes, types; and importing a name loads no more than it needs."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import crossbatch

ROOT = Path(__file__).parents[2]
# Public names, and packages of a library's interest, with what importing one must not load.
NEEDS = {
    "LARS": "cv2 timm torchvision PIL scipy nvidia deepspeed triton matplotlib tensorboard",
    "BatchFormer": "cv2 timm torchvision PIL scipy nvidia deepspeed matplotlib tensorboard",
    "convert_norms": "cv2 timm torchvision PIL scipy nvidia deepspeed matplotlib tensorboard",
    "chunked_backward": "cv2 timm torchvision PIL scipy nvidia deepspeed matplotlib tensorboard",
    "open_source": "cv2 timm deepspeed nvidia triton matplotlib tensorboard",
    "crossbatch.models": "cv2 timm torchvision PIL scipy deepspeed triton",
    "crossbatch.engine.optimizers": "cv2 timm torchvision PIL scipy nvidia deepspeed triton",
}


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


@pytest.mark.long
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
        *("--set", "crossbatch.evaluate.knn_every_epochs=0", "--set", "crossbatch.data.workers=0"),
        *("--set", "crossbatch.sharding=fsdp"),  # DeepSpeed takes 5 s to import
        *("--set", "crossbatch.data.backend=torchvision"),  # numba would compile OpenCV's colours for this folder, 15 s
    )
    assert "crossbatch linear --checkpoint run" in out or (tmp_path / "run" / "metrics.jsonl").exists()
    assert (tmp_path / "run" / "config.json").exists()


# Forks for each of the names, as torch takes seconds to import; prints the package's file, and what each name has loaded.
LOADS = """
import importlib, os, sys, torch
names = sys.argv[1:]
for name in names:
    if os.fork() == 0:
        before = set(sys.modules)
        import crossbatch
        for one in crossbatch.__all__ if name == "everything" else [name]:
            getattr(crossbatch, one) if one in crossbatch.__all__ else importlib.import_module(one)
        print(name, crossbatch.__file__, *set(sys.modules) - before, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""


@pytest.fixture(scope="module")
def loaded(installed, tmp_path_factory) -> dict[str, list[str]]:
    """What each name of NEEDS, and all names of the package, load from the wheel: the package's file, then modules."""
    names = [*NEEDS, "everything"]
    lines = run(installed, tmp_path_factory.mktemp("loads"), "-c", LOADS, *names).splitlines()
    found = {name: modules for name, *modules in map(str.split, lines)}
    assert [*found] == names
    return found


def test_wheel_has_types_and_everything_of_the_checkout(installed, loaded):
    assert (installed / "crossbatch" / "py.typed").exists()
    assert loaded["everything"][0].startswith(str(installed))


@pytest.mark.parametrize(
    ("extra", "torch", "torchvision", "dali"),
    [("cuda12", "2.10.0", "0.25.0", "nvidia-dali-cuda120"), ("cuda13", "2.11.0", "0.26.0", "nvidia-dali-cuda130")],
)
def test_torch_and_dali_are_for_one_cuda(installed, extra, torch, torchvision, dali):
    """PyPI's torch is built for CUDA 12 up to 2.10, which has the last code for a V100, and for CUDA 13 from 2.11 on."""
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    required = [Requirement(text) for text in distribution.requires or ()]
    chosen = [one for one in required if one.marker and one.marker.evaluate({"extra": extra})]
    versions = {"torch": ("2.10.0", "2.11.0"), "torchvision": ("0.25.0", "0.26.0")}
    allowed = {one.name: [*one.specifier.filter(versions.get(one.name, ()))] for one in chosen if one.marker}
    assert {name: found for name, found in allowed.items() if found} == {"torch": [torch], "torchvision": [torchvision]}
    assert [name for name in allowed if "dali" in name] == [dali]


def test_deepspeed_is_not_older_than_its_mended_races(installed):
    """0.19.3 has pull request 8080; up to 0.19.7, stages 1 and 2 do not skip a step that is not finite."""
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    (deepspeed,) = (one for one in map(Requirement, distribution.requires or ()) if one.name == "deepspeed")
    assert [*deepspeed.specifier.filter(["0.19.2", "0.19.7", "0.19.8"])] == ["0.19.8"]


MAKE = ["make", "--dry-run", "--no-print-directory", "-C", str(ROOT)]


def test_make_installs_for_the_cuda_that_was_chosen_last(tmp_path):
    """It removes the libraries of the other CUDA, whose files have the same names."""
    make = [*MAKE, "install", f"VENV={tmp_path}"]
    for number, other in ((12, 13), (13, 12)):
        said = subprocess.run([*make, f"CUDA=cuda{number}"], check=True, capture_output=True, text=True).stdout
        assert f"'.[cuda{number},test,dev]'" in said
        assert f"cu(da)?{other}0?' | xargs -r {tmp_path}/bin/python -m pip uninstall" in said
    (tmp_path / "installed-cuda12").touch()
    assert "pip" not in subprocess.run(make, check=True, capture_output=True, text=True).stdout  # nor cuda13's


def test_make_test_runs_compiled_kernels_where_there_is_a_gpu(tmp_path):
    (tmp_path / "installed-cuda13").touch()
    said = subprocess.run([*MAKE, "test", f"VENV={tmp_path}"], check=True, capture_output=True, text=True).stdout
    assert f"test ! -e /dev/nvidiactl || {tmp_path}/bin/python -m pytest -m gpu" in said.splitlines()


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_documentation_lists_every_public_name(page):
    text = (ROOT / page).read_text()
    assert [name for name in crossbatch.__all__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize(("name", "unwanted"), NEEDS.items(), ids=NEEDS)
def test_importing_a_name_loads_what_it_needs(loaded, name, unwanted):
    packages = {module.split(".")[0] for module in loaded[name][1:]}
    assert "crossbatch" in packages and packages & set(unwanted.split()) == set()
