"""Says how near a step comes to what this machine can do: the bytes that it moves, and its convolutions alone.

    of_bandwidth      the time that the bytes moved would take at the speed of a large copy, as a share of the time taken
    of_convolutions   the time of the backbone's convolutions and linear layers, one by one, as a share of the time taken

Both are measured in the process that measures the step; engine/bytes_moved.py counts the bytes. The second share compares with
a step in which norms, activations, heads and optimizer take no time: a ResNet cannot reach 100 % without fusing them into its
convolutions.
"""

import functools
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.measure import block_ms, call_ms, events_ms
from benchmarks.rows import Row
from crossbatch.data.augment.parameters import height_width
from crossbatch.engine.bytes_moved import BytesMoved
from crossbatch.engine.config import ResolvedConfig, autocast_dtype
from crossbatch.engine.sketch import shapes_only, without_memory
from crossbatch.engine.tasks.build import build_model
from crossbatch.models import NUM_VIEWS


def copy_row(megabytes: int) -> Row:
    """Measure copying so many MB (1e6 bytes) on this machine's device; the setting "gb_per_s" counts them read and written."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source, target = torch.zeros(2, megabytes * 250_000, device=device)
    sample = events_ms if device == "cuda" else block_ms
    samples = [sample(lambda: target.copy_(source)) for _ in range(6)][1:]
    row = Row.of_samples(f"copy of {megabytes} MB", samples, settings={"megabytes": megabytes})
    row.settings["gb_per_s"] = 2 * megabytes / row.p50
    return row


def bytes_moved(call: Callable[[], Any], device: torch.device) -> int:
    """Make one call and return the bytes that its operators read and write on `device`."""
    with BytesMoved(device.type) as counted:
        call()
    return counted.total


class Products(NamedTuple):
    """Holds the milliseconds of a backbone's convolutions and linear layers on one chunk, one layer after the other."""

    forward_ms: float
    backward_ms: float

    def of_step(self, chunks: int, passes: float) -> float:
        """Return the milliseconds of these layers in a step of `chunks` chunks with `passes` forward passes over each."""
        return chunks * (passes * self.forward_ms + self.backward_ms)


def products(cfg: ResolvedConfig, images: int) -> Products:
    """Measure the layers of the backbone of `cfg`, in its precision, for a chunk of `images` images with both views."""
    model, size = cfg.crossbatch.model, height_width(cfg.crossbatch.data.image_size)
    arguments = (repr(model), size, cfg.precision, NUM_VIEWS * images, cfg.device.type)
    if arguments not in _measured:
        backbone = without_memory(lambda: build_model(cfg)).online.backbone
        shapes: list[tuple[nn.Module, torch.Size]] = []
        hooks = [
            layer.register_forward_pre_hook(lambda layer, args: shapes.append((layer, args[0].shape)))
            for layer in backbone.modules()
            if isinstance(layer, (nn.Conv2d, nn.Linear))
        ]
        with shapes_only(cfg.precision), torch.no_grad():
            backbone(torch.empty(2 * NUM_VIEWS, 3, *size))  # norms need more than one value a view
        for hook in hooks:
            hook.remove()
        # The first layer has no gradient of its input. Equal layers are measured once.
        kinds = Counter((_kind(layer), tuple(shape), i > 0) for i, (layer, shape) in enumerate(shapes))
        dtype, device = autocast_dtype(cfg.precision) or torch.float32, cfg.device.type
        forward = backward = 0.0
        for (kind, shape, has_input_gradient), count in kinds.items():
            shape = (NUM_VIEWS * images, *shape[1:])
            times = _layer_ms(kind, shape, has_input_gradient, dtype, device)
            forward, backward = forward + count * times[0], backward + count * times[1]
        _measured[arguments] = Products(forward, backward)
    return _measured[arguments]


_measured: dict[tuple, Products] = {}


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Return what a layer computes: its weight's shape and, for a convolution, its stride, padding and groups."""
    if isinstance(layer, nn.Conv2d):
        return tuple(layer.weight.shape), layer.stride, layer.padding, layer.groups
    assert isinstance(layer, nn.Linear)
    return (tuple(layer.weight.shape),)


def _layer_ms(
    kind: tuple[Any, ...], shape: tuple[int, ...], has_input_gradient: bool, dtype: torch.dtype, device: str
) -> tuple[float, float]:
    """Return the milliseconds of forward and backward of one layer."""
    x = torch.randn(shape, device=device, dtype=dtype)
    weight = torch.randn(kind[0], device=device, dtype=dtype)
    if len(kind) > 1:
        _, stride, padding, groups = kind
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        layer = functools.partial(nn.functional.conv2d, stride=stride, padding=padding, groups=groups)
    else:
        layer = nn.functional.linear
    inputs = [weight.requires_grad_()] + [x.requires_grad_()] * has_input_gradient
    y = layer(x, weight)
    gradient = torch.randn_like(y)

    def forward() -> None:
        with torch.no_grad():
            layer(x, weight)

    def backward() -> None:
        torch.autograd.grad(y, inputs, gradient, retain_graph=True)

    forward_ms, backward_ms = (_few_calls_ms(call) for call in (forward, backward))
    return forward_ms, backward_ms


def _few_calls_ms(call: Callable[[], None]) -> float:
    """Return the milliseconds of a call, after one in which cuDNN chooses."""
    call()
    if not torch.cuda.is_available():
        return statistics.median(call_ms(call) for _ in range(3))

    def five() -> None:
        for _ in range(5):
            call()

    return call_ms(five) / 5
