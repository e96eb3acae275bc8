"""Ends a run in which a rank waits in vain for another one, and names the rank at fault on all of them.

When a process dies, the ranks that wait for it in a collective see a closed connection (gloo) or nothing at all (NCCL). So
every rank has a thread with a heartbeat: once a second it publishes in the process group's store what its rank is doing, and
reads what the others are doing. A rank is at fault if

    it has said so         it raised, and told the others before it left
    it is silent           its heartbeat stopped: the process is gone, stopped or cut off
    it is behind           it has been loading, saving, ... for longer than the timeout, and the others wait for it

or none is: on GPUs, where no step takes minutes, ranks that all stay in the same step for longer than the timeout wait for
messages that do not come.

The first rank to notice writes the verdict into the store. A rank with a failed collective looks for it and leaves with exit
code 3; the thread of a rank that is still stuck in a collective some seconds later ends its process.

Where torchrun starts the run again (--max-restarts), every second counts, and torchrun names the rank: there, one with a failed
collective leaves at once, which breaks the connections of the next one, and less silence is enough.
"""

import contextlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType

import torch.distributed as dist

from crossbatch import InputError, RunStopped
from crossbatch.engine.runtime.distributed import shared_token
from crossbatch.engine.runtime.world import World, may_be_restarted

PHASES = ("starting", "evaluating", "saving", "waiting for data", "training")  # in the order of a step
MAX_SILENT_BEATS = 60  # counted in our own heartbeats, so that a machine which slept as a whole accuses no rank
RESTART_SILENT_BEATS = 10  # the same where torchrun starts the run again, which costs seconds
OTHER_PHASES_TIMEOUTS = 6  # outside of training steps: evaluating all images takes longer than a step
SEARCH_S = 5.0  # for the rank at fault, after a collective failed
LINGER_S = 2.0  # before rank 0 leaves, whose process keeps the store from which the others read the verdict
LEAVE_S = 10.0  # for the main thread to leave after a verdict, before its process is ended
RESTART_LEAVE_S = 1.0  # the same where torchrun starts the run again


@dataclass
class RankStatus:
    """Holds what a rank last published, and for how many of our heartbeats that has not changed."""

    count: int = -1
    at: tuple[int, int] = (-1, 0)  # (steps done, index into PHASES)
    silent_beats: int = 0
    still_beats: int = 0

    def update(self, count: int, step: int, phase: int) -> None:
        """Take in what the rank has published now: its count of heartbeats, steps done and phase."""
        self.silent_beats = self.silent_beats + 1 if count == self.count else 0
        self.still_beats = self.still_beats + 1 if (step, phase) == self.at else 0
        self.count, self.at = count, (step, phase)


