"""Measures what follows BatchFormer, the heads on n images and the loss against the keys of B, beside plain torch.

Heads: forward and backward of projector and predictor on both views of n images. Our norms take both views in one call; the
baseline is the same layers with torch's `nn.BatchNorm1d` (plain_step.py), called once a view. Widths are those of a ResNet-50
(C 2048, hidden 4096, 256 out).

Loss: one term, forward and backward, n rows against B keys; ours in tiles, the baseline `cross_entropy(q @ keys.T / T)`. Memory
is the peak of a process of its own.
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
from crossbatch.engine.config import Device
from crossbatch.models.cross_entropy import cross_entropy_over_keys
from crossbatch.models.heads import build_predictor, build_projector

C, HIDDEN, D = 2048, 4096, 256
PLAIN, OURS = "plain torch", "ours"


def run(effort: Effort) -> Iterator[Row]:
    """Yield two rows, plain torch's and ours, for each size of the heads and of the loss."""
    gpu = Device.detect().type == "cuda"
    for n in effort.pick([16], [256, 4096] if gpu else [64], [64, 256, 1024, 4096, 16384] if gpu else [64, 256]):
        cases = {f"{name}, heads, n {n}": call for name, call in _heads(n).items()}
        yield from compare(cases, {"n": n, "C": C, "hidden": HIDDEN, "D": D}, effort)
    for n, B in effort.pick([(64, 4096)], [(256, 4096)], [(256, 4096), (256, 16384), (256, 65536)]):
        names, settings = {name: f"{name}, loss, n {n}, B {B}" for name in (PLAIN, OURS)}, {"n": n, "B": B, "D": D}
        yield from compare({case: _term(name, n, B) for name, case in names.items()}, settings, effort)
        peaks = {f"{case}, memory": partial(_peak, name, n, B) for name, case in names.items()}
        yield from compare_peaks(peaks, settings)


def _heads(n: int) -> dict[str, Callable[[], None]]:
    device = Device.detect().type
    torch.manual_seed(0)
    features = torch.randn(2 * n, C, device=device, requires_grad=True)
    ours = nn.Sequential(build_projector("resnet", C, HIDDEN, D), build_predictor("resnet", HIDDEN, D)).to(device)
    plain = nn.Sequential(plain_head([C, HIDDEN, D], True), plain_head([D, HIDDEN, D], False)).to(device)
    return {
        PLAIN: lambda: torch.cat([plain(view) for view in features.chunk(2)]).sum().backward(),
        OURS: lambda: ours(features).sum().backward(),
    }


def _term(name: str, n: int, B: int) -> Callable[[], None]:
    device = Device.detect().type
    q = F.normalize(torch.randn(n, D, device=device), dim=-1).requires_grad_()
    keys, labels = F.normalize(torch.randn(B, D, device=device), dim=-1), torch.arange(n, device=device)
    calls: dict[str, Callable[[], None]] = {
        PLAIN: lambda: F.cross_entropy(q @ keys.T / 0.2, labels).backward(),
        OURS: lambda: cross_entropy_over_keys(q, keys, labels, 0.2).sum().backward(),
    }
    return calls[name]


def _peak(name: str, n: int, B: int) -> float:
    _term(name, 4, 8)()  # libraries, thread pools, handles
    return peak_mib(_term(name, n, B))
