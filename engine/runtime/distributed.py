"""Joins the processes of a run as ranks."""

import contextlib
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.rendezvous import rendezvous

from crossbatch import InputError, RunStopped
from crossbatch.data.workers import keep_freed_memory
from crossbatch.engine.runtime.world import World, require_meeting_point
from crossbatch.models.collective import GroupCollective

T = TypeVar("T")


@contextlib.contextmanager
def process_group(
    world: World,
    device_type: str,
    threads: int = 1,
    timeout_s: float = 1800,
    check: Callable[[dist.Store, World, float], None] | None = None,
) -> Iterator[torch.device]:
    """Join the ranks (NCCL on GPUs, gloo on CPUs) and yield this rank's device; leave the group at the end.

    On CPUs, `threads` compute unless OMP_NUM_THREADS says otherwise. A collective fails after `timeout_s`. With NCCL, which
    then ends the process by itself, it fails a minute later, so that the watchdog can name the rank at fault first. `check` is
    called with the store in which the ranks meet, before they join, and with `world` and `timeout_s`.

    Raises:
        InputError: if the ranks cannot meet where the environment says.
        RunStopped: if not all ranks come.
    """
    require_meeting_point(world)
    device = torch.device(device_type, world.local_rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Before anything is measured: a step's shapes never change, so timing them once pays.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed asks for it even in a world of one
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    if device.type == "cpu":
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)
    timeout = timedelta(seconds=timeout_s)
    with meeting(os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")):
        store = meet(world, timeout)
        if check is not None:
            check(store, world, timeout_s)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=timeout + timedelta(seconds=60 if device.type == "cuda" else 0),
            device_id=device if device.type == "cuda" else None,
        )
    try:
        yield device
    except BaseException as error:
        if world.size == 1 or isinstance(error, InputError):
            _leave()
        raise  # else not: the others may be gone, and leaving the group would wait for them
    _leave()


def _leave() -> None:
    """Leave the process group, and make torch forget what it knows of DTensors.

    It keeps the results of its operators by the shape of the mesh, with that mesh: parameters in another process group, in the
    same process, would get the mesh of this one, whose groups are gone.
    """
    dist.destroy_process_group()
    if "torch.distributed.tensor" in sys.modules:  # a second to import
        from torch.distributed.tensor import debug

        debug._clear_python_sharding_prop_cache()
        debug._clear_fast_path_sharding_prop_cache()


@contextlib.contextmanager
def meeting(host: str, port: str) -> Iterator[None]:
    """Turn torch's errors when ranks cannot meet at `host` and `port` into InputError, or RunStopped if some do not come."""
    try:
        yield
    except socket.gaierror as error:
        raise InputError(
            f"{host}, where the ranks shall meet, is unknown here ({error.strerror}); give the name or the address of the "
            f"machine of rank 0 as --master_addr or in --dist-url"
        ) from error
    except (dist.DistNetworkError, dist.DistStoreError, RendezvousError) as error:
        text = str(error)
        if "EADDRINUSE" in text or "already in use" in text:
            raise InputError(
                f"port {port} is taken on this machine; give another with --master_port, or in --dist-url"
            ) from error
        raise RunStopped(
            f"not all ranks came to {host}:{port}: {text.splitlines()[0] if text else type(error).__name__}; start every "
            f"rank with the same address, and look at the network between the machines"
        ) from error


tries_to_meet: list[World] = []  # one for each call of `meet`


def meet(world: World, timeout: timedelta) -> dist.Store:
    """Return the store in which the ranks find each other; it is there once rank 0 is."""
    tries_to_meet.append(world)
    if world.size == 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=timeout))
        return unused(store, world)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    socket.getaddrinfo(host, port)  # raises at once where TCPStore would try for minutes
    return dist.TCPStore(host, port, world.size, world.is_main, timeout, wait_for_workers=False)


def unused(store: dist.Store, world: World) -> dist.Store:
    """Return a part of `store` that no earlier attempt at this run has touched.

    torchrun restarts ranks beside the store of those that died, which still holds their addresses. It counts restarts, but each
    node counts its own. So rank 0 invents a name for the part, and tells it to every rank that asks with a name of its own.
    """
    me = uuid.uuid4().hex
    if world.rank > 0:
        store.set(f"asks/{world.rank}", me)
        part = store.get(f"told/{me}").decode()  # waits
        store.set(f"{part}/knows/{world.rank}", "")
        return dist.PrefixStore(part, store)
    others = range(1, world.size)
    while not all(store.check([f"{me}/knows/{rank}"]) for rank in others):
        for rank in others:  # repeatedly, because the first that asked as this rank may have died
            if store.check([f"asks/{rank}"]):
                store.set(f"told/{store.get(f'asks/{rank}').decode()}", me)
        time.sleep(0.05)
    return dist.PrefixStore(me, store)


def make_deterministic() -> None:
    """Make torch give the same bits for the same inputs, or an error where it cannot; call it before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def broadcast_object(value: T) -> T:
    """Return rank 0's picklable value on every rank."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def cpu_group(timeout_s: float) -> dist.ProcessGroup:
    """Return a second group of all ranks, for messages that must mix neither with training's nor with the GPU's queue."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    return group


def consecutive_ranks(size: int, timeout_s: float) -> dist.ProcessGroup | None:
    """Return the group of `size` consecutive ranks that this rank is in; None means all ranks. Every rank must call it.

    Raises InputError if the ranks were given different sizes, which those of unequal nodes may be.
    """
    if size == dist.get_world_size():
        return None
    sizes: list[int] = [size] * dist.get_world_size()
    dist.all_gather_object(sizes, size)
    if len(set(sizes)) > 1:
        raise InputError(
            f"crossbatch.model.norm_ranks: given node, but nodes have {' or '.join(map(str, sorted(set(sizes))))} ranks; "
            f"allowed: nodes with equally many ranks; give a divisor of the {len(sizes)} ranks, or world"
        )
    group, _ = dist.new_subgroups(size, timeout=timedelta(seconds=timeout_s))
    return group


def shared_token() -> str:
    """Return a unique name, the same on all ranks."""
    return broadcast_object(uuid.uuid4().hex[:8])


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 only; return its result, or raise its InputError, on every rank."""
    result, error = None, None
    if dist.get_rank() == 0:
        try:
            result = function()
        except InputError as raised:
            error = str(raised)
    result, error = broadcast_object((result, error))
    if error is not None:
        raise InputError(error)
    return result  # pyright: ignore[reportReturnType]


def on_every_rank(
    function: Callable[[], T], expected: type[Exception] | tuple[type[Exception], ...]
) -> tuple[T | None, list[str]]:
    """Call `function` on every rank; return this rank's result, and the `expected` errors of all ranks as texts."""
    result, error = None, None
    try:
        result = function()
    except expected as raised:
        error = str(raised)
    errors: list[str | None] = [error] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return result, [f"rank {rank}: {error}" if len(errors) > 1 else error for rank, error in enumerate(errors) if error]


def on_all_ranks(function: Callable[[], T], expected: type[Exception] = InputError) -> T:
    """Call `function` on every rank; return this rank's result, or raise the first `expected` error of any rank on all."""
    result, errors = on_every_rank(function, expected)
    if errors:
        raise expected(errors[0])
    return result  # pyright: ignore[reportReturnType]


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the mean over ranks of a small tensor of statistics."""
    return GroupCollective().all_reduce(values) / dist.get_world_size()
