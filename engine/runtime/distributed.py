"""Joins the processes of a run as ranks. No other file of the engine but `launchers` reads the environment.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*; srun and mpirun have names of their own for them; a
plain `python` sets nothing and becomes a world of one.
"""

import contextlib
import os
import re
import socket
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.rendezvous import rendezvous

from crossbatch import InputError, RunStopped
from crossbatch.data.workers import keep_freed_memory
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

    Where nothing says how many ranks a node has, a LOCAL_RANK means that all are on this one, none that each has its own.

    Raises InputError if what the environment says cannot be, or if nothing says where several ranks meet.
    """
    adopt_scheduler()
    size = _number("WORLD_SIZE", default=1, least=1)
    rank = _number("RANK", default=0)
    if rank >= size:
        raise InputError(f"RANK: given {rank}; allowed: 0 to {size - 1}, as WORLD_SIZE is {size}; {_START}")
    unsaid = size if "LOCAL_RANK" in os.environ else 1
    local_size = _number("LOCAL_WORLD_SIZE", default=_number("LOCAL_SIZE", default=unsaid, least=1), least=1)
    return World(rank, size, _number("LOCAL_RANK", default=0), local_size)


_START = "start with torchrun or deepspeed, which set it, or unset it for one process"


def _number(name: str, default: int, least: int = 0) -> int:
    """Return a number from the environment. Raises InputError if it is none, or too small."""
    text = os.environ.get(name, str(default))
    if not text.strip().isascii() or not text.strip().isdigit() or int(text) < least:
        raise InputError(f"{name}: given {text!r} in the environment; allowed: a whole number >= {least}; {_START}")
    return int(text)


# What srun and mpirun set: the number of ranks, this rank, its number on its node, the number of ranks there. mpirun comes
# first: in a Slurm job it starts its daemons with srun, and the ranks see the numbers of the daemons, too.
_SCHEDULERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


def adopt_scheduler() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and MASTER_* from what srun or mpirun have set, if nobody else has.

    They go into the environment because DeepSpeed looks for them there.

    Raises InputError if several ranks have been started, but nothing says where they meet, or as which rank.
    """
    found = next((names for names in _SCHEDULERS if _number(names[0], default=1) > 1), None)
    if "RANK" in os.environ or found is None:
        return
    missing = [name for name in found if name not in os.environ]
    if missing:
        raise InputError(
            f"{found[0]}={os.environ[found[0]]}, but no {missing[0]}: this command was started that many times and "
            f"does not know as which rank; set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    size, rank, local_rank, local_size = (os.environ[name] for name in found)
    if found[0].startswith("SLURM"):
        local_size = str(_tasks_per_node(local_size)[int(os.environ["SLURM_NODEID"])])
    if "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ","):
        local_rank = "0"  # each rank has a GPU of its own and sees no other (srun --gpus-per-task)
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if "MASTER_ADDR" in os.environ:
        address = os.environ["MASTER_ADDR"]
    elif nodes is not None:
        address = _first_host(nodes)
    elif local_size == size:
        address = "127.0.0.1"
    else:
        raise InputError(
            f"{found[0]}={size}: mpirun has started ranks on several nodes, but no MASTER_ADDR says where they meet; give it "
            f"the host of rank 0: mpirun -x MASTER_ADDR=HOST (Intel MPI, MPICH: -genv MASTER_ADDR HOST)"
        )
    # Two jobs on one node must not meet each other.
    job = [os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE")]
    port = 15000 + zlib.crc32(" ".join(job).encode()) % 15000  # below those that the kernel gives to connections
    os.environ.update(
        RANK=rank, WORLD_SIZE=size, LOCAL_RANK=local_rank, LOCAL_WORLD_SIZE=local_size, MASTER_ADDR=address
    )
    os.environ.setdefault("MASTER_PORT", str(port))


def _tasks_per_node(text: str) -> list[int]:
    """Return Slurm's number of tasks of each node: of "2(x3),1" it is [2, 2, 2, 1]."""
    parts = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(","))
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def _first_host(nodes: str) -> str:
    """Return the first of Slurm's nodes: of "gpu[07-09,12],login1" it is gpu07."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]


def hides_gpus() -> bool:
    """Return whether CUDA_VISIBLE_DEVICES says that no GPU shall be used; Slurm writes NoDevFiles for a job without one."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")


def may_be_restarted() -> bool:
    """Return whether torchrun starts this very command again after a failure (--max-restarts)."""
    return _number("TORCHELASTIC_MAX_RESTARTS", default=0) > 0


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
    _require_meeting_point(world)
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
    """Raise what torch says when ranks cannot meet at `host` and `port` as InputError, or as RunStopped if some do not come."""
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


def _require_meeting_point(world: World) -> None:
    """Raise InputError if nothing says where ranks find each other."""
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if name not in os.environ]
    if world.size > 1 and missing:
        raise InputError(f"WORLD_SIZE is {world.size}, but {' and '.join(missing)} are not set; {_START}")
    if not missing:
        _number("MASTER_PORT", default=0)


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
