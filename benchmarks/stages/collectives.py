"""Measures what ranks exchange in a step, norms and keys, beside one message for each view and stream.

Two CPU processes are joined by gloo; the norms are measured on this machine's device without other ranks, too.

Norms: forward and backward of the 53 norms of a ResNet-50, on few and small images, where the fixed cost of a call counts. Ours
take both views in one call and send one message each way. The baseline takes one view a call, as torch's norms are used: on one
process `nn.BatchNorm2d`; on two the exchanges of `nn.SyncBatchNorm`, which refuses CPU tensors: one gather and one sum for each
norm and view, here around the same kernels as ours.

Keys: all views and streams of [V, S, n, D] in one gather, beside one `all_gather` for each view and stream.

Gloo on one machine has no network in it: these are the costs of starting a message, not of its bytes.
"""

import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.measure import Cases, compare, host_ms, summarise, take_turns
from benchmarks.rows import Row
from benchmarks.stages import Effort
from crossbatch.engine.config import Device
from crossbatch.engine.runtime.distributed import GroupCollective, process_group, world_from_environment
from crossbatch.models.norm import ViewBatchNorm

RANKS, VIEWS, STREAMS = 2, 2, 2
BLOCKS = {64: 3, 128: 4, 256: 6, 512: 3}  # of a ResNet-50, by width
WIDTHS = [64] + [c for width, blocks in BLOCKS.items() for c in [width, width, 4 * width] * blocks + [4 * width]]
IMAGES, SIDE, D = 4, 4, 256
OURS, PER_VIEW = "both views in a call", "one view a call"


def run(effort: Effort) -> Iterator[Row]:
    """Yield the norms of one process, then norms and keys on two."""
    keys = effort.pick([64], [256], [64, 256])
    yield from _norms_of_one_process(effort.pick(0.5, 2, 10))
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "times.json"
        _on_ranks(_measure, keys, effort.pick(3, 10, 30), str(answers))
        times = json.loads(answers.read_text())
    for what, cases in times.items():
        yield from summarise(cases, list(cases)[1], {"ranks": RANKS, "backend": "gloo", "what": what})


def _norms_of_one_process(seconds: float) -> list[Row]:
    device = Device.detect().type
    x, ours, plain = _images(device), _norms(2).to(device), nn.ModuleList(map(nn.BatchNorm2d, WIDTHS)).to(device)
    names = f"norms, 1 process, {OURS}", f"norms, 1 process, {PER_VIEW} (nn.BatchNorm2d)"
    cases = {
        names[0]: partial(_forward_backward, ours, x, 1),
        names[1]: partial(_forward_backward, plain, x, VIEWS),
    }
    settings = {"norms": len(WIDTHS), "images": IMAGES, "side": SIDE, "device": device}
    return compare(cases, names[1], settings, seconds, warmup=2)


def _measure(keys: list[int], rounds: int, answers: str) -> None:
    """Measure on every rank. Rounds are counted, not timed: the ranks must agree on them."""
    collective = GroupCollective()
    ours, per_view = _norms(VIEWS), _norms(1)
    for norm in (*ours, *per_view):
        assert isinstance(norm, ViewBatchNorm)
        norm.collective = collective
    x = _images("cpu")
    studies: dict[str, Cases] = {
        "norms": {
            f"norms, {RANKS} ranks, {OURS}": partial(_forward_backward, ours, x, 1),
            f"norms, {RANKS} ranks, {PER_VIEW} (as nn.SyncBatchNorm)": partial(_forward_backward, per_view, x, VIEWS),
        }
    }
    for n in keys:
        held = torch.randn(VIEWS, STREAMS, n, D)
        studies[f"keys of {n} images"] = {
            f"keys, {RANKS} ranks, n {n}, one gather": partial(collective.all_gather, held),
            f"keys, {RANKS} ranks, n {n}, one for each view and stream": partial(_gather_each, held),
        }
    times = {}
    for what, cases in studies.items():
        samples = take_turns(cases, 0, 2 + rounds * (1 if what == "norms" else 10), _from_a_barrier)
        times[what] = {name: values[2:] for name, values in samples.items()}  # the first two warm up
    if dist.get_rank() == 0:
        Path(answers).write_text(json.dumps(times))


def _from_a_barrier(call: Callable[[], object]) -> float:
    """Return the milliseconds of this rank; all ranks start the call together."""
    dist.barrier()
    return host_ms(call)


def _norms(num_views: int) -> nn.ModuleList:
    return nn.ModuleList(ViewBatchNorm(width, num_views=num_views) for width in WIDTHS)


def _images(device: str) -> dict[int, torch.Tensor]:
    """Return both views of a few small images, by number of channels."""
    shape = VIEWS * IMAGES, SIDE, SIDE
    return {c: torch.randn(shape[0], c, *shape[1:], device=device, requires_grad=True) for c in set(WIDTHS)}


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


def _on_ranks(function: Callable[..., None], *arguments: object) -> None:
    """Call `function` on `RANKS` processes that are joined by gloo, each on one core. Raises what a rank raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, (port, function, arguments), nprocs=RANKS, start_method="spawn")


def _rank(rank: int, port: int, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    with process_group(world_from_environment(), "cpu"):
        function(*arguments)
