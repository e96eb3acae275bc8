"""python compile_kernels.py [OPTION] [--planted] CAPABILITY...: compiles every Triton kernel as a launch would, without a GPU.

Prints a line of JSON for each configuration that can be chosen: what it takes of a multiprocessor. A process of its own, since
the tests interpret. kernels.json knows what was compiled before; what has another source, configuration or Triton is compiled.
  --largest  only the largest configurations
  --anew     compile also what kernels.json knows
  --record   write kernels.json; the tests expect it of 70 80 90
  --planted  also a kernel that does not fit
"""

import contextlib
import hashlib
import io
import json
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from crossbatch import LARS
from crossbatch.data import moco_v3_augmentations
from crossbatch.data.augment.parameters import draw_parameters
from crossbatch.data.augment.triton_colours import colour_view
from crossbatch.engine.optimizers import lars, lars_cuda
from crossbatch.models.batchformer import passes_triton, tiles
from crossbatch.models.batchformer.dropout import Mask
from crossbatch.models.norm import passes_triton as norm_passes

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
CHANNELS = (64, 33, 5, 16)  # of an image: a multiple of a tile's columns, odd numbers, a narrower tile
WIDTHS = (2048, 1024, 768, 512, 384)  # features of a ResNet-50, ViT-L, ViT-B, ResNet-18, ViT-S
GROUPS = (256, 4096, 512, 64, 8)
RECORD = Path(__file__).with_name("kernels.json")
MEASURED = ("registers", "spilled_bytes", "shared_bytes")  # of each configuration in kernels.json


def read_record() -> dict[str, list[int]]:
    """Return what was measured of each configuration, which is nothing if another Triton measured."""
    record = json.loads(RECORD.read_text())
    return record["kernels"] if record["triton"] == triton.__version__ else {}


def write_record(kernels: dict[str, list[int]]) -> None:
    lines = ",\n".join(f'"{key}": {measured}' for key, measured in sorted(kernels.items()))
    RECORD.write_text(f'{{"triton": "{triton.__version__}", "kernels": {{\n{lines}\n}}}}\n')


def sources(kernel: JITFunction) -> str:
    """Return the source of a kernel and of all that it calls, with the constants of their modules."""
    names = {name: kernel.fn.__globals__.get(name) for name in kernel.fn.__code__.co_names}
    plain = [name for name, value in names.items() if isinstance(value, int | float)]
    assert not plain, f"{kernel.__name__} uses {plain}: make them constexpr, so that they are found here"
    called = [sources(value) for name, value in sorted(names.items()) if isinstance(value, JITFunction)]
    constants = [
        f"{name} = {value}" for name, value in sorted(names.items()) if isinstance(value, triton.language.constexpr)
    ]
    return "\n".join([kernel.src, *constants, *called])


def type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


class Compiler:
    """Compiles where `JITFunction.run` would launch, each configuration once unless `known`, and prints what it takes."""

    def __init__(self, capability: int, known: dict[str, list[int]]):
        self.capability, self.known = capability, known
        self.done: dict[str, list[int]] = {}

    def run(self, kernel, *args, grid, warmup, num_warps=4, maxnreg=None, **constants):
        values = {**dict(zip(kernel.arg_names, args, strict=False)), **constants}
        assert values.keys() <= {*kernel.arg_names}, "an option of a launch that is not looked at here"
        signature = {p.name: "constexpr" if p.is_constexpr else type_of(values[p.name]) for p in kernel.params}
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        divisible = {
            (i,): [["tt.divisibility", 16]]
            for i, p in enumerate(kernel.params)
            if not p.is_constexpr
            if isinstance(values[p.name], torch.Tensor) or (type(values[p.name]) is int and values[p.name] % 16 == 0)
        }
        configuration = repr((sources(kernel), signature, constants, divisible, num_warps, maxnreg, self.capability))
        key = hashlib.sha256(configuration.encode()).hexdigest()[:16]
        if key in self.done:
            return
        options = {"num_warps": num_warps, "maxnreg": maxnreg}
        measured = self.known.get(key) or self.compile(ASTSource(kernel, signature, constants, divisible), options)
        self.done[key] = measured
        found = {"kernel": kernel.__name__, "capability": self.capability, "threads": 32 * num_warps}
        found |= dict(zip(MEASURED, measured, strict=True)) | {"constants": constants, "known": key in self.known}
        print(json.dumps(found), flush=True)

    def compile(self, source: ASTSource, options: dict) -> list[int]:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        (registers,) = re.findall(r"Used (\d+) registers", log.getvalue())
        spilled = re.findall(r"(\d+) bytes spill", log.getvalue())
        return [int(registers), sum(map(int, spilled)), compiled.metadata.shared]


