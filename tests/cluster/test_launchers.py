"""Launchers on two nodes: the same run by each, and what a signal to the launcher leaves."""

import os
import signal
import time

import pytest

from crossbatch.engine import checkpoint
from tests.cluster.conftest import (
    FLAGS,
    SIGNALS,
    STEPS,
    assert_prefix,
    pretrain,
    send,
    two_commands,
    wait_for_step,
    wait_until,
)

pytestmark = pytest.mark.slow
RUN = [f"--steps={STEPS}"]
LONG = ["--steps=20000"]
TORCHRUN = ["torchrun", "--nnodes=2", "--nproc_per_node=1", "--master_addr=10.88.0.1", "--signals-to-handle"]
TORCHRUN += ["SIGTERM,SIGINT,SIGHUP,SIGUSR1", "--shutdown-timeout=600"]


def start(box, launcher: str, out, *flags: str) -> list:
    """Return the commands that start a run on two nodes; a signal goes to the first."""
    port = 29000 + box.count
    if launcher == "two commands":
        return two_commands(box, out, *flags)
    if launcher == "torchrun":
        run = [*TORCHRUN, f"--master_port={port}"]
        return [box.on(f"node{n + 1}", *run, f"--node_rank={n}", *pretrain(out, *flags)) for n in (0, 1)]
    if launcher == "mpirun":
        # Open MPI would bind each rank, with the workers that load its images, to one core.
        run = [
            "mpirun",
            "--allow-run-as-root",
            "--bind-to",
            "none",
            "--host",
            "node1,node2",
            "-x",
            "MASTER_ADDR=10.88.0.1",
        ]
        for transport in ("btl", "oob"):
            run += ["--mca", f"{transport}_tcp_if_include", "eth0"]
        for variable in ("PATH", "PYTHONPATH", "DS_ACCELERATOR", "OMP_NUM_THREADS"):
            run += ["-x", variable]
        return [box.on("node1", *run, "python", *pretrain(out, *flags))]
    if launcher == "srun":
        run = ["srun", "--nodes=2", "--ntasks-per-node=1", "python", "-u"]
        return [box.on("login", *run, *pretrain(out, *flags))]
    hostfile = box.folder / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    run = ["deepspeed", f"--hostfile={hostfile}", "--master_addr=10.88.0.1", f"--master_port={port}"]
    if launcher == "deepspeed --launcher slurm":
        run[1:] = [f"--hostfile={hostfile}", "--launcher=slurm", "--launcher_args=--nodes=2 --ntasks-per-node=1"]
    return [box.on("login", *run, *pretrain(out, *flags))]


# The fixture that each needs.
NEEDS = {"torchrun": "box", "two commands": "box", "mpirun": "mpi", "deepspeed": "sshd", "srun": "slurm"}
NEEDS["deepspeed --launcher slurm"] = "slurm"


@pytest.mark.parametrize("launcher", [name for name in NEEDS if name != "two commands"])
def test_every_launcher_trains_the_same_run(request, whole, tmp_path, launcher):
    box = request.getfixturevalue(NEEDS[launcher])
    commands = start(box, launcher, tmp_path / "out", *RUN)
    assert [command.wait() for command in commands] == [0] * len(commands), commands[0].text()
    assert assert_prefix(tmp_path / "out", whole) == STEPS


# What a launcher returns after a signal that lets its ranks save; those that are absent are below.
CODES = {
    "two commands": dict.fromkeys(SIGNALS, 0),
    "torchrun": dict.fromkeys(SIGNALS, 1),
    "mpirun": {signal.SIGUSR1: 0},
    "srun": {signal.SIGUSR1: 0},
    "deepspeed": {signal.SIGTERM: 1, signal.SIGINT: 1},
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
    wait_until(lambda: not box.running(out), f"orphans: {box.running(out)}", 60)
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
    wait_until(lambda: not box.running(out), f"orphans: {box.running(out)}", 120)
    assert (out / "stopped.json").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_deepspeed_on_one_node_dies_of_a_signal_and_its_ranks_save(box, tmp_path, number):
    out = tmp_path / "out"
    port = f"--master_port={29000 + box.count}"
    command = box.on("node1", "deepspeed", "--num_gpus=2", port, *pretrain(out, *LONG))
    wait_for_step(out, 3, command)
    send(command, number)
    command.wait()
    wait_until(lambda: not box.running(out), f"orphans: {box.running(out)}", 120)
    assert (out / "stopped.json").exists(), command.text()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_the_whole_group_with_images_as_the_bottleneck(box, tmp_path, number):
    """Workers, fork server and resource tracker get it, too, as does a `| tee`."""
    out = tmp_path / "out"
    flags = ["--multiprocessing-distributed", "--nproc-per-node=2", "--set=crossbatch.data.workers=2"]
    flags += ["--data=synthetic://48?size=600,classes=4"]
    line = " ".join(f"'{argument}'" for argument in ["python", *pretrain(out, *LONG, *flags)])
    command = box.on("node1", "bash", "-c", f"set -o pipefail; {line} | tee {tmp_path}/tee")
    wait_for_step(out, 1, command)
    os.killpg(command.process.pid, number)
    command.wait()
    wait_until(lambda: not box.running(out), f"orphans: {box.running(out)}", 120)
    assert (out / "stopped.json").exists(), command.text()
    assert "Traceback" not in command.text()


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


KILL = [("mpirun", number) for number in SIGNALS if number != signal.SIGUSR1]  # a second after they got the signal
KILL += [("srun", signal.SIGTERM), ("srun", signal.SIGHUP)]


@pytest.mark.parametrize(("launcher", "number"), KILL, ids=str)
def test_a_signal_at_which_a_launcher_kills_its_ranks(request, tmp_path, launcher, number):
    """Nothing of the run is left, and the last checkpoint is good."""
    box, out = request.getfixturevalue(NEEDS[launcher]), tmp_path / "out"
    commands = start(box, launcher, out, *LONG)
    wait_for_step(out, 15, *commands)
    send(commands[0], number)
    assert commands[0].wait() != 0
    wait_until(lambda: not box.running(out), f"orphans: {box.running(out)}", 120)
    assert checkpoint.read(checkpoint.candidates(out, "auto")[0], "parameters.")
