"""Says which backbones other libraries can build, and how.

No tensor has to be renamed: the ViTs have the names of timm, the ResNets those of torchvision, which timm's ResNets have, too.
"""

from typing import TYPE_CHECKING, Any

from crossbatch.models.backbones import LAYOUTS, family

if TYPE_CHECKING:  # launch/convert.py imports FORMATS at its start
    from crossbatch.engine.pretrained.load import Pretrained

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


def timm_name(to: str, network: "Pretrained") -> tuple[str, dict[str, Any]]:
    """Return the name of a network in the library of format `to`, and the arguments in which it differs from that of the name.

    That library is timm, but for torchvision and deit. Raises ValueError if it cannot build the network.
    """
    arch, in_channels = network.arch, len(network.mean)
    if in_channels != 3 and to in ("torchvision", "deit"):
        raise ValueError(f"{to} builds networks for three channels, and this one has {in_channels}; allowed: timm")
    channels = {"in_chans": in_channels} if in_channels != 3 else {}
    if family(arch) == "resnet":
        if to == "deit":
            raise ValueError(f"DeiT trains only ViTs, and {arch} is not one; allowed: vit_small, vit_base")
        stem, width = network.stem, network.backbone_args.get("width", 64)
        if stem != "imagenet" or width != 64:
            raise ValueError(
                f"{to} builds {arch} with the imagenet stem and width 64; this one has stem {stem}, width {width}"
            )
        return arch, channels
    if to == "torchvision":
        raise ValueError(f"torchvision's ViTs differ from timm's, and {arch} is one of timm's; allowed: a ResNet")
    if arch not in _TIMM_VITS:
        raise ValueError(
            f"{to} cannot build {arch}, because its stem is a stack of convolutions; allowed: vit_small, vit_base"
        )
    settings = {**vars(LAYOUTS[arch]), **network.backbone_args, "img_size": network.image_size}
    differing = {name: settings[name] for name, value in _TIMM_VITS[arch].items() if settings[name] != value}
    return f"{'deit' if to == 'deit' else 'vit'}_{arch.removeprefix('vit_')}_patch16_224", differing | channels


def constructor(to: str, network: "Pretrained") -> str:
    """Return the call that builds a network in the library of format `to`; raises ValueError as `timm_name` does."""
    name, arguments = timm_name(to, network)
    if to == "torchvision":
        return f"torchvision.models.{name}()"
    return f'timm.create_model("{name}"{"".join(f", {key}={value}" for key, value in arguments.items())})'