def batchformer(dtype: torch.dtype, width: int, group: int, dropout: float) -> None:
    mask = Mask(torch.zeros(2, dtype=torch.int32), dropout)
    area = tiles.Area(mask, 2, 2, group, 0, 0, 1.0)
    scores, rows = torch.zeros(4, 1, group).expand(4, 16, group).contiguous(), torch.zeros(4, 16)
    passes_triton.softmax_dropout(scores, rows, area, dtype)
    passes_triton.softmax_dropout_backward(scores, scores, rows, rows, area, dtype)
    x, vector = torch.zeros(2, 16, width), torch.zeros(width)
    passes_triton.bias_relu(x.to(dtype), vector, mask)
    passes_triton.bias_relu_backward(x.to(dtype), x.to(dtype), 0.5)
    _, total, mean, rstd = passes_triton.add_norm(x, x.to(dtype), vector, vector, 1e-5, mask)
    passes_triton.add_norm_backward(x, total, mean, rstd, vector, mask, dtype)


def view_norm(dtype: torch.dtype, channels: int, options: bool) -> None:
    """Make every pass of a norm, with most inputs; and with `options` in every combination that can be chosen."""
    x = torch.zeros(2, channels, 8, 8, dtype=dtype).to(memory_format=torch.channels_last)
    vectors = torch.zeros(2, channels), torch.zeros(channels)
    channel = (*vectors[:1] * 2, *vectors[1:] * 2)
    norm_passes.statistics(x, 2)
    for relu in (True, False) if options else (True,):
        for residual in (x, x.float(), None) if options else ():
            norm_passes.normalise(x, residual, channel, 1e-5, relu)
        norm_passes.normalise(x, x, channel * 2, 1e-5, relu)
        # The output is kept if a residual was added and a ReLU followed.
        for dys, y in ([x, x], x if relu else None), ([x], x if relu else None), ([x], None):
            if options or len(dys) == 2:
                norm_passes.backward_sums(x, None, dys, y, channel, 1e-5, relu)
        for dys in ([x, x], [x])[: 2 if options else 1]:
            norm_passes.backward_sums(x, x, dys, None, channel * 2, 1e-5, relu)
        if options:
            norm_passes.input_gradients(x, None, x, channel, torch.zeros(2, 2, channels), 1e-5, 128, relu)
        norm_passes.input_gradients(x, x, x, channel * 2, torch.zeros(2, 3, channels), 1e-5, 128, relu)


def optimizer() -> None:
    parameters = [torch.nn.Parameter(torch.ones(64, 64)), torch.nn.Parameter(torch.ones(64))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with mock.patch.object(lars, "_passes", lambda _: lars_cuda):
        LARS(parameters, lr=0.1, weight_decay=1e-6).step()


def colours() -> None:
    for view, augmentation in enumerate(moco_v3_augmentations(224)):
        p = draw_parameters(augmentation, 0, 0, np.arange(2), view, np.full(2, 256), np.full(2, 256))
        pixels = torch.zeros(2, 224, 224, 3, dtype=torch.uint8)
        colour_view(pixels, p, augmentation, torch.empty_like(pixels))


@triton.jit
def too_much_shared_memory(out, SIZE: triton.language.constexpr):
    """Transpose more than fits: with --planted, what the test must find."""
    i = triton.language.arange(0, SIZE)
    columns = triton.language.reshape(triton.language.load(out + i), (128, SIZE // 128))
    triton.language.store(out + i, triton.language.reshape(triton.language.trans(columns), (SIZE,)))


def main(arguments: list[str]) -> None:
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    largest, planted, record = ("--" + option in arguments for option in ("largest", "planted", "record"))
    assert not (record and (largest or planted)), "--record is of all configurations, and of those that are used"
    known = {} if largest or "--anew" in arguments else read_record()
    done = {}
    for capability in (int(argument) for argument in arguments if argument.isdigit()):
        compiler = Compiler(capability, known)
        with mock.patch.object(JITFunction, "run", lambda *args, c=compiler, **more: c.run(*args, **more)):
            if planted:
                too_much_shared_memory[(1,)](torch.zeros(1), SIZE=1 << 17, num_warps=32)  # pyright: ignore[reportCallIssue]
            sixteen_bits = (torch.float16, torch.bfloat16) if capability >= 80 else (torch.float16,)
            batchformer(sixteen_bits[-1], WIDTHS[0], GROUPS[0], 0.5)
            view_norm(sixteen_bits[-1], CHANNELS[0], options=False)
            optimizer()
            colours()
            for dtype in () if largest else (*sixteen_bits, torch.float32):
                for channels in CHANNELS:
                    view_norm(dtype, channels, options=True)
                for width, group in zip(WIDTHS, GROUPS, strict=True):
                    for dropout in (0.5, 0.0):
                        batchformer(dtype, width, group, dropout)
        done |= compiler.done
    if record:
        write_record(done)


if __name__ == "__main__":
    main(sys.argv[1:])
