"""Every Triton kernel compiles for GPUs that are not here, and fits on a multiprocessor of each of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")

# Bytes that a program may have (CUDA C++ Programming Guide, table of compute capabilities); sm_86 is the smallest after sm_80.
SHARED_BYTES = {70: 96 * 1024, 80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65536  # of a multiprocessor
RECORDED = (70, 80, 90)  # what kernels.json knows: V100, A100, H100
KERNELS = {
    "_softmax_dropout",
    "_softmax_dropout_backward",
    "_bias_relu",
    "_bias_relu_backward",
    "_add_norm",
    "_add_norm_backward",
    "_squares",
    "_finish",
    "_update",
    "_mean_gray",
    "_jitter",
    "_blur",
    "_strip_statistics",
    "_merge",
    "_normalise",
    "_backward_sums",
    "_input_gradients",
}
PLANTED = "too_much_shared_memory"


def compiled(capabilities: Iterable[int], *options: str) -> list[dict]:
    """Return what the kernels take of a GPU of each capability, compiled in a process of its own."""
    try:
        ptxas = triton.knobs.nvidia.ptxas.path
    except RuntimeError as error:
        pytest.skip(f"needs ptxas: {error}")
    assert ptxas
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, str(script), *options, *map(str, capabilities)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict]) -> None:
    for kernel in found:
        assert kernel["shared_bytes"] <= SHARED_BYTES[kernel["capability"]], f"too much shared memory: {kernel}"
        assert kernel["spilled_bytes"] == 0, kernel
        assert kernel["registers"] * kernel["threads"] <= REGISTERS // 2, kernel  # two programs at once, at least


def is_recorded() -> bool:
    """Return whether kernels.json was written with the Triton that is installed."""
    return json.loads(Path(__file__).with_name("kernels.json").read_text())["triton"] == triton.__version__


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return compiled(RECORDED, "--planted", *([] if is_recorded() else ["--largest"]))


def test_every_kernel_fits(found):
    """In every type, width and group size, with dropout and without; of another Triton than the recorded, only the largest."""
    kernels = [kernel for kernel in found if kernel["kernel"] != PLANTED]
    check(kernels)
    for capability in RECORDED:
        assert {kernel["kernel"] for kernel in kernels if kernel["capability"] == capability} == KERNELS
    if is_recorded():
        assert len(kernels) >= 1000
        new = sum(not kernel["known"] for kernel in kernels)
        assert not new, f"{new} that fit are not in kernels.json: python tests/compile_kernels.py --record 70 80 90"


@pytest.mark.parametrize("capability", RECORDED)
def test_too_much_shared_memory_is_found(found, capability):
    planted = [kernel for kernel in found if kernel["kernel"] == PLANTED and kernel["capability"] == capability]
    assert len(planted) == 1 and not planted[0]["known"]
    with pytest.raises(AssertionError, match="too much shared memory"):
        check(planted)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_fits_compiled_anew(found, capability):
    """And takes what kernels.json says."""
    kernels = compiled([capability], "--anew")
    check(kernels)
    if capability in RECORDED and is_recorded():
        recorded = [k for k in found if k["capability"] == capability and k["kernel"] != PLANTED]
        assert [{**kernel, "known": True} for kernel in kernels] == recorded
