"""The weights of a backbone, from whatever holds them; nothing is loaded that was not meant.

    a run directory or one of its checkpoints     of any sharding; its configuration says what the network is
    checkpoint_*.pth.tar                          of moco-v3 or BatchFormer: base_encoder and momentum_encoder
    {"model": ...}, {"state_dict": ...}, tensors  as DeiT, timm and torchvision write them, .pth or .safetensors

Shapes alone do not tell networks apart: a ViT-S with 6 heads, as DeiT and timm have it, fits into MoCo v3's, which has 12, to
the last tensor, and computes something else. So the heads must be known: from a run, from an original's file, from what
`convert.py export` notes beside the weights (NOTE), or from the user.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from crossbatch import InputError
from crossbatch.engine import checkpoint
from crossbatch.engine.checkpoint import Unreadable
from crossbatch.engine.pretrained.files import read_safetensors, read_torch
from crossbatch.engine.pretrained.moco_v3 import ENCODERS
from crossbatch.models import build_backbone
from crossbatch.models.backbones import ARCHS, Backbone, family
from crossbatch.models.vit import ViT

NOTE = "crossbatch"  # under which an exported file says what its network is
PROBE, PROBE_FILE = "linear probe", "probe.pt"  # what a file of `linear_results` says that it is, and its name
CLASSIFIERS = ("fc", "head", "head_dist")  # of torchvision, timm and DeiT; in an original file, the projector


@dataclass
class Weights:
    """The tensors of one backbone under our names, and what is known about it. None: the file does not say."""

    tensors: dict[str, Tensor]
    origin: str
    ignored: Counter[str]  # part of the file -> tensors
    arch: str | None = None
    stem: str | None = None
    backbone_args: dict[str, Any] | None = None
    image_size: int | None = None
    num_heads: int | None = None


@dataclass
class Pretrained:
    """A backbone with pretrained weights, on the CPU; `str` says what was loaded."""

    backbone: Backbone
    arch: str
    stem: str
    backbone_args: dict[str, Any]
    image_size: int
    description: str  # where the weights come from
    loaded: int
    missing: list[str] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)  # part of the file -> tensors
    notes: list[str] = field(default_factory=list)  # what a user should know besides

    @property
    def num_heads(self) -> int | None:
        """Of a ViT."""
        return _heads(self.backbone)

    def __str__(self) -> str:
        parts = ", ".join(f"{count} {part}" for part, count in self.ignored.items())
        heads = f" with {self.num_heads} heads" if self.num_heads else ""
        missing = f"{len(self.missing)} missing ({', '.join(self.missing[:3])})" if self.missing else "none missing"
        ignored = f"{sum(self.ignored.values())} ignored ({parts})" if self.ignored else "none ignored"
        return "; ".join(
            [
                f"{self.arch}{heads} of {self.description}: {self.loaded} tensors loaded, {missing}, {ignored}",
                *self.notes,
            ]
        )

    def summary(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "from": self.description,
            "arch": self.arch,
            "stem": self.stem,
            "backbone_args": self.backbone_args,
            "num_heads": self.num_heads,
            "image_size": self.image_size,
            "tensors": self.loaded,
            "missing": self.missing,
            "ignored": self.ignored,
            "notes": self.notes,
        }


def load_pretrained(
    path: str | Path,
    arch: str | None = None,
    stem: str | None = None,
    backbone_args: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    encoder: str = "online",
    key: str = "--checkpoint",
) -> Pretrained:
    """The backbone in `path`, which may be anything of the list above.

    Args:
        arch, stem, backbone_args: what `path` does not say; may repeat, but not contradict, what it says.
        image_size: of the images to come; None: that of pretraining. A ViT's positions are resampled if they differ.
        encoder: "online" or "momentum", where there are two.
        key: flag that `path` was given with, for messages.

    Raises:
        InputError: if `path` cannot be read, holds no backbone, or one of another architecture or number of heads.
    """
    where = f"{key} {path}"
    weights = read_weights(Path(path), encoder, key)
    arch, stem, args = _network(weights, arch, stem, backbone_args, where)
    size = _native_size(weights, arch, args)
    backbone = _built(arch, image_size or size, stem, args, where)
    _check_heads(weights, backbone, arch, args, where)
    notes = _fit_positions(weights, backbone)
    missing = _load(backbone, weights, arch, where)
    return Pretrained(
        backbone=backbone,
        arch=arch,
        stem=stem,
        backbone_args=args,
        image_size=image_size or size,
        description=weights.origin,
        loaded=len(backbone.state_dict()) - len(missing),
        missing=missing,
        ignored=dict(weights.ignored),
        notes=notes,
    )


# --- what is in the file -----------------------------------------------------------------------------------------------


def read_weights(path: Path, encoder: str, key: str) -> Weights:
    """The tensors of a backbone, before anybody checks of which. Raises InputError, naming `key`."""
    where = f"{key} {path}"
    if not path.exists():
        raise InputError(
            f"{where}: no such file or folder; allowed: a run directory, one of its checkpoints, or a file"
        )
    if path.is_dir():
        return _of_a_run(path, encoder, key)
    if _is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        return _of_one_network(path, tensors, json.loads(metadata.get(NOTE, "{}")), encoder, where)
    content = read_torch(path)
    if not isinstance(content, dict):
        raise InputError(f"{where}: holds a {type(content).__name__}, not the tensors of a network")
    if content.get("kind") == PROBE or "best_acc1" in content:
        raise InputError(f"{where}: is the file of a linear probe; give the checkpoint that the probe was made on")
    tensors = next((content[name] for name in ("state_dict", "model") if isinstance(content.get(name), dict)), content)
    tensors = {str(name).removeprefix("module."): value for name, value in tensors.items()}
    if any(name.startswith(tuple(f"{part}." for part in ENCODERS.values())) for name in tensors):
        return _of_an_original(path, content, tensors, encoder, where)
    if "epoch" in content and "state_dict" in content:
        raise InputError(
            f"{where}: is no checkpoint of pretraining: it has an epoch and a state_dict, but no base_encoder in it, as the "
            f"file of a linear probe; give the checkpoint that it was made on"
        )
    return _of_one_network(path, tensors, content.get(NOTE, {}), encoder, where)


def _is_safetensors(path: Path) -> bool:
    """By its name, or by its start: the length of a JSON object, and that object."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _of_a_run(path: Path, encoder: str, key: str) -> Weights:
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
    model = config.get("crossbatch", {}).get("model", {})
    if not tensors or "arch" not in model:
        raise InputError(f"{key} {found}: holds no {encoder} backbone; allowed: a checkpoint of launch/pretrain.py")
    rest = [name for name in manifest.shapes if name.partition(".")[2].removeprefix(prefix) not in tensors]
    ignored = Counter(_part(name) for name in rest)
    return Weights(
        tensors,
        f"{found}, {encoder} encoder",
        ignored,
        arch=model["arch"],
        stem=model.get("stem", "imagenet"),
        backbone_args=dict(model.get("backbone_args", {})),
        image_size=config["crossbatch"].get("data", {}).get("image_size"),
    )


