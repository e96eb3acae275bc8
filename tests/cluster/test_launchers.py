"""Launchers on two nodes: the same run by each, and what a signal to the launcher leaves."""

import contextlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from crossbatch.engine import checkpoint
from tests.cluster.conftest import (
    FLAGS,
    SIGNALS,
    assert_prefix,
    pretrain,
    send,
    two_commands,
    wait_for_checkpoint,
    wait_for_end,
    wait_for_step,
    wait_until,
)
from tests.jobs import metrics

pytestmark = pytest.mark.slow
RUN = ["--steps=20"]
LONG = ["--steps=20000"]
TORCHRUN = ["torchrun", "--nnodes=2", "--nproc_per_node=1", "--master_addr=10.88.0.1", "--signals-to-handle"]
TORCHRUN += ["SIGTERM,SIGINT,SIGHUP,SIGUSR1", "--shutdown-timeout=600"]


# What docs/clusters.md advises for signals at which a launcher kills its ranks, or leaves them alone.
SCRIPT = """trap 'kill -{} $!' TERM INT HUP USR1
"$@" &
wait $!; wait $!"""


def start(box, launcher: str, out, *flags: str, tee: Path | None = None) -> list:
    """Return the commands that start a run on two nodes; a signal goes to the first, which may print into a `tee`."""
    port = 29000 + box.count
    launcher, _, script = launcher.partition(" in a script")
    script = ["bash", "-c", SCRIPT.format("USR1" if launcher == "srun" else "TERM"), "bash"] if script else []
    script = ["bash", "-c", f'"$@" | tee {tee}', "bash"] if tee else script
    if launcher == "two commands":
        return two_commands(box, out, *flags, script=script)
    if launcher == "torchrun":
        run = [*TORCHRUN, f"--master_port={port}"]
        second = box.on("node2", *run, "--node_rank=1", *pretrain(out, *flags))
        return [box.on("node1", *script, *run, "--node_rank=0", *pretrain(out, *flags)), second]
    if launcher == "mpirun":
        # Open MPI would bind each rank, with the workers that load its images, to one core.
        run = [
            "mpirun",
            "--allow-run-as-root",
            "--bind-to",
            "none",
            "--host",
            "node1,node2",
            "--mca",
            "odls_base_sigkill_timeout",
            "10",
            "-x",
            "MASTER_ADDR=10.88.0.1",
        ]
        for transport in ("btl", "oob"):
            run += ["--mca", f"{transport}_tcp_if_include", "eth0"]
        for variable in ("PATH", "PYTHONPATH", "DS_ACCELERATOR", "OMP_NUM_THREADS"):
            run += ["-x", variable]
        return [box.on("node1", *script, *run, "python", *pretrain(out, *flags))]
    if launcher == "srun":
        run = ["srun", "-X", "--nodes=2", "--ntasks-per-node=1", "python", "-u"]
        return [box.on("login", *script, *run, *pretrain(out, *flags))]
    hostfile = box.folder / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    run = ["deepspeed", f"--hostfile={hostfile}", "--master_addr=10.88.0.1", f"--master_port={port}"]
    if launcher == "deepspeed --launcher slurm":
        run[1:] = [f"--hostfile={hostfile}", "--launcher=slurm", "--launcher_args=--nodes=2 --ntasks-per-node=1"]
    return [box.on("login", *script, *run, *pretrain(out, *flags))]


# The fixture that each needs.
NEEDS = {"torchrun": "box", "two commands": "box", "mpirun": "mpi", "deepspeed": "sshd", "srun": "slurm"}
NEEDS |= {"deepspeed --launcher slurm": "slurm", "deepspeed in a script with a trap": "sshd"}
NEEDS["srun in a script with a trap"] = "slurm"


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "deepspeed", "srun", "deepspeed --launcher slurm"])
def test_every_launcher_trains_the_same_run(request, whole, tmp_path, launcher):
    box = request.getfixturevalue(NEEDS[launcher])
    commands = start(box, launcher, tmp_path / "out", *RUN)
    assert [command.wait() for command in commands] == [0] * len(commands), commands[0].text()
    assert assert_prefix(tmp_path / "out", whole) == 20


# What a launcher returns after a signal that lets its ranks save; those that are absent are below.
CODES = {
    "two commands": dict.fromkeys(SIGNALS, 0),
    "torchrun": dict.fromkeys(SIGNALS, 1),
    "mpirun": {**dict.fromkeys(SIGNALS, 1), signal.SIGUSR1: 0},
    "srun": {signal.SIGUSR1: 0, signal.SIGINT: 0},
    "deepspeed": {signal.SIGTERM: 1, signal.SIGINT: 1},
    "srun in a script with a trap": {signal.SIGTERM: 0, signal.SIGHUP: 0},
    "deepspeed in a script with a trap": {signal.SIGUSR1: 1, signal.SIGHUP: 1},
}


