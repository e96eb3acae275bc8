"""The originals' way to start ranks, so that their command lines (of pretraining and of the linear probe) run as they are:

    python launch/pretrain.py --multiprocessing-distributed --world-size 2 --rank 0 --dist-url tcp://node0:29500 ... DATA
    python launch/pretrain.py --multiprocessing-distributed --world-size 2 --rank 1 --dist-url tcp://node0:29500 ... DATA

--world-size and --rank count nodes. Each command starts the ranks of its node, through torchrun: one per GPU, one where there
is no GPU, or as many as --nproc-per-node says; it ends with the exit code of the first that failed. A SIGTERM is passed on to
them, so that they save; the exit code is then 143. `torchrun --nnodes 2 --node-rank 0 --master-addr node0 --nproc-per-node 8
launch/pretrain.py ...` does the same, and can restart what failed.

    python launch/pretrain.py --world-size 4 --rank 2 --gpu 0 --dist-url tcp://node0:29500 ... DATA

Without --multiprocessing-distributed they count ranks, and this process is one of them.

A flag that would change nothing is an error, unless it says what is the case anyway.
"""

import argparse
import math
import os
import sys
import uuid
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch

from crossbatch import InputError

_RUN_ID = "crossbatch-legacy-launch-"  # by which a rank knows that one of these commands has started it
_WORKERS = "crossbatch.data.workers"


def add_legacy_launch_flags(parser: argparse.ArgumentParser) -> None:
    """For `launched`."""
    group = parser.add_argument_group("the originals' way to start ranks (launch/legacy_launch.py)")
    group.add_argument(
        "--multiprocessing-distributed", action="store_true", help="start the ranks of this node, one per GPU"
    )
    group.add_argument(
        "--world-size", metavar="N", type=int, help="nodes; ranks, without --multiprocessing-distributed"
    )
    group.add_argument("--rank", metavar="N", type=int, help="of this node, or of this process, from 0")
    group.add_argument("--dist-url", metavar="tcp://HOST:PORT", help="where they meet: HOST is the node of rank 0")
    group.add_argument("--dist-backend", metavar="X", help="nccl on GPUs, gloo on CPUs, as would be taken anyway")
    group.add_argument("--gpu", metavar="N", type=int, help="of this process, from 0, where it does not start others")
    group.add_argument(
        "--nproc-per-node", "--nproc_per_node", metavar="N", type=int, help="ranks to start instead of one per GPU"
    )
    group.add_argument("-e", "--evaluate", action="store_true", help=argparse.SUPPRESS)
    group.add_argument(
        "--start-epoch", metavar="0", type=_zero, help="only 0: a run goes on where its checkpoint stands"
    )


def _zero(text: str) -> int:
    if text != "0":
        raise argparse.ArgumentTypeError(
            f"given {text}; allowed: 0; a run goes on where its checkpoint stands (--resume)"
        )
    return 0


@dataclass(frozen=True)
class _Asked:
    """What the flags ask for. With `processes` 0, this process is rank number `number` of `count` itself."""

    processes: int  # that each node starts
    count: int  # of nodes, or of ranks
    number: int
    address: tuple[str, int] | None  # None: any free port of this machine
    gpu: int | None

    @property
    def world_size(self) -> int:
        return self.count * max(self.processes, 1)


def asked_world_size(arguments: argparse.Namespace) -> int | None:
    """The ranks that the flags ask for, for a dry run; None where they ask for nothing. Raises InputError."""
    asked = _asked(arguments)
    return asked.world_size if asked else None


def launched(arguments: argparse.Namespace) -> bool:
    """Does what the flags ask for, before anything reads the environment or uses a GPU.

    True: the ranks of this node have run, all is done. False: this process is a rank, as its environment says.

    Raises InputError, and SystemExit with the exit code of the first rank that failed.
    """
    asked = _asked(arguments)
    if asked is None:
        return False
    if asked.processes:
        _start_ranks(asked, getattr(arguments, _WORKERS, None))
        return True
    os.environ["LOCAL_RANK"] = str(asked.gpu or 0)
    if asked.address:
        host, port = asked.address
        ranks = {"RANK": asked.number, "WORLD_SIZE": asked.count, "MASTER_ADDR": host, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in ranks.items()})
    return False


def _asked(given: argparse.Namespace) -> _Asked | None:
    if given.evaluate:
        raise InputError(
            "--evaluate: does nothing by itself; launch/linear.py with the --out of a finished probe evaluates it, and "
            "launch/knn.py a backbone"
        )
    if os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(_RUN_ID):
        return None
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if given.dist_backend not in (None, backend):
        where = "GPUs talk" if backend == "nccl" else "no GPU was found, and CPUs talk"
        raise InputError(f"--dist-backend: given {given.dist_backend}; {where} through {backend}; leave it out")
    for name in ("world_size", "rank"):
        if getattr(given, name) == -1:  # the originals' way to say nothing
            setattr(given, name, None)
    if "RANK" in os.environ:
        return _require_agreement(given)
    return _asked_of_node(given) if given.multiprocessing_distributed else _asked_of_process(given)


