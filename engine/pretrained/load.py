"""Builds a backbone and loads its weights, and refuses weights of another network.

Shapes alone do not tell networks apart. A ViT-S with 6 heads, as DeiT and timm have it, fits into MoCo v3's, which has 12, to
the last tensor, and computes something else. So the number of heads must be known: from a run, from a file of moco-v3, from
what `convert.py export` notes beside the weights, or from the user.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed

from crossbatch import InputError
from crossbatch.data.augment.parameters import Channels, channels_of
from crossbatch.engine.config import user_input
from crossbatch.engine.config.evaluation import FrozenModelConfig
from crossbatch.engine.pretrained.weights import Weights, mismatch, read_weights
from crossbatch.models import build_backbone
from crossbatch.models.backbones import ARCHS, Backbone, family
from crossbatch.models.vit import ViT

_FIRST = ("conv1.weight", "patch_embed.proj.weight", "patch_embed.proj.0.weight")  # layers that see the channels
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Pretrained:
    """Holds a backbone with pretrained weights, on the CPU; `str` says what was loaded."""

    backbone: Backbone
    arch: str
    stem: str
    backbone_args: dict[str, Any]
    num_heads: int | None  # of a ViT
    image_size: int | tuple[int, int]
    mean: tuple[float, ...]  # of each channel of the images, for values from 0 to 1
    std: tuple[float, ...]
    knows_channels: bool  # whether mean and std are those of pretraining; else they are ImageNet's
    description: str  # where the weights come from
    loaded: int
    missing: list[str]
    ignored: dict[str, int]  # part of the file -> tensors
    notes: list[str]  # what a user should know besides

    @property
    def channels(self) -> Channels:
        """Return which channels the images have, and how they are normalised."""
        return Channels(self.mean, self.std)

    def __str__(self) -> str:
        parts = ", ".join(f"{count} {part}" for part, count in self.ignored.items())
        heads = f" with {self.num_heads} heads" if self.num_heads else ""
        missing = f"{len(self.missing)} missing ({', '.join(self.missing[:3])})" if self.missing else "none missing"
        ignored = f"{sum(self.ignored.values())} ignored ({parts})" if self.ignored else "none ignored"
        loaded = f"{self.arch}{heads} of {self.description}: {self.loaded} tensors loaded, {missing}, {ignored}"
        return "; ".join([loaded, *self.notes])

    def summary(self) -> dict[str, Any]:
        """Return what was loaded, for results.json."""
        fields = {name: value for name, value in vars(self).items() if name not in ("backbone", "knows_channels")}
        return {"from": fields.pop("description"), "tensors": fields.pop("loaded"), **fields}


def load_configured(model: FrozenModelConfig, image_size: int | tuple[int, int] | str) -> Pretrained:
    """Load the backbone that the section `crossbatch.model` names. Raises InputError.

    `image_size` is the side of the images in pixels, (height, width), or "auto" for that of pretraining.
    """
    if model.checkpoint is None:
        raise InputError(
            "crossbatch.model.checkpoint: not given; allowed: a run directory, one of its checkpoints, or a file of weights; "
            "give it with --checkpoint"
        )
    size = None if isinstance(image_size, str) else image_size
    return load_pretrained(model.checkpoint, model.arch, model.stem, model.backbone_args, size, model.encoder)


def load_pretrained(
    path: str | Path,
    arch: str | None = None,
    stem: str | None = None,
    backbone_args: Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    encoder: str = "online",
    flag: str = "--checkpoint",
) -> Pretrained:
    """Load the backbone in `path`: a run directory, one of its checkpoints, or a file; see `weights`.

    Args:
        arch, stem, backbone_args: as of `build_backbone`, needed where `path` does not say them; they may repeat, but not
            contradict, what it says.
        image_size: side in pixels, or (height, width), of the images that the network will see; None means that of
            pretraining. The positions of a ViT are resampled if the two differ.
        encoder: "online" or "momentum", for checkpoints of pretraining, which hold both.
        flag: where the user gave `path`, for messages.

    Raises:
        InputError: if `path` cannot be read, holds no backbone, or one of another architecture or number of heads.
    """
    where = f"{flag} {path}"
    weights = read_weights(Path(path), encoder, where, flag)
    _check_kinds(weights, where)
    arch, stem, args = _network(weights, arch, stem, backbone_args, where)
    patch = int(args.get("patch_size", 16))
    grid = _grid(weights, patch)
    size = image_size or (_size_of(grid, patch) if grid else weights.image_size or 224)
    in_channels = next((weights.tensors[name].shape[1] for name in _FIRST if name in weights.tensors), 3)
    channels = channels_of(in_channels, weights.mean or "auto", weights.std or "auto")
    with user_input(f"{where}: crossbatch.model.", image_size=f"{where}: crossbatch.data.image_size"):
        backbone = build_backbone(arch, size, stem, backbone_args=args, in_channels=in_channels)
    heads = int(backbone.blocks[0].attn.num_heads) if isinstance(backbone, ViT) else None  # pyright: ignore
    _check_heads(weights, heads, arch, args, where)
    notes = _fit_positions(weights, grid, backbone, where)
    missing = _load(backbone, weights, arch, where)
    return Pretrained(
        backbone=backbone,
        arch=arch,
        stem=stem,
        backbone_args=args,
        num_heads=heads,
        image_size=size,
        mean=channels.mean,
        std=channels.std,
        knows_channels=weights.mean is not None,
        description=weights.origin,
        loaded=len(backbone.state_dict()) - len(missing),
        missing=missing,
        ignored=dict(weights.ignored),
        notes=notes,
    )


def _network(
    weights: Weights, arch: str | None, stem: str | None, backbone_args: Mapping[str, Any] | None, where: str
) -> tuple[str, str, dict[str, Any]]:
    """Return arch, stem and arguments as the file and the user give them. Raises InputError if the two disagree."""
    found = arch or weights.arch
    if found is None:
        raise InputError(f"{where}: does not say which backbone it holds; give it with -a, one of {', '.join(ARCHS)}")
    if weights.arch not in (None, found):
        raise InputError(
            f"{where}: holds a {weights.arch}, but {found} was asked for; give -a {weights.arch}, or another file"
        )
    if None not in (stem, weights.stem) and stem != weights.stem:
        raise InputError(
            f"{where}: has the stem {weights.stem}; crossbatch.model.stem: given {stem}; set it to {weights.stem}"
        )
    args = dict(weights.backbone_args or {})
    for name, value in (backbone_args or {}).items():
        if weights.backbone_args is not None and args.get(name, value) != value:
            raise InputError(
                f"{where}: has {name} {args[name]}; crossbatch.model.backbone_args.{name}: given {value}; set it to "
                f"{args[name]}"
            )
        args[name] = value
    return found, stem or weights.stem or "imagenet", args


def _grid(weights: Weights, patch: int) -> tuple[int, int] | None:
    """Return the rows and columns of patches that the positions of a ViT are for, or None if there are none.

    They are a square unless the file says otherwise, as a run with images of [height, width] does.
    """
    positions = weights.tensors.get("pos_embed")
    if positions is None or positions.dim() != 3:
        return None
    if isinstance(weights.image_size, tuple):
        height, width = weights.image_size
        return height // patch, width // patch
    side = math.isqrt(max(positions.shape[1] - 1, 1))
    return side, side


def _size_of(grid: tuple[int, int], patch: int) -> int | tuple[int, int]:
    height, width = grid[0] * patch, grid[1] * patch
    return height if height == width else (height, width)


def _check_heads(weights: Weights, heads: int | None, arch: str, args: Mapping[str, Any], where: str) -> None:
    """Raise InputError if the file means another number of attention heads, or none where the shapes fit two."""
    if heads is not None and weights.num_heads not in (None, heads):
        raise InputError(
            f"{where}: has {weights.num_heads} heads, but {arch} has {heads}, with the same shapes; if that is right, give "
            f"--set crossbatch.model.backbone_args='{{\"num_heads\": {weights.num_heads}}}'"
        )
    known = weights.num_heads is not None or weights.arch is not None or "num_heads" in args
    if arch == "vit_small" and not known and "cls_token" in weights.tensors:
        raise InputError(
            f"{where}: does not say how many heads it has: MoCo v3's ViT-S has 12, DeiT's and timm's has 6, with the same "
            f"shapes; say which: --set crossbatch.model.backbone_args='{{\"num_heads\": 12}}'"
        )


def _check_kinds(weights: Weights, where: str) -> None:
    """Raise InputError for tensors that are no floating-point numbers, but for batch counters."""
    odd = [
        f"{name} is {'meta, without values' if tensor.is_meta else str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in weights.tensors.items()
        if not name.endswith("num_batches_tracked") and (tensor.is_meta or tensor.dtype not in FLOATS)
    ]
    if odd:
        raise InputError(
            f"{where}: tensors that are not plain floating-point numbers: {len(odd)} ({', '.join(odd[:2])}); allowed: float64, "
            f"float32, float16, bfloat16; give the weights before they were quantised"
        )


def _fit_positions(weights: Weights, grid: tuple[int, int] | None, backbone: Backbone, where: str) -> list[str]:
    """Resample the positions of a ViT for images of another size; return what to tell the user about it."""
    if not isinstance(backbone, ViT) or grid is None:
        return []
    count = weights.tensors["pos_embed"].shape[1]
    if count != grid[0] * grid[1] + 1:
        what = "register tokens" if "reg_token" in weights.tensors else "no square of patches and one class token"
        raise InputError(
            f"{where}: has {count} positions ({what}); allowed: those of a class token and of a square of patches, as in MoCo "
            f"v3, DeiT and timm's vit_*_patch16_224; give such a file"
        )
    if grid == backbone.grid:
        return []
    rows, columns = backbone.grid
    positions = weights.tensors["pos_embed"]
    weights.tensors["pos_embed"] = resample_abs_pos_embed(positions, [rows, columns], old_size=[*grid])
    return [f"positions resampled from {grid[0]} x {grid[1]} to {rows} x {columns} patches"]


def _load(backbone: Backbone, weights: Weights, arch: str, where: str) -> list[str]:
    """Copy the tensors; return the names that the file lacks. Only batch counters, which nothing reads, may be missing."""
    wanted = backbone.state_dict()
    wrong = mismatch(wanted, weights.tensors, optional=("num_batches_tracked",))
    if wrong:
        raise InputError(
            f"{where}: is not a {arch} of this {'stem and width' if family(arch) == 'resnet' else 'size'}: {wrong}; check -a, "
            f"crossbatch.model.stem and crossbatch.model.backbone_args"
        )
    broken = [name for name, tensor in weights.tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError(
            f"{where}: {len(broken)} tensors hold inf or NaN ({', '.join(broken[:2])}); give another checkpoint"
        )
    backbone.load_state_dict(weights.tensors, strict=False)
    return sorted(wanted.keys() - weights.tensors.keys())
