"""doctor.py shows what is wrong with a GPU, and every command that trains or evaluates refuses it before it writes anything."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crossbatch.engine.runtime import gpu_check
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.launch import doctor, finetune, knn, linear, pretrain


@pytest.fixture
def old_driver(monkeypatch):
    """Make this machine look as if it had a GPU with a driver for CUDA 12.2."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for module in (gpu_check, doctor):
        monkeypatch.setattr(module, "nvidia_devices", lambda: [Path("/dev/nvidia0")])
        monkeypatch.setattr(module, "driver_cuda", lambda: (12, 2))


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (pretrain, []),
        (pretrain, ["--multiprocessing-distributed", "--dist-backend", "nccl"]),
        (finetune, ["--checkpoint", "resnet50.pth"]),
        (linear, ["--checkpoint", "resnet50.pth"]),
        (knn, ["--checkpoint", "resnet50.pth"]),
    ],
)
def test_an_unusable_gpu_stops_a_command_before_it_writes(old_driver, monkeypatch, capsys, tmp_path, command, flags):
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["command", "--out", str(out), "--data", "shapes://", *flags])
    with pytest.raises(SystemExit) as stop:
        run_main(command.main)
    assert stop.value.code == 2 and not out.exists()
    assert "the driver runs CUDA 12.2 at most" in capsys.readouterr().err


def test_doctor_shows_an_unusable_gpu_without_failing(old_driver, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor"])
    monkeypatch.setenv("COLUMNS", "400")
    run_main(doctor.main)
    shown = capsys.readouterr().out
    for words in ("none that torch sees, but there is /dev/nvidia0", "runs CUDA 12.2 at most", "no run can start"):
        assert words in shown
    assert "CUDA_VISIBLE_DEVICES= (empty)" in shown and "stages" not in shown


def test_doctor_names_the_architectures_that_torch_was_built_for(monkeypatch):
    monkeypatch.setattr(doctor, "built_for", lambda: ["sm_75", "sm_90"])
    assert dict(doctor.found())["CUDA of torch"] == f"{torch.version.cuda}, with code for sm_75 sm_90"


ON_A_BARE_MACHINE = """
import sys
sys.modules.update(dict.fromkeys(("deepspeed", "psutil", "numba", "nvidia", "apex")))  # None: cannot be imported
from crossbatch.launch import doctor
sys.argv[1:] = []
doctor.main()
print(doctor.interface("127.0.0.1"))
"""


@pytest.mark.long
def test_doctor_needs_no_optional_package():
    """It is the first command on a machine that has only torch and what belongs to it."""
    environment = {**os.environ, "COLUMNS": "400"}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_BARE_MACHINE], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "decode and augment" in done.stdout and done.stdout.endswith("psutil is not installed\n")


def compare_here(folder: str, differ: str) -> tuple[str, str]:
    """Run `doctor --nodes` on this rank of a pool as a new command, and return what it printed and raised."""
    import io
    from contextlib import redirect_stdout
    from unittest import mock

    import torch.distributed as dist

    from crossbatch import InputError
    from crossbatch.engine.config import Device
    from crossbatch.engine.runtime import same_run
    from crossbatch.engine.runtime.world import world_from_environment

    world, facts = world_from_environment(), doctor.facts_of({})
    if differ and world.rank == 1:
        facts[differ] = "another"
    store = dist.FileStore(str(Path(folder) / "store"), world.size)
    printed, error = io.StringIO(), ""

    @contextlib.contextmanager
    def joined(world, device_type, threads, timeout_s, check):
        check(store, world, timeout_s)
        yield torch.device("cpu")  # the pool has its process group

    with (
        redirect_stdout(printed),
        mock.patch.object(doctor, "facts_of", lambda config: facts),
        mock.patch.object(doctor, "process_group", joined),
        mock.patch.object(doctor, "REDUCED_MIB", {"cpu": 1}),
        mock.patch.object(same_run, "_compared", []),
        mock.patch.dict("os.environ", COLUMNS="200"),
    ):
        try:
            doctor.compare_ranks(world, Device("cpu"), 20.0)
        except InputError as raised:
            error = str(raised)
    return printed.getvalue(), error


def test_nodes_reports_every_rank(two_ranks, tmp_path):
    (printed, error), other = two_ranks.run(compare_here, str(tmp_path), "")
    assert error == "" and other == ("", "")
    words = " ".join(printed.split())
    for text in (
        "rank",
        "interface",
        "code",
        "all-reduce of 1 MiB",
        "GB/s",
        "+0.000 s",
        torch.__version__.split("+")[0],
    ):
        assert text in words, printed
    assert "all 2 ranks have the same versions and code" in words


@pytest.mark.parametrize("differ", ["torch", "the code of crossbatch"])
def test_nodes_names_what_differs_before_the_ranks_join(two_ranks, tmp_path, differ):
    results = two_ranks.run(compare_here, str(tmp_path), differ)
    assert all(error.startswith(f"{differ}: another on rank 1") for _, error in results), results
    assert "all-reduce" not in results[0][0] and "host" in results[0][0]  # the table of ranks is there all the same


def test_nodes_with_one_rank(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--nodes"])
    monkeypatch.setattr(doctor, "REDUCED_MIB", {"cpu": 1, "cuda": 1})
    doctor.main()
    assert "one rank" in capsys.readouterr().out


def test_the_interface_is_that_of_the_route(monkeypatch):
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert doctor.interface("127.0.0.1") == "lo 127.0.0.1"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert doctor.interface("127.0.0.1") == "ib0 (NCCL_SOCKET_IFNAME)"
