"""Counts the bytes that torch's operators read and write: each tensor counts once per pass, and views cost nothing.

The bytes of a kernel of our own count if it is an operator (`crossbatch::...`), which LARS on a GPU is not. Bytes that the
caches of a device would save count all the same.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crossbatch.engine.sketch import shapes_only, without_memory
from crossbatch.models import NUM_VIEWS
from crossbatch.models.norm.operators import as_if_fused

PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")
_OUT = {"out", "out0", "out1", "out2"}
# These write what they are given and do not read it, and these move nothing.
_NOT_READ = ("copy_", "fill_", "zero_", "normal_", "uniform_", "_foreach_copy_", "_foreach_zero_")
_NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "record_stream")
# In training, a batch norm sums over its inputs before it reads them again.
_NORMS = ("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit")
_NORM_BACKWARDS = ("native_batch_norm_backward", "cudnn_batch_norm_backward")


class BytesMoved(TorchDispatchMode):
    """Counts, as a context manager, the bytes of tensors on `device_type` that operators read and write.

    Attributes:
        by_operator: the bytes, by the name of the operator.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self._device_type = device_type
        self.by_operator: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Return the bytes of all operators."""
        return self.by_operator.total()

    @property
    def elementwise(self) -> int:
        """Return the bytes of all operators but convolutions and matrix products."""
        return sum(size for name, size in self.by_operator.items() if name not in PRODUCTS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        returned = func(*args, **kwargs)
        schema, name = func._schema, func._schema.name.partition("::")[2]
        if func.namespace not in ("aten", "crossbatch") or name in _NOTHING:
            return returned
        written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        if not written and schema.returns and all(r.alias_info is not None for r in schema.returns):
            return returned  # a view
        unread = {"self", *written} if name in _NOT_READ or name.endswith("_like") else written & _OUT
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        read = sum(self._size(value) for argument, value in given.items() if argument not in unread)
        if (name in _NORMS and given.get("training", given.get("train"))) or (
            name in _NORM_BACKWARDS and given.get("output_mask", (True,))[0] and given.get("train", True)
        ):
            read *= 2
        outputs = returned if len(schema.returns) > 1 else [returned]
        wanted = given.get("output_mask", (True,) * len(outputs))
        declared = zip(outputs, schema.returns, wanted, strict=False)
        new = [output for output, of, wants in declared if wants and of.alias_info is None]
        self.by_operator[name] += read + self._size(new) + sum(self._size(given.get(argument)) for argument in written)
        return returned

    def _size(self, values: Any) -> int:
        """Count the bytes of all tensors of this device; what is expanded lies in memory once."""
        tensors = [t for t in tree_leaves(values) if isinstance(t, torch.Tensor) and t.device.type == self._device_type]
        return sum(_elements(t) * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Moved:
    """Holds the bytes that a backbone moves per image (both views): in total, and without convolutions and matrix products."""

    total: float
    elementwise: float


def of_backbone(build: Callable[[], nn.Module], image_size: int, precision: str, images: int = 256) -> Moved:
    """Count the bytes per image that a training pass moves on a GPU, with `images` at once; nothing is allocated."""
    network = without_memory(build)
    with shapes_only(precision), as_if_fused():  # the norms take the operators of their kernels
        views = torch.empty(NUM_VIEWS * images, 3, image_size, image_size)
        views = views.to(memory_format=torch.channels_last)
        with BytesMoved("cpu") as counted:
            network(views).float().sum().backward()
    return Moved(counted.total / images, counted.elementwise / images)


def _elements(tensor: torch.Tensor) -> int:
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