@pytest.mark.parametrize(
    ("launcher", "number"), [(launcher, number) for launcher, codes in CODES.items() for number in codes], ids=str
)
def test_a_signal_to_the_launcher(request, whole, tmp_path, launcher, number):
    """The run is saved, nothing of it keeps running, and the launcher ends with the code that docs/clusters.md says."""
    box, out = request.getfixturevalue(NEEDS[launcher]), tmp_path / "out"
    commands = start(box, launcher, out, *LONG)
    wait_for_step(out, 3, *commands)
    assert box.running(out)
    send(commands[0], number)
    codes = [command.wait() for command in commands]
    wait_for_end(box, out, 60)
    assert (out / "stopped.json").exists(), "\n".join(command.text() for command in commands)
    assert codes[0] == CODES[launcher][number], commands[0].text()
    steps = assert_prefix(out, whole)
    assert f"step-{steps:08d}" in os.listdir(out / "checkpoints")  # noqa: PTH208


@pytest.mark.parametrize("launcher", ["two commands", "torchrun", "deepspeed local"])
def test_a_launcher_that_is_killed_leaves_no_rank(box, tmp_path, launcher):
    out = tmp_path / "out"
    if launcher == "deepspeed local":
        port = f"--master_port={29000 + box.count}"
        commands = [box.on("node1", "deepspeed", "--num_gpus=2", port, *pretrain(out, *LONG))]
    else:
        commands = start(box, launcher, out, *LONG)
    wait_for_step(out, 3, *commands)
    for command in commands:
        send(command, signal.SIGKILL)
    wait_for_end(box, out)
    assert (out / "stopped.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_deepspeed_on_one_node_dies_of_a_signal_and_its_ranks_save(box, tmp_path, number):
    out = tmp_path / "out"
    port = f"--master_port={29000 + box.count}"
    command = box.on("node1", "deepspeed", "--num_gpus=2", port, *pretrain(out, *LONG))
    wait_for_step(out, 3, command)
    send(command, number)
    command.wait()
    wait_for_end(box, out)
    assert (out / "stopped.json").exists(), command.text()


def listening(box, out) -> int:
    """Return how many Python processes of a run catch SIGUSR1; ranks do from just before their workers start."""
    count = 0
    for pid, _, *arguments in (line.split() for line in box.running(out)):
        if arguments[arguments[0] == "-u"] != "launch/pretrain.py":
            continue  # a launcher
        with contextlib.suppress(OSError):  # has ended
            caught = re.search(r"SigCgt:\s*(\w+)", Path("/proc", pid, "status").read_text())
            count += bool(caught and int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1)
    return count


WORKERS = ["--set=crossbatch.data.workers=2", "--data=synthetic://48?size=600,classes=4"]
# The flags of a run, and the step until which to wait; an epoch has four.
PHASES = {
    "workers start": (WORKERS, 0),
    "evaluating": ([*WORKERS, "--set=crossbatch.evaluate.knn_every_epochs=1"], 4),
    "images are the bottleneck": (WORKERS, 1),
}


def wait_for_phase(box, out, phase: str, ranks: int, *commands) -> None:
    """Wait until a run has come so far; `ranks` is the number of its processes, with the released code's launchers."""
    steps = PHASES[phase][1]
    if steps:
        wait_for_step(out, steps, *commands)
    else:
        wait_until(lambda: listening(box, out) == ranks, f"{listening(box, out)} of {ranks} listen")


@pytest.mark.parametrize(
    ("launcher", "phase", "number"),
    [
        (launcher, phase, list(codes)[index % len(codes)])
        for launcher, codes in CODES.items()
        for index, phase in enumerate(PHASES)
    ],
    ids=str,
)
def test_a_signal_while_no_step_is_computed(request, tmp_path, launcher, phase, number):
    box, out = request.getfixturevalue(NEEDS[launcher]), tmp_path / "out"
    commands = start(box, launcher, out, *LONG, *PHASES[phase][0])
    wait_for_phase(box, out, phase, 4 if launcher == "two commands" else 2, *commands)
    send(commands[0], number)
    codes = [command.wait() for command in commands]
    wait_for_end(box, out, 60)
    said = "\n".join(command.text() for command in commands)
    assert (out / "stopped.json").exists() and "in run_main" not in said, (
        said
    )  # a traceback of ours; torchrun shows its own
    assert codes[0] == CODES[launcher][number], said


@pytest.mark.parametrize(
    ("launcher", "number"),
    [(launcher, signal.SIGINT) for launcher in ("two commands", "torchrun", "mpirun", "srun", "deepspeed")]
    + [("two commands", signal.SIGHUP), ("torchrun", signal.SIGTERM), ("mpirun", signal.SIGHUP)],
    ids=str,
)
def test_a_signal_to_a_launcher_and_to_its_tee(request, tmp_path, launcher, number):
    """As a terminal sends it; nobody reads what the ranks print of their save."""
    box, out = request.getfixturevalue(NEEDS[launcher]), tmp_path / "out"
    commands = start(box, launcher, out, *LONG, tee=tmp_path / "tee")
    wait_for_step(out, 3, *commands)
    os.killpg(commands[0].process.pid, number)
    for command in commands:
        command.wait()
    wait_for_end(box, out)
    said = (tmp_path / "tee").read_text() + "".join(command.text() for command in commands)
    assert (out / "stopped.json").exists() and "in run_main" not in said, said


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("images are the bottleneck", signal.SIGTERM),
        ("images are the bottleneck", signal.SIGINT),
        ("workers start", signal.SIGUSR1),
        ("evaluating", signal.SIGHUP),
    ],
    ids=str,
)
def test_a_signal_to_the_whole_group(box, tmp_path, phase, number):
    """Workers, fork server and resource tracker get it, too, as does a `| tee`."""
    out = tmp_path / "out"
    flags = ["--multiprocessing-distributed", "--nproc-per-node=2", *PHASES[phase][0]]
    line = " ".join(f"'{argument}'" for argument in ["python", *pretrain(out, *LONG, *flags)])
    command = box.on("node1", "bash", "-c", f"set -o pipefail; {line} | tee {tmp_path}/tee")
    wait_for_phase(box, out, phase, 3, command)
    os.killpg(command.process.pid, number)
    command.wait()
    wait_for_end(box, out)
    assert (out / "stopped.json").exists(), command.text()
    assert "Traceback" not in command.text()