def _require_agreement(given: argparse.Namespace) -> None:
    """With torchrun or deepspeed, which have started this process."""
    is_so = {"world_size": "WORLD_SIZE", "rank": "RANK", "gpu": "LOCAL_RANK"}
    disagreeing = [name for name, variable in is_so.items() if getattr(given, name) not in (None, _variable(variable))]
    disagreeing += ["multiprocessing_distributed"] * given.multiprocessing_distributed
    disagreeing += ["nproc_per_node"] * (given.nproc_per_node is not None)
    disagreeing += ["dist_url"] * (given.dist_url not in (None, "env://"))
    if disagreeing:
        flag = f"--{disagreeing[0].replace('_', '-')}"
        raise InputError(
            f"{flag}: given, but a launcher has started this process as rank {_variable('RANK')} of "
            f"{_variable('WORLD_SIZE')}; leave {flag} out, or start the command with plain python"
        )


def _variable(name: str) -> int:
    return int(os.environ.get(name, "0"))


def _asked_of_node(given: argparse.Namespace) -> _Asked:
    if given.gpu is not None:
        raise InputError(
            f"--gpu: given {given.gpu} with --multiprocessing-distributed, which starts one rank per GPU; leave it out, or "
            f"choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    gpus = torch.cuda.device_count()
    processes = given.nproc_per_node if given.nproc_per_node is not None else gpus or 1
    if processes < 1 or (gpus and processes > gpus):
        allowed = f"1 to {gpus}, the GPUs of this machine" if gpus else ">= 1"
        raise InputError(f"--nproc-per-node: given {processes}; allowed: {allowed}")
    nodes, number = _count_and_number(given, "nodes")
    return _Asked(processes, nodes, number, _address(given.dist_url, nodes, "nodes"), None)


def _asked_of_process(given: argparse.Namespace) -> _Asked | None:
    if given.nproc_per_node is not None:
        raise InputError(
            f"--nproc-per-node: given {given.nproc_per_node} without --multiprocessing-distributed, which starts ranks; add it"
        )
    if given.world_size is None and given.rank is None and given.dist_url is None and given.gpu is None:
        return None
    gpus = torch.cuda.device_count()
    if given.gpu is not None and not 0 <= given.gpu < gpus:
        allowed = f"0 to {gpus - 1}" if gpus else "nothing, as no GPU was found; leave it out"
        raise InputError(f"--gpu: given {given.gpu}; allowed: {allowed}")
    ranks, number = _count_and_number(given, "ranks")
    if ranks == 1 and given.dist_url is not None:
        raise InputError(
            f"--dist-url: given {given.dist_url} for one process, which meets nobody; leave it out, or add "
            f"--multiprocessing-distributed, or --world-size and --rank"
        )
    if ranks > 1 and gpus > 1 and given.gpu is None:
        raise InputError(
            f"--gpu: not given, but this machine has {gpus} GPUs; say which is this rank's, or let "
            f"--multiprocessing-distributed start a rank on each"
        )
    return _Asked(0, ranks, number, _address(given.dist_url, ranks, "ranks"), given.gpu)


def _count_and_number(given: argparse.Namespace, what: str) -> tuple[int, int]:
    count = 1 if given.world_size is None else given.world_size
    if count < 1:
        raise InputError(f"--world-size: given {count}; allowed: >= 1, the number of {what}")
    number = 0 if given.rank is None and count == 1 else given.rank
    if number is None or not 0 <= number < count:
        raise InputError(f"--rank: given {number}; allowed: 0 to {count - 1}, as --world-size is {count} ({what})")
    return count, number


def _address(url: str | None, count: int, what: str) -> tuple[str, int] | None:
    if url is None and count == 1:
        return None
    try:
        parts = urlsplit(url or "")
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:  # brackets or a port that are none
        scheme = host = port = None
    if scheme != "tcp" or not host or not port:
        raise InputError(
            f"--dist-url: given {url or 'nothing'} for {count} {what}; allowed: tcp://HOST:PORT, a free port of the machine "
            f"of rank 0"
        )
    return host, port


def _start_ranks(asked: _Asked, workers: int | None) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    host, port = asked.address or ("localhost", 0)
    host = f"[{host}]" if ":" in host else host  # IPv6
    ranks = LaunchConfig(
        min_nodes=asked.count,
        max_nodes=asked.count,
        nproc_per_node=asked.processes,
        run_id=_RUN_ID + ("static" if asked.address else uuid.uuid4().hex),
        rdzv_backend="static" if asked.address else "c10d",
        rdzv_endpoint=f"{host}:{port}",
        rdzv_configs={"rank": asked.number} if asked.address else {},
        max_restarts=0,
    )
    command = ["-u", *sys.argv]
    if workers is not None:  # -j is a node's there, a rank's here
        command[2:2] = ["--set", f"{_WORKERS}={math.ceil(workers / asked.processes)}"]
    try:
        elastic_launch(ranks, sys.executable)(*command)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
