"""A cluster on this machine: hosts are network namespaces, with real Slurm, sshd, pdsh and Open MPI between them."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from crossbatch.engine import checkpoint
from tests.jobs import metrics
from tests.small_runs import ADAMW, BASE, VIT, fsdp

FOLDER = Path(__file__).parent / "box"
DEADLINE_S = 900  # on a busy machine
STEPS = 150  # of the run that nothing stops: enough to stop the others meanwhile
SETTINGS = [*BASE, *VIT, *ADAMW, *fsdp(1), "crossbatch.schedule.epochs=5000", "crossbatch.checkpoint.every_steps=10"]
FLAGS = [f"--set={setting}" for setting in SETTINGS if not setting.startswith("crossbatch.data.path")]
DATA = "--data=synthetic://48?size=20,classes=4"
PACKAGES = {"sshd": ("/usr/sbin/sshd", "pdsh"), "slurm": ("slurmctld", "slurmd", "sbatch", "munged")}


class Command:
    """A command on a node, with what it prints in a file."""

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str]):
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                arguments,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                process_group=0,
            )

    def wait(self, within_s: float = DEADLINE_S) -> int:
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {within_s} s: {self.text()}") from None

    def text(self) -> str:
        return self.log.read_text(errors="replace")  # mpirun may write one rank's text into a character of another's


def _names(pid: int) -> dict[str, str]:
    """Return where the box of a session is, and how its network namespaces begin."""
    return {"BOX": f"/run/crossbatch-box-{pid}", "CB": f"cb{pid}"}


class Box:
    """The nodes "login", "node1" and "node2"."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.commands: list[Command] = []
        python = Path(sys.executable).parent
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI"))},
            "PATH": f"{python}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path.cwd()),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            **_names(os.getpid()),
            "SSH_BOX": str(folder / "ssh"),
            "SLURM_BOX": str(folder / "slurm"),
            "SLURM_CONF": str(folder / "slurm" / "slurm.conf"),
        }
        # What `deepspeed --hostfile` takes along to other nodes, besides PYTHON*.
        (folder / "deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
        self.environment["DS_ENV_FILE"] = str(folder / "deepspeed_env")

    def script(self, name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(FOLDER / f"{name}.sh"), *arguments],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def on(self, node: str, *command: str, **environment: str) -> Command:
        """Start a command on a node; `exec` keeps its process id that of the launcher, for signals."""
        self.count += 1
        arguments = ["bash", str(FOLDER / "nodes.sh"), "on", node, *command]
        self.commands.append(Command(arguments, self.folder / f"log-{self.count}", {**self.environment, **environment}))
        return self.commands[-1]

    def end_commands(self) -> None:
        """Kill what a test has left; ranks of other sessions end with their launcher."""
        for command in self.commands:
            if command.process.poll() is None:
                os.killpg(command.process.pid, signal.SIGKILL)
                command.process.wait()
        self.commands.clear()

    def ask(self, node: str, *command: str) -> str:
        """Return what a command prints."""
        return self.script("nodes", "on", node, *command).stdout

    def pids(self, node: str) -> set[str]:
        """Return the processes of a node."""
        command = ["ip", "netns", "pids", f"{self.environment['CB']}-{node}"]
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

    def running(self, out: Path) -> list[str]:
        """Return the processes of a run, launchers included."""
        lines = subprocess.run(
            ["ps", "-ewwo", "pid=,args="], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        return [line for line in lines if str(out) in line and "launch/pretrain" in line]


@pytest.fixture(autouse=True)
def nothing_left(box):
    yield
    box.end_commands()


@pytest.fixture(scope="session")
def box(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("needs root, for network namespaces")
    box = Box(tmp_path_factory.mktemp("box"))
    for left in Path("/run").glob("crossbatch-box-*"):  # by a session that was killed
        if not Path("/proc", pid := left.name.rpartition("-")[2]).exists():
            box.script("nodes", "down", **_names(int(pid)))
    made = box.script("nodes", "up")
    if made.returncode:
        pytest.skip(f"needs the right to make network namespaces: {made.stderr[-200:]}")
    yield box
    box.script("nodes", "down")


def _service(box: Box, name: str) -> Iterator[Box]:
    """Start a service on the nodes, or skip; end it after the tests."""
    missing = [program for program in PACKAGES[name] if not shutil.which(program)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (see docs/clusters.md)")
    started = box.script(name, "up")
    if started.returncode:
        pytest.skip(f"{name}.sh up: {started.stdout[-200:]} {started.stderr[-500:]}")
    yield box
    box.script(name, "down")


@pytest.fixture(scope="session")
def sshd(box):
    yield from _service(box, "sshd")


@pytest.fixture(scope="session")
def mpi(sshd):
    """mpirun starts its daemons by ssh."""
    if not shutil.which("mpirun"):
        pytest.skip("needs mpirun (see docs/clusters.md)")
    return sshd


@pytest.fixture(scope="session")
def slurm(box):
    yield from _service(box, "slurm")


@pytest.fixture(scope="session")
def whole(box, tmp_path_factory) -> Path:
    """A run of two nodes that nothing stops, by the released code's two commands."""
    out = tmp_path_factory.mktemp("whole") / "out"
    nodes = two_commands(box, out, f"--steps={STEPS}")
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].text() + nodes[1].text()
    return out


def pretrain(out: Path, *flags: str) -> list[str]:
    return ["launch/pretrain.py", *FLAGS, DATA, f"--out={out}", *flags]


def two_commands(
    box: Box,
    out: Path,
    *flags: str,
    script: Sequence[str] = (),
    **second_environment: str,
) -> list[Command]:
    """The released code's way; the first may have a script around it, the second another environment."""
    meet = ["--multiprocessing-distributed", "--world-size=2", f"--dist-url=tcp://10.88.0.1:{29000 + box.count}"]
    first = box.on("node1", *script, "python", *pretrain(out, *flags, *meet, "--rank=0"))
    return [first, box.on("node2", "python", *pretrain(out, *flags, *meet, "--rank=1"), **second_environment)]


def wait_for_step(out: Path, step: int, *commands: Command) -> None:
    end = time.monotonic() + DEADLINE_S
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < step:
        texts = "\n".join(command.text() for command in commands)
        assert all(command.process.poll() is None for command in commands), texts
        assert time.monotonic() < end, texts
        time.sleep(0.1)


def wait_for_checkpoint(out: Path, *commands: Command) -> None:
    wait_for_step(out, 10, *commands)
    wait_until(lambda: checkpoint.candidates(out, "auto"), "no checkpoint", 60)  # one is written beside the next steps


def wait_until(condition, what: str, within_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def wait_for_end(box: Box, out: Path, within_s: float = 120) -> None:
    """Wait until no process of the run in `out` is left in a box."""
    end = time.monotonic() + within_s
    while left := box.running(out):
        assert time.monotonic() < end, f"orphans: {left}"
        time.sleep(0.2)


def assert_prefix(out: Path, whole: Path, steps: int | None = None) -> int:
    """Check that a run's metrics so far (the first `steps` of them) are those of the whole run; return its steps."""
    ours, theirs = metrics(out)[:steps], metrics(whole)
    common = min(len(ours), len(theirs))
    assert common and ours[:common] == theirs[:common]
    return len(ours)


def send(command: Command, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(command.process.pid, number)


def was_signalled(pid: int, number: int) -> bool:
    """Return whether a process that is stopped has been sent a signal; Slurm may also have let it go on, and it has ended."""
    try:
        found = re.search(r"ShdPnd:\s*(\w+)", Path("/proc", str(pid), "status").read_text())
    except OSError:
        return True
    return bool(found and int(found[1], 16) >> (number - 1) & 1)


def job_state(box: Box, job: str) -> str:
    found = re.search(r"JobState=(\w+)", box.ask("login", "scontrol", "show", "job", job))
    return found[1] if found else ""


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
