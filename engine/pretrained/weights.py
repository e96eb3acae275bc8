"""Reads the tensors of one backbone from whatever holds them, and what the file says about the network.

a run directory or one of its checkpoints     of any sharding; its configuration describes the network
checkpoint_*.pth.tar                          of moco-v3 or BatchFormer: base_encoder and momentum_encoder
checkpoint_*.pth.tar of MoCo v2               encoder_q and encoder_k
a full checkpoint of DINO                     student and teacher
{"model": ...}, {"state_dict": ...}, tensors  as DeiT, timm, Lightning and torchvision write them, .pth or .safetensors; the
                                              backbone may have a prefix, such as "backbone." or "_orig_mod."
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from crossbatch import InputError
from crossbatch.data.augment.parameters import channels_of
from crossbatch.engine import checkpoint
from crossbatch.engine.checkpoint import Unreadable
from crossbatch.engine.pretrained.files import read_safetensors, read_torch
from crossbatch.models.backbones import ARCHS, family

ENCODERS = {"online": "base_encoder", "momentum": "momentum_encoder"}  # in the files of moco-v3 and BatchFormer
NOTE = "crossbatch"  # entry of an exported file that describes its network
NETWORK = ("arch", "stem", "backbone_args", "image_size", "num_heads", "mean", "std")  # of that entry
PROBE, PROBE_FILE = "linear probe", "probe.pt"  # "kind" of the file that the linear probe saves, and its name
MOMENTUM = ("momentum", "teacher", "ema", "target", "encoder_k")  # in the prefix of a momentum encoder, anywhere
MARKS = ("layer4.0.conv1.weight", "blocks.0.norm1.weight")  # of a ResNet, of a ViT
DECODER = ("decoder_", "mask_token")  # of MAE, beside its backbone
CLASSIFIERS = ("fc", "head", "head_dist")  # in torchvision, timm and DeiT; the projector in a file of moco-v3


@dataclass
class Weights:
    """Holds the tensors of one backbone, named as in this package, and what the file says about it (None: nothing)."""

    tensors: dict[str, Tensor]
    origin: str
    ignored: Counter[str]  # part of the file -> tensors
    arch: str | None = None
    stem: str | None = None
    backbone_args: dict[str, Any] | None = None
    image_size: int | tuple[int, int] | None = None
    num_heads: int | None = None
    mean: tuple[float, ...] | None = None  # of each channel; None, as `std`: ImageNet's
    std: tuple[float, ...] | None = None


def read_weights(path: Path, encoder: str, where: str, flag: str = "--checkpoint") -> Weights:
    """Read the tensors of a backbone, without checking that they fit any network.

    Args:
        encoder: "online" or "momentum", for checkpoints of pretraining, which hold both.
        where: flag and path, for messages.
        flag: the flag alone.

    Raises:
        InputError: if `path` cannot be read, or holds no backbone.
    """
    if not path.exists():
        raise InputError(
            f"{where}: no such file or folder; allowed: a run directory, one of its checkpoints, or a file"
        )
    return _read_run(path, encoder, where, flag) if path.is_dir() else _read_file(path, encoder, where)


def _read_run(path: Path, encoder: str, where: str, flag: str) -> Weights:
    """Read the backbone of a run directory or of one of its checkpoints."""
    if (path / PROBE_FILE).is_file():
        raise InputError(f"{where}: is the folder of a linear probe; give the checkpoint that the probe was trained on")
    found = checkpoint.find(path, flag)
    prefix = f"{encoder}.backbone."
    try:
        manifest, config = checkpoint.read_manifest(found)
        tensors = checkpoint.read(found, f"parameters.{prefix}") | checkpoint.read(found, f"buffers.{prefix}")
    except Unreadable as error:
        raise InputError(f"{flag} {found}: {error}; name another checkpoint of the run") from None
    section = config.get("crossbatch", {})
    model = section.get("model", {})
    if not tensors or "arch" not in model:
        raise InputError(f"{flag} {found}: holds no {encoder} backbone; allowed: a checkpoint of launch/pretrain.py")
    data = section.get("data", {})
    mean, std = channels_of(data.get("channels", 3), data.get("mean", "auto"), data.get("std", "auto"))
    rest = [name for name in manifest.shapes if name.partition(".")[2].removeprefix(prefix) not in tensors]
    return Weights(
        tensors,
        f"{found}, {encoder} encoder",
        Counter(_part_of_checkpoint(name) for name in rest),
        arch=model["arch"],
        stem=model.get("stem", "imagenet"),
        backbone_args=dict(model.get("backbone_args", {})),
        image_size=_tuple(data.get("image_size")),
        mean=mean,
        std=std,
    )


def _tuple(stored: Any) -> Any:
    """Return a list of JSON as a tuple, anything else as it is."""
    return tuple(stored) if isinstance(stored, list) else stored


def _part_of_checkpoint(name: str) -> str:
    """Return the part that a tensor belongs to, such as "momentum projector", "predictor" or "optimizer"."""
    kind, first, second, *_ = [*name.split("."), "", ""]
    if kind not in ("parameters", "buffers"):
        return kind
    return f"{first} {second}" if first in ENCODERS else first


def _read_file(path: Path, encoder: str, where: str) -> Weights:
    """Read the backbone of a file of weights, after finding out what kind of file it is."""
    entries, tensors = _open(path, where)
    if entries.get("kind") == PROBE:
        raise InputError(f"{where}: is the file of a linear probe; give the checkpoint that the probe was trained on")
    has_both = any(name.startswith(tuple(f"{part}." for part in ENCODERS.values())) for name in tensors)
    prefix = f"{ENCODERS[encoder]}." if has_both else _prefix(tensors, encoder, where)
    of_ddp = "epoch" in entries and any(str(name).startswith("module.") for name in entries.get("state_dict", ()))
    if not prefix and (of_ddp or "best_acc1" in entries):
        raise InputError(
            f"{where}: is the file of a linear probe of MoCo v3, or of a classifier trained with pytorch/examples, which look "
            f"alike: it has an epoch, but no base_encoder; give the checkpoint that the probe was trained on, or for a "
            f"classifier a file with its state_dict alone"
        )
    chosen = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if isinstance(value, Tensor)
        and name.startswith(prefix)
        and not name.removeprefix(prefix).startswith(DECODER)
        and name.removeprefix(prefix).split(".")[0] not in CLASSIFIERS
    }
    if not chosen:
        found, what = ", ".join(list(tensors)[:4]) or "nothing", ENCODERS[encoder] if has_both else "backbone"
        raise InputError(f"{where}: holds no {what}, only {found}; give a file with the weights of one")
    rest = [name for name in tensors if name.removeprefix(prefix) not in chosen]
    ignored = Counter(".".join(name.split(".")[: 2 if has_both and name.startswith(prefix) else 1]) for name in rest)
    note = entries.get(NOTE)
    note = note if isinstance(note, Mapping) else {}
    known = {name: _tuple(note.get(name)) for name in NETWORK}
    arch = entries.get("arch")
    # Elsewhere the name of a ViT would not say which of two it is, see `load`.
    if isinstance(arch, str) and (has_both or (arch in ARCHS and family(arch) == "resnet")):
        known["arch"] = known["arch"] or arch
    of = f", {encoder} encoder" if has_both else f", {prefix.rstrip('.')}" if prefix else ""
    return Weights(chosen, f"{path}{of}", ignored, **known)


def _prefix(tensors: Mapping[str, Any], encoder: str, where: str) -> str:
    """Return what stands before the names of the backbone's tensors, such as "backbone."; InputError if that is not clear."""
    found = {name.removesuffix(mark) for name in tensors for mark in MARKS if name.endswith(mark)}
    prefixes = sorted(prefix for prefix in found if not prefix or prefix.endswith("."))
    of_encoder = [prefix for prefix in prefixes if any(word in prefix for word in MOMENTUM) == (encoder == "momentum")]
    if encoder == "momentum" and not of_encoder:
        raise InputError(f"{where}: holds only one network; encoder {encoder} needs a checkpoint of pretraining")
    if "" in prefixes or not prefixes:
        return ""
    if len(of_encoder) != 1:
        raise InputError(
            f"{where}: holds networks named {', '.join(prefixes)}, and none of them is clearly the {encoder} encoder; save the "
            f"tensors of one without that prefix"
        )
    return of_encoder[0]


