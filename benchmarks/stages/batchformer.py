"""Measures the BatchFormer layer on G images of C features, one view, beside torch's `nn.TransformerEncoderLayer`.

Cases: forward, forward and backward, and the memory of the latter, of our kernels by name (see models/batchformer/dispatch.py),
with dropout 0.5 but for sdpa, which has none; torch's layer with dropout 0.5, as the originals call it, and on a GPU the same
compiled. The precision is what `precision: auto` gives. Memory is the peak of a process of its own for each case. On a CPU, the
sizes are those that take seconds.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.measure import compare, compare_peaks, peak_mib
from benchmarks.rows import Row
from benchmarks.stages import Effort
from crossbatch.engine.config import Device, autocast_dtype, choose_precision
from crossbatch.models import autocast
from crossbatch.models.batchformer import BatchFormer, DropoutKey
from crossbatch.models.batchformer.dispatch import NAMES, Situation, reason_against

EAGER, COMPILED = "nn.TransformerEncoderLayer", "nn.TransformerEncoderLayer, compiled"
GPU_SIZES = [(G, C) for C in (384, 768, 2048) for G in (64, 256, 1024, 4096, 16384)]
CPU_SIZES = [(64, 2048), (256, 384), (256, 768), (256, 2048), (1024, 768)]
CPU_MEMORY_SIZES = [(1024, 768), (4096, 384), (4096, 2048)]
BRIEF_SIZES = {"cuda": [(256, 2048), (256, 384), (4096, 2048)], "cpu": [(256, 384), (256, 2048)]}


def run(effort: Effort) -> Iterator[Row]:
    """Yield the times by size, then the memory by size."""
    device = Device.detect()
    situation = Situation.on(torch.device(device.type), dropout=0.0)
    names = [EAGER, *(name for name in NAMES if reason_against(name, situation) is None)]
    names += [COMPILED] if device.type == "cuda" and effort is not Effort.QUICK else []
    facts = {"heads": 4, "precision": choose_precision("auto", device)}
    full, full_memory = (GPU_SIZES, GPU_SIZES) if device.type == "cuda" else (CPU_SIZES, CPU_MEMORY_SIZES)
    for G, C in effort.pick([(64, 384)], BRIEF_SIZES[device.type], full):
        layers = {name: _layer(name, G, C) for name in names}
        for what, call in (("forward", lambda forward: forward()), ("forward + backward", _backward)):
            cases = {f"{name}, {what}, G {G}, C {C}": partial(call, layer) for name, layer in layers.items()}
            optional = [case for case in cases if case.startswith(COMPILED)]
            yield from compare(cases, {"G": G, "C": C, **facts}, effort, optional=optional)
    for G, C in effort.pick([(1024, 384)], [(4096, 2048)], full_memory):
        weighed = effort.pick(names[:2], names[:2], names)
        cases = {f"{name}, memory, G {G}, C {C}": partial(_peak, name, G, C) for name in weighed}
        yield from compare_peaks(cases, {"G": G, "C": C, **facts})


def _layer(name: str, G: int, C: int) -> Callable[[], torch.Tensor]:
    """Return a call of the layer in the precision of this device; the input has a gradient."""
    device = Device.detect()
    dtype = autocast_dtype(choose_precision("auto", device)[0])
    torch.manual_seed(0)
    if name == COMPILED:
        torch.compiler.reset()  # after 8 other sizes torch would go on without compiling
    x = torch.randn(1, G, C, device=device.type, requires_grad=True)
    if name in NAMES:
        layer = BatchFormer(C, G, dropout=0.0 if name == "sdpa" else 0.5, kernel=name).to(device.type)
        call = partial(layer, x, dropout_seeds=DropoutKey(0, 0).dropout_seeds(1, x.device))
    else:
        layer = torch.nn.TransformerEncoderLayer(C, 4, C, dropout=0.5).to(device.type)
        call = partial(torch.compile(layer, dynamic=False) if name == COMPILED else layer, x.transpose(0, 1))

    def forward() -> torch.Tensor:
        layer.zero_grad()
        with autocast(device.type, dtype):
            return call()

    return forward


def _backward(forward: Callable[[], torch.Tensor]) -> None:
    forward().sum().backward()


def _peak(name: str, G: int, C: int) -> float:
    _backward(_layer(name, 8, C))  # libraries, thread pools, handles
    forward = _layer(name, G, C)
    if name == COMPILED:
        _backward(forward)
    return peak_mib(partial(_backward, forward))
