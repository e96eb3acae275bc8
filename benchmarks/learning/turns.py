"""Lets processes take turns on all cores, and counts the time and the CPU time of each one's turns."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from crossbatch.engine.runtime.timing import descendants

POLL_S, COUNT_S = 0.1, 2.0  # looking for all descendants takes milliseconds
POWERCAP = Path("/sys/class/powercap")


class Runner:
    """Starts a command in a process group of its own, whose processes are stopped whenever it is not their turn.

    Attributes:
        active_s: seconds of its turns until now.
        cpu_s: CPU seconds, user and system, of all its processes.
        energy_j: joules that the CPU packages used in its turns, None where the machine does not tell.
        marks: when each file or folder that `saved` finds was there first, in seconds of its turns.
        progress: the same of the lines of `metrics` (as launch/pretrain.py writes them), with the images that they name.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        metrics: Path,
        saved: Callable[[], Iterable[Path]],
        environment: dict[str, str],
    ):
        self.command, self.log, self._metrics, self._saved = list(command), log, metrics, saved
        self.active_s, self.marks, self._cpu_s = 0.0, dict[Path, float](), dict[int, float]()
        self.energy_j: float | None = None
        self.progress: list[tuple[float, int]] = []
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                self.command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )
        self._signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> bool:
        """Run for `seconds`, or until the process ends; return whether it goes on."""
        before, start, energy = self.active_s, time.monotonic(), _energy_uj()
        counted = start
        self._signal(signal.SIGCONT)
        while self.process.poll() is None and self.active_s - before < seconds:
            time.sleep(POLL_S)
            self.active_s = before + time.monotonic() - start
            self._look()
            if time.monotonic() - counted > COUNT_S:
                counted = time.monotonic()
                self._count()
        self._count()
        self._signal(signal.SIGSTOP)
        if energy:
            self.energy_j = (self.energy_j or 0.0) + _joules_since(energy)
        if self.process.returncode:
            said = self.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{' '.join(self.command)} ended with exit code {self.process.returncode}:\n{said}")
        return self.process.returncode is None

    def end(self) -> None:
        """Kill all processes of the group."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    @property
    def cpu_s(self) -> float:
        return sum(self._cpu_s.values())

    def _look(self) -> None:
        for path in self._saved():
            self.marks.setdefault(path, self.active_s)
        lines = self._metrics.read_text().splitlines() if self._metrics.exists() else []
        images = [json.loads(line)["images_seen"] for line in lines[-2:] if line.endswith("}")]
        if images and (not self.progress or images[-1] > self.progress[-1][1]):
            self.progress.append((self.active_s, images[-1]))

    def _count(self) -> None:
        for pid in (self.process.pid, *descendants(self.process.pid)):
            with suppress(OSError):  # it has ended
                self._cpu_s[pid] = time.clock_gettime(~pid << 3 | 2)  # see `cpu_s`

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _energy_uj() -> dict[Path, int]:
    """Return the counter of each CPU package in microjoules; none where Linux has none, or tells only root."""
    with suppress(OSError):
        return {zone: int((zone / "energy_uj").read_text()) for zone in POWERCAP.glob("intel-rapl:?")}
    return {}


def _joules_since(before: dict[Path, int]) -> float:
    now = _energy_uj()
    wraps = {zone: int((zone / "max_energy_range_uj").read_text()) for zone in before}
    return sum((now[zone] - before[zone]) % wraps[zone] for zone in before) / 1e6


def take_turns(
    runners: Sequence[Runner], slice_s: float, enough: Callable[[Runner], bool] = lambda runner: False
) -> None:
    """Run until each has ended, or had `enough`; then end the processes of all, also where one fails."""
    going = list(runners)
    try:
        while going:
            going = [runner for runner in going if runner.turn(slice_s) and not enough(runner)]
    finally:
        for runner in runners:
            runner.end()
