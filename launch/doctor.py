"""Print what was found on this machine, which path each stage will take, and why.

python launch/doctor.py
"""

if __name__ == "__main__":
    from crossbatch.launch.__main__ import run

    run("doctor")  # before the imports below, which take seconds

import importlib.metadata
import importlib.util
import platform

import torch
from rich.table import Table

from crossbatch import InputError
from crossbatch.data import choose_backend
from crossbatch.engine.config import Device, choose_precision, usable_cores
from crossbatch.engine.runtime.gpu_check import built_for, driver_cuda, nvidia_devices
from crossbatch.engine.runtime.output import check_printed, console
from crossbatch.launch.arguments import ArgumentParser
from crossbatch.models.batchformer import dispatch


def main() -> None:
    """Print both tables, or what is wrong with the GPU in place of the second."""
    ArgumentParser(description=__doc__).parse_args()
    printer = console()
    try:
        tables = {"found": found(), "stages": stages(Device.detect())}
    except InputError as error:
        tables = {"found": found(), "no run can start": [(str(error),)]}
    for title, rows in tables.items():
        table = Table(title=title, title_justify="left", show_header=False)
        for row in rows:
            table.add_row(*row)
        printer.print(table)
    check_printed()


def found() -> list[tuple[str, str]]:
    """Return (what, version or description) of hardware and packages."""
    rows = [("Python", platform.python_version()), ("CPU cores", str(usable_cores()))]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        rows.append((f"GPU {i}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        devices = ", ".join(map(str, nvidia_devices()))
        rows.append(("GPU", f"none that torch sees, but there is {devices}" if devices else "none"))
    driver = driver_cuda()
    rows.append(("NVIDIA driver", f"runs CUDA {driver[0]}.{driver[1]} at most" if driver else "none"))
    archs = " ".join(built_for())
    rows.append(("CUDA of torch", f"{torch.version.cuda}, with code for {archs}" if archs else "none"))
    packages = ("torch", "torchvision", "timm", "deepspeed", "triton", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
    for package in packages:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "absent"))
    # PyPI's package of that name is another project, without this module.
    has_apex = importlib.util.find_spec("apex") and importlib.util.find_spec("apex.normalization")
    return [*rows, ("apex (NVIDIA's)", "found" if has_apex else "absent")]


def stages(device: Device) -> list[tuple[str, str, str]]:
    """Return (stage, path, reason) as the engine will choose on `device`."""
    gpu = device.type == "cuda"
    capability = torch.cuda.get_device_capability() if gpu else None
    kernel, why = dispatch.explain("auto", dispatch.Situation(device.type, capability))  # at dropout 0.5
    blocks = "Triton" if gpu else "block by block"
    return [
        ("collectives", "NCCL" if gpu else "gloo", "GPU" if gpu else "no GPU"),
        ("decode and augment", *choose_backend("auto", device.type)),
        ("precision auto", *choose_precision("auto", device)),
        ("BatchFormer", f"fused ({blocks}), scores in tiles" if kernel == "fused" else kernel, why),
        (
            "chunk of the backbone",
            "computed from the free memory at the start of a run",
            "unless train_micro_batch_size_per_gpu is a number",
        ),
        ("LARS", blocks, "one collective for all norms where parameters are sharded"),
    ]
