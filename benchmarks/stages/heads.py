"""Measures what follows BatchFormer, the heads on n images and the loss against the keys of B, beside plain torch.

Heads: forward and backward of projector and predictor on both views of n images, under autocast to the 16 bits in which this
device trains (fp32 on a CPU). Our norms take both views in one call; the baseline is the same layers with torch's
`nn.BatchNorm1d` (plain_step.py), called once a view. Widths are those of a ResNet-50 (C 2048, hidden 4096, 256 out).

Loss: one term, forward and backward, n rows against B keys; ours in tiles and in fp32, as in training; the baseline
`cross_entropy(q @ keys.T / T)` under the same autocast, which takes its product in 16 bits, as the originals do, and in fp32.
Memory is the peak of a process of its own.

On a GPU the baselines are measured compiled, too.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.measure import compare, compare_peaks, peak_mib
from benchmarks.rows import Row
from benchmarks.stages import Effort
from benchmarks.stages.plain_step import plain_head
from crossbatch.engine.config import Device, autocast_dtype, choose_precision
from crossbatch.models import autocast
from crossbatch.models.cross_entropy import cross_entropy_over_keys
from crossbatch.models.heads import build_predictor, build_projector

C, HIDDEN, D = 2048, 4096, 256
PLAIN, FP32, COMPILED, OURS = "plain torch", "plain torch, fp32", "plain torch, compiled", "ours"


def run(effort: Effort) -> Iterator[Row]:
    """Yield plain torch's rows and ours for each size of the heads and of the loss."""
    device = Device.detect()
    gpu, precision = device.type == "cuda", choose_precision("auto", device)[0]
    facts = {"C": C, "hidden": HIDDEN, "D": D, "precision": precision}
    for n in effort.pick([16], [256, 4096] if gpu else [64], [64, 256, 1024, 4096, 16384] if gpu else [64, 256]):
        cases = {f"{name}, heads, n {n}": call for name, call in heads(n, precision, compiled=gpu).items()}
        yield from compare(cases, {"n": n, **facts}, effort, optional=[f"{COMPILED}, heads, n {n}"])
    for n, B in effort.pick([(64, 4096)], [(256, 4096)], [(256, 4096), (256, 16384), (256, 65536)]):
        names = {name: f"{name}, loss, n {n}, B {B}" for name in (PLAIN, *([FP32, COMPILED] if gpu else []), OURS)}
        settings = {"n": n, "B": B, "D": D, "precision": precision}
        terms = {case: term(name, n, B, precision) for name, case in names.items()}
        yield from compare(terms, settings, effort, optional=[names.get(COMPILED, "")])
        peaks = {f"{names[name]}, memory": partial(_peak, name, n, B, precision) for name in (PLAIN, OURS)}
        yield from compare_peaks(peaks, settings)


def heads(n: int, precision: str, compiled: bool) -> dict[str, Callable[[], None]]:
    """Return forward and backward of the heads on both views of n images, by who computes it."""
    device, dtype = Device.detect().type, autocast_dtype(precision)
    torch.manual_seed(0)
    features = torch.randn(2 * n, C, device=device, requires_grad=True)
    ours = nn.Sequential(build_projector("resnet", C, HIDDEN, D), build_predictor("resnet", HIDDEN, D)).to(device)
    plain = nn.Sequential(plain_head([C, HIDDEN, D], True), plain_head([D, HIDDEN, D], False)).to(device)

    def backward(network: Callable[[torch.Tensor], torch.Tensor], views: tuple[torch.Tensor, ...]) -> None:
        with autocast(device, dtype):
            projected = torch.cat([network(view) for view in views])
        projected.float().sum().backward()

    calls = {PLAIN: lambda: backward(plain, features.chunk(2))}
    if compiled:
        torch.compiler.reset()  # after 8 other sizes torch would go on without compiling
        fused = torch.compile(plain, dynamic=False)
        calls[COMPILED] = lambda: backward(fused, features.chunk(2))
    return {**calls, OURS: lambda: backward(ours, (features,))}


def term(name: str, n: int, B: int, precision: str) -> Callable[[], None]:
    """Return forward and backward of one term of the loss as `name` computes it."""
    device, dtype = Device.detect().type, autocast_dtype(precision)
    q = F.normalize(torch.randn(n, D, device=device), dim=-1).requires_grad_()
    keys, labels = F.normalize(torch.randn(B, D, device=device), dim=-1), torch.arange(n, device=device)

    def plain(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(q @ keys.T / 0.2, labels)

    if name == OURS:
        return lambda: cross_entropy_over_keys(q, keys, labels, 0.2).sum().backward()
    loss = torch.compile(plain, dynamic=False) if name == COMPILED else plain

    def backward() -> None:
        with autocast(device, None if name == FP32 else dtype):
            value = loss(q, keys)
        value.backward()

    return backward


def _peak(name: str, n: int, B: int, precision: str) -> float:
    term(name, 4, 8, precision)()  # libraries, thread pools, handles
    return peak_mib(term(name, n, B, precision))