def test_a_closed_terminal_ends_deepspeed_on_other_nodes(sshd, whole, tmp_path):
    """pdsh and ssh end, and the ranks have lost their launcher."""
    out = tmp_path / "out"
    commands = start(sshd, "deepspeed", out, *LONG)
    wait_for_step(out, 3, *commands)
    os.killpg(commands[0].process.pid, signal.SIGHUP)
    commands[0].wait()
    wait_for_end(sshd, out)
    assert (out / "stopped.json").exists() and assert_prefix(out, whole)


def test_a_node_with_other_code(box, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    for folder in ("crossbatch", "engine", "models", "data", "launch", "ds_configs"):
        shutil.copytree(folder, other / folder, symlinks=True)
    with (other / "models" / "collective.py").open("a") as file:
        file.write("# Changed on this node only.\n")
    commands = two_commands(box, out, *RUN, PYTHONPATH=str(other))
    assert [command.wait() for command in commands] == [2, 2], commands[0].text()
    assert re.search(
        r"the code of crossbatch: \w+ on rank 1 \(node2\), but \w+ on rank 0 \(node1\)", commands[0].text()
    )
    assert not out.exists()


def test_a_node_that_is_lost_and_comes_back(box, whole, tmp_path):
    """The other goes on alone meanwhile; on both, the steps are those of two ranks from the same checkpoint."""
    out, port = tmp_path / "out", 29000 + box.count
    run = ["torchrun", "--nnodes=1:2", *TORCHRUN[2:], "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=one"]
    run = [part for part in run if not part.startswith("--master_addr")]
    run += [f"--rdzv-endpoint=10.88.0.1:{port}", *pretrain(out, *LONG, "--set=crossbatch.checkpoint.keep=10000")]
    apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def resumed() -> list[int]:
        return [int(step) for step in re.findall(r"resumed\s\S*\s?at\s+step\s+(\d+)", first.text())]

    first, second = (box.on(node, *run, **apart) for node in ("node1", "node2"))
    wait_for_checkpoint(out, first, second)
    for pid in {line.split()[0] for line in box.running(out)} & box.pids("node2"):
        os.kill(int(pid), signal.SIGKILL)
    wait_until(lambda: len(resumed()) == 1, first.text())
    assert assert_prefix(out, whole, resumed()[0])
    wait_for_step(out, resumed()[0] + 3, first)
    third = box.on("node2", *run, **apart)
    wait_until(lambda: len(resumed()) == 2, first.text())
    both = resumed()[1]
    wait_for_step(out, both + 3, first, third)
    for command in (first, third):
        send(command, signal.SIGTERM)
    assert [command.wait() for command in (first, third)] == [1, 1]
    again = tmp_path / "again"
    commands = two_commands(box, again, f"--steps={both + 3}", f"--resume={out}/checkpoints/step-{both:08d}")
    assert [command.wait() for command in commands] == [0, 0], commands[0].text()
    assert metrics(out)[both : both + 3] == metrics(again)[-3:]


STORE = "import time, torch.distributed as d; store = d.TCPStore('0.0.0.0', {}, is_master=True, wait_for_workers=False)"


def test_a_node_that_is_cut_off_costs_no_step(box, whole, tmp_path):
    """The other goes on alone from its memory, and both go on together once the network is back, all by themselves."""
    out, port, timeout_s = tmp_path / "out", 29000 + box.count, 8
    store = box.on("login", "python", "-c", STORE.format(port) + "; time.sleep(3600)")
    run = ["torchrun", "--nnodes=1:2", *TORCHRUN[2:], "--max-restarts=9", "--rdzv-backend=c10d", "--rdzv-id=one"]
    run = [part for part in run if not part.startswith("--master_addr")]
    conf = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,is_host=0"
    run += [f"--rdzv-endpoint=10.88.0.254:{port}", f"--rdzv-conf={conf}"]
    run += pretrain(
        out, *LONG, f"--set=crossbatch.watch.timeout_s={timeout_s}", "--set=crossbatch.checkpoint.every_steps=1000"
    )
    apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def resumed(commands) -> list[str]:
        return [
            found for command in commands for found in re.findall(r"resumed (/dev/shm/\S+ at step \d+)", command.text())
        ]

    first, second = (box.on(node, *run, **apart) for node in ("node1", "node2"))
    wait_for_step(out, 6, first, second)
    box.script("nodes", "cut", "node2")
    cut, done = time.monotonic(), len(metrics(out))
    try:
        wait_until(lambda: resumed([first, second]), "nobody goes on: " + first.text())
        seconds = time.monotonic() - cut
        assert int(resumed([first, second])[0].split()[-1]) >= done - 1
        wait_for_step(out, done + 5, first)
    finally:
        box.script("nodes", "plug", "node2")
    wait_until(lambda: json.loads((out / "config.json").read_text())["world_size"] == 2, "node2 does not come back")
    done = len(metrics(out))
    wait_for_step(out, done + 5, first, second)
    for command in (first, second):
        send(command, signal.SIGTERM)
    for command in (first, second):
        command.wait()
    store.process.kill()
    print(f"goes on alone {seconds:.1f} s after the cut")
    ours, theirs = metrics(out), metrics(whole)
    common = min(len(ours), len(theirs))
    assert [line["step"] for line in ours] == list(range(1, len(ours) + 1))
    losses, expected = ([line["loss"] for line in lines[:common]] for lines in (ours, theirs))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert seconds < timeout_s + 60  # of that, the machine may be busy


def test_deepspeed_cuts_the_command_line_at_an_ampersand(sshd, tmp_path):
    """Its shell does; without the flags behind it, the run would be another one."""
    hostfile, out = tmp_path / "hostfile", tmp_path / "out"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    run = ["deepspeed", f"--hostfile={hostfile}", "--master_addr=10.88.0.1", f"--master_port={29000 + sshd.count}"]
    path = "--data=synthetic://48?size=20&classes=4"
    command = sshd.on("login", *run, "launch/pretrain.py", f"--out={out}", path, *FLAGS, *RUN)
    command.wait()
    assert (
        "a shell has cut the command line off after '--data=synthetic://48?size=20'; write , for & in data"
        in command.text()
    )
    assert not out.exists()
    quoted = path.replace("--data=", '--data="') + '"'
    command = sshd.on("login", *run, "launch/pretrain.py", f"--out={out}", quoted, *FLAGS, "--steps=1")
    assert command.wait() == 0 and (out / "metrics.jsonl").exists(), command.text()


def test_a_cut_network_is_named(box, tmp_path):
    out = tmp_path / "out"
    commands = two_commands(box, out, *LONG, "--set=crossbatch.watch.timeout_s=20")
    wait_for_step(out, 3, *commands)
    box.script("nodes", "cut", "node2")
    cut = time.monotonic()
    try:
        assert [command.wait() for command in commands] == [3, 3]
    finally:
        box.script("nodes", "plug", "node2")
    assert time.monotonic() - cut < 20 + 100  # of that, the machine may be busy
    assert "stopped (rank 0): rank 1 is gone" in commands[0].text()


def test_srun_kills_its_ranks_at_sigterm(slurm, tmp_path):
    """Nothing of the run is left, and the last checkpoint is good."""
    out = tmp_path / "out"
    commands = start(slurm, "srun", out, *LONG)
    wait_for_checkpoint(out, *commands)
    send(commands[0], signal.SIGTERM)
    assert commands[0].wait() != 0
    wait_for_end(slurm, out)
    assert checkpoint.read(checkpoint.candidates(out, "auto")[0], "parameters.")
