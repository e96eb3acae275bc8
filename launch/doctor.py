"""Prints what was found on this machine, which path each stage will take, and why.

python launch/doctor.py
"""

import importlib.metadata
import importlib.util
import platform

import torch
from rich.console import Console
from rich.table import Table

from crossbatch.data import choose_backend
from crossbatch.engine.config import Device, choose_precision, usable_cores
from crossbatch.launch.arguments import ArgumentParser
from crossbatch.models.batchformer import dispatch


def main() -> None:
    ArgumentParser(description=__doc__).parse_args()
    console = Console()
    for title, rows in (("found", found()), ("stages", stages(Device.detect()))):
        table = Table(title=title, title_justify="left", show_header=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def found() -> list[tuple[str, str]]:
    """Return (what, version or description) of hardware and packages."""
    rows = [("Python", platform.python_version()), ("CPU cores", str(usable_cores()))]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            rows.append((f"GPU {i}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"))
    else:
        rows.append(("GPU", "none that torch can use"))
    rows.append(("CUDA of torch", torch.version.cuda or "none"))
    for package in ("torch", "torchvision", "timm", "deepspeed", "triton"):
        rows.append((package, _version(package)))
    dali = [version for cuda in ("130", "120") if (version := _version(f"nvidia-dali-cuda{cuda}")) != "absent"]
    rows.append(("DALI", dali[0] if dali else "absent"))
    rows.append(("apex (NVIDIA's)", "found" if has_apex() else "absent"))
    return rows


def stages(device: Device) -> list[tuple[str, str, str]]:
    """Return (stage, path, reason) as the engine will choose on `device`."""
    gpu = device.type == "cuda"
    return [
        ("collectives", "NCCL" if gpu else "gloo", "GPU" if gpu else "no GPU"),
        ("decode and augment", *choose_backend("auto", device.type)),
        ("precision auto", *choose_precision("auto", device)),
        ("BatchFormer", *batchformer(device)),
        (
            "chunk of the backbone",
            "computed from the free memory at the start of a run",
            "unless train_micro_batch_size_per_gpu is a number",
        ),
        ("LARS", "Triton" if gpu else "block by block", "one collective for all norms where parameters are sharded"),
    ]


def batchformer(device: Device) -> tuple[str, str]:
    """Return the kernel of BatchFormer at dropout 0.5, and why no other."""
    capability = torch.cuda.get_device_capability() if device.type == "cuda" else None
    chosen, why = dispatch.explain("auto", dispatch.Situation(device.type, capability))
    passes = "Triton" if device.type == "cuda" else "torch, block by block"
    return f"fused ({passes}), scores in tiles" if chosen == "fused" else chosen, why


def has_apex() -> bool:
    """Tell whether NVIDIA's apex is installed, by a module of its own; PyPI's package of that name is another project."""
    return importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.normalization") is not None


def _version(package: str) -> str:
    """Return the version of an installed package, or "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
