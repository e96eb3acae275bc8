"""Compiles parts of a network by torch.compile, each without a break in its graph ("regional compilation").

A part is a method of a module, never the module: the hooks by which FSDP2 and ZeRO gather parameters stay outside of the graph,
and so do the norms, which talk to other ranks. Names of parameters do not change. Parts of the same kind (the blocks of a ViT)
share what was compiled, because their parameters are inputs of the graph. What has another shape, or no gradient, is compiled
for itself, when it is first called.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BACKEND: Any = "inductor"
# The linear layers of both encoders, with and without gradient, in chunks of two sizes, are about 30 cases of one method; torch
# stops after 8 by default.
RECOMPILE_LIMIT = 128


class CompiledMethod:
    """Stands in for a method of `module`: compiled in training, and as it was in evaluation, where shapes change.

    It looks up the method when it is called, so that it follows a copy of the module, and a class that FSDP2 puts in its place.
    """

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name

    def __call__(self, *args: Any) -> Any:
        method = getattr(type(self.module), self.name)
        return (_compiled(method, BACKEND) if self.module.training else method)(self.module, *args)


@functools.cache
def _compiled(function: Callable, backend: Any) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def compile_method(module: nn.Module, name: str) -> None:
    """Let a method of `module` be compiled when it is next called in training."""
    setattr(module, name, CompiledMethod(module, name))


def compiled_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of `model` that have a compiled method."""
    return [m for m in model.modules() if any(isinstance(value, CompiledMethod) for value in vars(m).values())]


def check_compiler(device: torch.device) -> None:
    """Compile two operators for `device`. Raises ValueError if that fails, with the reason and what to do."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    try:
        _compiled(_two_operators, BACKEND)(torch.ones(16, device=device))
    except Exception as error:
        *_, reason = str(error).strip().partition("\n")[0].rpartition("Error: ")
        missing = "Triton and a C compiler (gcc)" if device.type == "cuda" else "a C++ compiler (g++)"
        raise ValueError(
            f"compile is true, but torch.compile cannot compile for {device.type} here: {reason}; install {missing}, or set it "
            f"to false"
        ) from None


def _two_operators(x: torch.Tensor) -> torch.Tensor:
    return (x + 1).relu()
