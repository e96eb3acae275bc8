"""Writes backbones for other programs.

    timm          {"state_dict", "num_heads", "crossbatch"}, or safetensors if the file is called so
    deit          {"model", "num_heads", "crossbatch"}
    torchvision   the tensors, nothing else
    safetensors   the tensors, and the rest as metadata

"crossbatch" describes the network, so that `load_pretrained` can read the file again without further arguments.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from crossbatch import InputError, __version__
from crossbatch.engine.pretrained.files import write_file
from crossbatch.engine.pretrained.foreign import FOREIGN
from crossbatch.engine.pretrained.formats import constructor
from crossbatch.engine.pretrained.load import Pretrained
from crossbatch.engine.pretrained.weights import NETWORK, NOTE
from crossbatch.models.backbones import family


def export(pretrained: Pretrained, to: str, file: Path) -> list[str]:
    """Write `file` in one of `formats.FORMATS`, and return lines for the user: what was written, and how to load it.

    Raises:
        InputError: if the programs of that format cannot build the network, or `file` cannot be written.
    """
    if to in FOREIGN:
        return [f"loaded {pretrained}", *FOREIGN[to](pretrained, file)]
    advice = _advice(pretrained, to, file)
    tensors = {name: tensor.contiguous() for name, tensor in pretrained.backbone.state_dict().items()}
    note = {name: getattr(pretrained, name) for name in NETWORK}
    note |= {"from": pretrained.description, "version": __version__}
    heads = {} if pretrained.num_heads is None else {"num_heads": pretrained.num_heads}
    if to == "safetensors" or (to == "timm" and file.suffix == ".safetensors"):
        metadata = {"format": "pt", NOTE: json.dumps(note), **{name: str(value) for name, value in heads.items()}}
        write_file(file, lambda path: save_file(tensors, path, metadata))
    else:
        named = {"model" if to == "deit" else "state_dict": tensors, **heads, NOTE: note}
        content = tensors if to == "torchvision" else named
        write_file(file, lambda path: torch.save(content, path))
    return [f"loaded {pretrained}", f"{file}: {len(tensors)} tensors written", *advice]


def _advice(pretrained: Pretrained, to: str, file: Path) -> list[str]:
    """Return how to build the network elsewhere, and what goes wrong silently; InputError if the format is not for it."""
    arch = pretrained.arch
    try:
        built = constructor(to, pretrained)
    except ValueError as error:
        if to != "safetensors":
            raise InputError(f"--to {to}: {error}; --to safetensors takes any network") from None
        return [
            f"timm and torchvision cannot build this network; the commands of crossbatch take it as --checkpoint {file}"
        ]
    classifier = "head" if family(arch) == "vit" else "fc"
    since = " (timm 0.9 or newer)" if "=" in built else ""  # before, such an argument is given twice there
    advice = [
        f"build it with {built}{since}; load_state_dict(strict=False) then misses {classifier}.weight and {classifier}.bias"
    ]
    if arch == "vit_small" and "num_heads=" in built:
        heads = f"num_heads={pretrained.num_heads}"
        deit = f"; DeiT's main.py, with timm 0.4.9, builds its own deit_small_patch16_224 with 6: write {heads} in models.py"
        fits = f"without {heads} the weights fit as well, and the network computes something else"
        advice.append(fits + (deit if to == "deit" else ""))
    return advice
