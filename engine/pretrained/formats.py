"""Says which backbones other libraries can build, and how. No tensor has to be renamed: the ViTs have the names of timm, the
ResNets those of torchvision, which timm's ResNets have, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
}


@dataclass(frozen=True)
class Constructor:
    """A call that builds the network in another library; `str` writes it out."""

    library: str
    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        arguments = "".join(f", {name}={value}" for name, value in self.arguments.items())
        if self.library == "torchvision":
            return f"torchvision.models.{self.name}()"
        return f'timm.create_model("{self.name}"{arguments})'


def constructor(to: str, arch: str, image_size: int, stem: str, backbone_args: Mapping[str, Any]) -> Constructor | None:
    """Return the call that builds `arch` for format `to`; None if that is safetensors and timm cannot build the network.

    Raises ValueError if the library of that format cannot build it.
    """
    try:
        if family(arch) == "vit":
            return _vit("timm" if to == "safetensors" else to, arch, image_size, backbone_args)
        return _resnet("timm" if to == "safetensors" else to, arch, stem, backbone_args)
    except ValueError:
        if to == "safetensors":
            return None
        raise


def _vit(to: str, arch: str, image_size: int, backbone_args: Mapping[str, Any]) -> Constructor:
    if to == "torchvision":
        raise ValueError(f"torchvision has other ViTs than timm's, and {arch} is one of timm's; allowed: a ResNet")
    if arch not in _TIMM_VITS:
        raise ValueError(
            f"{to} cannot build {arch}, because its stem is a stack of convolutions; allowed: vit_small, vit_base"
        )
    settings = {**vars(LAYOUTS[arch]), **backbone_args, "img_size": image_size}
    different = {name: settings[name] for name, value in _TIMM_VITS[arch].items() if settings[name] != value}
    prefix = "deit" if to == "deit" else "vit"
    return Constructor("timm", f"{prefix}_{arch.removeprefix('vit_')}_patch16_224", different)


def _resnet(to: str, arch: str, stem: str, backbone_args: Mapping[str, Any]) -> Constructor:
    if to == "deit":
        raise ValueError(f"DeiT trains ViTs, and {arch} is none; allowed: vit_small, vit_base")
    width = backbone_args.get("width", 64)
    if stem != "imagenet" or width != 64:
        raise ValueError(
            f"{to} builds {arch} with the imagenet stem and width 64; this one has stem {stem}, width {width}"
        )
    return Constructor("torchvision" if to == "torchvision" else "timm", arch, {})
