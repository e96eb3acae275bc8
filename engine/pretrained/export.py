"""Writes backbones for other programs.

    timm          {"state_dict", "num_heads", "crossbatch"}, or safetensors if the file is called so
    deit          {"model", "num_heads", "crossbatch"}
    torchvision   the tensors, nothing else
    safetensors   the tensors, and the rest as metadata

"crossbatch" describes the network, so that `load_pretrained` can read the file again without further arguments.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from crossbatch import InputError, __version__
from crossbatch.engine.pretrained.files import write_safetensors, write_torch
from crossbatch.engine.pretrained.formats import Constructor, constructor
from crossbatch.engine.pretrained.load import Pretrained
from crossbatch.engine.pretrained.weights import NOTE
from crossbatch.models.backbones import family


def export(pretrained: Pretrained, to: str, file: Path) -> list[str]:
    """Write `file` in one of `formats.FORMATS`, and return lines for the user: what was written, and how to load it.

    Raises:
        InputError: if the programs of that format cannot build the network, or `file` cannot be written.
    """
    try:
        built = constructor(to, pretrained.arch, pretrained.image_size, pretrained.stem, pretrained.backbone_args)
    except ValueError as error:
        raise InputError(f"--to {to}: {error}; --to safetensors takes any network") from None
    tensors = {name: tensor.contiguous() for name, tensor in pretrained.backbone.state_dict().items()}
    note = {
        "arch": pretrained.arch,
        "stem": pretrained.stem,
        "backbone_args": pretrained.backbone_args,
        "image_size": pretrained.image_size,
        "num_heads": pretrained.num_heads,
        "from": pretrained.description,
        "version": __version__,
    }
    _write(file, to, tensors, note)
    return [f"loaded {pretrained}", f"{file}: {len(tensors)} tensors written", *_advice(pretrained, to, file, built)]


def _write(file: Path, to: str, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
    heads = {} if note["num_heads"] is None else {"num_heads": note["num_heads"]}
    if to == "safetensors" or (to == "timm" and file.suffix == ".safetensors"):
        metadata = {"format": "pt", NOTE: json.dumps(note)}
        write_safetensors(file, tensors, metadata | {name: str(value) for name, value in heads.items()})
    elif to == "torchvision":
        write_torch(file, tensors)
    else:
        write_torch(file, {"model" if to == "deit" else "state_dict": tensors, **heads, NOTE: note})


def _advice(pretrained: Pretrained, to: str, file: Path, built: Constructor | None) -> list[str]:
    """Return how to build the network elsewhere, and what goes wrong silently."""
    if built is None:
        return [
            f"timm and torchvision cannot build this network; the commands of crossbatch take it as --checkpoint {file}"
        ]
    classifier = "head" if family(pretrained.arch) == "vit" else "fc"
    advice = [
        f"build it with {built}; load_state_dict(strict=False) then misses {classifier}.weight and {classifier}.bias"
    ]
    if pretrained.arch == "vit_small" and "num_heads" in built.arguments:
        advice.append(
            f"without num_heads={pretrained.num_heads} the weights fit as well, and the network computes something else"
            + ("; DeiT's own deit_small_patch16_224 has 6" if to == "deit" else "")
        )
    return advice
