"""Measures batch norm + residual + ReLU, forward and backward, beside torch's, and counts what a ResNet-50 moves for them.

Bytes: those that the operators of a ResNet-50, forward and backward on two views of 224 px under autocast to 16 bits, read and
write besides convolutions and products (engine/bytes_moved.py), by shapes alone. torchvision's network has nn.BatchNorm2d or
nn.SyncBatchNorm, which sum over their inputs before they read them again, an addition and a ReLU; ours is counted as on a GPU.

Time: one norm at the shapes of a ResNet-50, 256 images with both views on a GPU, in the 16 bits in which it trains, channels
last (8 images and fp32 on a CPU). torch's norms are called once a view. nn.SyncBatchNorm's kernels, with a group of one rank,
and what torch.compile makes of the baselines are measured on a GPU only. `of_bandwidth` compares with a large copy in the same
process.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm

from benchmarks import limits
from benchmarks.measure import compare, summarise
from benchmarks.rows import Row
from benchmarks.stages import Effort, recipe
from crossbatch.engine.bytes_moved import of_backbone
from crossbatch.engine.config import Device, autocast_dtype, choose_precision
from crossbatch.models import NUM_VIEWS, ViewBatchNorm, build_backbone

SYNC, CUDNN, OURS = "SyncBatchNorm + add + ReLU", "BatchNorm2d + add + ReLU", "ours"
COMPILED = {name: f"{name}, compiled" for name in (SYNC, CUDNN)}


class Shape(NamedTuple):
    """Names one kind of norm in a ResNet-50."""

    channels: int
    side: int
    residual: bool = False
    relu: bool = True

    def __str__(self) -> str:
        parts = ["residual"] * self.residual + ["ReLU"] * self.relu
        return f"C {self.channels}, {self.side} px, {' + '.join(parts) or 'norm alone'}"


SHAPES = [
    *(Shape(64, 112), Shape(256, 56, residual=True), Shape(512, 28, residual=True), Shape(2048, 7, residual=True)),
    *(Shape(64, 56), Shape(256, 56, relu=False), Shape(128, 56), Shape(128, 28), Shape(512, 28, relu=False)),
    *(Shape(256, 28), Shape(256, 14), Shape(1024, 14, residual=True), Shape(1024, 14, relu=False), Shape(512, 14)),
    *(Shape(512, 7), Shape(2048, 7, relu=False)),
]


def run(effort: Effort) -> Iterator[Row]:
    """Yield the bytes of the network, then the speed of a copy and the times by shape, those that move most first."""
    yield from _bytes()
    device = Device.detect()
    copy = limits.copy_row(effort.pick(16, 1000, 1000))
    yield copy
    precision = choose_precision("auto", device)[0]
    images = effort.pick(2, 8, 8) if device.type == "cpu" else effort.pick(8, 256, 256)
    with recipe.one_rank():
        for shape in SHAPES[: effort.pick(1, 4, len(SHAPES))]:
            calls = _calls(shape, images, precision, device.type)
            settings = {"images": images, "precision": precision, **shape._asdict()}
            cases = {f"{name}, {shape}": call for name, call in calls.items()}
            optional = [f"{name}, {shape}" for name in COMPILED.values()]
            rows = compare(cases, settings, effort, optional=optional)
            for row in rows:
                if row.case not in optional:
                    moved = limits.bytes_moved(cases[row.case], torch.device(device.type))
                    of_bandwidth = moved / (1e6 * copy.settings["gb_per_s"]) / row.p50
                    row.settings = row.settings | {"bytes_moved": moved, "of_bandwidth": of_bandwidth}
            yield from rows


def _bytes() -> Iterator[Row]:
    """Yield the elementwise MB of an image, of torchvision's ResNet-50 and of ours."""
    networks: dict[str, Callable[[], Any]] = {
        f"bytes, torchvision's ResNet-50 ({CUDNN})": partial(torchvision.models.resnet50, num_classes=1),
        "bytes, our ResNet-50": partial(build_backbone, "resnet50"),
    }
    moved = {name: of_backbone(build, 224, "bf16") for name, build in networks.items()}
    settings = {"image_size": 224, "views": NUM_VIEWS, "precision": "bf16"}
    for row in summarise({name: [found.elementwise / 1e6] for name, found in moved.items()}, settings, "MB/image"):
        row.settings = row.settings | {"with_products": moved[row.case].total / 1e6}
        yield row


def _calls(shape: Shape, images: int, precision: str, device: str) -> dict[str, Callable[[], None]]:
    """Return forward and backward of one norm on both views of `images`, by who computes it, the baseline first."""
    torch.manual_seed(0)
    dtype = autocast_dtype(precision) or torch.float32
    size = (NUM_VIEWS * images, shape.channels, shape.side, shape.side)

    def image() -> Tensor:
        return torch.randn(size, device=device, dtype=dtype).to(memory_format=torch.channels_last)

    x, gradient = image().requires_grad_(), image()
    residual = image().requires_grad_() if shape.residual else None
    plain, ours = nn.BatchNorm2d(shape.channels).to(device), ViewBatchNorm(shape.channels).to(device)
    sync = partial(_synchronised, plain)

    def after(y: Tensor, r: Tensor | None) -> Tensor:
        y = y if r is None else y.add_(r)
        return F.relu(y, inplace=True) if shape.relu else y

    def both_views(norm: Callable[[Tensor], Tensor]) -> list[Tensor]:
        residuals = (None, None) if residual is None else residual.chunk(2)
        return [after(norm(x_v), r_v) for x_v, r_v in zip(x.chunk(2), residuals, strict=True)]

    def backward(forward: Callable[[], list[Tensor]]) -> None:
        outputs = forward()
        torch.autograd.backward(outputs, list(gradient.chunk(len(outputs))))
        x.grad = None
        if residual is not None:
            residual.grad = None

    forwards = {CUDNN: partial(both_views, plain), OURS: lambda: [ours(x, residual, relu=shape.relu)]}
    if device == "cuda":
        torch.compiler.reset()  # after 8 other sizes torch would go on without compiling
        forwards[SYNC] = partial(both_views, sync)
        forwards |= {name: torch.compile(forwards[of], dynamic=False) for of, name in COMPILED.items()}
    order = (SYNC, CUDNN, *COMPILED.values(), OURS)
    return {name: partial(backward, forwards[name]) for name in order if name in forwards}


def _synchronised(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Call the kernels of nn.SyncBatchNorm, which would take those of nn.BatchNorm2d on one rank."""
    given = (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, norm.momentum)
    return SyncBatchNorm.apply(x, *given, dist.group.WORLD, 1)  # pyright: ignore[reportReturnType]
