"""Refuse a GPU that the installed torch cannot use, before a run starts without it or fails at its first kernel."""

import contextlib
import ctypes
import re
from pathlib import Path

import torch

from crossbatch import InputError
from crossbatch.engine.runtime.world import hides_gpus, world_from_environment

ON_THE_CPU = "set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
OLDER = "pip install 'torch==2.10.*' 'torchvision==0.25.*' (in a checkout: make install CUDA=cuda12, which changes DALI, too)"
NEWER = "pip install --upgrade torch torchvision (in a checkout: make install CUDA=cuda13, which changes DALI, too)"


def check_gpus() -> None:
    """Check that torch can use the GPUs of this node's ranks.

    Raises:
        InputError: if torch has no code for one of them, or if it sees none where the machine has one. An empty
            CUDA_VISIBLE_DEVICES says that none shall be used.
    """
    if not torch.cuda.is_available():
        devices = nvidia_devices()
        if devices and not hides_gpus():
            raise InputError(f"{devices[0]}: is a GPU that torch does not see: {_why_unseen()}, or {ON_THE_CPU}")
        return
    world, archs = world_from_environment(), built_for()
    for index in sorted({world.local_rank, *range(world.local_size)} & {*range(torch.cuda.device_count())}):
        major, minor = torch.cuda.get_device_capability(index)
        if not has_code_for((major, minor), archs):
            if (major, minor) < (7, 0):
                remedy = "take a V100 or later"
            else:
                remedy = f"install another: {OLDER if (major, minor) < (7, 5) else NEWER}"
            raise InputError(
                f"GPU {index}: {torch.cuda.get_device_name(index)} is sm_{major}{minor}, but torch {torch.__version__} is "
                f"built for {' '.join(archs)}; {remedy}, or {ON_THE_CPU}"
            )


def nvidia_devices() -> list[Path]:
    """Return the device files of this machine's NVIDIA GPUs, whether torch can use them or not."""
    return sorted(Path("/dev").glob("nvidia[0-9]*"))


def built_for() -> list[str]:
    """Return the architectures that torch has code for; unlike torch.cuda.get_arch_list() of torch 2.10, also without a GPU."""
    flags = getattr(torch._C, "_cuda_getArchFlags", None)  # absent without CUDA
    text: str = (flags and flags()) or ""
    return text.split()


def driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA (major, minor) that the NVIDIA driver can run; None without a driver."""
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return (version.value // 1000, version.value % 1000 // 10) if version.value else None


def has_code_for(capability: tuple[int, int], archs: list[str]) -> bool:
    """Return whether a build for `archs`, as torch names them, runs on a GPU of `capability`.

    Code for sm_86 runs on every later GPU of the same major capability; compute_86 is compiled by the driver for any later GPU.
    Endings: sm_90a runs on 9.0 only, sm_100f within the major capability.
    """
    for arch in archs:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if found is None:
            return True  # not of NVIDIA
        kind, major, minor, ending = found[1], int(found[2]), int(found[3]), found[4]
        if ending == "a":
            fits = capability == (major, minor)
        elif kind == "sm" or ending == "f":
            fits = capability[0] == major and capability[1] >= minor
        else:
            fits = capability >= (major, minor)
        if fits:
            return True
    return not archs


def _why_unseen() -> str:
    """Return why torch sees no GPU, and what to do about it."""
    driver, cuda = driver_cuda(), torch.version.cuda
    if cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install one with: {NEWER}"
    if driver is None:
        return "there is no NVIDIA driver (libcuda.so.1); install it, or start the container with it"
    if driver[0] < int(cuda.split(".")[0]):
        older = f", install an older torch: {OLDER}" if driver[0] == 12 else ""
        return (
            f"the driver runs CUDA {driver[0]}.{driver[1]} at most, and torch {torch.__version__} is built for CUDA {cuda}; "
            f"update the driver{older}"
        )
    return "its driver does not answer, or CUDA_VISIBLE_DEVICES names no GPU; see what nvidia-smi says"
