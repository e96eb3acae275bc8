"""Every Triton kernel compiles for GPUs that are not here, and fits on a multiprocessor of each of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

# Bytes that a program may have (CUDA C++ Programming Guide, table of compute capabilities); sm_86 is the smallest after sm_80.
SHARED_BYTES = {70: 96 * 1024, 80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65536  # of a multiprocessor
QUICK = (70, 90)  # V100 and H100
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


def compiled(option: str, capabilities: Iterable[int]) -> list[dict]:
    """Return what the kernels take of a GPU of each capability, compiled in a process of its own."""
    triton = pytest.importorskip("triton", reason="needs Triton")
    try:
        ptxas = triton.knobs.nvidia.ptxas.path
    except RuntimeError as error:
        pytest.skip(f"needs ptxas: {error}")
    assert ptxas
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, str(script), option, *map(str, capabilities)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict]) -> None:
    for kernel in found:
        assert kernel["shared_bytes"] <= SHARED_BYTES[kernel["capability"]], f"too much shared memory: {kernel}"
        assert kernel["spilled_bytes"] == 0, kernel
        assert kernel["registers"] * kernel["threads"] <= REGISTERS // 2, kernel  # two programs at once, at least


@pytest.fixture(scope="module")
def largest() -> list[dict]:
    return compiled("--planted", QUICK)


def test_the_largest_kernels_fit(largest):
    """At the width of a ResNet-50, each with the most inputs."""
    found = [kernel for kernel in largest if kernel["kernel"] != PLANTED]
    check(found)
    for capability in QUICK:
        assert {kernel["kernel"] for kernel in found if kernel["capability"] == capability} == KERNELS


@pytest.mark.parametrize("capability", QUICK)
def test_too_much_shared_memory_is_found(largest, capability):
    planted = [kernel for kernel in largest if kernel["kernel"] == PLANTED and kernel["capability"] == capability]
    assert len(planted) == 1
    with pytest.raises(AssertionError, match="too much shared memory"):
        check(planted)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_kernel_fits(capability):
    """In every type, width and group size, with dropout and without."""
    check(compiled("--all", [capability]))
