"""Builds every backbone by its name, and checks its arguments.

A new backbone needs `num_features`, a builder below, and a family of heads (`crossbatch.models.heads`). torchvision and timm
are imported when a network is built.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from crossbatch.models.arguments import check_choice, list_allowed

if TYPE_CHECKING:
    from crossbatch.models.resnet import ResNet
    from crossbatch.models.vit import ViT

    Backbone = ResNet | ViT
else:
    Backbone = nn.Module  # for annotations only


@dataclass(frozen=True)
class Layout:
    """Hold the sizes of a ViT; `conv_stem` replaces the patch projection."""

    embed_dim: int
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 16
    mlp_ratio: float = 4.0
    conv_stem: bool = False


LAYOUTS = {
    "vit_small": Layout(embed_dim=384),
    "vit_base": Layout(embed_dim=768),
    "vit_conv_small": Layout(embed_dim=384, depth=11, conv_stem=True),
    "vit_conv_base": Layout(embed_dim=768, depth=11, conv_stem=True),
}
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
ARCHS: tuple[str, ...] = (*RESNETS, *LAYOUTS)


def family(arch: str) -> str:
    """Return "resnet" or "vit", which decides the heads. Raises ValueError for a name that is not in ARCHS."""
    check_choice("arch", arch, ARCHS)
    return "resnet" if arch in RESNETS else "vit"


def blocks(backbone: nn.Module) -> list[nn.Module]:
    """Return the blocks of a ViT or the stages of a ResNet, in order; nothing for other networks."""
    found = getattr(backbone, "blocks", None)
    if found is None:
        found = [getattr(backbone, f"layer{number}", None) for number in range(1, 5)]
    return [block for block in found if block is not None]


def build_backbone(
    arch: str,
    image_size: int | tuple[int, int] = 224,
    stem: str = "imagenet",
    stop_grad_conv1: bool = False,
    backbone_args: Mapping[str, float] | None = None,
    in_channels: int = 3,
) -> Backbone:
    """Build a randomly initialised backbone: [n, in_channels, H, W] -> [n, backbone.num_features].

    Args:
        arch: one of ARCHS.
        image_size: side of the images in pixels, or (height, width); a ResNet takes any.
        stem: "imagenet" or "small", for ResNets only.
        stop_grad_conv1: freeze the patch projection, for ViTs that have one.
        backbone_args: sizes that differ from the published ones: `width` of a ResNet; `embed_dim`, `depth`, `num_heads`,
            `mlp_ratio` and `patch_size` (not with a conv stem) of a ViT.
        in_channels: channels of the images.

    Raises:
        ValueError: for arguments that would be ignored or that make no network; the message begins with the argument.
    """
    args = dict(backbone_args or {})
    if family(arch) == "resnet":
        from crossbatch.models import resnet

        if stop_grad_conv1:
            raise ValueError(f"stop_grad_conv1 is true, but {arch} has no patch projection to freeze; set it to false")
        _check_args(arch, args, integers=("width",))
        return resnet.ResNet(*resnet.BLOCKS[arch], int(args.get("width", 64)), stem, in_channels)
    from crossbatch.models import vit

    layout = LAYOUTS[arch]
    if stem != "imagenet":
        raise ValueError(f"stem is {stem!r}, but {arch} has a stem of its own; leave it out (only ResNets take one)")
    sizes = ("embed_dim", "depth", "num_heads")
    _check_args(arch, args, integers=sizes if layout.conv_stem else (*sizes, "patch_size"), reals=("mlp_ratio",))
    layout = replace(layout, **args)
    _check_layout(arch, layout, image_size)
    return vit.ViT(layout, image_size, stop_grad_conv1, in_channels)  # pyright: ignore[reportArgumentType] (Layout by its two paths)


def _check_args(arch: str, args: dict[str, float], integers: tuple[str, ...], reals: tuple[str, ...] = ()) -> None:
    for key, value in args.items():
        if key not in integers + reals:
            raise ValueError(
                f"backbone_args has {key!r}, which {arch} does not take; {list_allowed(key, integers + reals)}"
            )
        number = isinstance(value, int if key in integers else (int, float)) and not isinstance(value, bool)
        if not number or value <= 0:
            kind = "integer" if key in integers else "number"
            raise ValueError(f"backbone_args.{key} is {value!r}; it must be a positive {kind}")


def _check_layout(arch: str, layout: Layout, image_size: int | tuple[int, int]) -> None:
    dim = layout.embed_dim
    sides = (image_size,) if isinstance(image_size, int) else image_size
    if any(side <= 0 or side % layout.patch_size for side in sides):
        what = "the stride of its conv stem" if layout.conv_stem else "backbone_args.patch_size"
        raise ValueError(f"image_size is {image_size}, but {arch} needs a multiple of {what} (={layout.patch_size})")
    if dim % layout.num_heads:
        raise ValueError(
            f"backbone_args.embed_dim is {dim}, which backbone_args.num_heads (={layout.num_heads}) does not divide"
        )
    divisor = 8 if layout.conv_stem else 4
    if dim % divisor:
        reason = "a conv stem starts at embed_dim / 8 channels" if layout.conv_stem else "positions come in 4 quarters"
        raise ValueError(f"backbone_args.embed_dim is {dim}; it must be divisible by {divisor}: {reason}")
