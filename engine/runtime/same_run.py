"""Checks, before ranks train together, that all were started for the same run.

On a cluster one command per node is typed, or copied to nodes that have checkouts, packages and disks of their own. Ranks that
differ would train on without an error message, and to something that nobody can repeat. So every rank writes what it was
started with into the store in which the ranks meet; rank 0 compares, and all stop with its verdict. A rank whose input is wrong
writes that, so that the others need not wait for it.
"""

import hashlib
import importlib.metadata
import json
import platform
import socket
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

import crossbatch
from crossbatch import InputError, RunStopped
from crossbatch.engine.nested import flatten
from crossbatch.engine.runtime.distributed import meet, on_every_rank, on_main, shared_token, tries_to_meet
from crossbatch.engine.runtime.world import World

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "deepspeed",
    "numpy",
    "triton",
    "opencv-python-headless",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
)
_MAY_DIFFER = ("crossbatch.data.path", "crossbatch.data.workers")  # the images are compared by themselves
_MISSING = "did not come within"
_SHOWN = 3  # differences in a message
REFUSAL_S = 10.0  # how long a rank with wrong input waits for others to tell them
VISIBLE_S = 5.0  # for what one node has created to appear on another
_compared: list[World] = []  # one for each comparison: from then on, all ranks raise the same InputErrors


def facts_of(config: Mapping[str, Any], **flags: Any) -> dict[str, str]:
    """Return what all ranks must have in common, as texts by name: configuration, flags, versions and code."""
    facts = {key: str(value) for key, value in flatten(config).items() if key not in _MAY_DIFFER}
    facts |= {f"--{name.replace('_', '-')}": str(value) for name, value in flags.items()}
    facts |= {name: _version(name) for name in _PACKAGES}
    return facts | {"python": platform.python_version(), "the code of crossbatch": code_digest()}


def code_digest() -> str:
    """Return a digest of the sources of this package."""
    package = Path(crossbatch.__file__).parent
    digest = hashlib.sha256()
    for folder in ("engine", "models", "data", "launch"):
        root = (package / folder).resolve()  # a checkout has links there
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{folder}/{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def check_same_run(facts: Mapping[str, str], store: dist.Store, world: World, timeout_s: float) -> None:
    """Check that all ranks have the same `facts`; every rank calls it once, with the `store` in which they meet.

    Raises InputError on all ranks, with the rank and the key, if they have not, or if a rank has called `refuse`. Raises
    RunStopped if a rank does not come within `timeout_s`.
    """
    if world.size > 1:
        verdict = _exchange(store, world, {"facts": dict(facts)}, timeout_s)
        if verdict:
            raise RunStopped(verdict) if _MISSING in verdict else InputError(verdict)


def refuse(world: World, message: str) -> None:
    """Print on rank 0 that the input is wrong. If only this rank knows, tell the others, which may wait for it.

    If that fails, because rank 0 is not there, the first rank of each node prints.
    """
    alone = bool(tries_to_meet) and not _compared  # it has found no store where others could read it
    if world.is_main or (alone and world.local_rank == 0):
        _print(message)
    if world.size == 1 or alone or _compared:
        return
    try:
        _exchange(meet(world, timedelta(seconds=REFUSAL_S)), world, {"error": message}, REFUSAL_S)
    except (KeyError, OSError, RuntimeError, ValueError):  # no store there
        if not world.is_main and world.local_rank == 0:
            _print(message)


def _print(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def check_visible(folder: Path) -> None:
    """Check that all ranks see what rank 0 writes into `folder`; every rank calls it.

    Raises InputError that names the ranks that do not, on all ranks.
    """
    token = folder / f".seen-{shared_token()}"
    on_main(token.touch)

    def look() -> None:
        end = time.monotonic() + VISIBLE_S
        while not token.exists():
            if time.monotonic() > end:
                raise FileNotFoundError(
                    f"--out: {folder} on {socket.gethostname()} is not the folder of rank 0; give a folder that all nodes share"
                )
            time.sleep(0.1)

    _, errors = on_every_rank(look, FileNotFoundError)
    if dist.get_rank() == 0:
        token.unlink(missing_ok=True)
    if errors:
        raise InputError("; ".join(errors[:_SHOWN]))


def _exchange(store: dist.Store, world: World, mine: dict[str, Any], timeout_s: float) -> str:
    """Return rank 0's verdict on what all ranks have written: "" if they may go on."""
    _compared.append(world)
    timeout = timedelta(seconds=timeout_s)
    taken = store.add(f"start/taken/{world.rank}", 1) > 1
    store.set(
        f"start/{world.rank}", json.dumps({**mine, "taken": taken, "size": world.size, "host": socket.gethostname()})
    )
    if not world.is_main:
        store.wait(["start/verdict"], timeout + timedelta(seconds=REFUSAL_S))
        verdict = store.get("start/verdict").decode()
        store.add("start/read", 1)
        return verdict
    keys = [f"start/{rank}" for rank in range(world.size)]
    end = time.monotonic() + timeout_s
    while not store.check(keys) and time.monotonic() < end:
        time.sleep(0.02)
    missing = [key for key in keys if not store.check([key])]
    if missing:
        numbers = ", ".join(key.removeprefix("start/") for key in missing)
        verdict = f"rank{'s' * (len(missing) > 1)} {numbers} of {world.size} {_MISSING} {timeout_s:.0f} s; "
        verdict += f"look at the output of {'their nodes' if len(missing) > 1 else 'its node'}"
    else:
        verdict = _verdict([json.loads(text) for text in store.multi_get(keys)])
    store.set("start/verdict", verdict)
    others, end = world.size - 1 - len(missing), time.monotonic() + REFUSAL_S
    while verdict and store.add("start/read", 0) < others and time.monotonic() < end:
        time.sleep(0.02)  # the store may live in this process, which is about to end
    return verdict


def _verdict(ranks: list[dict[str, Any]]) -> str:
    """Return what keeps the ranks from training together; "" if nothing does."""
    wrong = [(rank, its["error"]) for rank, its in enumerate(ranks) if "error" in its]
    if wrong:
        rank, error = wrong[0]
        return error if len(wrong) == len(ranks) else f"rank {rank} on {ranks[rank]['host']}: {error}"
    first = ranks[0]
    for rank, its in enumerate(ranks):
        if its["taken"] or its["size"] != first["size"]:
            return (
                f"WORLD_SIZE, RANK: {'two processes say that they are' if its['taken'] else 'differing world sizes:'} rank "
                f"{rank} of {its['size']} on {its['host']}, rank 0 of {first['size']} on {first['host']}; give every node the "
                f"same number of ranks, and a number of its own"
            )
        names = [*first["facts"], *(name for name in its["facts"] if name not in first["facts"])]
        found = [
            f"{name}: {its['facts'].get(name, 'not given')} on rank {rank} ({its['host']}), but "
            f"{first['facts'].get(name, 'not given')} on rank 0 ({first['host']})"
            for name in names
            if its["facts"].get(name) != first["facts"].get(name)
        ]
        if found:
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            return f"{'; '.join(found[:_SHOWN])}{more}; start all ranks with the same command, code and packages"
    return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
