"""Defines the interface of networks that can be sharded, trained in chunks, and followed by a moving average."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.profiler import record_function

from crossbatch.models.backbones import blocks
from crossbatch.models.collective import Collective


class ShardableModel(nn.Module, ABC):
    """Hold an online network, which is trained, and perhaps a momentum network, which follows it."""

    parts: tuple[str, ...]  # names of the methods that `forward` calls
    collective: Collective
    autocast_dtype: torch.dtype | None = None  # of `forward`; None: whatever is in force around it
    span: Callable[[str], AbstractContextManager] = record_function  # contains a named part of the step

    def forward(self, part: str, *args):
        """Call the method named `part`: DDP and sharding backends do their work where `forward` is called, and only there.

        Autocast begins here because DeepSpeed switches off one that surrounds the call of its engine. It begins anew in each
        call, because it would otherwise reuse weights that it cast without gradient.

        Raises:
            ValueError: if `part` is not the name of a part.
        """
        if not isinstance(part, str) or part not in self.parts:
            given = repr(part) if isinstance(part, str) else f"a {type(part).__name__}"
            raise ValueError(
                f"part is {given}; allowed: {', '.join(self.parts)}; then its arguments, as in model({self.parts[0]!r}, images)"
            )
        device = next((argument.device.type for argument in args if isinstance(argument, torch.Tensor)), "cpu")
        with autocast(device, self.autocast_dtype):
            return getattr(self, part)(*args)

    @property
    @abstractmethod
    def chunked_module(self) -> nn.Module:
        """Return the part that is run and back-propagated chunk by chunk."""

    @abstractmethod
    def momentum_pairs(self) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
        """Return (name, online parameter, momentum parameter) of everything that the moving average follows."""

    @abstractmethod
    def fsdp_units(self) -> list[nn.Module]:
        """Return the modules that FSDP gathers one by one, from the inside out, without the network itself.

        Online and momentum parts have corresponding units, so that their shards are cut alike. The units of each are in the
        order in which they end in a forward pass.
        """


def autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager:
    """Run forward passes in `dtype`; None changes nothing."""
    return torch.autocast(device_type, dtype) if dtype else contextlib.nullcontext()


def backbone_units(backbone: nn.Module) -> list[nn.Module]:
    """Return the blocks of a backbone, then the backbone."""
    return [*blocks(backbone), backbone]
