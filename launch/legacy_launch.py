"""Start ranks as the originals do, so that their command lines (of pretraining and of the linear probe) run as they are:

    python launch/pretrain.py --multiprocessing-distributed --world-size 2 --rank 0 --dist-url tcp://node0:29500 ... DATA
    python launch/pretrain.py --multiprocessing-distributed --world-size 2 --rank 1 --dist-url tcp://node0:29500 ... DATA

--world-size and --rank count nodes. Each command starts the ranks of its node: one per GPU, one where there is no GPU, or as
many as --nproc-per-node says. It passes signals on to them, so that they save, and ends with the exit code of the first that
failed. `torchrun --nnodes 2 --node-rank 0 --master-addr node0 --nproc-per-node 8 launch/pretrain.py ...` starts the same ranks,
and can restart what failed.

    python launch/pretrain.py --world-size 4 --rank 2 --gpu 0 --dist-url tcp://node0:29500 ... DATA

Without --multiprocessing-distributed they count ranks, and this process is one of them.
"""

import argparse
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from types import FrameType

import torch

from crossbatch import InputError
from crossbatch.engine.runtime.gpu_check import check_gpus
from crossbatch.engine.runtime.launchers import LAUNCHER
from crossbatch.engine.runtime.signals import SIGNALS
from crossbatch.launch.arguments import positive

_GRACE_S = 30.0  # for the other ranks of this node, after one has failed
_WORKERS = "crossbatch.data.workers"


