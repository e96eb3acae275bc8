"""Reads the tensors of one backbone from whatever holds them, and what the file says about the network.

a run directory or one of its checkpoints     of any sharding; its configuration describes the network
checkpoint_*.pth.tar                          of moco-v3 or BatchFormer: base_encoder and momentum_encoder
{"model": ...}, {"state_dict": ...}, tensors  as DeiT, timm and torchvision write them, .pth or .safetensors
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from crossbatch import InputError
from crossbatch.engine import checkpoint
from crossbatch.engine.checkpoint import Unreadable
from crossbatch.engine.pretrained.files import read_safetensors, read_torch
from crossbatch.engine.pretrained.moco_v3 import ENCODERS

NOTE = "crossbatch"  # entry of an exported file that describes its network
PROBE, PROBE_FILE = "linear probe", "probe.pt"  # "kind" of the file that the linear probe saves, and its name
CLASSIFIERS = ("fc", "head", "head_dist")  # in torchvision, timm and DeiT; the projector in a file of moco-v3


@dataclass
class Weights:
    """The tensors of one backbone, under the names of this package, and what the file says about it (None: nothing)."""

    tensors: dict[str, Tensor]
    origin: str
    ignored: Counter[str]  # part of the file -> tensors
    arch: str | None = None
    stem: str | None = None
    backbone_args: dict[str, Any] | None = None
    image_size: int | None = None
    num_heads: int | None = None


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights that has been read, but not yet understood."""

    path: Path
    where: str  # flag and path, for messages
    entries: Mapping[str, Any]  # what the file holds
    tensors: Mapping[str, Any]  # those of its entries that are the network, without "module."
    encoder: str  # that is asked for, "online" or "momentum"


def read_weights(path: Path, encoder: str, key: str) -> Weights:
    """Read the tensors of a backbone, without checking that they fit any network.

    Args:
        encoder: "online" or "momentum", where there are two.
        key: flag that `path` was given with, for messages.

    Raises:
        InputError: if `path` cannot be read, or holds no backbone.
    """
    where = f"{key} {path}"
    if not path.exists():
        raise InputError(
            f"{where}: no such file or folder; allowed: a run directory, one of its checkpoints, or a file"
        )
    if path.is_dir():
        return _read_run(path, encoder, key)
    file = _read_file(path, encoder, where)
    return next(read for is_of_this_kind, read in _KINDS if is_of_this_kind(file))(file)


# --- a run of this package -------------------------------------------------------------------------------------------


def _read_run(path: Path, encoder: str, key: str) -> Weights:
    if (path / PROBE_FILE).is_file():
        raise InputError(
            f"{key} {path}: is the folder of a linear probe; give the checkpoint that the probe was made on"
        )
    found = checkpoint.find(path, key)
    prefix = f"{encoder}.backbone."
    try:
        manifest, config = checkpoint.read_manifest(found)
        tensors = {
            name: tensor
            for part in ("parameters", "buffers")
            for name, tensor in checkpoint.read(found, f"{part}.{prefix}").items()
        }
    except Unreadable as error:
        raise InputError(f"{key} {found}: {error}; name another checkpoint of the run") from None
    section = config.get("crossbatch", {})
    model = section.get("model", {})
    if not tensors or "arch" not in model:
        raise InputError(f"{key} {found}: holds no {encoder} backbone; allowed: a checkpoint of launch/pretrain.py")
    rest = [name for name in manifest.shapes if name.partition(".")[2].removeprefix(prefix) not in tensors]
    return Weights(
        tensors,
        f"{found}, {encoder} encoder",
        Counter(_part_of_checkpoint(name) for name in rest),
        arch=model["arch"],
        stem=model.get("stem", "imagenet"),
        backbone_args=dict(model.get("backbone_args", {})),
        image_size=section.get("data", {}).get("image_size"),
    )


def _part_of_checkpoint(name: str) -> str:
    """Return the part that a tensor belongs to, such as "momentum projector", "predictor" or "optimizer"."""
    kind, first, second, *_ = [*name.split("."), "", ""]
    if kind not in ("parameters", "buffers"):
        return kind
    return f"{first} {second}" if first in ENCODERS else first