def _part(name: str) -> str:
    """Of a tensor of a checkpoint: "momentum projector", "predictor", "optimizer"."""
    kind, first, second, *_ = [*name.split("."), "", ""]
    if kind not in ("parameters", "buffers"):
        return kind
    return f"{first} {second}" if first in ENCODERS else first


def _of_an_original(
    path: Path, content: Mapping[str, Any], tensors: Mapping[str, Any], encoder: str, where: str
) -> Weights:
    prefix = f"{ENCODERS[encoder]}."
    heads = tuple(f"{prefix}{classifier}." for classifier in CLASSIFIERS)
    chosen = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix) and not name.startswith(heads)
    }
    rest = [name for name in tensors if name.removeprefix(prefix) not in chosen]
    ignored = Counter(".".join(name.split(".")[: 2 if name.startswith(prefix) else 1]) for name in rest)
    if not chosen:
        raise InputError(f"{where}: holds nothing of {ENCODERS[encoder]}; give a checkpoint of moco-v3 or BatchFormer")
    arch = content.get("arch")
    return Weights(chosen, f"{path}, {encoder} encoder", ignored, arch=arch if isinstance(arch, str) else None)


def _of_one_network(path: Path, tensors: Mapping[str, Any], note: Any, encoder: str, where: str) -> Weights:
    if encoder != "online":
        raise InputError(
            f"{where}: holds one network only; encoder {encoder}: allowed with a checkpoint of pretraining"
        )
    chosen = {
        name: value
        for name, value in tensors.items()
        if isinstance(value, Tensor) and name.split(".")[0] not in CLASSIFIERS
    }
    if not chosen:
        found = ", ".join(list(tensors)[:4]) or "nothing at all"
        raise InputError(f"{where}: holds nothing of a backbone ({found}); give a file with the weights of one")
    ignored = Counter(name.split(".")[0] for name in tensors if name not in chosen)
    note = note if isinstance(note, Mapping) else {}
    known = {name: note.get(name) for name in ("arch", "stem", "backbone_args", "image_size", "num_heads")}
    return Weights(chosen, str(path), ignored, **known)


# --- whether it is what was meant --------------------------------------------------------------------------------------


