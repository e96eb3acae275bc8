"""Predicts how long a collective takes, from latency and bandwidth (Hockney's model), and what waiting ranks cost.

n ranks on k nodes, g = n / k of a node; S bytes of the whole tensor (gathered, or to be reduced); b the bandwidth of a rank
inside a node, B that of all adapters of a node. Sources: NVIDIA/nccl-tests doc/PERFORMANCE.md for the bytes of a ring,
NVIDIA/nccl src/graph/tuning.cc for the latencies.

    ring          all-reduce 2 (n-1)/n S, all-gather and reduce-scatter (n-1)/n S, at the slower of b and B;
                  n-1 hops (all-reduce: twice that), k-1 of them over the network
    tree          all-reduce only: twice S up and down, hops 2 (g-1 + log2 k)
    hierarchical  reduce-scatter in the node, all-reduce of S / g over the network by g rings at once, all-gather in the node
                  (all-gather and reduce-scatter: one way)

With the network in between, a hop inside a node takes 1.8 times as long (NCCL's factor).
"""

import math

import numpy as np
from scipy.special import gammaincc

from crossbatch.engine.planning.catalogue import Machines

BASE_RING_US, BASE_TREE_US, INSIDE = 3.6, 4.4, 1.8  # tuning.cc, protocol LL
LAUNCH_US = 10.0  # to start a collective from Python, a kernel and two events (assumed)
PAUSE_MS = 3.0  # the shortest slice that Linux gives to another task, on 8 cores and more; published runs leave it open


def collective_ms(kind: str, size: float, at: Machines) -> float:
    """Predict the milliseconds of one collective over all GPUs of `at`, by the fastest algorithm.

    Args:
        kind: all-reduce, all-gather or reduce-scatter.
        size: bytes of the whole tensor.
    """
    n, k, g, both = at.gpus, at.nodes, at.gpus_per_node, 2 if kind == "all-reduce" else 1
    if n == 1:
        return 0.0
    inside, between = 1e3 * at.link.bandwidth, 1e3 * at.network.bandwidth * at.adapters  # bytes per us
    slowest = min(inside, between) if k > 1 else inside
    hop, tree_hop = ((INSIDE if k > 1 else 1) * us for us in (at.link.ring_us, at.link.tree_us))
    ways = [BASE_RING_US + both * ((n - k) * hop + (k - 1) * at.network.ring_us + (n - 1) / n * size / slowest)]
    if both == 2:
        ways.append(BASE_TREE_US + 2 * ((g - 1) * tree_hop + math.log2(k) * at.network.tree_us + size / slowest))
    if k > 1 and g > 1:
        latency = (1 + both) * BASE_RING_US + both * ((g - 1) * hop + (k - 1) * at.network.ring_us)
        ways.append(latency + both * size * ((g - 1) / g / inside + (k - 1) / k / between))
    return (LAUNCH_US + min(ways)) / 1e3


def wait_ms(
    ranks: int, synchronisations: int, step_ms: float, share: float, groups: int = 1, of_all: int | None = None
) -> float:
    """Predict how many milliseconds ranks that wait for each other add to a step of `step_ms`; 0 for one rank.

    A rank is interrupted now and then: the operating system, a loader or Python's garbage collector takes its core. Alone it
    loses a `share` of its time. But at every collective all wait for the slowest, which is another one each time, so a step
    with S synchronisations loses up to S pauses or N times the share, whichever is less. That is why hundreds of tiny
    collectives of batch norms cost far more than their latency (Petrini et al. 2003, "The case of the missing supercomputer
    performance"; Hoefler et al. 2010). With random (Poisson) pauses of length d = PAUSE_MS, a rank has s T / (d S) of them in
    each of the S parts of a step of T, and the step is longer by

        d S E[largest of N Poisson(s T / (d S))] - s T        (s T being in T already)

    Where G groups of N ranks wait only for their own ranks, but at S' of the S synchronisations (`of_all`) for all, a group is
    to the others what a rank is to its group: it has P = S E[largest of N ...] pauses in a step, also taken as Poisson, and
    the step is longer by d S' E[largest of G Poisson(P / S')] - s T.
    """
    if ranks * groups == 1:
        return 0.0
    of_all = synchronisations if of_all is None else of_all
    pauses = synchronisations * largest_of(ranks, share * step_ms / (PAUSE_MS * synchronisations))
    return PAUSE_MS * of_all * largest_of(groups, pauses / of_all) - share * step_ms


def largest_of(ranks: int, expected: float) -> float:
    """Return the expected largest of `ranks` independent Poisson numbers: the sum over k of P(one of them >= k)."""
    k = np.arange(1, int(expected + 10 * np.sqrt(expected)) + 20)
    return float(np.sum(1 - gammaincc(k, expected) ** ranks))  # gammaincc(k, x) = P(Poisson(x) < k)
