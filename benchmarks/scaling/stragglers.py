"""What it costs that ranks wait for each other: the term that grows with ranks and with the number of synchronisations.

A rank is interrupted now and then: the operating system runs something else on its core, a loader or the garbage collector of
Python takes a moment. Alone, it loses a share of its time by that and nothing more. But at every collective all ranks wait for
the slowest. Between two collectives most ranks lose nothing, one of them something, and so all of them do; between the next two
it is another's turn. A step with S synchronisations on N ranks loses up to S pauses or N times the share, whichever is less:
which is why hundreds of tiny collectives of batch norms cost far more than their latency, and more with every rank
(Petrini et al. 2003, "The case of the missing supercomputer performance"; Hoefler et al. 2010 on noise).

With pauses of length d that take a share s of a rank's time, one rank has s T / (d S) of them in each of S equal parts of a
step of T, as random events do (Poisson), and the step is longer by

    wait = d S E[largest of N Poisson(s T / (d S))] - s T

(s T being in T already). The share is fitted; the length is not, because the published runs leave it open (1 to 5 ms, depending
on which are left out; at 1 ms the one run with norms over many nodes is missed by half): it is the shortest slice that Linux
gives to another task, 3 ms on 8 cores and more (CFS: 0.75 ms (1 + log2 8)).
"""

import numpy as np
from scipy.special import gammaincc

PAUSE_MS = 3.0


def wait_ms(ranks: int, synchronisations: int, step_ms: float, share: float) -> float:
    """What a step of `step_ms` takes longer because of waiting; 0 for one rank."""
    if ranks == 1:
        return 0.0
    expected = share * step_ms / (PAUSE_MS * synchronisations)
    return PAUSE_MS * synchronisations * largest(ranks, expected) - share * step_ms


def largest(ranks: int, expected: float) -> float:
    """The expected largest of `ranks` independent Poisson numbers: sum over k of P(one of them >= k)."""
    k = np.arange(1, int(expected + 10 * np.sqrt(expected)) + 20)
    return float(np.sum(1 - gammaincc(k, expected) ** ranks))  # gammaincc(k, x) = P(Poisson(x) < k)