def _network(
    weights: Weights, arch: str | None, stem: str | None, backbone_args: Mapping[str, Any] | None, where: str
) -> tuple[str, str, dict[str, Any]]:
    """What the file says and what the user says, which must agree."""
    found = arch or weights.arch
    if found is None:
        raise InputError(f"{where}: does not say which backbone it holds; give it with -a, one of {', '.join(ARCHS)}")
    if weights.arch not in (None, found):
        raise InputError(
            f"{where}: holds a {weights.arch}, but {found} was asked for; leave out -a, or give another file"
        )
    if None not in (stem, weights.stem) and stem != weights.stem:
        raise InputError(f"{where}: has the stem {weights.stem}; crossbatch.model.stem: given {stem}; leave it out")
    args = dict(weights.backbone_args or {})
    for name, value in (backbone_args or {}).items():
        if weights.backbone_args is not None and args.get(name, value) != value:
            raise InputError(
                f"{where}: has {name} {args[name]}; crossbatch.model.backbone_args.{name}: given {value}; leave it out"
            )
        args[name] = value
    return found, stem or weights.stem or "imagenet", args


def _native_size(weights: Weights, arch: str, args: Mapping[str, Any]) -> int:
    """Side of the images that the network was trained on, as far as one can know; a ViT's positions tell."""
    positions = weights.tensors.get("pos_embed")
    if positions is not None and positions.dim() == 3:
        return math.isqrt(max(positions.shape[1] - 1, 1)) * int(args.get("patch_size", 16))
    return weights.image_size or 224


def _built(arch: str, image_size: int, stem: str, args: dict[str, Any], where: str) -> Backbone:
    try:
        return build_backbone(arch, image_size, stem, backbone_args=args)
    except ValueError as error:
        raise InputError(
            f"{where}: crossbatch.{'data' if str(error).startswith('image_size') else 'model'}.{error}"
        ) from None


def _heads(backbone: Backbone) -> int | None:
    return backbone.blocks[0].attn.num_heads if isinstance(backbone, ViT) else None  # pyright: ignore


def _check_heads(weights: Weights, backbone: Backbone, arch: str, args: Mapping[str, Any], where: str) -> None:
    heads = _heads(backbone)
    if heads is None:
        return
    if weights.num_heads not in (None, heads):
        raise InputError(
            f"{where}: has {weights.num_heads} heads, {arch} has {heads}, with the same shapes; if they are meant, "
            f"--set crossbatch.model.backbone_args='{{\"num_heads\": {weights.num_heads}}}'"
        )
    said = weights.num_heads is not None or weights.arch is not None or "num_heads" in args
    if arch == "vit_small" and not said:
        raise InputError(
            f"{where}: does not say how many heads it has: MoCo v3's ViT-S has 12, DeiT's and timm's has 6, with the same "
            f"shapes; say which: --set crossbatch.model.backbone_args='{{\"num_heads\": 12}}'"
        )


def _fit_positions(weights: Weights, backbone: Backbone) -> list[str]:
    """Resamples the positions of a ViT for images of another size; what to tell the user."""
    positions = weights.tensors.get("pos_embed")
    if not isinstance(backbone, ViT) or positions is None or positions.dim() != 3:
        return []
    was = math.isqrt(max(positions.shape[1] - 1, 1))
    if (was, was) == backbone.grid:
        return []
    weights.tensors["pos_embed"] = resample_abs_pos_embed(positions, list(backbone.grid))
    return [f"positions resampled from {was} x {was} to {backbone.grid[0]} x {backbone.grid[1]} patches"]


def _load(backbone: Backbone, weights: Weights, arch: str, where: str) -> list[str]:
    """Copies the tensors; which of the backbone's are not in the file. Only batch counters, which nothing reads, may be."""
    wanted = backbone.state_dict()
    missing = sorted(name for name in wanted if name not in weights.tensors)
    unexpected = sorted(name for name in weights.tensors if name not in wanted)
    wrong = sorted(
        f"{name} {list(weights.tensors[name].shape)} for {list(wanted[name].shape)}"
        for name in wanted.keys() & weights.tensors.keys()
        if weights.tensors[name].shape != wanted[name].shape
    )
    needed = [name for name in missing if not name.endswith("num_batches_tracked")]
    if needed or unexpected or wrong:
        raise InputError(
            f"{where}: is no {arch} of this {'stem and width' if family(arch) == 'resnet' else 'size'}: "
            f"{len(needed)} tensors missing {needed[:2]}, {len(unexpected)} unexpected {unexpected[:2]}, {len(wrong)} of "
            f"another shape {wrong[:2]}; check -a, crossbatch.model.stem and crossbatch.model.backbone_args"
        )
    broken = [name for name, tensor in weights.tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError(f"{where}: {len(broken)} tensors hold values that are not finite ({broken[0]}, ...)")
    backbone.load_state_dict(weights.tensors, strict=False)
    return missing
