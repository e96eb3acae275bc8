"""Joins the processes of a run as ranks. No other file of the engine reads the environment.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*; a plain `python` sets nothing and becomes a world of
one.
"""

import contextlib
import ctypes
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.rendezvous import rendezvous

from crossbatch import InputError, RunStopped
from crossbatch.models.collective import GroupCollective

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Says which of the processes of a run this one is; "local" counts those of the same node."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes and prints."""
        return self.rank == 0


def world_from_environment() -> World:
    """Return the rank that the launcher has given this process; no process group is needed.

    Raises InputError if what the environment says cannot be.
    """
    size = _number("WORLD_SIZE", default=1, least=1)
    rank = _number("RANK", default=0)
    if rank >= size:
        raise InputError(f"RANK: given {rank}; allowed: 0 to {size - 1}, as WORLD_SIZE is {size}; {_START}")
    local_size = _number("LOCAL_WORLD_SIZE", default=_number("LOCAL_SIZE", default=size, least=1), least=1)
    return World(rank, size, _number("LOCAL_RANK", default=0), local_size)


_START = "start with torchrun or deepspeed, which set it, or unset it for one process"


def _number(name: str, default: int, least: int = 0) -> int:
    """Return a number from the environment. Raises InputError if it is none, or too small."""
    text = os.environ.get(name, str(default))
    if not text.strip().isascii() or not text.strip().isdigit() or int(text) < least:
        raise InputError(f"{name}: given {text!r} in the environment; allowed: a whole number >= {least}; {_START}")
    return int(text)


def hides_gpus() -> bool:
    """Return whether CUDA_VISIBLE_DEVICES says that no GPU shall be used; Slurm writes NoDevFiles for a job without one."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")


def may_be_restarted() -> bool:
    """Return whether torchrun starts this very command again after a failure (--max-restarts)."""
    return _number("TORCHELASTIC_MAX_RESTARTS", default=0) > 0


@contextlib.contextmanager
def process_group(world: World, device_type: str, threads: int = 1, timeout_s: float = 1800) -> Iterator[torch.device]:
    """Join the ranks (NCCL on GPUs, gloo on CPUs) and yield this rank's device; leave the group at the end.

    On CPUs, `threads` compute unless OMP_NUM_THREADS says otherwise. A collective fails after `timeout_s`. With NCCL, which
    then ends the process by itself, it fails a minute later, so that the watchdog can name the rank at fault first.

    Raises:
        InputError: if srun or mpirun started several processes that do not know of each other, or if the ranks cannot meet
            where the environment says.
        RunStopped: if not all ranks come.
    """
    _require_launcher(world)
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
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_store(world, timeout),
            rank=world.rank,
            world_size=world.size,
            timeout=timeout + timedelta(seconds=60 if device.type == "cuda" else 0),
            device_id=device if device.type == "cuda" else None,
        )
    try:
        yield device
    except Exception as error:
        if world.size == 1 or isinstance(error, InputError):
            dist.destroy_process_group()
        raise  # else not: the others may be gone, and leaving the group would wait for them
    dist.destroy_process_group()


@contextlib.contextmanager
def meeting(host: str, port: str) -> Iterator[None]:
    """Raise what torch says when ranks cannot meet at `host` and `port` as InputError, or as RunStopped if some do not come."""
    try:
        if host and port.isdigit():
            socket.getaddrinfo(host, int(port))
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


def _require_launcher(world: World) -> None:
    """Raise InputError if ranks cannot find each other, or if several were started that would each be a world of one."""
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if name not in os.environ]
    if world.size > 1 and missing:
        raise InputError(f"WORLD_SIZE is {world.size}, but {' and '.join(missing)} are not set; {_START}")
    if not missing:
        _number("MASTER_PORT", default=0)
    for started in () if "RANK" in os.environ else ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if int(os.environ.get(started, "1")) > 1:
            raise InputError(
                f"{started}={os.environ[started]}, but no RANK: this command was started {os.environ[started]} times, each as "
                f"a run of its own; start torchrun once per node instead: it starts one per GPU (see launch/pretrain.slurm)"
            )


def _store(world: World, timeout: timedelta) -> dist.Store:
    """Return the store in which the ranks find each other."""
    if world.size == 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return dist.HashStore()
    store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=timeout))
    return unused(store, world) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else store


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


def keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks instead of returning them to the kernel after every operator.

    Otherwise each activation is mapped and page-faulted anew: a step of a ResNet-18 of width 16 on 256 images of 32 px
    then takes 2.15 s instead of 1.61 s on two cores.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


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


def on_every_rank(function: Callable[[], T], expected: type[Exception]) -> tuple[T | None, list[str]]:
    """Call `function` on every rank; return this rank's result, and the `expected` errors of all ranks as texts."""
    result, error = None, None
    try:
        result = function()
    except expected as raised:
        error = str(raised)
    errors: list[str | None] = [error] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return result, [f"rank {rank}: {error}" if len(errors) > 1 else error for rank, error in enumerate(errors) if error]


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the mean over ranks of a small tensor of statistics."""
    return GroupCollective().all_reduce(values) / dist.get_world_size()
