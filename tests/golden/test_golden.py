"""Golden numbers: six small training runs give the losses in golden.json, so that moved code is shown to compute the same.

A run goes through what scripts rely on only: the launcher's main, configuration keys and metrics.jsonl. Its recipe stands in
golden.json, beside the numbers; where a key is renamed, rename it there. Where numbers change on purpose, write them anew,
from the repository's root:

    python -m tests.golden.test_golden

The file holds every number at full precision, so `git diff tests/golden/golden.json` afterwards shows each bit that changed.
To compare two commits on another machine, write a file at each, and `diff` them:

    python -m tests.golden.test_golden before.json
"""

import contextlib
import json
import math
import os
import platform
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.small_runs import slow_unless

GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 10
MORE = ("resnet-lars-zero0-1rank", "resnet-lars-fsdp3-2ranks")  # in `make test-all` only
THREADS = 1  # of a rank; the order of a sum, and so its last bits, depends on it
NUMBERS = ("loss", "grad_norm", "feature_std")

TOLERANCE = 1e-6  # relative; the same code on the same kernels is expected to be bit-equal
# Another torch or CPU brings other kernels of MKL and oneDNN, which add in another order. Ten steps enlarge these last bits:
# with the kernels of AVX2 or SSE instead of AVX-512 by up to 1.1e-5 in grad_norm, 7e-7 in loss. The recipes are chosen for that
# (small learning rates, AdamW with a large eps): otherwise a ReLU's input that changes its sign shows as 1e-2.
TOLERANCE_OTHER_KERNELS = 1e-4
DECIDE_KERNELS = ("torch", "cpu_capability", "cpu_name", "cpu_instruction_sets")


def read_golden(path: Path = GOLDEN) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def measured_with() -> dict:
    """Return what the last bits of a run may depend on."""
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch have none
    packages = ("torch", "deepspeed", "timm", "numpy", "torchvision", "pillow", "opencv-python-headless")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_name": cpu.get("cpu_name"),
        "cpu_instruction_sets": " ".join(sorted(name for name, has in cpu.items() if has is True)),
        "threads": THREADS,
    }


def train(settings: dict, out: str) -> None:
    """Run the launcher's main on this rank of a pool, inside the pool's process group."""
    import torch.distributed as dist

    from crossbatch.data.augment import opencv
    from crossbatch.engine.runtime import distributed
    from crossbatch.launch import pretrain

    flags = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["pretrain.py", "--out", out, f"--steps={STEPS}", *flags]))
        stack.enter_context(mock.patch.dict(os.environ, OMP_NUM_THREADS=str(THREADS), CUDA_VISIBLE_DEVICES=""))
        met = dist.PrefixStore(out, dist.distributed_c10d._get_default_store())  # the pool stays together
        stack.enter_context(mock.patch.object(distributed, "meet", lambda *_: met))
        for name in ("init_process_group", "destroy_process_group"):
            stack.enter_context(mock.patch(f"torch.distributed.{name}"))
        stack.enter_context(mock.patch("torch.cuda.is_available", return_value=False))
        # The numbers are older than the compiled colours, which equal PIL's (tests/data/test_backends.py), not OpenCV's.
        stack.enter_context(mock.patch("crossbatch.data.augment.opencv.colour", opencv.opencv_colour))
        torch.set_num_threads(THREADS)
        pretrain.main()


def measure(golden: dict, name: str, pools, out: Path) -> list[dict]:
    """Train a recipe and return one row {step, loss, grad_norm, feature_std} per optimizer step."""
    recipe = golden["recipes"][name]
    pools(recipe["ranks"]).run(train, golden["shared_settings"] | recipe["settings"], str(out))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: line[key] for key in ("step", *NUMBERS)} for line in lines]


def relative_difference(found: float | None, expected: float) -> float:
    """Return |found - expected| / |expected|; infinity where metrics.jsonl has null, for a number that is not finite."""
    return math.inf if found is None else abs(found - expected) / abs(expected)


def compare(name: str, found: list[dict], expected: list[dict], tolerance: float) -> tuple[list[str], float]:
    """Return a message for each number beyond `tolerance`, and the largest relative difference of all."""
    assert [row["step"] for row in found] == [row["step"] for row in expected] == [*range(1, STEPS + 1)]
    messages, largest = [], 0.0
    for found_row, expected_row in zip(found, expected, strict=True):
        for key in NUMBERS:
            difference = relative_difference(found_row[key], expected_row[key])
            largest = max(largest, difference)
            if difference > tolerance:
                messages.append(
                    f"{name}, step {expected_row['step']}: {key} is {found_row[key]!r}, golden.json has "
                    f"{expected_row[key]!r}; relative difference {difference:.1e}, allowed {tolerance:.0e}"
                )
    return messages, largest


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow_unless(name not in MORE)) for name in read_golden()["recipes"]]
)
def test_a_recipe_gives_the_golden_numbers(tmp_path, pools, name):
    golden = read_golden()
    was = golden["measured_with"]
    changed = {key: value for key, value in measured_with().items() if value != was.get(key)}
    tolerance = TOLERANCE_OTHER_KERNELS if changed.keys() & {*DECIDE_KERNELS} else TOLERANCE
    messages, largest = compare(
        name, measure(golden, name, pools, tmp_path), golden["recipes"][name]["steps"], tolerance
    )
    versions = [f"{key} is {value}, golden.json was measured with {was.get(key)}" for key, value in changed.items()]
    print(f"{name}: {f'largest relative difference {largest:.1e}' if largest else 'bit-equal'}", *versions, sep="\n")
    assert not messages, "\n".join([*messages, *versions])


def write(path: Path) -> None:
    """Train every recipe of golden.json and write `path`: the same file with the numbers of this code."""
    from tests.conftest import RankPool

    golden = read_golden() | {"measured_with": measured_with()}
    open_pools: dict[int, RankPool] = {}
    try:
        for name, recipe in golden["recipes"].items():
            ranks = recipe["ranks"]
            open_pools[ranks] = open_pools.get(ranks) or RankPool(ranks)
            with tempfile.TemporaryDirectory() as out:
                recipe["steps"] = measure(golden, name, open_pools.get, Path(out))
    finally:
        for pool in open_pools.values():
            pool.close()
    text = json.dumps(golden, indent=2)
    one_line_a_step = re.sub(
        r'\{\s+("step".*?)\s+\}', lambda row: "{" + re.sub(r"\s+", " ", row[1]) + "}", text, flags=re.S
    )
    path.write_text(one_line_a_step + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN)
