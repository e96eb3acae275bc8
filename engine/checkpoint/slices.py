"""The state of a rank as slices of flattened tensors.

ZeRO cuts through the middle of rows, so a part of a tensor is not a smaller tensor but a slice of its flattened elements.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from crossbatch.engine.sharding import Backend, FlatSlice, LocalShards

SPLIT_FROM = 2**16  # elements: smaller tensors are not worth a slice per rank

Slices = Mapping[tuple[str, int], torch.Tensor]  # (name, first element) -> values, 1-D


def local_state(backend: Backend) -> dict[str, LocalShards]:
    """Return this rank's parameters, buffers and optimizer state under their names in checkpoints."""
    held = {f"parameters.{name}": value for name, value in backend.local_parameters().items()}
    held |= {f"buffers.{name}": value for name, value in backend.local_buffers().items()}
    for name, state in backend.local_optimizer_state().items():
        held |= {f"optimizer.{key}.{name}": value for key, value in state.items()}
    return held


def random_state() -> dict[str, LocalShards]:
    """Return the states of this rank's global random generators as tensors of a checkpoint, one row a rank.

    Nothing in a step draws from them today (views, order and dropout are functions of seed, step and position), so a run on
    another number of ranks loses nothing by starting them at the seed.
    """
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return {
        name: LocalShards(
            torch.Size([world_size, state.numel()]), [FlatSlice(rank * state.numel(), state)], replicated=False
        )
        for name, state in states.items()
    }


def shares(held: Mapping[str, LocalShards], rank: int, world_size: int) -> dict[tuple[str, int], torch.Tensor]:
    """Return the slices that this rank writes, as views of its memory.

    Over all ranks, every element is in exactly one slice. Of a tensor that all ranks hold, each rank writes an equal slice;
    small ones are dealt out whole.
    """
    slices = {}
    for number, (name, tensor) in enumerate(held.items()):
        for part in _share(tensor, number, rank, world_size):
            if part.local.numel():
                slices[name, part.start] = part.local
    return slices


def _share(held: LocalShards, number: int, rank: int, world_size: int) -> list[FlatSlice]:
    """Return the part of one tensor, the `number`-th, that this rank writes."""
    if not held.replicated:
        return held.pieces
    whole = held.pieces[0].local
    if whole.numel() < SPLIT_FROM:
        return held.pieces if number % world_size == rank else []
    each = -(-whole.numel() // world_size)
    return [FlatSlice(rank * each, whole[rank * each : (rank + 1) * each])]