class Watchdog:
    """Watches over a run on several ranks: `with Watchdog(world, timeout_s) as watchdog`. With one rank it does nothing.

    A rank that leaves with an exception tells the others. An exception that another rank caused becomes a RunStopped that names
    that rank.

    Args:
        world: this rank among the others.
        timeout_s: how long a rank may keep the others waiting.
    """

    def __init__(self, world: World, timeout_s: float):
        self.world, self.timeout_s = world, timeout_s
        self.beat_s = max(1.0, world.size / 64)  # between heartbeats; every rank reads every rank
        self._at = (-1, 0)
        self._ranks = [RankStatus() for _ in range(world.size)]
        self._beats = 0
        self._on_gpus, self._may_be_restarted = False, may_be_restarted()
        self._accusation = ""  # what this rank says of the rank at fault
        self._verdict = ""  # what all ranks take for true
        self._decided, self._stopping = threading.Event(), threading.Event()

    def set_phase(self, step: int, phase: str) -> None:
        """Say that this rank has done `step` steps and is now in `phase`, one of PHASES."""
        self._at = (step, PHASES.index(phase))

    def __enter__(self) -> "Watchdog":
        if self.world.size > 1:
            self._on_gpus = dist.get_backend() == "nccl"
            store = dist.distributed_c10d._get_default_store().clone()  # a connection of its own: the other may block
            self._store = dist.PrefixStore(f"watch/{shared_token()}", store)
            if self.world.is_main:
                self._store.set("verdict", "")
            self._publish()
            dist.barrier()
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.world.size == 1:
            return
        if error is None:
            with contextlib.suppress(RuntimeError):  # another has been ended by its launcher, when all was saved
                dist.barrier()  # rank 0 keeps the store, so no rank leaves before all are done
            self._stopping.set()
            self._thread.join(2 * self.beat_s)
            return
        lost = _is_from_a_collective(error)
        if lost and self._may_be_restarted:
            raise RunStopped(f"another rank is gone ({_first_line(error)}); torchrun starts all ranks again") from error
        culprit = self._find_culprit() if lost else ""
        if not culprit:
            self._accuse(f"rank {self.world.rank} stopped: {_first_line(error)}")
        self._stopping.set()
        self._thread.join(2 * self.beat_s)
        if self.world.is_main and not isinstance(error, InputError):
            time.sleep(LINGER_S)
        if culprit:
            raise RunStopped(f"{culprit}; the last checkpoint is good: repeat the command to resume") from error

    def _find_culprit(self) -> str:
        """Return which rank is at fault for a collective that failed, as soon as the thread knows; "" if none is found."""
        first, end = self._beats, time.monotonic() + SEARCH_S + self.beat_s
        while not self._verdict and time.monotonic() < end:
            time.sleep(0.1)
            suspicion = self._suspect(silent_beats=3, still_beats=max(3, int(self.timeout_s / self.beat_s / 2)))
            if suspicion:
                self._accuse(suspicion)
        if not self._verdict and self._beats == first:
            self._accuse("rank 0 does not answer (its process or its host is gone)")
        return self._verdict

    def _accuse(self, accusation: str) -> None:
        """Let the thread publish `accusation`, and take it for the verdict if that does not succeed soon."""
        self._accusation = accusation
        self._decided.wait(2 * self.beat_s)
        self._verdict = self._verdict or accusation

    def _run(self) -> None:
        """Beat until there is a verdict or the main thread leaves; this is what the thread does.

        After a verdict the main thread may be stuck in a collective that nothing ends, such as NCCL's. Then end the process.
        """
        failures = 0
        while not self._verdict:
            if self._stopping.wait(self.beat_s):
                return
            try:
                self._exchange()
                failures = 0
            except RuntimeError:
                failures += 1
                if failures == 3:
                    self._verdict = self._verdict or "rank 0 is gone (it kept the store)"
            self._beats += 1
        self._decided.set()
        if not self._stopping.wait(RESTART_LEAVE_S if self._may_be_restarted else LEAVE_S):
            print(f"stopped (rank {self.world.rank}): {self._verdict}\n", end="", file=sys.stderr, flush=True)
            os._exit(3)

    def _exchange(self) -> None:
        """Publish what this rank does, read what the others do, and write or read the verdict."""
        self._publish()
        verdict, *statuses = self._store.multi_get(["verdict", *map(str, range(self.world.size))])
        for rank, published in zip(self._ranks, statuses, strict=True):
            rank.update(*json.loads(published))
        if not verdict:
            patience = int(self.timeout_s / self.beat_s)
            most = RESTART_SILENT_BEATS if self._may_be_restarted else MAX_SILENT_BEATS
            suspicion = self._suspect(min(patience, most), patience) or self._all_stuck(patience)
            accusation = self._accusation or suspicion
            if accusation:
                verdict = self._store.compare_set("verdict", "", accusation)
        if verdict:
            self._verdict = verdict.decode()

    def _publish(self) -> None:
        self._store.set(str(self.world.rank), json.dumps([self._beats, *self._at]))

    def _suspect(self, silent_beats: int, still_beats: int) -> str:
        """Return which rank is silent, or has kept all others waiting; "" if none has."""
        others = [number for number in range(self.world.size) if number != self.world.rank]
        number = max(others, key=lambda number: self._ranks[number].silent_beats)
        silent = self._ranks[number].silent_beats
        if silent >= silent_beats:
            return f"rank {number} is gone or does not answer ({silent * self.beat_s:.0f} s without a sign)"
        number, rank = min(enumerate(self._ranks), key=lambda other: other[1].at)
        ahead = [other for other in self._ranks if other.at > rank.at]
        if ahead and all(other.still_beats >= still_beats for other in (rank, *ahead)):
            return f"rank {number} keeps the others waiting: {self._describe(rank.at, rank.still_beats)}"
        return ""

    def _all_stuck(self, still_beats: int) -> str:
        """Return a verdict if all GPUs wait in the same step. Not on CPUs: gloo fails by itself, and steps may be long."""
        at = self._ranks[0].at
        still = min(rank.still_beats for rank in self._ranks)
        enough = still_beats if PHASES[at[1]] == "training" else OTHER_PHASES_TIMEOUTS * still_beats
        if not self._on_gpus or still < enough or any(rank.at != at for rank in self._ranks):
            return ""
        return f"rank 0 and all others stand still: {self._describe(at, still)}; look at the network"

    def _describe(self, at: tuple[int, int], still_beats: int) -> str:
        step, phase = at
        return f"{PHASES[phase]} after step {step} for {still_beats * self.beat_s:.0f} s"


def _is_from_a_collective(error: BaseException) -> bool:
    """Return whether a collective raised `error`; gloo raises plain RuntimeErrors that name its source file."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(library in str(error) for library in ("gloo", "NCCL"))
    )


def _first_line(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    return text if isinstance(error, (RunStopped, InputError)) else f"{type(error).__name__}: {text}"
