"""Modules as CUDA graphs: their launches, forward and backward, become one each.

For small batches, where launching a kernel takes longer than the kernel. A graph replays what was captured, with the same
addresses and sizes; so the parameters must stay where they are, nothing may talk to another rank, and what changes from step
to step (features, dropout seeds) comes in tensors.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# The loader prepares images on the same GPU meanwhile; newer versions of torch can be told to watch one thread only.
_THIS_THREAD_ONLY: dict[str, Any] = {"capture_error_mode": "thread_local"}

Part = Callable[[Tensor, Tensor], Tensor]


def capture(parts: Sequence[nn.Module], samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Part, ...]:
    """Capture each of `parts`, called with features and dropout seeds like its sample, under the current autocast.

    The parts run a few times before they are captured; their buffers (running statistics) are restored.
    """
    device = samples[0][0].device.type
    buffers = [buffer for part in parts for buffer in part.buffers()]
    before = [buffer.clone() for buffer in buffers]
    copies = tuple((x.detach().clone().requires_grad_(x.requires_grad), seeds.clone()) for x, seeds in samples)
    known = inspect.signature(torch.cuda.make_graphed_callables).parameters
    # Without its cache, since weights that autocast remembers as bf16 would be those of this step.
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    with torch.autocast(device, dtype, enabled, cache_enabled=False):
        options = {name: value for name, value in _THIS_THREAD_ONLY.items() if name in known}
        graphs = torch.cuda.make_graphed_callables(tuple(parts), copies, **options)
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
    return graphs  # pyright: ignore[reportReturnType]
