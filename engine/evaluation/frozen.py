"""A pretrained backbone that must not change, and the check that it did not."""

import hashlib

import torch
from torch import nn

from crossbatch import InputError
from crossbatch.engine.config import autocast_dtype
from crossbatch.engine.config.evaluation import FrozenModelConfig
from crossbatch.engine.pretrained.load import Pretrained, load_pretrained
from crossbatch.models import autocast


class FrozenBackbone:
    """Maps normalised images [m, 3, H, W] to features [m, C]: no gradients, running statistics stay as they are.

    Args:
        pretrained: the backbone, which is moved to `device`.
        precision: "fp32", "bf16" or "fp16", for autocast.
    """

    def __init__(self, pretrained: Pretrained, device: torch.device, precision: str = "fp32"):
        self.backbone: nn.Module = pretrained.backbone.to(device).eval().requires_grad_(False)
        self.num_features = pretrained.backbone.num_features
        self._dtype = autocast_dtype(precision)
        self.fingerprint = fingerprint(self.backbone)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        with autocast(images.device.type, self._dtype):
            return self.backbone(images)

    def check(self) -> None:
        """Raise RuntimeError if any bit of the backbone has changed since it was frozen."""
        if fingerprint(self.backbone) != self.fingerprint:
            raise RuntimeError(
                "the frozen backbone has changed during the evaluation, so the result is of another network"
            )


def fingerprint(module: nn.Module) -> str:
    """Return the SHA-256 of the names and bits of all parameters and buffers."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def load_configured(model: FrozenModelConfig, image_size: int | str) -> Pretrained:
    """Load the backbone that the section `crossbatch.model` names. Raises InputError.

    `image_size` is the side of the images in pixels, or "auto" for that of pretraining.
    """
    if model.checkpoint is None:
        raise InputError(
            "crossbatch.model.checkpoint: not given; allowed: a run directory, one of its checkpoints, or a file of weights; "
            "give it with --checkpoint"
        )
    size = image_size if isinstance(image_size, int) else None
    return load_pretrained(model.checkpoint, model.arch, model.stem, model.backbone_args, size, model.encoder)
