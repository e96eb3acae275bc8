"""runtime/gpu_check.py: a GPU that the installed torch cannot use is refused with the way out, and a run without one is not."""

import dataclasses
from pathlib import Path

import pytest
import torch

from crossbatch import InputError
from crossbatch.engine.config import Device
from crossbatch.engine.runtime import gpu_check

CUDA_12, CUDA_13 = "sm_70 sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"


@pytest.fixture
def machine(monkeypatch):
    """Return a function that makes this machine look like another one."""

    def look_like(gpus=(), archs=CUDA_13, files=0, driver=None, cuda="13.0", **environment):
        cards = {"V100": (7, 0), "T4": (7, 5), "A100": (8, 0), "4090": (8, 9), "H100": (9, 0), "P100": (6, 0)}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: cards[gpus[index]])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: gpus[index])
        monkeypatch.setattr(gpu_check, "built_for", archs.split)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(
            gpu_check, "nvidia_devices", lambda: [Path(f"/dev/nvidia{i}") for i in range(files or len(gpus))]
        )
        monkeypatch.setattr(gpu_check, "driver_cuda", lambda: driver)
        for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return look_like


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((7, 0), CUDA_13, False),
        ((7, 0), CUDA_12, True),
        ((8, 9), "sm_80 sm_86", True),
        ((8, 0), "sm_86", False),
        ((9, 0), "sm_80 sm_86", False),
        ((9, 0), "sm_80 compute_80", True),
        ((9, 0), "sm_90a", True),
        ((12, 1), CUDA_13, True),
        ((12, 1), "sm_120a", False),
        ((12, 1), "sm_120f", True),
        ((9, 0), "gfx90a", True),
    ],
)
def test_code_runs_on_later_gpus_of_the_same_major_capability(capability, archs, runs):
    assert gpu_check.has_code_for(capability, archs.split()) is runs


@pytest.mark.parametrize(
    ("looks", "words"),
    [
        ({"gpus": ["V100"]}, ["GPU 0: V100 is sm_70", CUDA_13, "pip install 'torch==2.10.*'", "CUDA=cuda12"]),
        ({"gpus": ["H100"], "archs": "sm_80"}, ["GPU 0: H100 is sm_90", "pip install --upgrade torch"]),
        ({"gpus": ["P100"], "archs": CUDA_12}, ["GPU 0: P100 is sm_60", "take a V100 or later"]),
        ({"gpus": ["A100", "V100"], "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["GPU 1: V100 is sm_70"]),
        ({"gpus": ["A100", "V100"], "LOCAL_RANK": "1"}, ["GPU 1: V100 is sm_70"]),
        (
            {"files": 1, "driver": (12, 2)},
            [
                "/dev/nvidia0",
                "the driver runs CUDA 12.2",
                "CUDA 13.0",
                "pip install 'torch==2.10.*'",
                "VISIBLE_DEVICES= ",
            ],
        ),
        ({"files": 1, "driver": (11, 4), "cuda": "12.8"}, ["the driver runs CUDA 11.4", "update the driver, or set"]),
        ({"files": 1, "driver": (13, 0), "cuda": None}, ["built without CUDA", "pip install --upgrade torch"]),
        ({"files": 1}, ["there is no NVIDIA driver"]),
        ({"files": 1, "driver": (13, 0)}, ["see what nvidia-smi says"]),
        ({"files": 1, "driver": (13, 0), "CUDA_VISIBLE_DEVICES": "7"}, ["CUDA_VISIBLE_DEVICES names no GPU"]),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_refused_with_the_remedy(machine, looks, words):
    machine(**looks)
    with pytest.raises(InputError) as error:
        Device.detect()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        ({}, Device("cpu")),
        ({"files": 1, "driver": (12, 2), "CUDA_VISIBLE_DEVICES": ""}, Device("cpu")),
        ({"files": 1, "driver": (12, 2), "CUDA_VISIBLE_DEVICES": "-1"}, Device("cpu")),
        ({"gpus": ["V100"], "archs": CUDA_12}, Device("cuda", False, "V100")),
        ({"gpus": ["4090"]}, Device("cuda", True, "4090")),
        ({"gpus": ["A100", "V100"]}, Device("cuda", True, "A100")),  # one rank: the second is not used
    ],
)
def test_what_torch_can_use_is_taken(machine, looks, expected):
    machine(**looks)
    assert dataclasses.replace(Device.detect(), has_amx=False) == expected


def test_built_for_is_what_torch_says_with_a_gpu():
    assert gpu_check.built_for() == (torch.cuda.get_arch_list() or gpu_check.built_for())
    assert bool(gpu_check.built_for()) is (torch.version.cuda is not None)


@pytest.mark.skipif(not (torch.version.cuda or "").startswith("12."), reason="needs a torch for CUDA 12")
def test_a_torch_for_cuda_12_has_code_for_a_v100():
    assert gpu_check.has_code_for((7, 0), gpu_check.built_for())


def test_a_driver_that_serves_torch_runs_its_cuda():
    driver = gpu_check.driver_cuda()
    if torch.cuda.is_available():
        assert driver is not None and driver[0] >= int((torch.version.cuda or "0").split(".")[0])
    else:
        assert driver is None or driver >= (9, 0)
