"""Measures what ranks exchange in a step, norms and keys, beside one message for each view and stream.

Two CPU processes are joined by gloo; the norms are measured on this machine's device without other ranks, too.

Norms: forward and backward of the 53 norms of a ResNet-50, on few and small images, where the fixed cost of a call counts. Ours
take both views in one call and send one message each way. The baseline takes one view a call, as torch's norms are used: on one
process `nn.BatchNorm2d`; on two the exchanges of `nn.SyncBatchNorm`, which refuses CPU tensors: one gather and one sum for each
norm and view, here around the same kernels as ours.

Keys: all views and streams of [V, S, n, D] in one gather, beside one `all_gather` for each view and stream.

Gloo on one machine has no network in it: these are the costs of starting a message, not of its bytes.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.measure import Cases, compare, host_ms, summarise, take_turns
from benchmarks.rows import Row
from benchmarks.stages import Effort
from crossbatch.engine.config import Device
from crossbatch.engine.runtime.distributed import GroupCollective, process_group
from crossbatch.engine.runtime.world import world_from_environment
from crossbatch.models.norm import ViewBatchNorm

RANKS, VIEWS, STREAMS = 2, 2, 2
BLOCKS = {64: 3, 128: 4, 256: 6, 512: 3}  # of a ResNet-50, by width
WIDTHS = [64] + [c for width, blocks in BLOCKS.items() for c in [width, width, 4 * width] * blocks + [4 * width]]
IMAGES, SIDE, D = 4, 4, 256


def run(effort: Effort) -> Iterator[Row]:
    """Yield the norms of one process, then norms and keys on two."""
    device = Device.detect().type
    x, ours, plain = _images(device), _norms(VIEWS).to(device), nn.ModuleList(map(nn.BatchNorm2d, WIDTHS)).to(device)
    cases = {
        "norms, 1 process, one view a call (nn.BatchNorm2d)": lambda: _forward_backward(plain, x, VIEWS),
        "norms, 1 process, both views in a call": lambda: _forward_backward(ours, x, 1),
    }
    yield from compare(cases, {"norms": len(WIDTHS), "images": IMAGES, "side": SIDE, "device": device}, effort)
    launch = LaunchConfig(
        1, 1, RANKS, run_id="collectives", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    times = elastic_launch(launch, _measure)(effort.pick([64], [256], [64, 256]), effort.pick(3, 10, 30))[0]
    for what, samples in times.items():
        yield from summarise(samples, {"ranks": RANKS, "backend": "gloo", "what": what})


def _measure(keys: list[int], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return this rank's milliseconds by case. Rounds are counted, not timed: the ranks must agree on them."""
    per_view, both, x = _norms(1), _norms(VIEWS), _images("cpu")
    studies: dict[str, Cases] = {
        "norms": {
            f"norms, {RANKS} ranks, one view a call (as nn.SyncBatchNorm)": lambda: _forward_backward(
                per_view, x, VIEWS
            ),
            f"norms, {RANKS} ranks, both views in a call": lambda: _forward_backward(both, x, 1),
        }
    }
    for n in keys:
        held = torch.randn(VIEWS, STREAMS, n, D)
        studies[f"keys of {n} images"] = {
            f"keys, {RANKS} ranks, n {n}, one for each view and stream": partial(_gather_each, held),
            f"keys, {RANKS} ranks, n {n}, one gather": partial(GroupCollective().all_gather, held),
        }
    times = {}
    with process_group(world_from_environment(), "cpu"):
        for what, cases in studies.items():
            samples = take_turns(cases, 0, 2 + rounds * (1 if what == "norms" else 10), _from_a_barrier)
            times[what] = {name: values[2:] for name, values in samples.items()}  # the first two warm up
    return times


def _from_a_barrier(call: Callable[[], object]) -> float:
    """Return the milliseconds of this rank; all ranks start the call together."""
    dist.barrier()
    return host_ms(call)


def _norms(num_views: int) -> nn.ModuleList:
    return nn.ModuleList(ViewBatchNorm(width, num_views=num_views) for width in WIDTHS)


def _images(device: str) -> dict[int, torch.Tensor]:
    """Return both views of a few small images, by number of channels."""
    n = VIEWS * IMAGES
    return {c: torch.randn(n, c, SIDE, SIDE, device=device, requires_grad=True) for c in set(WIDTHS)}


def _forward_backward(norms: nn.ModuleList, images: dict[int, torch.Tensor], calls: int) -> None:
    """Run each norm on its own input, in `calls` calls of a view or of both."""
    for width, norm in zip(WIDTHS, norms, strict=True):
        for part in images[width].chunk(calls):
            norm(part).sum().backward()


def _gather_each(held: torch.Tensor) -> list[torch.Tensor]:
    """Gather each view and stream into a list of tensors, and copy these into one."""
    everyone = []
    for keys in held.flatten(0, 1):
        parts = [torch.empty_like(keys) for _ in range(RANKS)]
        dist.all_gather(parts, keys)
        everyone.append(torch.cat(parts))
    return everyone
