"""How long a collective takes, by latency and bandwidth (Hockney's model), for the algorithms that NCCL chooses from.

n ranks on k nodes, g = n / k of a node; S bytes of the whole tensor (gathered, or to be reduced); b the bandwidth of a rank
inside of a node, B that of all adapters of a node. Sources: NVIDIA/nccl-tests doc/PERFORMANCE.md for the bytes of a ring,
NVIDIA/nccl src/graph/tuning.cc for the latencies.

    ring          all-reduce 2 (n-1)/n S, all-gather and reduce-scatter (n-1)/n S, through every link of it: the slowest
                  of b and B counts; n-1 hops (all-reduce: twice that), k-1 of them over the network
    tree          all-reduce only: twice S up and down, hops 2 (g-1 + log2 k)
    hierarchical  reduce-scatter in the node, all-reduce of S / g over the network by g rings at once, all-gather in the node
                  (all-gather and reduce-scatter: one way)

A broadcast costs S / min(b, B). With the network in between, a hop inside of a node takes 1.8 times as long (NCCL's factor).
"""

import math
from dataclasses import dataclass

from benchmarks.scaling.catalogue import Machines

BASE_RING_US, BASE_TREE_US, INSIDE = 3.6, 4.4, 1.8  # tuning.cc, protocol LL
LAUNCH_US = 10.0  # to start a collective from Python, a kernel and two events (assumed)


@dataclass(frozen=True)
class Layout:
    """The ranks that one collective joins."""

    ranks: int
    nodes: int
    inside: float  # GB/s of a rank
    between: float  # GB/s of a node
    hop_us: tuple[float, float]  # in a ring, in a tree; inside of a node
    network_us: tuple[float, float]

    @staticmethod
    def of(machines: Machines) -> "Layout":
        link, network = machines.link, machines.network
        return Layout(
            machines.gpus,
            machines.nodes,
            link.bandwidth,
            network.bandwidth * machines.adapters,
            (link.ring_us, link.tree_us),
            (network.ring_us, network.tree_us),
        )


def seconds(kind: str, size: float, layout: Layout) -> float:
    """Of one collective, by the fastest algorithm: `kind` as in traffic.Message, `size` the bytes of the whole tensor."""
    if layout.ranks == 1:
        return 0.0
    ways = [_ring, _hierarchical] + ([_tree] if kind == "all-reduce" else [])
    return LAUNCH_US * 1e-6 + min(way(kind, size, layout) for way in ways)


def latency_us(kind: str, layout: Layout) -> float:
    """Of a collective of a few bytes."""
    return 1e6 * seconds(kind, 0.0, layout)


def _directions(kind: str) -> int:
    return 2 if kind == "all-reduce" else 1


def _ring(kind: str, size: float, at: Layout) -> float:
    n, k = at.ranks, at.nodes
    there = _directions(kind)
    slowest = min(at.inside, at.between) if k > 1 else at.inside
    inside, network = (_ring_hop(at), at.network_us[0])
    latency = BASE_RING_US + there * ((n - k) * inside + (k - 1) * network)
    moved = size if kind == "broadcast" else there * (n - 1) / n * size
    return latency * 1e-6 + moved / (slowest * 1e9)


def _tree(_kind: str, size: float, at: Layout) -> float:
    n, k = at.ranks, at.nodes
    inside = at.hop_us[1] * (INSIDE if k > 1 else 1)
    latency = BASE_TREE_US + 2 * ((n // k - 1) * inside + math.log2(k) * at.network_us[1])
    return latency * 1e-6 + 2 * size / ((min(at.inside, at.between) if k > 1 else at.inside) * 1e9)


def _hierarchical(kind: str, size: float, at: Layout) -> float:
    k, g, there = at.nodes, at.ranks // at.nodes, _directions(kind)
    if k == 1 or g == 1:
        return _ring(kind, size, at)
    latency = (1 + there) * BASE_RING_US + there * ((g - 1) * _ring_hop(at) + (k - 1) * at.network_us[0])
    inside, network = there * (g - 1) / g * size / at.inside, there * (k - 1) / k * size / at.between
    return latency * 1e-6 + (inside + network) / 1e9


def _ring_hop(at: Layout) -> float:
    return at.hop_us[0] * (INSIDE if at.nodes > 1 else 1)
