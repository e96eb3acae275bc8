"""The state of a rank as slices of flattened tensors, and these in the terms of torch.distributed.checkpoint (DCP).

DCP knows a tensor as a box of numbers and a rank's part of it as a smaller box. ZeRO cuts through the middle of rows, so the
box here is the flattened tensor, and a part of it is a slice. `.metadata` lists the slices that were written; reading finds
where they overlap with the slices that are wanted.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

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


class SliceSavePlanner(SavePlanner):
    """Plans and hands out the slices to write; `sizes` holds the number of elements of every whole tensor."""

    def __init__(self, staged: Slices, sizes: Mapping[str, int]):
        self.staged, self.sizes = staged, sizes

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None: ...

    def create_local_plan(self) -> SavePlan:
        return SavePlan([self._item(name, start, values) for (name, start), values in self.staged.items()])

    def _item(self, name: str, start: int, values: torch.Tensor) -> WriteItem:
        data = TensorWriteData(
            chunk=_chunk(start, values.numel()),
            properties=replace(TensorProperties.create_from_tensor(values), pin_memory=False),
            size=torch.Size([self.sizes[name]]),
        )
        return WriteItem(index=MetadataIndex(name, (start,)), type=WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        _check_complete(metadata)
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.index.offset is not None
        return self.staged[write_item.index.fqn, write_item.index.offset[0]]


class SliceLoadPlanner(LoadPlanner):
    """Fills `held` from the slices in the checkpoint, whichever ranks wrote them; every name must be in it."""

    def __init__(self, held: Mapping[str, LocalShards], metadata: Metadata):
        self.held, self.metadata = held, metadata
        self.targets = {
            (name, part.start): part.local for name, tensor in held.items() for part in tensor.pieces
        }  # fmt: skip

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, tensor in self.held.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            assert all(part.local.dtype == stored.properties.dtype for part in tensor.pieces), name
            wanted = [_chunk(part.start, part.local.numel()) for part in tensor.pieces if part.local.numel()]
            items += create_read_items_for_chunk_list(name, stored, wanted)
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        assert read_item.dest_index.offset is not None
        target = self.targets[read_item.dest_index.fqn, read_item.dest_index.offset[0]]
        return target.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...


def _chunk(start: int, length: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([start]), torch.Size([length]))


def _check_complete(metadata: Metadata) -> None:
    """Assert that every element of every tensor is in exactly one slice."""
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        end = 0
        for start, length in sorted((chunk.offsets[0], chunk.sizes[0]) for chunk in tensor.chunks):
            assert start == end, (
                f"{name}: elements {min(start, end)} to {max(start, end)} are held by no rank or by two"
            )
            end = start + length
        assert end == tensor.size[0], f"{name}: elements from {end} on are held by no rank"
