"""Finds the newest step that the nodes have in memory as a whole, and makes a checkpoint of it on each of them.

Every rank says what its node has (see `memory`); whatever parts a node lacks are sent to it. The checkpoint loads as any other
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
    """Names a part of the state after a step, in the memory of a node."""

    attempt: str
    step: int
    part: str  # rank3: what only that rank held; node1of2: the second of two shares of what every rank held
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
    line: dict[str, Any] | None = None  # of metrics, of that step, if it has one


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
    holders: dict[tuple[int, str, int], dict[str, dict[int, Copy]]] = defaultdict(lambda: defaultdict(dict))
    for its_leader, copies in everyone:
        for copy in copies:
            holders[copy.step, copy.attempt, copy.world_size][copy.part][its_leader] = copy
    needed = {key: needed_parts([*parts], key[2]) for key, parts in holders.items()}
    whole = [key for key, parts in holders.items() if key[0] > newer_than and all(map(parts.get, needed[key]))]
    if not whole:
        newest = max(holders, default=(0, "", 0))
        if newest[0] <= newer_than:
            return NOTHING
        gone = [part for part in needed[newest] if part not in holders[newest]]
        return Recovered(None, 0, f"warning: step {newest[0]} in memory is lost: no node has {_describe(gone)}")
    newest = max(whole)
    parts = {part: holders[newest][part] for part in needed[newest]}
    return _assemble(out, newest[0], newest[1], parts, sorted({its for its, _ in everyone}), world, timeout_s)


def needed_parts(parts: list[str], world_size: int) -> list[str]:
    """Return the parts that make up a whole state; nodes of other sizes have other shares of what every rank held."""
    sizes = sorted({int(part.partition("of")[2]) for part in parts if part.startswith("node")}) or [1]
    splits = [[f"node{number}of{size}" for number in range(size)] for size in sizes]
    best = min(splits, key=lambda split: len({*split} - {*parts}))
    return [*(f"rank{rank}" for rank in range(world_size)), *best]


def _describe(parts: list[str]) -> str:
    """Return for a message what `parts` hold, of the ranks or else of all of them."""
    ranks = [part.removeprefix("rank") for part in parts if part.startswith("rank")]
    if ranks:
        return f"the slices of rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}"
    return f"these shares of what every rank held: {', '.join(parts)}"


def _kept_here(attempts: list[str], fingerprint: str) -> Iterator[Copy]:
    """Yield the complete copies on this node."""
    for attempt in attempts:
        folder = folder_of(attempt)
        for file in folder.glob("*-by*-*.json") if run_of(folder).get("fingerprint") == fingerprint else ():
            with contextlib.suppress(OSError, ValueError, LookupError):
                counts = json.loads(file.read_text())
                yield Copy(attempt, counts["step"], file.name.partition("-")[0], counts["world_size"], file.stem)


def _delete_forgotten(out: Path, attempts: list[str]) -> None:
    """Delete the copies on this node that belong to `out`, but to none of its last attempts."""
    for folder in MEMORY.glob("crossbatch-*"):
        if run_of(folder).get("out") == str(out.resolve()) and folder not in map(folder_of, attempts):
            shutil.rmtree(folder, ignore_errors=True)


def _assemble(
    out: Path,
    step: int,
    attempt: str,
    holders: dict[str, dict[int, Copy]],
    leaders: list[int],
    world: World,
    timeout_s: float,
) -> Recovered:
    """Make the checkpoint of `step` on every node; `holders` says which leaders have each part."""
    leader = world.rank - world.local_rank
    lacking = [(part, its) for part, found in holders.items() for its in leaders if its not in found]
    owners = {part: min(found) for part, found in holders.items()}
    run = folder_of(attempt) / f"recovered-{leader}"
    folder = run / "checkpoints" / name_of(step)
    described: list[dict[str, Any]] = [{}] * world.size
    mine = {part: holders[part][leader] for part, owner in owners.items() if owner == world.rank}
    dist.all_gather_object(described, {part: _read(copy) for part, copy in mine.items()})
    everything: dict[str, Any] = {part: found for some in described for part, found in some.items()}

    def make_room() -> dict[str, torch.Tensor]:
        if world.rank != leader:
            return {}
        shutil.rmtree(run, ignore_errors=True)
        folder.mkdir(parents=True)
        for part, found in holders.items():
            if leader in found:
                os.link(folder_of(attempt) / f"{found[leader].files}.bin", folder / f"{part}.bin")
        return {
            part: allocate(folder / f"{part}.bin", everything[part]["bytes"]) for part, its in lacking if its == leader
        }

    def describe() -> None:
        if world.rank == leader:
            base = everything["rank0"]
            skipped = [
                found["counts"]["skipped_images"] for part, found in everything.items() if part.startswith("rank")
            ]
            counts = {"progress": base["counts"]["progress"], "skipped_images": sum(skipped)}
            manifest = Manifest(**{**base["manifest"], **counts})
            manifest.files = {f"{part}.bin": describe_file(folder / f"{part}.bin") for part in everything}
            slices = [
                SliceInFile(name, start, length, getattr(torch, dtype), f"{part}.bin", offset)
                for part, found in everything.items()
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
    came = f"nodes that lacked some were sent {len(lacking)}" if lacking else "all of them on every node"
    line = everything["rank0"]["counts"]["line"]
    return Recovered(folder, step, f"from memory: {len(holders)} parts, {came}", line)


def _read(copy: Copy) -> dict[str, Any]:
    counts = json.loads((folder_of(copy.attempt) / f"{copy.files}.json").read_text())
    return {**json.loads(copy.description.read_text()), "counts": counts}


def _send(
    lacking: list[tuple[str, int]],
    owners: dict[str, int],
    holders: dict[str, dict[int, Copy]],
    received: dict[str, torch.Tensor],
    world: World,
    timeout_s: float,
) -> None:
    """Send parts from those who have them to the leaders that lack them, in an order that is the same on all ranks."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    for part, target in lacking:
        if owners[part] == world.rank:
            copy = holders[part][world.rank]
            file = folder_of(copy.attempt) / f"{copy.files}.bin"
            size = file.stat().st_size
            dist.send(torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8), target, group)
        elif target == world.rank:
            dist.recv(received[part], owners[part], group)
    dist.barrier(group)
    dist.destroy_process_group(group)
