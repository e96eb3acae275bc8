"""Whole runs as processes that a test can kill: `launch/pretrain.py` on some ranks, without paying for the imports each time.

One process imports everything and then forks a rank whenever it is asked to; the rank sets up its environment and calls the
launcher's main, as a process started by hand would.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

DEADLINE_S = 300
IMPORTED_ONCE = (
    "crossbatch.launch.pretrain",
    "crossbatch.engine.tasks.pretrain",
    "crossbatch.engine.start",
    "crossbatch.engine.trainer",
    "crossbatch.engine.sharding.fsdp",
    "crossbatch.engine.sharding.zero",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imports torch._inductor, 4 s
    "deepspeed.ops.op_builder.all_ops",
    "setuptools",  # DeepSpeed asks it for the compiler
    "torch.utils.tensorboard",
)

LAUNCHED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)  # what a launcher sets


@dataclass
class Job:
    """One attempt at a run: its ranks' process ids and what they printed."""

    nursery: "Nursery"
    pids: list[int]
    logs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)  # by rank; a signal is negative

    def kill(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.pids)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def wait(self, *ranks: int, within: float = DEADLINE_S) -> list[int]:
        """Exit codes of `ranks` (of all)."""
        ranks = ranks or tuple(range(len(self.pids)))
        end = time.monotonic() + within
        while not all(rank in self.codes for rank in ranks):
            for rank in set(ranks) - self.codes.keys():
                code = self.nursery.poll(self.pids[rank])
                if code is not None:
                    self.codes[rank] = code
            assert time.monotonic() < end, f"still running after {within} s: {self.output()}"
            time.sleep(0.05)
        return [self.codes[rank] for rank in ranks]

    def output(self, rank: int | None = None) -> str:
        logs = self.logs if rank is None else [self.logs[rank]]
        return "\n".join(log.read_text() for log in logs)

    def wait_for(self, text: str, rank: int = 0, times: int = 1) -> None:
        """Until `rank` has printed `text` so many times."""
        end = time.monotonic() + DEADLINE_S
        while self.output(rank).count(text) < times:
            assert time.monotonic() < end and self.nursery.poll(self.pids[rank]) is None, self.output()
            time.sleep(0.02)


class Nursery:
    """Starts ranks. `close` kills what is left of them."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*IMPORTED_ONCE])  # the server of the pools, where it runs already
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_nurse, args=(there,))
        self._process.start()
        self._pids: set[int] = set()

    def start(self, folder: Path, ranks: int, *arguments: str, last: tuple[str, ...] = (), **environment: str) -> Job:
        """`arguments` of launch/pretrain.py, or of that of COMMAND, those of the `last` rank besides; logs go to `folder`.

        NETWORKS: names of network namespaces, by rank. STDOUT: a file that takes the place of the log, but for stderr.
        PRIVATE: a folder that the last rank does not share with the others. ALONE: no launcher has started this process.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = Job(self, [], [])
        for rank in range(ranks):
            variables = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "DS_ACCELERATOR": "cpu",
                **environment,
            }
            log = folder / f"log-{time.monotonic_ns()}-{rank}"
            log.touch()
            job.logs.append(log)
            flags = [*arguments, *(last if rank == ranks - 1 else ())]
            job.pids.append(self._ask("start", flags, {k: str(v) for k, v in variables.items()}, str(log)))
        self._pids.update(job.pids)
        return job

    def poll(self, pid: int) -> int | None:
        """The exit code, or None while it runs."""
        return self._ask("poll", pid)

    def close(self) -> None:
        for pid in self._pids:
            if self.poll(pid) is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
        self._process.kill()
        self._process.join()

    def _ask(self, *question):
        self._pipe.send(question)
        return self._pipe.recv()


def _nurse(pipe) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a server that loaders have started is deaf to signals
    for module in IMPORTED_ONCE:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # or every rank would walk through a million imported objects again, and so copy them
    codes: dict[int, int] = {}
    while True:
        try:
            question, *arguments = pipe.recv()
        except EOFError:
            return
        if question == "start":
            pid = os.fork()
            if pid == 0:
                _be_a_rank(*arguments)
            pipe.send(pid)
            continue
        (pid,) = arguments
        if pid not in codes:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        pipe.send(codes.get(pid))


def _be_a_rank(arguments: list[str], environment: dict[str, str], log: str) -> None:
    from crossbatch.engine.runtime.exit_codes import run_main
    from crossbatch.engine.runtime.output import protect_streams

    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(os.open(environment["STDOUT"], os.O_WRONLY) if "STDOUT" in environment else output, 1)
        os.dup2(output, 2)
        protect_streams()
        if "ALONE" in environment:
            environment = {name: value for name, value in environment.items() if name not in LAUNCHED}
        os.environ.update(environment)
        command = environment.get("COMMAND", "pretrain")
        sys.argv = [f"launch/{command}.py", *arguments]
        if "NETWORKS" in environment:
            _enter_network(environment["NETWORKS"].split(",")[int(environment["RANK"])])
        if "PRIVATE" in environment and int(environment["RANK"]) == int(environment["WORLD_SIZE"]) - 1:
            _hide_under_another(environment["PRIVATE"])
        code = 0
        run_main(importlib.import_module(f"crossbatch.launch.{command}").main)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _enter_network(name: str) -> None:
    """Move this process into a network namespace, as `ip netns exec` does; os.setns needs Python 3.12."""
    with Path("/var/run/netns", name).open() as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), 0x40000000) == 0  # CLONE_NEWNET


def _hide_under_another(folder: str) -> None:
    """Give this process an empty folder in place of `folder`, as another node has that does not share it."""
    libc = ctypes.CDLL(None)
    assert libc.unshare(0x20000) == 0  # CLONE_NEWNS
    assert libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None) == 0  # MS_REC | MS_PRIVATE
    assert libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, None) == 0


def metrics(out: Path) -> list[dict]:
    """The lines of a run, without what depends on the clock."""
    clock = ("images_per_s", "data_wait_ms", "step_ms", "stage_ms")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]
