"""Every backbone by its name, and the checks of what a user may ask of it.

Messages name the keys of the configuration section `crossbatch.model`, whose values arrive here unchanged.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from crossbatch.models import resnet, vit

ARCHS: tuple[str, ...] = resnet.ARCHS + vit.ARCHS
Backbone = resnet.ResNet | vit.ViT


def family(arch: str) -> str:
    """ "resnet" or "vit": which heads belong to it. ValueError for a name that is not in ARCHS."""
    if arch in resnet.ARCHS:
        return "resnet"
    if arch in vit.ARCHS:
        return "vit"
    raise ValueError(f"model.arch is {arch!r}; {_allowed(arch, ARCHS)}")


def blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks of a ViT or the stages of a ResNet, in order."""
    found = getattr(backbone, "blocks", None)
    return list(found) if found is not None else [getattr(backbone, f"layer{number}") for number in range(1, 5)]


def build_backbone(
    arch: str,
    image_size: int = 224,
    stem: str = "imagenet",
    stop_grad_conv1: bool = False,
    backbone_args: Mapping[str, float] | None = None,
) -> Backbone:
    """A randomly initialised backbone: [n, 3, image_size, image_size] -> [n, num_features], an attribute of it.

    `stem` ("imagenet" or "small") belongs to ResNets, `stop_grad_conv1` to ViTs with a patch projection.
    `backbone_args` override sizes: `width` of a ResNet; `embed_dim`, `depth`, `num_heads`, `mlp_ratio` and `patch_size`
    (not with a conv stem) of a ViT. ValueError for anything that would be ignored or cannot be built.
    """
    args = dict(backbone_args or {})
    if family(arch) == "resnet":
        return _build_resnet(arch, stem, stop_grad_conv1, args)
    return _build_vit(arch, image_size, stem, stop_grad_conv1, args)


def _build_resnet(arch: str, stem: str, stop_grad_conv1: bool, args: dict[str, float]) -> resnet.ResNet:
    if stop_grad_conv1:
        raise ValueError(
            f"model.stop_grad_conv1 is true but {arch} has no patch projection to freeze; set it to false."
        )
    _check_args(arch, args, integers=("width",))
    return resnet.build(arch, stem=stem, width=int(args.get("width", 64)))


def _build_vit(arch: str, image_size: int, stem: str, stop_grad_conv1: bool, args: dict[str, float]) -> vit.ViT:
    layout = vit.LAYOUTS[arch]
    if stem != "imagenet":
        raise ValueError(
            f"model.stem is {stem!r} but {arch} has a stem of its own; leave it out (stems are for ResNets)."
        )
    sizes = ("embed_dim", "depth", "num_heads")
    _check_args(arch, args, integers=sizes if layout.conv_stem else (*sizes, "patch_size"), reals=("mlp_ratio",))
    layout = replace(layout, **args)
    _check_layout(arch, layout, image_size)
    return vit.build(layout, image_size=image_size, stop_grad_conv1=stop_grad_conv1)


def _check_args(arch: str, args: dict[str, float], integers: tuple[str, ...], reals: tuple[str, ...] = ()) -> None:
    for key, value in args.items():
        if key not in integers + reals:
            raise ValueError(
                f"model.backbone_args has {key!r}, which {arch} does not take; {_allowed(key, integers + reals)}"
            )
        number = isinstance(value, int if key in integers else (int, float)) and not isinstance(value, bool)
        if not number or value <= 0:
            kind = "integer" if key in integers else "number"
            raise ValueError(f"model.backbone_args.{key} is {value!r}; it must be a positive {kind}.")


def _check_layout(arch: str, layout: vit.Layout, image_size: int) -> None:
    where, dim = "model.backbone_args", layout.embed_dim
    if image_size <= 0 or image_size % layout.patch_size:
        what = "the stride of its conv stem" if layout.conv_stem else f"{where}.patch_size"
        raise ValueError(
            f"data.image_size is {image_size}, but {arch} needs a multiple of {what} (={layout.patch_size})."
        )
    if dim % layout.num_heads:
        raise ValueError(f"{where}.embed_dim is {dim}, which {where}.num_heads (={layout.num_heads}) does not divide.")
    divisor = 8 if layout.conv_stem else 4
    if dim % divisor:
        reason = "a conv stem starts at embed_dim / 8 channels" if layout.conv_stem else "positions come in 4 quarters"
        raise ValueError(f"{where}.embed_dim is {dim}; it must be divisible by {divisor}: {reason}.")


def _allowed(given: object, allowed: Iterable[str]) -> str:
    allowed = tuple(allowed)
    nearest = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"allowed: {', '.join(allowed)}{hint}."
