"""Lists what GPUs and links can do at best: every hardware number that a prediction uses, with its source.

A GPU's numbers are those of NVIDIA's data sheet, dense (without sparsity), products of 16 bits summed in fp32. A link's
bandwidth is the "bus bandwidth" of nccl-tests, bytes per second that each rank (within a node) or each adapter (between nodes)
sends while all of them send; where none is published, it is derived from the data sheet, and says so. Latencies per hop are
those of NCCL's own model (src/graph/tuning.cc, protocol LL).
"""

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from crossbatch import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """Describes one kind of card: bandwidth in GB/s (1e9), dense peaks in TFLOP/s; 0 where there is no such unit."""

    memory_gib: float
    bandwidth: float
    fp32: float
    tf32: float
    fp16: float
    bf16: float
    link: str  # inside of a node, unless the user says otherwise
    network: str  # between nodes, likewise
    source: str
    card: str = ""  # CUDA's name for it, to the letter: an H100 PCIe has 0.76 of an H100's peaks

    def peak(self, precision: str) -> float:
        """Return the dense peak in FLOP/s. For fp32 it is without TF32, which a user would have to allow."""
        return 1e12 * getattr(self, precision)


@dataclass(frozen=True)
class Link:
    """Describes a connection: GB/s of a rank or adapter, microseconds of a hop in a ring and in a tree."""

    bandwidth: float
    ring_us: float
    tree_us: float
    source: str


GPUS = {
    "v100-16g": Gpu(16, 900, 15.7, 0, 125, 0, "nvlink2", "edr", "V100 SXM2 data sheet", "Tesla V100-SXM2-16GB"),
    "v100-32g": Gpu(32, 900, 15.7, 0, 125, 0, "nvlink2", "edr", "V100 SXM2 data sheet", "Tesla V100-SXM2-32GB"),
    "t4": Gpu(15, 320, 8.1, 0, 65, 0, "pcie3", "25gbe", "T4 data sheet; 1 GB less for ECC", "Tesla T4"),
    "a10": Gpu(22.5, 600, 31.2, 62.5, 125, 125, "pcie4", "25gbe", "A10 data sheet", "NVIDIA A10"),
    "a100-40g": Gpu(40, 1555, 19.5, 156, 312, 312, "nvlink3", "hdr", "A100 SXM data sheet", "NVIDIA A100-SXM4-40GB"),
    "a100-80g": Gpu(80, 2039, 19.5, 156, 312, 312, "nvlink3", "hdr", "A100 SXM data sheet", "NVIDIA A100-SXM4-80GB"),
    "h100-80g": Gpu(
        80, 3350, 66.9, 494.7, 989.4, 989.4, "nvlink4", "ndr", "H100 SXM data sheet", "NVIDIA H100 80GB HBM3"
    ),
    "h200": Gpu(141, 4800, 66.9, 494.7, 989.4, 989.4, "nvlink4", "ndr", "H200 SXM data sheet", "NVIDIA H200"),
    "l40s": Gpu(45, 864, 91.6, 183, 362, 362, "pcie4", "100gbe", "L40S data sheet; 3 GB less for ECC", "NVIDIA L40S"),
    "rtx3090": Gpu(24, 936, 35.6, 35.6, 71, 71, "pcie4", "10gbe", "GA102 whitepaper", "NVIDIA GeForce RTX 3090"),
    "rtx4090": Gpu(
        24, 1008, 82.6, 82.6, 165.2, 165.2, "pcie4-no-p2p", "10gbe", "Ada whitepaper", "NVIDIA GeForce RTX 4090"
    ),
    "a6000": Gpu(48, 768, 38.7, 77.4, 154.8, 154.8, "pcie4", "25gbe", "RTX A6000 data sheet", "NVIDIA RTX A6000"),
}

CARDS = {gpu.card: name for name, gpu in GPUS.items()}

