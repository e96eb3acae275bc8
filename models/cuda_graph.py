"""Runs modules as CUDA graphs: one launch replays all kernels of a forward or of a backward pass.

That pays for small batches, where launching a kernel takes longer than the kernel runs. A graph replays what was captured,
with the same addresses and sizes; so the parameters must stay where they are, nothing may talk to another rank, and what
changes from step to step (features, dropout seeds) comes in tensors.

While a graph is captured, no other thread may allocate memory of the GPU or pinned memory: older versions of torch (2.11 among
them) then fail, at random. The engine closes its loader first.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

# Newer versions of torch can be told to watch one thread only; others may allocate then.
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
    # The graphs keep nodes of autograd that belong to the stream of the capture, of which torch would warn in a backward pass.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    # Without its cache, since weights that autocast remembers as bf16 would be those of this step.
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    with torch.autocast(device, dtype, enabled, cache_enabled=False):
        options = {name: value for name, value in _THIS_THREAD_ONLY.items() if name in known}
        graphs = torch.cuda.make_graphed_callables(tuple(parts), copies, **options)
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
    return tuple(_once_a_step(graph, part) for graph, part in zip(cast(tuple[Part, ...], graphs), parts, strict=True))


def _once_a_step(graph: Part, part: nn.Module) -> Part:
    """Return `graph` with a check that no gradient is pending when its backward pass begins.

    A replay writes gradients where those of the last one are, and autograd hands out that memory as `.grad`. So a second
    backward pass before the gradients are cleared would count its own twice and lose the first (pytorch issue 181723).
    """
    trained = [parameter for parameter in part.parameters() if parameter.requires_grad]

    def check(_: Tensor) -> None:
        if any(parameter.grad is not None for parameter in trained):
            raise RuntimeError(
                "cuda_graph: parameters behind the backbone have gradients from an earlier backward pass, which a replay would "
                "overwrite; make one backward pass a step and call optimizer.zero_grad() after it, or set cuda_graph to False"
            )

    def replay(features: Tensor, dropout_seeds: Tensor) -> Tensor:
        output = graph(features, dropout_seeds)
        if output.requires_grad:
            output.register_hook(check)
        return output

    return replay
