"""Measures the BatchFormer layer on G images of C features, one view, beside torch's `nn.TransformerEncoderLayer`.

Cases: forward, forward and backward, and the memory of the latter, of our kernels by name (see models/batchformer/dispatch.py),
with dropout 0.5 but for sdpa, which has none; torch's layer with dropout 0.5, as the originals call it, and on a GPU the same
compiled. The precision is what `precision: auto` gives. With NVIDIA's apex installed, its LayerNorm (after a sum and torch's
dropout) is measured beside ours.

Memory is the peak of a process of its own for each case. On a CPU, the sizes are those that take seconds.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.measure import compare, in_new_process, over, peak_mib
from benchmarks.rows import Row
from benchmarks.stages import Effort
from crossbatch.engine.config import Device, autocast_dtype, choose_precision
from crossbatch.models import autocast
from crossbatch.models.batchformer import BatchFormer, DropoutKey, fused
from crossbatch.models.batchformer.dispatch import NAMES, Situation, reason_against
from crossbatch.models.batchformer.dropout import AFTER_MLP, Mask

EAGER, COMPILED = "nn.TransformerEncoderLayer", "nn.TransformerEncoderLayer, compiled"
GPU_SIZES = [(G, C) for C in (384, 768, 2048) for G in (64, 256, 1024, 4096, 16384)]
CPU_SIZES = [(64, 2048), (256, 384), (256, 768), (256, 2048), (1024, 768)]
CPU_MEMORY_SIZES = [(1024, 768), (4096, 384), (4096, 2048)]
BRIEF_SIZES = {"cuda": [(256, 2048), (256, 384), (4096, 2048)], "cpu": [(256, 384), (256, 2048)]}


def run(effort: Effort) -> Iterator[Row]:
    """Yield the times by size, then the memory by size."""
    device = Device.detect().type
    sizes = effort.pick([(64, 384)], BRIEF_SIZES[device], GPU_SIZES if device == "cuda" else CPU_SIZES)
    names, seconds = _names(compiled=effort is Effort.FULL), effort.pick(0.2, 0.7, 5)
    for G, C in sizes:
        yield from _time(G, C, names, seconds)
    yield from _norms(256, effort.pick(384, 2048, 2048), seconds)
    for G, C in effort.pick([(1024, 384)], [(4096, 2048)], GPU_SIZES if device == "cuda" else CPU_MEMORY_SIZES):
        yield from _memory(G, C, effort.pick([names[0], EAGER], [names[0], EAGER], names))


def _names(compiled: bool) -> list[str]:
    gpu = Device.detect().type == "cuda"
    situation = Situation("cuda", torch.cuda.get_device_capability()) if gpu else Situation("cpu")
    ours = [name for name in NAMES if name == "sdpa" or reason_against(name, situation) is None]
    return [*ours, EAGER, *([COMPILED] if gpu and compiled else [])]


def _layer(name: str, G: int, C: int) -> Callable[[], torch.Tensor]:
    """Return a call of the layer in the precision of this device; the input has a gradient."""
    device = Device.detect()
    dtype = autocast_dtype(choose_precision("auto", device)[0])
    torch.manual_seed(0)
    x = torch.randn(1, G, C, device=device.type, requires_grad=True)
    if name in NAMES:
        layer = BatchFormer(C, G, dropout=0.0 if name == "sdpa" else 0.5, kernel=name).to(device.type)
        call = partial(layer, x, dropout_seeds=DropoutKey(0, 0).dropout_seeds(1, x.device))
    else:
        layer = torch.nn.TransformerEncoderLayer(C, 4, C, dropout=0.5).to(device.type)
        call = partial(torch.compile(layer) if name == COMPILED else layer, x.transpose(0, 1))

    def forward() -> torch.Tensor:
        layer.zero_grad()
        with autocast(device.type, dtype):
            return call()

    return forward


def _backward(forward: Callable[[], torch.Tensor]) -> None:
    forward().sum().backward()


def _settings(G: int, C: int) -> dict:
    return {"G": G, "C": C, "heads": 4, "precision": choose_precision("auto", Device.detect())[0]}


def _time(G: int, C: int, names: list[str], seconds: float) -> Iterator[Row]:
    layers = {name: _layer(name, G, C) for name in names}
    for what, call in (("forward", lambda forward: forward()), ("forward + backward", _backward)):
        cases = {f"{name}, {what}, G {G}, C {C}": partial(call, forward) for name, forward in layers.items()}
        yield from compare(cases, f"{EAGER}, {what}, G {G}, C {C}", _settings(G, C), seconds, warmup=2, rounds=3)


def _memory(G: int, C: int, names: list[str]) -> Iterator[Row]:
    cases = {name: f"{name}, memory, G {G}, C {C}" for name in names}
    peaks = {cases[name]: in_new_process(_peak, name, G, C) for name in names}
    yield from over(peaks, cases[EAGER], "MiB", _settings(G, C))


def _norms(G: int, C: int, seconds: float) -> list[Row]:
    """Measure LayerNorm(x + dropout(y)) by our operator beside apex's: which one to use where apex is installed."""
    try:
        from apex.normalization import FusedLayerNorm  # pyright: ignore[reportMissingImports]
    except ImportError:
        return []
    x, y = (torch.randn(1, G, C, device="cuda", requires_grad=True) for _ in range(2))
    norm = FusedLayerNorm(C).cuda()
    mask = Mask(DropoutKey(0, 0).dropout_seeds(1, x.device)[AFTER_MLP], 0.5)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "fused add_norm": lambda: fused.add_norm(x, y, norm.weight, norm.bias, norm.eps, mask),
        "apex FusedLayerNorm": lambda: norm(x + torch.nn.functional.dropout(y, 0.5)),
    }
    cases = {f"{name}, G {G}, C {C}": partial(_backward, call) for name, call in calls.items()}
    return compare(cases, f"apex FusedLayerNorm, G {G}, C {C}", _settings(G, C), seconds)


def _peak(name: str, G: int, C: int) -> float:
    _backward(_layer(name, 8, C))  # libraries, thread pools, handles
    forward = _layer(name, G, C)
    if name == COMPILED:
        _backward(forward)
    return peak_mib(partial(_backward, forward))