_NCCL = "hops: NCCL tuning.cc"
LINKS = {
    "nvlink2": Link(120, 0.47, 0.52, f"0.8 x 150 GB/s of the V100 data sheet (derived); {_NCCL}"),
    "nvlink3": Link(232, 0.47, 0.52, f"8 x A100: NVIDIA/nccl #1048; {_NCCL}"),
    "nvlink4": Link(476, 0.47, 0.52, f"8 x H100 with NVLink SHARP: NVIDIA/nccl-tests #290; {_NCCL}"),
    "pcie3": Link(10, 1.0, 1.0, f"half of pcie4 (derived); {_NCCL}"),
    "pcie4": Link(20, 1.0, 1.0, f"A100s on PCIe: NVIDIA/nccl-tests #178; {_NCCL}"),
    "pcie4-no-p2p": Link(10, 1.0, 1.0, f"through host memory, half of pcie4 (assumed); {_NCCL}"),
    "pcie5": Link(40, 1.0, 1.0, f"twice pcie4 (derived); {_NCCL}"),
}
NETWORKS = {
    "edr": Link(12.2, 2.7, 5.0, f"InfiniBand 100 Gb/s: NVIDIA/nccl-tests #29; {_NCCL}"),
    "hdr": Link(24, 2.7, 5.0, f"InfiniBand 200 Gb/s: NVIDIA/nccl #1048; {_NCCL}"),
    "ndr": Link(47, 2.7, 5.0, f"InfiniBand 400 Gb/s: NVIDIA/nccl-tests #290; {_NCCL}"),
    "100gbe": Link(11, 5.0, 10.0, "RoCE, 0.9 x edr, hops x 2 (assumed)"),
    "25gbe": Link(2.8, 25.0, 30.0, "TCP, 0.9 x line rate; hops as of a socket round trip (assumed)"),
    "10gbe": Link(1.1, 25.0, 30.0, "TCP, 0.9 x line rate; hops as of a socket round trip (assumed)"),
}


@dataclass(frozen=True)
class Machines:
    """Describes equal nodes of equal GPUs; `gpus` counts those of all nodes."""

    gpu: Gpu
    gpus: int
    nodes: int
    link: Link
    network: Link
    adapters: int  # of a node

    @property
    def gpus_per_node(self) -> int:
        return self.gpus // self.nodes

    def part_of(self, gpus: int) -> "Machines":
        """Return the first `gpus` GPUs, on as few nodes as hold them; groups that cross nodes count as spread evenly."""
        nodes = 1 if self.gpus_per_node % gpus == 0 else max(2, -(-gpus // self.gpus_per_node))
        return replace(self, gpus=gpus, nodes=nodes)


@functools.cache
def machines(gpu: str, gpus: int, nodes: int = 1, interconnect: str | None = None, link: str | None = None) -> Machines:
    """Look up GPUs and links by name; `interconnect` may carry the number of adapters of a node, as in 4xedr.

    Raises:
        InputError: for names that are not in the tables, and for numbers of GPUs and nodes that do not fit each other.
    """
    for flag, value in (("--gpus", gpus), ("--nodes", nodes)):
        if value < 1:
            raise InputError(f"{flag}: given {value}; allowed: a whole number >= 1")
    if gpus % nodes:
        raise InputError(
            f"--gpus: given {gpus} on {nodes} nodes; allowed: a multiple of --nodes; take {gpus // nodes * nodes or nodes}"
        )
    found = _find_gpu(gpu)
    adapters, name = re.fullmatch(r"(?:(\d+)x)?(.*)", (interconnect or found.network).lower()).groups()  # pyright: ignore[reportOptionalMemberAccess]
    inside = _look_up(link or found.link, LINKS, "--link")
    between = _look_up(name, NETWORKS, "--interconnect", "with the number of adapters of a node in front, as in 4xedr")
    return Machines(found, gpus, nodes, inside, between, max(1, int(adapters or 1)))


GPU_BY_HAND = '"memory_gib=24,bandwidth=936,fp32=35.6,fp16=71,bf16=71"'
_KEYS_BY_HAND: dict[str, None] = dict.fromkeys(("memory_gib", "bandwidth", "fp32", "fp16", "bf16", "tf32"))


def _find_gpu(name: str) -> Gpu:
    """Look a GPU up in the table, or read one that is given by hand, as in GPU_BY_HAND."""
    if "=" not in name:
        by_hand = f"or by hand: --gpu {GPU_BY_HAND} (GB/s and TFLOP/s of its data sheet; without bf16 if it has none)"
        return _look_up(name.lower().replace("_", "-").replace(" ", ""), GPUS, "--gpu", by_hand)
    values = {"bf16": 0.0, "tf32": 0.0}
    for pair in name.split(","):
        key, _, number = (part.strip() for part in pair.partition("="))
        _look_up(key, _KEYS_BY_HAND, "--gpu")
        try:
            values[key] = float(number)
        except ValueError:
            raise InputError(f"--gpu: given {pair}; allowed: a number") from None
        if not values[key] > 0:
            raise InputError(f"--gpu: given {pair}; allowed: > 0; leave bf16 and tf32 out if the GPU has none")
    if missing := [key for key in _KEYS_BY_HAND if key not in values]:
        raise InputError(f"--gpu: given {name}; missing: {', '.join(missing)}")
    return Gpu(**values, link="pcie4", network="25gbe", source="given by hand")  # pyright: ignore[reportArgumentType]


def _look_up(name: str, table: Mapping[str, T], flag: str, otherwise: str = "") -> T:
    """Return `table[name]`, or raise InputError with the nearest names."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.5) or [key for key in table if key[:2] == name[:2]]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise InputError(f"{flag}: given {name}; allowed: {', '.join(table)}{'; ' + otherwise if otherwise else ''}{hint}")