def add_legacy_launch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `launched` reads."""
    add = parser.add_argument_group("starting ranks as the released code does (launch/legacy_launch.py)").add_argument
    add("--multiprocessing-distributed", action="store_true", help="start the ranks of this node, one per GPU")
    add(
        "--world-size", metavar="N", type=int, help="number of nodes, or of ranks without --multiprocessing-distributed"
    )
    add("--rank", metavar="N", type=int, help="number of this node, or of this process, from 0")
    add("--dist-url", metavar="tcp://HOST:PORT", help="where the ranks meet; HOST is the node of rank 0")
    add("--dist-backend", metavar="X", help="nccl on GPUs, gloo on CPUs; any other value is an error")
    add("--gpu", metavar="N", type=int, help="GPU of this process, from 0; only without --multiprocessing-distributed")
    add("--nproc-per-node", "--nproc_per_node", metavar="N", type=positive, help="ranks to start, if not one per GPU")
    add("-e", "--evaluate", action="store_true", help=argparse.SUPPRESS)
    add(
        "--start-epoch",
        type=_first_epoch,
        help="only 0: a resumed run continues from its checkpoint (see --resume)",
    )


def _first_epoch(text: str) -> int:
    if text != "0":
        raise argparse.ArgumentTypeError(
            f"given {text}; allowed: 0; leave it out: a run continues from its checkpoint (see --resume)"
        )
    return 0


@dataclass(frozen=True)
class _Asked:
    """Holds what the flags ask for."""

    processes: int  # that each node starts; 0: this process is rank number `number` of `count` itself
    count: int  # of nodes, or of ranks
    number: int
    address: str | None  # HOST:PORT; None: any free port of this machine


def asked_world_size(given: argparse.Namespace) -> int | None:
    """Return the number of ranks that the flags ask for, for a dry run; None if they ask for nothing. Raises InputError."""
    asked = _asked(given)
    return asked.count * max(asked.processes, 1) if asked else None


def launched(given: argparse.Namespace) -> bool:
    """Do what the flags ask for, before anything reads the environment or uses a GPU.

    Returns:
        True if the ranks of this node have run and all is done; False if this process is a rank, as its environment says.

    Raises:
        InputError: if the flags contradict each other, the machine, or another launcher.
        SystemExit: with the exit code of the first rank that failed.
    """
    asked = _asked(given)
    if asked and asked.processes:
        _start_ranks(asked, getattr(given, _WORKERS, None))
        return True
    if asked:
        os.environ["LOCAL_RANK"] = str(given.gpu or 0)
    if asked and asked.address:
        host, _, port = asked.address.rpartition(":")
        meeting = {"MASTER_ADDR": host.strip("[]"), "MASTER_PORT": port}  # an IPv6 address has brackets in a URL
        os.environ.update(RANK=str(asked.number), WORLD_SIZE=str(asked.count), **meeting)
    return False


def _asked(given: argparse.Namespace) -> _Asked | None:
    """Return what the flags ask for, None for nothing. A flag that would change nothing is an error."""
    if given.evaluate:
        raise InputError(
            "--evaluate: does nothing by itself; launch/linear.py with the --out of a finished probe evaluates it, and "
            "launch/knn.py a backbone"
        )
    if LAUNCHER in os.environ:
        return None
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "gloo":
        check_gpus()  # says what is wrong with the GPU, where the next line would refuse nccl
    if given.dist_backend not in (None, backend):
        raise InputError(f"--dist-backend: given {given.dist_backend}; allowed here: {backend}; leave it out")
    numbers = ("world_size", "rank", "gpu", "nproc_per_node")
    asked = {name: getattr(given, name) for name in numbers if getattr(given, name) not in (None, -1)}
    asked |= {
        name: getattr(given, name) for name in ("multiprocessing_distributed", "dist_url") if getattr(given, name)
    }
    if "RANK" in os.environ and asked.get("dist_url") == "env://":
        del asked["dist_url"]
    if not asked:
        return None
    if "RANK" in os.environ:
        flag = f"--{next(iter(asked)).replace('_', '-')}"
        raise InputError(
            f"{flag}: given, but a launcher has started this process as rank {os.environ['RANK']} of "
            f"{os.environ.get('WORLD_SIZE')}; leave {flag} out, or start the command with plain python"
        )
    starts, gpus = given.multiprocessing_distributed, torch.cuda.device_count()
    if given.gpu is not None and (starts or not 0 <= given.gpu < gpus):
        raise InputError(
            f"--gpu: given {given.gpu}; allowed: the number of one of this machine's {gpus} GPUs, without "
            f"--multiprocessing-distributed, which starts a rank on each; leave it out"
        )
    if given.nproc_per_node is not None and not starts:
        raise InputError(
            f"--nproc-per-node: given {given.nproc_per_node} without --multiprocessing-distributed, which starts ranks; add it"
        )
    what, count = "nodes" if starts else "ranks", asked.get("world_size", 1)
    if count < 1:
        raise InputError(f"--world-size: given {count}; allowed: >= 1, the number of {what}")
    number = asked.get("rank", 0 if count == 1 else None)
    if number is None or not 0 <= number < count:
        given_rank = "nothing" if number is None else number
        raise InputError(f"--rank: given {given_rank}; allowed: 0 to {count - 1}, as --world-size is {count} ({what})")
    meeting = re.fullmatch(r"tcp://(.+:\d+)", given.dist_url or "")
    is_alone = count == 1 and not starts
    if (is_alone and given.dist_url) or (not meeting and (given.dist_url or count > 1)):
        raise InputError(
            f"--dist-url: given {given.dist_url or 'nothing'} for {count} {what}; allowed: tcp://HOST:PORT, a free port of the "
            f"machine of rank 0; for one process, leave it out"
        )
    processes = (given.nproc_per_node or gpus or 1) if starts else 0
    return _Asked(processes, count, number, meeting[1] if meeting else None)


def _start_ranks(asked: _Asked, workers: int | None) -> None:
    """Start the ranks of this node, pass signals on to them, wait for all, and exit with the code of the first that failed.

    They are sessions of their own, so that a Ctrl-C reaches them once, from here. (torchrun would end with code 1 after a
    SIGTERM, kill what has not saved within 30 s, and die of a SIGUSR1.)
    """
    address, port = (asked.address or f"127.0.0.1:{_free_port()}").rsplit(":", 1)
    meeting = {"MASTER_ADDR": address.strip("[]"), "MASTER_PORT": port}  # an IPv6 address has brackets in a URL
    command = [sys.executable, "-u", *sys.argv]
    if workers is not None:  # -j is a node's there, a rank's here
        command[3:3] = ["--set", f"{_WORKERS}={math.ceil(workers / asked.processes)}"]
    ranks: list[subprocess.Popen] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            rank.send_signal(number)  # does nothing if it has ended

    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # else: nohup
            signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until all have been started, or one would miss it
    for local_rank in range(asked.processes):
        numbers = {
            "RANK": asked.number * asked.processes + local_rank,
            "WORLD_SIZE": asked.count * asked.processes,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": asked.processes,
            LAUNCHER: os.getpid(),
        }
        environment = {**os.environ, **meeting, **{name: str(number) for name, number in numbers.items()}}
        unblock = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, SIGNALS)
        ranks.append(subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=unblock))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    code, kill_at = 0, math.inf
    while None in [rank.poll() for rank in ranks]:
        failed = [rank.returncode for rank in ranks if rank.returncode]
        if failed and not code:
            code, kill_at = failed[0], time.monotonic() + _GRACE_S
            pass_on(signal.SIGTERM, None)
        if time.monotonic() > kill_at:
            pass_on(signal.SIGKILL, None)
        time.sleep(0.1)
    code = code or next((rank.returncode for rank in ranks if rank.returncode), 0)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
