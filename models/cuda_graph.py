"""What follows the backbone as CUDA graphs: the launches of BatchFormer and heads, forward and backward, become one each.

For small batches, where launching a kernel takes longer than the kernel. A graph replays what was captured, with the same
addresses and sizes; so the parameters must stay where they are, nothing may talk to another rank, and what changes from step
to step (features, and the words of the dropout masks) comes in tensors.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# While it captures: the loader prepares images on the same GPU. Newer versions of torch can be told.
_LOOK_AT_THIS_THREAD_ONLY: dict[str, Any] = (
    {"capture_error_mode": "thread_local"}
    if "capture_error_mode" in inspect.signature(torch.cuda.make_graphed_callables).parameters
    else {}
)

Part = Callable[[Tensor, Tensor], Tensor]


def captured(parts: Sequence[nn.Module], features: Sequence[Tensor], words: Sequence[Tensor]) -> tuple[Part, ...]:
    """Each of `parts`, called with its features and words, as a graph for inputs like these, in today's autocast.

    The parts run a few times before they are captured; their buffers (running statistics) are put back.
    """
    device = features[0].device.type
    buffers = [buffer for part in parts for buffer in part.buffers()]
    before = [buffer.clone() for buffer in buffers]
    samples = tuple(
        (x.detach().clone().requires_grad_(x.requires_grad), word.clone())
        for x, word in zip(features, words, strict=True)
    )
    # Weights that autocast remembers as bf16 would be those of this step.
    autocast = torch.autocast(
        device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
    )
    with autocast:
        graphs = torch.cuda.make_graphed_callables(tuple(parts), samples, **_LOOK_AT_THIS_THREAD_ONLY)
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
    return graphs  # pyright: ignore[reportReturnType]
