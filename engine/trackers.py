"""Send the metrics of a run to experiment trackers: Weights & Biases, MLflow and Trackio, each an optional package.

A tracker is a service that can be slow, full or gone, and training must not wait for it. So each has a thread of its own, with
a queue. What a service does not take is sent again, ever less often, with one warning; a service that is back gets what waited
for it. What it has not taken when the run ends, or when the queue is full, is left out. The names are those
of metrics.jsonl. The file trackers.json in the run directory holds the tracker's own name of the run, so that a resumed run
goes on in it. Server, project and experiment come from the trackers' own settings (WANDB_PROJECT, MLFLOW_TRACKING_URI, ...).
"""

import contextlib
import importlib
import importlib.util
import json
import queue
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from crossbatch import InputError
from crossbatch.engine.nested import flatten
from crossbatch.engine.runtime.atomic_files import write_atomically

RUNS = "trackers.json"  # in the run directory: {tracker: its name of this run}
QUEUED = 10_000  # lines of metrics that wait for a slow tracker, at most
CLOSE_S = 30.0  # that the end of a run waits for them
TRIES = 20  # of a line that a tracker does not take; then comes the next, in case that it never takes this one
LONGEST_PAUSE_S = 60.0  # between two tries; the first is a second
Outcome = Literal["finished", "stopped", "failed"]  # stopped: by a signal, before the last step


class Tracker(ABC):
    """Sends the metrics of a run to one service, from one thread. Every method may raise anything."""

    @abstractmethod
    def open(self, out: Path, run: str | None, config: Mapping[str, Any]) -> str:
        """Create the run, or continue `run`; return the service's name for it."""

    @abstractmethod
    def record(self, values: dict[str, float], step: int) -> None:
        """Send the numbers of a step; a later call may add some to the same step."""

    @abstractmethod
    def close(self, outcome: Outcome) -> None:
        """Tell the service that the run has ended, and how."""


class _Wandb(Tracker):
    def open(self, out: Path, run: str | None, config: Mapping[str, Any]) -> str:
        wandb = importlib.import_module("wandb")
        run = run or uuid.uuid4().hex[:8]
        settings = wandb.Settings(console="off")  # it would put its own streams in place of stdout and stderr
        self.run = wandb.init(
            id=run, name=out.name, dir=str(out), config=dict(config), resume="allow", settings=settings
        )
        return run

    def record(self, values: dict[str, float], step: int) -> None:
        if step >= self.run.step:  # of a resumed run, wandb has had some already, and warns of each
            self.run.log(values, step=step)

    def close(self, outcome: Outcome) -> None:
        if outcome == "stopped":
            self.run.mark_preempting()  # with a code other than 0, wandb calls the run preempted
        self.run.finish(exit_code=0 if outcome == "finished" else 1)