def _open(path: Path, where: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return what a file holds, and those of its entries that are the network, without "module."."""
    with path.open("rb") as file:
        start = file.read(9)
    # A file of safetensors starts with the length of a JSON object and that object.
    if path.suffix == ".safetensors" or start[8:] == b"{":
        tensors, metadata = read_safetensors(path)
        return {NOTE: json.loads(metadata.get(NOTE, "{}"))}, tensors
    entries = read_torch(path)
    if not isinstance(entries, dict):
        raise InputError(f"{where}: holds a {type(entries).__name__}, not the tensors of a network")
    networks = {part: entries[part] for part in ("student", "teacher") if isinstance(entries.get(part), dict)}
    if len(networks) == 2:  # a full checkpoint of DINO
        return entries, {
            f"{part}.{str(name).removeprefix('module.')}": value
            for part, network in networks.items()
            for name, value in network.items()
        }
    tensors = next((entries[name] for name in ("state_dict", "model") if isinstance(entries.get(name), dict)), entries)
    return entries, {str(name).removeprefix("module."): value for name, value in tensors.items()}


def mismatch(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], optional: tuple[str, ...] = ()) -> str | None:
    """Describe the tensors that `found` lacks, has besides, or has in another shape; None if there are none.

    A missing tensor does not count if its name ends with one of `optional`.
    """
    missing = sorted(name for name in wanted.keys() - found.keys() if not name.endswith(optional))
    unexpected = sorted(found.keys() - wanted.keys())
    wrong = sorted(
        f"{name} {list(found[name].shape)} for {list(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    )
    if not (missing or unexpected or wrong):
        return None
    return (
        f"{len(missing)} tensors missing {missing[:2]}, {len(unexpected)} unexpected {unexpected[:2]}, {len(wrong)} of another "
        f"shape {wrong[:2]}"
    )
