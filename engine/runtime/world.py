"""Says which rank a process is, from what its launcher has set; only `launchers` and `distributed` read that, too.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*; srun and mpirun have names of their own for them; a
plain `python` sets nothing and becomes a world of one. Nothing here imports torch, which takes seconds: what is wrong is said
at once.
"""

import os
import re
import zlib
from dataclasses import dataclass

from crossbatch import InputError


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


def has_false_terminal() -> bool:
    """Return whether what looks like a terminal may be a file: Open MPI reads the output of each rank through one.

    It stops reading when it ends its ranks: a progress bar has filled the terminal ten seconds later, and whoever writes waits.
    """
    return "OMPI_COMM_WORLD_RANK" in os.environ


def may_be_restarted() -> bool:
    """Return whether torchrun starts this very command again after a failure (--max-restarts)."""
    return _number("TORCHELASTIC_MAX_RESTARTS", default=0) > 0


def require_meeting_point(world: World) -> None:
    """Raise InputError if nothing says where ranks find each other."""
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if name not in os.environ]
    if world.size > 1 and missing:
        raise InputError(
            f"WORLD_SIZE is {world.size}, but {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set; {_START}"
        )
    if not missing:
        _number("MASTER_PORT", default=0)