class _Mlflow(Tracker):
    def open(self, out: Path, run: str | None, config: Mapping[str, Any]) -> str:
        mlflow = importlib.import_module("mlflow")
        self.entities, self.client = mlflow.entities, mlflow.MlflowClient()
        if run is not None:
            self.run = self.client.get_run(run).info.run_id
            self.client.update_run(self.run, status="RUNNING")
            return self.run
        name = importlib.import_module("mlflow.environment_variables").MLFLOW_EXPERIMENT_NAME.get() or "Default"
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.run = self.client.create_run(number, run_name=out.name).info.run_id
        settings = [self.entities.Param(key, str(value)[:500]) for key, value in flatten(config, ".").items()]
        for start in range(0, len(settings), 100):  # as many as a request may hold
            self.client.log_batch(self.run, params=settings[start : start + 100])
        return self.run

    def record(self, values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self.entities.Metric(name, value, now, step) for name, value in values.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def close(self, outcome: Outcome) -> None:
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[outcome]
        self.client.set_terminated(self.run, status)


class _Trackio(Tracker):
    def open(self, out: Path, run: str | None, config: Mapping[str, Any]) -> str:
        self.trackio = importlib.import_module("trackio")
        run = run or f"{out.name}-{uuid.uuid4().hex[:8]}"
        self.trackio.init(project="crossbatch", name=run, config=dict(config), resume="allow")
        return run

    def record(self, values: dict[str, float], step: int) -> None:
        self.trackio.log(values, step=step)

    def close(self, outcome: Outcome) -> None:
        self.trackio.finish()  # it has no status


TRACKERS: dict[str, type[Tracker]] = {"wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}


def check_trackers(names: Iterable[str]) -> None:
    """Raise InputError if a tracker's package is absent, or its settings name a place that cannot be written."""
    for name in names:
        spec = importlib.util.find_spec(name) if name in TRACKERS else None
        if name in TRACKERS and (spec is None or spec.origin is None):  # the latter is a folder of that name
            raise InputError(
                f"crossbatch.log.to: given {name}, which is not installed; pip install {name} (or 'crossbatch[trackers]'), or "
                f"leave it out"
            )
        if name == "mlflow":
            _check_mlflow()


def _check_mlflow() -> None:
    """Raise InputError if MLflow's settings name a folder or a database file to which this MLflow does not write."""
    mlflow = importlib.import_module("mlflow")
    uri = mlflow.get_tracking_uri()
    if (uri.partition(":")[0] if ":" in uri else "file") not in ("file", "sqlite"):
        return  # a server, which may come back
    try:
        mlflow.MlflowClient()
    except Exception as error:  # from 3.17 on for folders; without sqlalchemy for sqlite
        raise InputError(
            f"crossbatch.log.to: mlflow cannot write to {uri}: {_reason(error)}; set MLFLOW_TRACKING_URI to a server or to "
            f"sqlite:///mlflow.db (for which mlflow-skinny is too little), or MLFLOW_ALLOW_FILE_STORE to true for a folder"
        ) from error


Lines = queue.Queue[tuple[dict[str, float], int] | Outcome]  # numbers of a step; at the end, how the run has ended


class Trackers:
    """Sends metrics to the trackers `names`, each in a thread; no method waits or raises, but `close` waits up to 30 s.

    Args:
        names: of `TRACKERS`; others are passed over.
        out: the run directory, which holds the trackers' names of the run.
        config: the resolved configuration.
        new: start new runs, instead of those that the run directory names.
        warn: is told once of a tracker that fails.
    """

    def __init__(
        self, names: Iterable[str], out: Path, config: Mapping[str, Any], new: bool, warn: Callable[[str], None]
    ):
        self._file, self._lock = out / RUNS, threading.Lock()
        self._runs: dict[str, str] = {}
        if not new:
            with contextlib.suppress(OSError, ValueError):  # none, or damaged: new runs
                self._runs = dict(json.loads(self._file.read_text(encoding="utf-8")))
        self._out, self._config, self._warn, self._closing = out, config, warn, threading.Event()
        self._threads: dict[str, tuple[threading.Thread, Lines]] = {}
        for name in dict.fromkeys(names):
            if name in TRACKERS:
                lines: Lines = queue.Queue(QUEUED)
                # A daemon: a service that does not answer must not keep the process from ending.
                thread = threading.Thread(target=self._send, args=(name, lines), name=f"tracker {name}", daemon=True)
                self._threads[name] = thread, lines
                thread.start()

    def record(self, values: Mapping[str, float], step: int) -> None:
        """Queue the numbers of a step for every tracker; a tracker that has a full queue does not get them."""
        for _, lines in self._threads.values():
            with contextlib.suppress(queue.Full):
                lines.put_nowait((dict(values), step))

    def close(self, outcome: Outcome) -> None:
        """Send what waits, for 30 s at most, and end the trackers' runs; may be called twice."""
        end = time.monotonic() + CLOSE_S
        self._closing.set()
        for _, lines in self._threads.values():
            with contextlib.suppress(queue.Full):
                lines.put_nowait(outcome)
        for name, (thread, _) in self._threads.items():
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                self._warn(f"{name} did not take the last metrics within {CLOSE_S:.0f} s; {self._out} has them all")
        self._threads = {}

    def _send(self, name: str, lines: Lines) -> None:
        try:
            tracker = TRACKERS[name]()
            run = tracker.open(self._out, self._runs.get(name), self._config)
            with self._lock:
                self._runs[name] = run
                write_atomically(self._file, json.dumps(self._runs) + "\n")
            tries = TRIES
            while not isinstance(line := lines.get(), str):
                tries = TRIES if self._deliver(name, tracker, line, tries) else 1
            tracker.close(line)
        except BaseException as error:  # wandb ends a process with SystemExit
            self._warn(
                f"{name} gets no more metrics: {_reason(error)}; training goes on, and metrics.jsonl has them all"
            )

    def _deliver(self, name: str, tracker: Tracker, line: tuple[dict[str, float], int], tries: int) -> bool:
        """Send a line, and return whether the service has taken it; warn of the first of several tries that fails."""
        for attempt in range(tries):
            try:
                tracker.record(*line)
            except BaseException as error:
                if attempt == 0 and tries > 1:
                    self._warn(
                        f"{name} does not take metrics: {_reason(error)}; they are sent again until it does, training goes on, "
                        f"and metrics.jsonl has them all"
                    )
                if self._closing.wait(min(LONGEST_PAUSE_S, 2.0**attempt)):
                    return False
            else:
                return True
        return False


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
