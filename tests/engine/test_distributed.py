"""Ranks that are started again find each other, and not those that died."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from crossbatch import InputError, RunStopped
from crossbatch.engine.runtime.distributed import process_group, unused
from crossbatch.engine.runtime.same_run import check_same_run, code_digest
from crossbatch.engine.runtime.world import World, world_from_environment


def meet(store: dist.Store, size: int) -> list[dist.Store]:
    """What `unused` gives to each of `size` ranks."""
    found: dict[int, dist.Store] = {}

    def rank_main(rank: int) -> None:
        found[rank] = unused(store, World(rank, size, rank, size))

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [found[rank] for rank in range(size)]


def test_a_second_attempt_shares_a_part_of_the_store_that_the_first_has_not_touched():
    store = dist.HashStore()
    first = meet(store, 3)
    first[0].set("address", "of one that died")
    assert first[2].get("address") == b"of one that died"
    store.set("asks/1", "one that died before it was told")
    second = meet(store, 3)
    assert not any(part.check(["address"]) for part in second)
    second[1].set("address", "new")
    assert second[0].get("address") == second[2].get("address") == b"new"


STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "a,b",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]-ib,b",
}
TASK = {"SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "5", "SLURM_NODEID": "3", "SLURM_LOCALID": "0"}
SRUN = {**STEP, **TASK, "SLURM_STEP_TASKS_PER_NODE": "2,1(x2),3"}
MPIRUN = dict(zip(("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE"), "4321", strict=True))
MPIRUN = {f"OMPI_COMM_WORLD_{name}": value for name, value in MPIRUN.items()}
HYDRA = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
FREE = {"CUDA_VISIBLE_DEVICES": "3"}


@pytest.mark.parametrize(
    ("given", "world", "address"),
    [
        (SRUN, World(5, 7, 0, 3), "gpu07-ib"),
        ({**SRUN, **FREE, "SLURM_LOCALID": "2"}, World(5, 7, 0, 3), "gpu07-ib"),  # its only GPU has the number 0
        ({**SRUN, "MASTER_ADDR": "here"}, World(5, 7, 0, 3), "here"),
        ({**MPIRUN, **SRUN}, World(3, 4, 2, 1), "gpu07-ib"),  # mpirun's daemons are tasks of srun
        (HYDRA, World(1, 2, 1, 2), "127.0.0.1"),
        ({**HYDRA, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, World(1, 2, 1, 2), "127.0.0.1"),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, World(0, 1, 0, 1), None),
        ({**SRUN, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, World(1, 2, 1, 2), None),  # torchrun beneath srun
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0"}, World(1, 2, 0, 1), "pod-0"),  # one rank a pod
    ],
)
def test_ranks_of_srun_and_mpirun(monkeypatch, given, world, address):
    monkeypatch.setattr(os, "environ", dict(given))
    assert world_from_environment() == world == world_from_environment()
    assert os.environ.get("MASTER_ADDR") == address
    assert world.size == 1 or "RANK" in given or 15000 <= int(os.environ["MASTER_PORT"]) < 30000


def test_two_jobs_on_a_node_do_not_meet(monkeypatch):
    ports = []
    for job in ("7", "8"):
        monkeypatch.setattr(os, "environ", {**SRUN, "SLURM_JOB_ID": job})
        world_from_environment()
        ports.append(os.environ["MASTER_PORT"])
    assert ports[0] != ports[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (MPIRUN, "mpirun has started ranks on several nodes, but no MASTER_ADDR.*mpirun -x MASTER_ADDR=HOST"),
        (
            {"PMI_SIZE": "2", "PMI_RANK": "1"},
            "PMI_SIZE=2, but no MPI_LOCALRANKID: this command was started that many times",
        ),
        ({"PMI_SIZE": "two"}, "PMI_SIZE: given 'two' in the environment; allowed: a whole number"),
    ],
)
def test_ranks_that_cannot_meet_are_refused(monkeypatch, given, message):
    monkeypatch.setattr(os, "environ", dict(given))
    with pytest.raises(InputError, match=message):
        world_from_environment()


def compare(*facts: dict, size: int | None = None, timeout_s: float = 20) -> list[Exception | None]:
    """What `check_same_run` raises on each of the ranks that have come."""
    store, size = dist.HashStore(), size or len(facts)
    raised: list[Exception | None] = [None] * len(facts)

    def rank_main(rank: int) -> None:
        try:
            check_same_run(facts[rank], store, World(rank, size, rank, size), timeout_s)
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return raised


def test_ranks_that_were_started_for_the_same_run():
    assert compare({"lr": "0.6"}, {"lr": "0.6"}, {"lr": "0.6"}) == [None] * 3


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"lr": "0.7", "seed": "0"}, "lr: 0.7 on rank 1 (HOST), but 0.6 on rank 0 (HOST); start all ranks"),
        ({"lr": "0.6"}, "seed: not given on rank 1 (HOST), but 0 on rank 0"),
        ({"lr": "0.6", "seed": "0", "steps": "1"}, "steps: 1 on rank 1 (HOST), but not given on rank 0"),
        (dict.fromkeys("abcd", "1"), "and 3 more; start all ranks"),
    ],
)
def test_ranks_that_were_not(second, message):
    first = {"lr": "0.6", "seed": "0"}
    raised = compare(first, second, first)
    assert [type(error) for error in raised] == [InputError] * 3 and len({str(error) for error in raised}) == 1
    assert message.replace("HOST", socket.gethostname()) in str(raised[0])


def test_a_rank_that_does_not_come_is_named():
    raised = compare({}, {}, size=3, timeout_s=0.5)
    assert [type(error) for error in raised] == [RunStopped] * 2
    assert str(raised[0]).startswith("rank 2 of 3 did not come within 0 s")


def test_two_processes_that_say_that_they_are_the_same_rank():
    """As two nodes do that have different numbers of GPUs."""
    store, raised = dist.HashStore(), []
    store.add("start/taken/1", 1)

    def rank_main(rank: int) -> None:
        try:
            check_same_run({}, store, World(rank, 2, rank, 2), 20)
        except InputError as error:
            raised.append(str(error))

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(raised) == 2 and "two processes say that they are rank 1 of 2" in raised[0]


def test_a_changed_line_is_other_code(monkeypatch, tmp_path):
    monkeypatch.setattr("crossbatch.__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "models" / "heads").mkdir(parents=True)
    digests = []
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("b.py", "x = 2")):
        (tmp_path / "models" / "heads" / name).write_text(text)
        digests.append(code_digest())
    assert len({*digests, code_digest()}) == 3


RANK = """
import os, sys, time, signal
from crossbatch.engine.runtime.launchers import end_with_launcher
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(0)))
end_with_launcher()
print("ready", flush=True)
time.sleep(60)
"""
LAUNCH = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.parametrize("marker", ["TORCHELASTIC_RUN_ID", "CROSS_RANK", None])
def test_a_rank_ends_with_its_launcher_but_not_with_a_shell(marker):
    """Under `deepspeed` with the launcher of its launcher, too."""
    depth = 2 if marker == "CROSS_RANK" else 1
    command = [sys.executable, "-c", LAUNCH, RANK]
    if depth == 2:
        command = [sys.executable, "-c", f"import subprocess; subprocess.run({command!r})"]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
    }
    environment |= {marker: "0"} if marker else {}
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert launcher.stdout is not None
    try:
        assert launcher.stdout.readline() == "ready\n"
        launcher.kill()
        if marker:
            assert launcher.stdout.readline() == "saved\n"
        else:
            assert not select.select([launcher.stdout], [], [], 3)[0]
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
        launcher.stdout.close()


@pytest.mark.parametrize("nodes", ["2", "1"])
def test_a_rank_of_another_node_ends_when_nobody_reads_its_output(nodes):
    """As where ssh has ended, which is all that is left of the launcher there; on one node, `| head` may end."""
    script = RANK.replace('print("saved", flush=True)', 'print("saved", file=sys.stderr)')
    environment = {**os.environ, "CROSS_RANK": "0", "CROSS_SIZE": nodes}
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as rank:
        assert rank.stdout is not None and rank.stderr is not None
        try:
            assert rank.stdout.readline() == "ready\n"
            rank.stdout.close()
            assert bool(select.select([rank.stderr], [], [], 3)[0]) == (nodes == "2")
        finally:
            rank.kill()


def test_parameters_in_a_second_process_group_are_of_its_mesh():
    """Also where its groups have other names than those of the first, which torch numbers."""
    for number in (7, 0):
        dist.distributed_c10d._world.group_count = number
        with process_group(World(0, 1, 0, 1), "cpu"):
            mesh, layer = init_device_mesh("cpu", (1,)), torch.nn.Linear(4, 4)
            fully_shard(layer, mesh=mesh)
            meshes = [getattr(parameter, "device_mesh", None) for parameter in layer.parameters()]
            assert len(meshes) == 2 and all(found is mesh for found in meshes)


def test_one_rank_waits_for_nobody():
    assert not unused(dist.HashStore(), World(0, 1, 0, 1)).check(["anything"])


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_times_its_algorithms_from_the_start_unless_the_run_is_deterministic(monkeypatch, deterministic):
    seen = []
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(torch, "are_deterministic_algorithms_enabled", lambda: deterministic),
        mock.patch.object(dist, "init_process_group", lambda *_, **__: seen.append(torch.backends.cudnn.benchmark)),
        mock.patch.object(dist, "destroy_process_group"),
        process_group(World(0, 1, 0, 1), "cuda") as device,
    ):
        seen.append(torch.backends.cudnn.benchmark)
    assert device.type == "cuda" and seen == [not deterministic] * 2
