"""doctor.py shows what is wrong with a GPU, and every command that trains or evaluates refuses it before it writes anything."""

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
