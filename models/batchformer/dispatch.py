"""Chooses the kernel that computes what lies between the linear layers, and says why the others cannot run.

    fused      Triton passes on a GPU (from V100 on: no `tl.dot`), torch operators on blocks that fit a core's cache on a CPU;
               scores in tiles
    sdpa       torch's scaled_dot_product_attention, for dropout 0
    reference  a few lines of fp32: runs everywhere

A kernel is a module with the three functions of `reference`. "auto" takes the first that runs.
"""

import importlib.util
from typing import NamedTuple

import torch

NAMES = ("fused", "sdpa", "reference")
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # found, not imported


class Situation(NamedTuple):
    """Hold everything that the choice of a kernel depends on."""

    device: str
    capability: tuple[int, int] | None = None  # of a GPU
    dropout: float = 0.5

    @staticmethod
    def on(device: torch.device, dropout: float) -> "Situation":
        """Return the situation of a layer on `device`."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return Situation(device.type, capability, dropout)


def reason_against(name: str, situation: Situation) -> str | None:
    """Say why a kernel cannot run; None means that it can."""
    device, capability, dropout = situation
    if name == "sdpa" and dropout:
        return f"torch's attention draws its own dropout masks; it can be used only with dropout 0, not {dropout:g}"
    if name == "fused" and device == "cuda":
        assert capability is not None
        if not _HAS_TRITON:
            return "Triton is not installed"
        if capability < (7, 0):
            return f"Triton needs sm_70 (V100) or later; this is sm_{capability[0]}{capability[1]}"
    if name == "fused" and device not in ("cpu", "cuda"):
        return f"it is written for NVIDIA GPUs and for CPUs; this is {device}"
    return None


def choose(name: str, situation: Situation) -> str:
    """Return the kernel of this name, or for "auto" the first that runs. Raises ValueError for one that cannot run."""
    runs = [kernel for kernel in NAMES if reason_against(kernel, situation) is None]
    if name == "auto":
        return runs[0]
    if name not in runs:
        reason = (reason_against(name, situation) if name in NAMES else None) or "there is no such kernel"
        raise ValueError(f"kernel is {name!r}, but {reason}; allowed: {', '.join(('auto', *runs))}")
    return name


def explain(name: str, situation: Situation) -> tuple[str, str]:
    """Return the kernel for `name` and why it was chosen; for "auto", why no other."""
    chosen = choose(name, situation)
    if name != "auto":
        return chosen, "as configured"
    reasons = [f"{kernel}: {reason}" for kernel in NAMES if (reason := reason_against(kernel, situation))]
    return chosen, "; ".join(reasons) or "runs here"
