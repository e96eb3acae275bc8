"""Processes, ranks and collectives. The only file of the engine that reads the environment.

Three launchers meet here: `deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*; a plain `python` sets
nothing and becomes a world of one.
"""

import contextlib
import ctypes
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from crossbatch import InputError
from crossbatch.models.collective import GroupCollective

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_from_environment() -> World:
    """What the launcher says, before any process group exists."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return World(
        rank=int(os.environ.get("RANK", "0")),
        size=size,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", str(size)))),
    )


def may_be_restarted() -> bool:
    """Whether a launcher will start this very command again after a failure (torchrun --max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


@contextlib.contextmanager
def process_group(world: World, device_type: str, threads: int = 1, timeout_s: float = 1800) -> Iterator[torch.device]:
    """Joins the ranks (NCCL on GPUs, gloo on CPUs) and yields this rank's device; leaves the group at the end.

    On CPUs, `threads` compute unless OMP_NUM_THREADS says otherwise. A collective fails after `timeout_s`; NCCL, which
    by itself then ends the process, a minute later, so that `engine.watch` can say whose fault it is.

    Raises InputError if srun or mpirun started several processes of which none knows of the others.
    """
    _require_launcher()
    device = torch.device(device_type, world.local_rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed asks for it even in a world of one
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    if device.type == "cpu":
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)
    timeout = timedelta(seconds=timeout_s)
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


def _require_launcher() -> None:
    for started in () if "RANK" in os.environ else ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if int(os.environ.get(started, "1")) > 1:
            raise InputError(
                f"{started}={os.environ[started]}, but no RANK: this command was started {os.environ[started]} times, each as "
                f"a run of its own; start torchrun once a node instead: it starts a rank per GPU (see launch/pretrain.slurm)"
            )


def _store(world: World, timeout: timedelta) -> dist.Store:
    """Where the ranks find each other."""
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()  # of this process
    store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=timeout))
    return unused(store, world) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else store


def unused(store: dist.Store, world: World) -> dist.Store:
    """A part of `store` that no earlier attempt at this run has touched.

    torchrun starts ranks again beside the store of those that died, which still holds their addresses. It counts restarts,
    but each node counts its own. So rank 0 invents a name, and tells it to whoever asks with a name of their own.
    """
    me = uuid.uuid4().hex
    if world.rank > 0:
        store.set(f"asks/{world.rank}", me)
        part = store.get(f"told/{me}").decode()  # waits
        store.set(f"{part}/knows/{world.rank}", "")
        return dist.PrefixStore(part, store)
    others = range(1, world.size)
    while not all(store.check([f"{me}/knows/{rank}"]) for rank in others):
        for rank in others:  # again and again: the first that asks for a rank may be one that has died
            if store.check([f"asks/{rank}"]):
                store.set(f"told/{store.get(f'asks/{rank}').decode()}", me)
        time.sleep(0.05)
    return dist.PrefixStore(me, store)


def make_deterministic() -> None:
    """From now on the same inputs give the same bits, or an error where torch has no such algorithm. Before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> None:
    """Lets glibc reuse large freed blocks instead of returning them to the kernel after every operator.

    Otherwise each activation is mapped and page-faulted anew: a step of a ResNet-18 of width 16 on 256 images of 32 px
    then takes 2.15 s instead of 1.61 s on two cores.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def barrier() -> None:
    """Waits for all ranks; on GPUs as a tiny all-reduce of this rank's device."""
    if dist.get_world_size() > 1:
        dist.barrier()


def broadcast_object(value, source: int = 0):
    """The `source` rank's picklable value, on every rank."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def cpu_group(timeout_s: float) -> dist.ProcessGroup:
    """All ranks once more, for messages that must mix neither with training's nor with the GPU's queue."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    return group


def shared_token() -> str:
    """A name that nobody else uses, the same on all ranks."""
    return broadcast_object(uuid.uuid4().hex[:8])


def on_main(function: Callable[[], T]) -> T:
    """Calls `function` on rank 0 only and gives every rank its result, or its InputError."""
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
    """Calls `function` on every rank: this rank's result, and what any rank raised of the `expected` kind, the same for all."""
    result, error = None, None
    try:
        result = function()
    except expected as raised:
        error = str(raised)
    errors: list[str | None] = [error] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return result, [f"rank {rank}: {error}" if len(errors) > 1 else error for rank, error in enumerate(errors) if error]


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Mean of a small tensor of statistics."""
    return GroupCollective().all_reduce(values) / dist.get_world_size()
