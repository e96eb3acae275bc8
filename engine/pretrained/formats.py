"""Says which backbones other libraries can build, and how.

No tensor has to be renamed: the ViTs have the names of timm, the ResNets those of torchvision, which timm's ResNets have, too.
"""

from collections.abc import Mapping
from typing import Any

from crossbatch.models.backbones import LAYOUTS, family

# What the constructors of timm and DeiT set for these names; their ViT-S has 6 heads.
_TIMM_VITS: dict[str, dict[str, Any]] = {
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 16, "mlp_ratio": 4.0, "img_size": 224},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16, "mlp_ratio": 4.0, "img_size": 224},
}
FORMATS = {
    "timm": "for timm.create_model",
    "deit": 'for DeiT\'s main.py: {"model": ...}',
    "torchvision": "for torchvision.models",
    "safetensors": "any backbone, without pickle",
    "huggingface": "a folder for transformers' AutoModel.from_pretrained and timm's local-dir:",
    "onnx": "any backbone, for onnxruntime; any number of images",
    "detectron2": "a ResNet as MODEL.WEIGHTS, .pkl",
}


def timm_name(
    arch: str,
    image_size: int | tuple[int, int],
    stem: str,
    backbone_args: Mapping[str, Any],
    in_channels: int = 3,
) -> tuple[str, dict[str, Any]]:
    """Return timm's name of `arch`, and the arguments in which it differs from timm's network of that name.

    Raises ValueError if timm cannot build it.
    """
    constructor("timm", arch, image_size, stem, backbone_args, in_channels)
    channels = {"in_chans": in_channels} if in_channels != 3 else {}
    if family(arch) == "resnet":
        return arch, channels
    settings = {**vars(LAYOUTS[arch]), **backbone_args, "img_size": image_size}
    differing = {name: settings[name] for name, value in _TIMM_VITS[arch].items() if settings[name] != value}
    return f"vit_{arch.removeprefix('vit_')}_patch16_224", differing | channels


def constructor(
    to: str,
    arch: str,
    image_size: int | tuple[int, int],
    stem: str,
    backbone_args: Mapping[str, Any],
    in_channels: int = 3,
) -> str:
    """Return the call that builds `arch` in the library of format `to`, which is timm for safetensors.

    Raises ValueError if that library cannot build it.
    """
    if in_channels != 3 and to in ("torchvision", "deit"):
        raise ValueError(f"{to} builds networks for three channels, and this one has {in_channels}; allowed: timm")
    channels = f", in_chans={in_channels}" if in_channels != 3 else ""
    if family(arch) == "resnet":
        if to == "deit":
            raise ValueError(f"DeiT trains only ViTs, and {arch} is not one; allowed: vit_small, vit_base")
        width = backbone_args.get("width", 64)
        if stem != "imagenet" or width != 64:
            raise ValueError(
                f"{to} builds {arch} with the imagenet stem and width 64; this one has stem {stem}, width {width}"
            )
        return f"torchvision.models.{arch}()" if to == "torchvision" else f'timm.create_model("{arch}"{channels})'
    if to == "torchvision":
        raise ValueError(f"torchvision's ViTs differ from timm's, and {arch} is one of timm's; allowed: a ResNet")
    if arch not in _TIMM_VITS:
        raise ValueError(
            f"{to} cannot build {arch}, because its stem is a stack of convolutions; allowed: vit_small, vit_base"
        )
    settings = {**vars(LAYOUTS[arch]), **backbone_args, "img_size": image_size}
    arguments = [f", {name}={settings[name]}" for name, value in _TIMM_VITS[arch].items() if settings[name] != value]
    name = f"{'deit' if to == 'deit' else 'vit'}_{arch.removeprefix('vit_')}_patch16_224"
    return f'timm.create_model("{name}"{"".join(arguments)}{channels})'
