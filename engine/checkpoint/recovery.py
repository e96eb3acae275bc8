"""Finds the newest step that the nodes have in memory as a whole, and makes a checkpoint of it on each of them.

Every rank says what its node has (see `memory`); whatever slices a node lacks are sent to it. The checkpoint loads as any other
does, at another number of ranks, stage or backend.
"""

import contextlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from crossbatch.engine.checkpoint.directory import name_of
from crossbatch.engine.checkpoint.memory import MEMORY, allocate, folder_of, read_attempts, run_of
from crossbatch.engine.checkpoint.store import Manifest, SliceInFile, describe_file, write_description
from crossbatch.engine.runtime.distributed import on_every_rank, on_main
from crossbatch.engine.runtime.world import World
from crossbatch.engine.tasks.task import STARTED_FROM


class Copy(NamedTuple):
    """Names the slices of a rank after a step, in the memory of a node."""

    attempt: str
    step: int
    rank: int  # among the `world_size` ranks of that attempt
    world_size: int
    files: str  # how their names begin: rank3-by1-0

    @property
    def description(self) -> Path:
        """Return the file that says where each slice is."""
        return folder_of(self.attempt) / f"{self.files.rpartition('-')[0]}.json"


class Recovered(NamedTuple):
    """Says what `recover` has found, and where this node has it."""

    checkpoint: Path | None
    step: int
    note: str  # for the log; "" if there is nothing to say


NOTHING = Recovered(None, 0, "")


def recover(out: Path, fingerprint: str, newer_than: int, world: World, timeout_s: float) -> Recovered:
    """Make a checkpoint of the newest step that the nodes have in memory; all ranks call it.

    Args:
        out: the run directory, which names the attempts that may have copies.
        fingerprint: of configuration and code; copies with another one are not used.
        newer_than: the step of the last checkpoint on disk; a copy that is not newer is not used.
        world: this rank among the others.
        timeout_s: how long another node may take to send what this one lacks.
    """
    attempts = on_main(lambda: read_attempts(out))
    if world.local_rank == 0:
        _delete_forgotten(out, attempts)
    if not attempts:
        return NOTHING
    leader = world.rank - world.local_rank
    mine = list(_kept_here(attempts, fingerprint)) if world.rank == leader else []
    everyone: list[tuple[int, list[Copy]]] = [(leader, mine)] * world.size
    dist.all_gather_object(everyone, (leader, mine))
    holders: dict[tuple[int, str, int], dict[int, dict[int, Copy]]] = defaultdict(lambda: defaultdict(dict))
    for its_leader, copies in everyone:
        for copy in map(Copy._make, copies):
            holders[copy.step, copy.attempt, copy.world_size][copy.rank][its_leader] = copy
    whole = [key for key, ranks in holders.items() if len(ranks) == key[2] and key[0] > newer_than]
    if not whole:
        newest = max(holders, default=(0, "", 0))
        if newest[0] <= newer_than:
            return NOTHING
        gone = [str(rank) for rank in range(newest[2]) if rank not in holders[newest]]
        return Recovered(
            None,
            0,
            f"warning: step {newest[0]} in memory is lost: no node has the slices of rank{'s' * (len(gone) > 1)} "
            + ", ".join(gone),
        )
    newest = max(whole)
    return _assemble(out, newest[0], newest[1], holders[newest], sorted({its for its, _ in everyone}), world, timeout_s)


def _kept_here(attempts: list[str], fingerprint: str) -> Iterator[Copy]:
    """Yield the complete copies on this node."""
    for attempt in attempts:
        folder = folder_of(attempt)
        for file in folder.glob("rank*-by*-*.json") if run_of(folder).get("fingerprint") == fingerprint else ():
            with contextlib.suppress(OSError, ValueError, LookupError):
                counts, rank = json.loads(file.read_text()), int(file.name[4:].partition("-")[0])
                yield Copy(attempt, counts["step"], rank, counts["world_size"], file.stem)