# --- a file ----------------------------------------------------------------------------------------------------------


def _read_file(path: Path, encoder: str, where: str) -> WeightsFile:
    if _is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        return WeightsFile(path, where, {NOTE: json.loads(metadata.get(NOTE, "{}"))}, tensors, encoder)
    entries = read_torch(path)
    if not isinstance(entries, dict):
        raise InputError(f"{where}: holds a {type(entries).__name__}, not the tensors of a network")
    tensors = next((entries[name] for name in ("state_dict", "model") if isinstance(entries.get(name), dict)), entries)
    tensors = {str(name).removeprefix("module."): value for name, value in tensors.items()}
    return WeightsFile(path, where, entries, tensors, encoder)


def _is_safetensors(path: Path) -> bool:
    """Tell safetensors by the name, or by the start: the length of a JSON object, and that object."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _is_probe(file: WeightsFile) -> bool:
    return file.entries.get("kind") == PROBE or "best_acc1" in file.entries


def _refuse_probe(file: WeightsFile) -> Weights:
    raise InputError(f"{file.where}: is the file of a linear probe; give the checkpoint that the probe was made on")


def _has_encoders(file: WeightsFile) -> bool:
    return any(name.startswith(tuple(f"{part}." for part in ENCODERS.values())) for name in file.tensors)


def _read_moco_v3(file: WeightsFile) -> Weights:
    prefix = f"{ENCODERS[file.encoder]}."
    heads = tuple(f"{prefix}{classifier}." for classifier in CLASSIFIERS)
    chosen = {
        name.removeprefix(prefix): value
        for name, value in file.tensors.items()
        if name.startswith(prefix) and not name.startswith(heads)
    }
    rest = [name for name in file.tensors if name.removeprefix(prefix) not in chosen]
    ignored = Counter(".".join(name.split(".")[: 2 if name.startswith(prefix) else 1]) for name in rest)
    if not chosen:
        raise InputError(
            f"{file.where}: holds nothing of {ENCODERS[file.encoder]}; give a checkpoint of moco-v3 or BatchFormer"
        )
    arch = file.entries.get("arch")
    origin = f"{file.path}, {file.encoder} encoder"
    return Weights(chosen, origin, ignored, arch=arch if isinstance(arch, str) else None)


def _is_other_training(file: WeightsFile) -> bool:
    return "epoch" in file.entries and "state_dict" in file.entries


def _refuse_other_training(file: WeightsFile) -> Weights:
    raise InputError(
        f"{file.where}: is no checkpoint of pretraining: it has an epoch and a state_dict, but no base_encoder in it, as the "
        f"file of a linear probe; give the checkpoint that it was made on"
    )


def _read_network(file: WeightsFile) -> Weights:
    if file.encoder != "online":
        raise InputError(
            f"{file.where}: holds one network only; encoder {file.encoder}: allowed with a checkpoint of pretraining"
        )
    chosen = {
        name: value
        for name, value in file.tensors.items()
        if isinstance(value, Tensor) and name.split(".")[0] not in CLASSIFIERS
    }
    if not chosen:
        found = ", ".join(list(file.tensors)[:4]) or "nothing at all"
        raise InputError(f"{file.where}: holds nothing of a backbone ({found}); give a file with the weights of one")
    ignored = Counter(name.split(".")[0] for name in file.tensors if name not in chosen)
    note = file.entries.get(NOTE)
    note = note if isinstance(note, Mapping) else {}
    known = {name: note.get(name) for name in ("arch", "stem", "backbone_args", "image_size", "num_heads")}
    return Weights(chosen, str(file.path), ignored, **known)


# The kinds of files, in the order in which they are tried, and what reads or refuses each.
_KINDS: list[tuple[Callable[[WeightsFile], bool], Callable[[WeightsFile], Weights]]] = [
    (_is_probe, _refuse_probe),
    (_has_encoders, _read_moco_v3),
    (_is_other_training, _refuse_other_training),
    (lambda file: True, _read_network),
]
