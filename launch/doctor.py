"""Print what was found on this machine, which path each stage will take, and why; or compare all ranks before a job.

python launch/doctor.py
torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 launch/doctor.py --nodes
srun --ntasks-per-node 8 python launch/doctor.py --nodes
"""

if __name__ == "__main__":
    from crossbatch.launch.__main__ import run

    run("doctor")  # before the imports below, which take seconds

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import statistics
import time

import torch
import torch.distributed as dist
from rich.table import Table

from crossbatch import InputError
from crossbatch.data import choose_backend
from crossbatch.engine.config import Device, choose_precision, usable_cores
from crossbatch.engine.runtime.distributed import process_group
from crossbatch.engine.runtime.gpu_check import built_for, driver_cuda, nvidia_devices
from crossbatch.engine.runtime.output import check_printed, console
from crossbatch.engine.runtime.same_run import check_same_run, facts_of
from crossbatch.engine.runtime.world import World, world_from_environment
from crossbatch.launch.arguments import ArgumentParser, positive
from crossbatch.models.batchformer import dispatch

REDUCED_MIB = {"cuda": 256, "cpu": 16}  # of one all-reduce; a ResNet-50 with BatchFormer has gradients of 240 MiB
REDUCTIONS = 5  # after a first one, which connects
CLOCK_S = 1.0  # that clocks may differ without a warning


def main() -> None:
    """Print what was found and what each stage will use, or why no run can start; with --nodes, compare the ranks instead."""
    parser = ArgumentParser(description=__doc__)
    what = "compare all ranks, under any launcher: host, GPU, versions, code, clock, and one all-reduce"
    parser.add_argument("--nodes", action="store_true", help=what)
    what = "seconds that a rank may be late, with --nodes; default %(default)s"
    parser.add_argument("--timeout", metavar="S", type=positive, default=120, help=what)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # of DeepSpeed's launcher
    arguments = parser.parse_args()
    printer = console()
    if arguments.nodes:
        compare_ranks(world_from_environment(), Device.detect(), float(arguments.timeout))
        check_printed()
        return
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


def compare_ranks(world: World, device: Device, timeout_s: float) -> None:
    """Print a line for each rank, compare versions and code before the ranks join, and measure an all-reduce after.

    Raises InputError with what differs, and RunStopped if a rank does not come within `timeout_s`.
    """
    gpu = "none"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(world.local_rank)
        gpu = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    facts = facts_of({})
    mine = {
        "host": socket.gethostname(),
        "GPU": gpu,
        "interface": interface(os.environ.get("MASTER_ADDR", "127.0.0.1")),
    }
    mine |= {name: facts[name] for name in ("python", "torch", "deepspeed", "the code of crossbatch")}
    printer = console()

    def check(store: dist.Store, world: World, timeout_s: float) -> None:
        store.set(f"doctor/{world.rank}", json.dumps(mine))
        try:
            check_same_run(facts, store, world, timeout_s)
        finally:
            if world.is_main:
                keys = [f"doctor/{rank}" for rank in range(world.size)]
                table = Table(
                    "rank", *(name.removeprefix("the ") for name in mine), title="ranks", title_justify="left"
                )
                for rank, key in enumerate(keys):
                    came = store.check([key])
                    table.add_row(str(rank), *(json.loads(store.get(key)).values() if came else ["did not come"]))
                printer.print(table)

    with process_group(world, device.type, 1, timeout_s, check) as torch_device:
        rows = [{}] * world.size
        dist.all_gather_object(rows, measure_network(torch_device))
    if not world.is_main:
        return
    mib = REDUCED_MIB[device.type]
    columns = ("rank", "clock against rank 0", f"all-reduce of {mib} MiB", "bus bandwidth")
    table = Table(*columns, title="network", title_justify="left")
    for rank, row in enumerate(rows):
        offset_s, seconds = row["clock"] - rows[0]["clock"], row["seconds"]
        bandwidth = 2 * (world.size - 1) / world.size * mib * 2**20 / seconds / 1e9
        speed = f"{bandwidth:.2f} GB/s" if world.size > 1 else "one rank"
        table.add_row(str(rank), f"{offset_s:+.3f} s", f"{1000 * seconds:.1f} ms", speed)
    printer.print(table)
    late = [rank for rank, row in enumerate(rows) if abs(row["clock"] - rows[0]["clock"]) > CLOCK_S]
    if late:
        printer.print(f"warning: more than {CLOCK_S:g} s from the clock of rank 0: rank {', '.join(map(str, late))}")
    printer.print(f"all {world.size} ranks have the same versions and code, and reach each other")


def measure_network(device: torch.device) -> dict[str, float]:
    """Return this rank's clock just after a barrier, and the median seconds of an all-reduce; every rank calls it."""
    data = torch.zeros(REDUCED_MIB[device.type] * 2**18, device=device)
    seconds = []
    for _ in range(REDUCTIONS + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(data)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    dist.barrier()
    return {"clock": time.time(), "seconds": statistics.median(seconds[1:])}


def interface(host: str) -> str:
    """Return the network interface that NCCL or gloo are told to use, or else that of the route to `host`, with its address."""
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if os.environ.get(name):
            return f"{os.environ[name]} ({name})"
    try:
        import psutil  # which DeepSpeed brings
    except ImportError:
        return "not looked up: psutil is not installed"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as route:
            route.connect(address)  # sends nothing
            mine = route.getsockname()[0]
    except OSError as error:
        return f"no route to {host}: {error.strerror}"
    named = [nic for nic, addresses in psutil.net_if_addrs().items() if mine in {one.address for one in addresses}]
    return f"{named[0] if named else 'unknown'} {mine}"
