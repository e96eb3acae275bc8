"""Names the state of this rank, and decides which slices of the flattened tensors it writes."""

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
        name: LocalShards(torch.Size([world_size, len(state)]), [FlatSlice(rank * len(state), state)], replicated=False)
        for name, state in states.items()
    }


def shares(held: Mapping[str, LocalShards], rank: int, world_size: int) -> dict[tuple[str, int], torch.Tensor]:
    """Return the slices that this rank writes, as views of its memory.

    Over all ranks, every element is in exactly one slice. Of a tensor that all ranks hold, each rank writes an equal slice;
    small ones are dealt out whole.
    """
    shares = {}
    for number, (name, tensor) in enumerate(held.items()):
        slices = tensor.slices
        if tensor.replicated:
            whole = slices[0].local
            each = -(-whole.numel() // world_size)
            if whole.numel() >= SPLIT_FROM:
                slices = [FlatSlice(rank * each, whole[rank * each :][:each])]
            elif number % world_size != rank:
                slices = []
        shares |= {(name, part.start): part.local for part in slices if part.local.numel()}
    return shares