def _delete_forgotten(out: Path, attempts: list[str]) -> None:
    """Delete the copies on this node that belong to `out`, but to none of its last attempts."""
    for folder in MEMORY.glob("crossbatch-*"):
        if run_of(folder).get("out") == str(out.resolve()) and folder not in map(folder_of, attempts):
            shutil.rmtree(folder, ignore_errors=True)


def _assemble(
    out: Path,
    step: int,
    attempt: str,
    holders: dict[int, dict[int, Copy]],
    leaders: list[int],
    world: World,
    timeout_s: float,
) -> Recovered:
    """Make the checkpoint of `step` on every node; `holders` says which leaders have the slices of each rank."""
    leader = world.rank - world.local_rank
    lacking = [(rank, its) for rank in range(len(holders)) for its in leaders if its not in holders[rank]]
    owners = {rank: min(found) for rank, found in holders.items()}
    run = folder_of(attempt) / f"recovered-{leader}"
    folder = run / "checkpoints" / name_of(step)
    described: list[dict[int, Any]] = [{}] * world.size
    mine = {rank: holders[rank][leader] for rank, owner in owners.items() if owner == world.rank}
    dist.all_gather_object(described, {rank: _read(copy) for rank, copy in mine.items()})
    everything: dict[int, Any] = {rank: found for some in described for rank, found in some.items()}

    def make_room() -> dict[int, torch.Tensor]:
        if world.rank != leader:
            return {}
        shutil.rmtree(run, ignore_errors=True)
        folder.mkdir(parents=True)
        for rank, found in holders.items():
            if leader in found:
                os.link(folder_of(attempt) / f"{found[leader].files}.bin", folder / f"{rank}.bin")
        return {
            rank: allocate(folder / f"{rank}.bin", everything[rank]["bytes"]) for rank, its in lacking if its == leader
        }

    def describe() -> None:
        if world.rank == leader:
            base = everything[0]
            counts = {"progress": base["counts"]["progress"], "skipped_images": 0}
            counts["skipped_images"] = sum(found["counts"]["skipped_images"] for found in everything.values())
            manifest = Manifest(**{**base["manifest"], **counts})
            manifest.files = {f"{rank}.bin": describe_file(folder / f"{rank}.bin") for rank in everything}
            slices = [
                SliceInFile(name, start, length, getattr(torch, dtype), f"{rank}.bin", offset)
                for rank, found in everything.items()
                for name, start, length, dtype, offset in found["slices"]
            ]
            write_description(folder, slices, manifest, base["config"])
            if (out / STARTED_FROM).exists():  # a file that belongs to a run of which this is a checkpoint
                (run / STARTED_FROM).symlink_to((out / STARTED_FROM).resolve())

    received, errors = on_every_rank(make_room, OSError)
    if not errors:
        if lacking:
            _send(lacking, owners, holders, received or {}, world, timeout_s)
        _, errors = on_every_rank(describe, OSError)
    if errors:
        return Recovered(None, 0, f"warning: step {step} is in memory, but cannot be read: {errors[0]}")
    came = f"{len(lacking)} of them sent by other nodes" if lacking else "all of them on every node"
    return Recovered(folder, step, f"from memory: the slices of {len(holders)} ranks, {came}")


def _read(copy: Copy) -> dict[str, Any]:
    counts = json.loads((folder_of(copy.attempt) / f"{copy.files}.json").read_text())
    return {**json.loads(copy.description.read_text()), "counts": counts}


def _send(
    lacking: list[tuple[int, int]],
    owners: dict[int, int],
    holders: dict[int, dict[int, Copy]],
    received: dict[int, torch.Tensor],
    world: World,
    timeout_s: float,
) -> None:
    """Send slices from those who have them to the leaders that lack them, in an order that is the same on all ranks."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    for rank, target in lacking:
        if owners[rank] == world.rank:
            copy = holders[rank][world.rank]
            file = folder_of(copy.attempt) / f"{copy.files}.bin"
            size = file.stat().st_size
            dist.send(torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8), target, group)
        elif target == world.rank:
            dist.recv(received[rank], owners[rank], group)
    dist.barrier(group)
    dist.destroy_process_group(group)
