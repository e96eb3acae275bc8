"""python compile_batchformer_kernels.py CAPABILITY...: compiles kernels as a launch would, without a GPU.

Prints the name of each and the bytes of shared memory that a program takes. A process of its own, since the tests interpret.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from crossbatch.models.batchformer import passes_triton, tiles
from crossbatch.models.batchformer.dropout import Mask

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}


def type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def compile_instead(kernel, *args, grid, warmup, num_warps=4, **constants):
    """Compile where `JITFunction.run` would launch."""
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **constants}
    names = [(i, p.name) for i, p in enumerate(kernel.params) if not p.is_constexpr]
    signature = {p.name: "constexpr" if p.is_constexpr else type_of(values[p.name]) for p in kernel.params}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in names
        if isinstance(values[name], torch.Tensor) or (isinstance(values[name], int) and values[name] % 16 == 0)
    }
    source = ASTSource(kernel, signature, {name: values[name] for name in constants}, divisible)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    print(kernel.__name__, done.metadata.shared)


def passes(dtype: torch.dtype) -> None:
    area = tiles.Area(MASK, 2, 2, 256, 0, 0, 1.0)
    scores, rows = torch.zeros(4, 256, 256), torch.zeros(4, 256)
    passes_triton.softmax_dropout(scores, rows, area, dtype)
    passes_triton.softmax_dropout_backward(scores, scores, rows, rows, area, dtype)
    x, vector = torch.zeros(2, 16, 2048), torch.zeros(2048)
    passes_triton.bias_relu(x.to(dtype), vector, MASK)
    passes_triton.bias_relu_backward(x.to(dtype), x.to(dtype), 0.5)
    _, total, mean, rstd = passes_triton.add_norm(x, x.to(dtype), vector, vector, 1e-5, MASK)
    passes_triton.add_norm_backward(x, total, mean, rstd, vector, MASK, dtype)


MASK = Mask(torch.zeros(2, dtype=torch.int32), 0.5)

if __name__ == "__main__":
    JITFunction.run = compile_instead  # pyright: ignore[reportAttributeAccessIssue]
    for number in sys.argv[1:]:
        capability = int(number)
        passes(torch.bfloat16 if capability >= 80 else torch.float16)
