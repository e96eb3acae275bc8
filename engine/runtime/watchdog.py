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
"""

import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType

import torch.distributed as dist

from crossbatch import InputError, RunStopped
from crossbatch.engine.runtime.distributed import World, barrier, shared_token

PHASES = ("starting", "evaluating", "saving", "waiting for data", "training")  # in the order of a step
MAX_SILENT_BEATS = 60  # counted in our own heartbeats, so that a machine which slept as a whole accuses no rank
OTHER_PHASES_TIMEOUTS = 6  # outside of training steps: evaluating all images takes longer than a step
SEARCH_S = 5.0  # for the rank at fault, after a collective failed
LINGER_S = 2.0  # before rank 0 leaves, whose process keeps the store from which the others read the verdict
LEAVE_S = 10.0  # for the main thread to leave after a verdict, before its process is ended


@dataclass
class RankStatus:
    """What a rank last published, and for how many of our heartbeats that has not changed."""

    count: int = -1
    at: tuple[int, int] = (-1, 0)  # (steps done, index into PHASES)
    silent_beats: int = 0
    still_beats: int = 0


@dataclass(frozen=True)
class Verdict:
    """The rank at fault, and what it did."""

    rank: int
    what: str

    def __str__(self) -> str:
        return f"rank {self.rank} {self.what}"


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
        self._on_gpus = False
        self._verdict: Verdict | None = None
        self._to_announce: Verdict | None = None
        self._announced, self._stopping = threading.Event(), threading.Event()

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
            barrier()
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.world.size == 1:
            return
        if error is None:
            barrier()  # rank 0 keeps the store, so no rank leaves before all are done
            self._stop_thread()
            return
        if _is_from_a_collective(error):
            verdict = self._find_culprit()
            if verdict is not None:
                self._stop_thread()
                if self.world.is_main:
                    time.sleep(LINGER_S)
                raise RunStopped(f"{verdict}; the last checkpoint is good: repeat the command to resume") from error
        self._announce(Verdict(self.world.rank, f"stopped: {_first_line(error)}"))
        self._stop_thread()
        if self.world.is_main and not isinstance(error, InputError):
            time.sleep(LINGER_S)

    # --- the main thread -------------------------------------------------------------------------------------------

    def _find_culprit(self) -> Verdict | None:
        """Return who is at fault for a collective that failed, as soon as the thread knows; None if nobody is found."""
        first, end = self._beats, time.monotonic() + SEARCH_S + self.beat_s
        while self._verdict is None and time.monotonic() < end:
            time.sleep(0.1)
            suspect = self._suspect(silent_beats=3, still_beats=max(3, int(self.timeout_s / self.beat_s / 2)))
            if suspect is not None:
                self._announce(suspect)
        if self._verdict is None and self._beats == first:
            self._announce(Verdict(0, "does not answer (its process or its host is gone)"))
        return self._verdict

    def _announce(self, verdict: Verdict) -> None:
        self._to_announce = verdict
        self._announced.wait(2 * self.beat_s)
        self._verdict = self._verdict or verdict

    def _stop_thread(self) -> None:
        self._stopping.set()
        self._thread.join(2 * self.beat_s)

    # --- the thread with the heartbeat ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        gone = 0
        while not self._stopping.wait(self.beat_s):
            try:
                self._exchange()
                gone = 0
            except RuntimeError:
                gone += 1
                if gone == 3:
                    self._verdict = self._verdict or Verdict(0, "is gone (it kept the store)")
            self._beats += 1
            if self._verdict is not None and not self._announced.is_set():
                self._announced.set()
                threading.Thread(target=self._end_if_stuck, daemon=True).start()

    def _exchange(self) -> None:
        self._publish()
        keys = ["verdict", *(str(rank) for rank in range(self.world.size))]
        verdict, *statuses = self._store.multi_get(keys)
        for rank, published in zip(self._ranks, statuses, strict=True):
            _update(rank, json.loads(published))
        if not verdict:
            patience = int(self.timeout_s / self.beat_s)
            mine = (
                self._to_announce
                or self._suspect(min(patience, MAX_SILENT_BEATS), patience)
                or self._all_stuck(patience)
            )
            if mine is not None:
                verdict = self._store.compare_set("verdict", "", json.dumps([mine.rank, mine.what]))
        if verdict:
            self._verdict = Verdict(*json.loads(verdict))

    def _publish(self) -> None:
        self._store.set(str(self.world.rank), json.dumps([self._beats, *self._at]))

    def _suspect(self, silent_beats: int, still_beats: int) -> Verdict | None:
        """Return the rank that is silent, or that all others have been waiting for, if there is one."""
        others = [(number, rank) for number, rank in enumerate(self._ranks) if number != self.world.rank]
        number, rank = max(others, key=lambda other: other[1].silent_beats)
        if rank.silent_beats >= silent_beats:
            return Verdict(
                number, f"is gone or does not answer ({rank.silent_beats * self.beat_s:.0f} s without a sign)"
            )
        number, rank = min(enumerate(self._ranks), key=lambda other: other[1].at)
        ahead = [other for other in self._ranks if other.at > rank.at]
        if ahead and all(other.still_beats >= still_beats for other in (rank, *ahead)):
            step, phase = rank.at
            seconds = rank.still_beats * self.beat_s
            return Verdict(number, f"keeps the others waiting: {PHASES[phase]} after step {step} for {seconds:.0f} s")
        return None

    def _all_stuck(self, still_beats: int) -> Verdict | None:
        """Return a verdict if all GPUs wait in the same step. Not on CPUs: gloo fails by itself, and steps may be long."""
        step, phase = self._ranks[0].at
        still = min(rank.still_beats for rank in self._ranks)
        enough = still_beats if PHASES[phase] == "training" else OTHER_PHASES_TIMEOUTS * still_beats
        if not self._on_gpus or still < enough or len({rank.at for rank in self._ranks}) > 1:
            return None
        seconds = still * self.beat_s
        return Verdict(
            0, f"and all others stand still: {PHASES[phase]} after step {step} for {seconds:.0f} s; look at the network"
        )

    def _end_if_stuck(self) -> None:
        """End this process if its main thread does not leave: it may wait in a collective that nothing ends, such as NCCL's."""
        if not self._stopping.wait(LEAVE_S):
            print(f"stopped (rank {self.world.rank}): {self._verdict}\n", end="", file=sys.stderr, flush=True)
            os._exit(3)


def _update(rank: RankStatus, published: list[int]) -> None:
    """Compare what a rank has published, [count of heartbeats, steps done, phase], with what is known of it."""
    count, *at = published
    rank.silent_beats = rank.silent_beats + 1 if count == rank.count else 0
    rank.still_beats = rank.still_beats + 1 if tuple(at) == rank.at else 0
    rank.count, rank.at = count, (at[0], at[1])


def _is_from_a_collective(error: BaseException) -> bool:
    """Return whether a collective raised `error`; gloo raises plain RuntimeErrors that name its source file."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(library in str(error) for library in ("gloo", "NCCL"))
    )


def _first_line(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    return text if isinstance(error, (RunStopped, InputError)) else f"{type(error).__name__}: {text}"
