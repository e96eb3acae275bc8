"""What autograd keeps of a forward pass until its backward pass, from the shapes of the layers.

Per kind of layer, what its gradient needs:

    convolution, linear   its input
    batch norm            its input, and a mean and a deviation of each channel and view
    layer norm            its input, and a mean and a deviation of each row
    ReLU                  its output, GELU its input
    max pooling           its input and, in 8 bytes each, where the maxima were
    attention             q, k, v (what the linear layer before gave), its output, and a log-sum-exp of each row and head

Nothing else is kept: additions, averages and reshapes need no values. A tensor that two layers need is kept once (a
convolution's input is the ReLU's output before it), and a ReLU in place shares the memory of the norm's output. Which tensors
those are is found by passing shapes without memory ("meta" tensors) through the real module, one image's views at a time;
all of it is linear in the images. What depends on the size of an image: every feature map, with the area, and in a ViT every
token; attention's scores are not kept.

Under fp16 or bf16 autocast, convolutions and linear layers keep their input in 16 bits (a copy, if it was in 32), and so do the
layers after them; a layer norm keeps fp32; and the 16-bit copies of the weights are kept once a step, whatever the batch.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from crossbatch.models import NUM_VIEWS
from crossbatch.models.norm import ViewBatchNorm

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}  # of an element of a feature map
_FP32, _INDEX = 4, 8


@dataclass(frozen=True)
class Kept:
    """Bytes kept for the backward pass: `per_image` for each (all its views), `fixed` once."""

    per_image: float
    fixed: float

    def bytes(self, images: int) -> float:
        return self.per_image * images + self.fixed


def kept(module: nn.Module, one_image: torch.Tensor, precision: str) -> Kept:
    """Of any module made of the layers above, for what it gets of one image: [V, 3, H, W], or [rows, features]."""
    trace = _Trace.of(module, one_image, precision)
    return Kept(float(sum(trace.memory(module.modules()).values())), float(trace.fixed))


def kept_by_backbone(backbone: nn.Module, image_size: int, precision: str, checkpointed: bool = False) -> Kept:
    """Of a backbone on the "meta" device, for both views.

    `checkpointed`: of its blocks only the inputs, and everything of one block while that is repeated.
    """
    images = torch.empty(NUM_VIEWS, 3, image_size, image_size, device="meta")
    trace = _Trace.of(backbone, images, precision)
    everything = trace.memory(backbone.modules())
    if not checkpointed:
        return Kept(float(sum(everything.values())), float(trace.fixed))
    insides = [trace.memory(block.modules()) for block in trace.blocks]
    outside = everything.keys() - {memory for inside in insides for memory in inside}
    element = _FP32 if hasattr(backbone, "blocks") else BYTES[precision]  # a ViT passes fp32 from block to block
    inputs = sum(element * x.numel() for x in trace.blocks.values())
    repeated = max(sum(inside.values()) for inside in insides)
    return Kept(float(sum(everything[memory] for memory in outside) + inputs + repeated), float(trace.fixed))


def largest_moment(module: nn.Module, one_image: torch.Tensor, precision: str) -> float:
    """Bytes alive at once while `module` runs without gradients: a layer's input and output, and a residual branch."""
    return float(max(_Trace.of(module, one_image, precision).alive))


@contextlib.contextmanager
def shapes_only(module: nn.Module) -> Iterator[None]:
    """Within it, norms pass on no more than shapes, and nothing has a gradient: for modules on the "meta" device.

    A norm's kernels for training have no version for that, and those for evaluation take 10 ms each.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, ViewBatchNorm)]
    for norm in norms:
        norm.__dict__["forward"] = torch.empty_like
    try:
        with torch.no_grad():
            yield
    finally:
        for norm in norms:
            del norm.__dict__["forward"]


Memory = tuple[int, int]  # which, and bytes of an element


@dataclass
class _Trace:
    """What was seen while shapes passed through a module."""

    element: int
    fixed: int = 0
    blocks: dict[nn.Module, torch.Tensor] = field(default_factory=dict)  # residual blocks and their inputs
    alive: list[int] = field(default_factory=list)
    _kept: dict[nn.Module, dict[Memory, int]] = field(default_factory=dict)
    _held: list[torch.Tensor] = field(default_factory=list)  # or their memory would be given out twice
    _branches: list[int] = field(default_factory=list)

    @staticmethod
    def of(module: nn.Module, x: torch.Tensor, precision: str) -> "_Trace":
        trace = _Trace(BYTES[precision])
        hooks = [layer.register_forward_hook(trace._leave) for layer in module.modules()]
        hooks += [block.register_forward_pre_hook(trace._enter) for block in _blocks(module)]
        try:
            with shapes_only(module):
                module(x)
        finally:
            for hook in hooks:
                hook.remove()
        return trace

    def memory(self, layers: Iterator[nn.Module]) -> dict[Memory, int]:
        """Bytes that these layers keep, by memory: shared memory once."""
        return {memory: size for layer in layers for memory, size in self._kept.get(layer, {}).items()}

    def _enter(self, block: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.blocks[block] = args[0]
        self._branches.append(args[0].numel() * self.element)

    def _leave(self, layer: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        x = args[0]
        for tensor, element in self._keeps(layer, x, y):
            memory = tensor.untyped_storage()._cdata, element
            self._kept.setdefault(layer, {})[memory] = tensor.numel() * element
            self._held.append(tensor)
        if isinstance(layer, ViewBatchNorm):
            self.fixed += 2 * NUM_VIEWS * layer.num_features * _FP32
        elif isinstance(layer, (nn.Conv2d, nn.Linear)) and self.element < _FP32:
            self.fixed += layer.weight.numel() * self.element
        if layer in self.blocks:
            self._branches.pop()
        self.alive.append((x.numel() + y.numel()) * self.element + sum(self._branches[-1:]))

    def _keeps(self, layer: Any, x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
        """(tensor, bytes of an element)."""
        rows = x.numel() // x.shape[-1]
        match layer:
            case nn.Conv2d() | nn.Linear():
                if layer.weight.requires_grad:  # frozen, and first: there is no gradient to compute
                    yield x, self.element
            case ViewBatchNorm() | nn.GELU():
                yield x, self.element
            case nn.ReLU():
                yield y, self.element
            case nn.MaxPool2d():
                yield x, self.element
                yield torch.empty_like(y), _INDEX
            case nn.LayerNorm():
                yield x, _FP32
                yield x.new_empty(2, rows), _FP32
            case _ if hasattr(layer, "qkv"):
                yield x.new_empty(rows, 3 * x.shape[-1]), self.element
                yield x.new_empty(rows, layer.num_heads), _FP32


def _blocks(module: nn.Module) -> list[nn.Module]:
    """Residual blocks of a ResNet or of a ViT, as far as it has any."""
    if (blocks := getattr(module, "blocks", None)) is not None:
        return list(blocks)
    return [block for i in range(1, 5) if hasattr(module, f"layer{i}") for block in getattr(module, f"layer{i}")]
