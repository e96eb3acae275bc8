"""Finds what a training step keeps in memory without allocating it: shapes pass through the real modules and autograd.

Nothing is modelled layer by layer, so any backbone counts, under autocast and with checkpointed blocks too. The tensors are
those of torch's FakeTensorMode, on its "CPU": what autograd saves there is what it saves on a GPU.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from crossbatch.data.augment.parameters import ImageSize, height_width
from crossbatch.engine.config import ResolvedConfig, autocast_dtype
from crossbatch.engine.tasks.build import build_model
from crossbatch.models import NUM_VIEWS, Collective, MoCo, autocast
from crossbatch.models.backbones import blocks

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Kept:
    """Counts bytes kept for the backward pass: `per_image` for each image (all its views), `fixed` once."""

    per_image: float
    fixed: float


@dataclass(frozen=True)
class Sketch:
    """Holds a network without memory, and what a step of it keeps."""

    model: MoCo
    backbone: Kept
    working: float  # bytes per image: alive at once in the momentum encoder's forward pass
    batch_wide: float  # bytes kept behind the backbone, for the whole local batch
    heads_flops: float  # products there, forward, without those of attention over the batch


_sketches: dict[str, Sketch] = {}


def sketch(cfg: ResolvedConfig) -> Sketch:
    """Return what a step of `cfg` keeps in memory; it does not depend on sharding, chunks and sharing of statistics."""
    ours, batch = cfg.crossbatch, (cfg.group_size, cfg.local_batch, cfg.world_size)
    model = ours.model.model_copy(update={"norm_ranks": "world"})
    key = repr((model, ours.batchformer, ours.data.image_size, ours.data.channels, cfg.precision, batch))
    if key not in _sketches:
        _sketches[key] = _sketch(cfg)
    return _sketches[key]


def _sketch(cfg: ResolvedConfig) -> Sketch:
    model = without_memory(lambda: build_model(cfg))
    model.cuda_graph = False  # there is nothing to capture
    model.set_collective(_AnyRank(cfg.world_size))  # no shape may travel to other ranks, which torch 2.10 refuses
    backbone = model.online.backbone
    kept, working = _of_backbones(model, cfg)
    with shapes_only(cfg.precision), FlopCounterMode(display=False) as counter:
        online, momentum = (torch.empty(NUM_VIEWS * cfg.local_batch, backbone.num_features) for _ in range(2))
        behind = _saved(lambda: model.contrast(online.requires_grad_(), momentum, 0, 0).loss, model)
    return Sketch(model, kept, working, behind, float(counter.get_total_flops()))


_backbones: dict[str, tuple[Kept, float]] = {}


def _of_backbones(model: MoCo, cfg: ResolvedConfig) -> tuple[Kept, float]:
    """Trace what the online backbone keeps and the momentum one works with, an image each; once, for any batch and heads."""
    ours, size = cfg.crossbatch.model, cfg.crossbatch.data.image_size
    of_backbone = (ours.arch, ours.stem, ours.stop_grad_conv1, ours.backbone_args, ours.checkpoint_activations)
    key = repr((of_backbone, size, cfg.crossbatch.data.channels, cfg.precision))
    if key not in _backbones:
        repeats = ours.checkpoint_activations == "blocks"
        kept = kept_by_backbone(model.online.backbone, size, cfg.precision, repeats)
        _backbones[key] = kept, _working(model.momentum.backbone, size, cfg.precision)
    return _backbones[key]


def kept_by_backbone(backbone: nn.Module, image_size: ImageSize, precision: str, checkpointed: bool = False) -> Kept:
    """Trace what a backbone keeps of both views; with `checkpointed` blocks, also one of them while it is repeated."""
    with shapes_only(precision):
        # Not one image: a norm has no statistics where a view is a single pixel.
        two, three = (_kept_of(backbone, _images(backbone, count, image_size), checkpointed) for count in (2, 3))
    return Kept(three - two, 3 * two - 2 * three)


def _kept_of(backbone: nn.Module, images: torch.Tensor, checkpointed: bool) -> float:
    if not checkpointed:
        return _saved(lambda: backbone(images), backbone)
    inputs: dict[nn.Module, torch.Tensor] = {}
    hooks = [b.register_forward_pre_hook(lambda b, args: inputs.setdefault(b, args[0])) for b in _blocks(backbone)]
    kept = _saved(lambda: backbone(images), backbone)
    for hook in hooks:
        hook.remove()
    repeated = [_saved(lambda b=b, x=x: b(x.detach().requires_grad_()), b) - x.nbytes for b, x in inputs.items()]
    return kept + max(repeated)


def _saved(call: Callable[[], Any], module: nn.Module) -> float:
    """Count the bytes that autograd saves in `call`, every storage once, without parameters and buffers."""
    own = {t.untyped_storage()._cdata for t in [*module.parameters(), *module.buffers()]}
    found: dict[int, int] = {}
    alive: list[Any] = []  # or a storage's address would be given out twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(call())
    return float(sum(size for storage, size in found.items() if storage not in own))


def _working(backbone: nn.Module, image_size: ImageSize, precision: str) -> float:
    """Count bytes per image that live at once without gradients: a layer's input and output, and its block's input."""
    layers, inputs = [0], [0]

    def note(_: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        if isinstance(output, torch.Tensor):  # a norm may leave its work to another, and return nothing new
            layers.append(args[0].nbytes + output.nbytes)

    hooks = [layer.register_forward_hook(note) for layer in backbone.modules() if not list(layer.children())]
    hooks += [b.register_forward_pre_hook(lambda _, args: inputs.append(args[0].nbytes)) for b in _blocks(backbone)]
    with shapes_only(precision), torch.no_grad():
        backbone(_images(backbone, 2, image_size))
    for hook in hooks:
        hook.remove()
    return (max(layers) + max(inputs)) / 2


def _blocks(backbone: nn.Module) -> list[nn.Module]:
    """Return the residual blocks; a ResNet has several in each of its stages."""
    return [b for stage in blocks(backbone) for b in (stage if isinstance(stage, nn.Sequential) else [stage])]


def _images(backbone: nn.Module, count: int, size: ImageSize) -> torch.Tensor:
    channels = getattr(backbone, "in_channels", 3)
    return torch.empty(NUM_VIEWS * count, channels, *height_width(size)).to(memory_format=torch.channels_last)


def without_memory(build: Callable[[], Network]) -> Network:
    """Build a network that has shapes only; it can run inside `shapes_only`."""
    with torch.device("meta"):  # not in FakeTensorMode, where timm's .item() has no value
        network = build()
    # As to_empty(device="cpu") in that mode, in a tenth of the time.
    return network._apply(lambda tensor: FakeTensor(_no_memory(), tensor, torch.device("cpu")))


@contextlib.contextmanager
def shapes_only(precision: str) -> Iterator[None]:
    """Let networks of `without_memory` run without arithmetic, under autocast to `precision`; new tensors have no memory."""
    with _no_memory(), autocast("cpu", autocast_dtype(precision)):
        yield


@functools.cache
def _no_memory() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


class _AnyRank(Collective):
    """Stands in for one of `world_size` ranks where only shapes matter."""

    def __init__(self, world_size: int):
        self._world_size = world_size

    @property
    def world_size(self) -> int:
        return self._world_size

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty(self.world_size, *tensor.shape)
