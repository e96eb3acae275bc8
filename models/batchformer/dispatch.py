"""Which kernel computes what lies between the linear layers, and why not another.

    fused      Triton passes on a GPU (from V100 on: no `tl.dot`), torch operators in blocks of a cache on a CPU; scores in
               tiles, or in a flash-style kernel for large groups
    sdpa       torch's scaled_dot_product_attention, for dropout 0
    reference  a few lines of fp32: runs everywhere

All three have the functions of `reference`. "auto" takes the first that runs.
"""

import importlib.util
from dataclasses import dataclass
from typing import Protocol

import torch

from crossbatch.models.batchformer.dropout import Mask

NAMES = ("fused", "sdpa", "reference")

FLASH_FROM = 8192  # images of a group; from where on it is faster than tiles is not yet measured
FLASH_FEATURES = 512  # of a head, at most


class Kernel(Protocol):
    """See `reference` for the three functions."""

    def attention(
        self, q_SHQD: torch.Tensor, k_SHGD: torch.Tensor, v_SHGD: torch.Tensor, mask: Mask
    ) -> torch.Tensor: ...

    def bias_relu(self, x_SQC: torch.Tensor, bias_C: torch.Tensor, mask: Mask) -> torch.Tensor: ...

    def add_norm(
        self,
        x_SQC: torch.Tensor,
        y_SQC: torch.Tensor,
        weight_C: torch.Tensor,
        bias_C: torch.Tensor,
        eps: float,
        mask: Mask,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Situation:
    """What the choice depends on."""

    device: str
    capability: tuple[int, int] | None = None  # of a GPU
    dropout: float = 0.5

    @staticmethod
    def on(device: torch.device, dropout: float) -> "Situation":
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return Situation(device.type, capability, dropout)


def reason_against(name: str, situation: Situation) -> str | None:
    """Why the kernel cannot run; None where it can."""
    if name == "sdpa" and situation.dropout:
        return f"torch's attention draws its own masks, and dropout {situation.dropout:g} goes by position in the batch"
    if name == "fused" and situation.device == "cuda":
        assert situation.capability is not None
        if not _has_triton():
            return "Triton is not installed"
        if situation.capability < (7, 0):
            return f"Triton needs sm_70 (V100) or later; this is sm_{situation.capability[0]}{situation.capability[1]}"
    if name == "fused" and situation.device not in ("cpu", "cuda"):
        return f"written for GPUs of NVIDIA and for CPUs; this is {situation.device}"
    return None


def reason_against_flash(
    device: str, capability: tuple[int, int] | None, dtype: torch.dtype, features: int, images: int
) -> str | None:
    """Why fused attention takes tiles rather than the flash-style kernel; None where it takes the latter."""
    if device != "cuda" or capability is None:
        return "written for GPUs"
    if capability < (8, 0):
        return f"needs tensor cores that Triton can use (sm_80); this is sm_{capability[0]}{capability[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes fp16 and bf16; given {str(dtype).removeprefix('torch.')}"
    if features > FLASH_FEATURES:
        return f"takes at most {FLASH_FEATURES} features of a head; given {features}"
    if images < FLASH_FROM:
        return f"for groups of {FLASH_FROM} images and more (its gain in speed is not yet measured); given {images}"
    return None


def check(name: str, situation: Situation) -> None:
    """Raises ValueError where the kernel was asked for by name and cannot run."""
    against = {kernel: reason_against(kernel, situation) for kernel in NAMES}
    if name in against and (reason := against[name]) is not None:
        allowed = ", ".join(["auto", *(kernel for kernel in NAMES if against[kernel] is None)])
        raise ValueError(f"batchformer.kernel: given {name}; {reason}; allowed: {allowed}")


def choose(name: str, situation: Situation) -> str:
    """This kernel, or for "auto" the first that runs. Raises ValueError where a named one cannot."""
    check(name, situation)
    return next(kernel for kernel in NAMES if name in ("auto", kernel) and reason_against(kernel, situation) is None)


def explain(name: str, situation: Situation) -> tuple[str, str]:
    """The kernel for `name` here, and why; for "auto", why no other."""
    if name != "auto":
        return choose(name, situation), "as configured"
    against = {kernel: reason_against(kernel, situation) for kernel in NAMES}
    reasons = [f"{kernel}: {reason}" for kernel, reason in against.items() if reason is not None]
    return choose(name, situation), "; ".join(reasons) or "runs here"


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
