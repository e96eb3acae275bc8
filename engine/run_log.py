"""Reports a run: metrics.jsonl for programs, TensorBoard for curves and pictures, a progress bar and a table for a person.

`RunLog` is the log of rank 0; `Log` does nothing and takes its place on the other ranks. A disk that is full or has become
read-only does not stop training: lines of metrics wait in memory until they can be written, TensorBoard misses what was logged
meanwhile.
"""

import contextlib
import json
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from crossbatch.engine.config.evaluation import FrozenModelConfig
from crossbatch.engine.nested import flatten
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.engine.runtime.output import console
from crossbatch.engine.trackers import Outcome, Trackers

METRICS = "metrics.jsonl"  # in the run directory
STOPPED = "stopped.json"  # there, too, if a signal ended the run before its last step: {"signal": ..., "step": ...}
BOARD = "TensorBoard"
SCORES = {"knn_top1": "k-NN top-1", "top1": "top-1", "average_top1": "top-1 of the moving average"}  # percentages
# Of features, without labels.
QUALITY = {"rankme": "RankMe", "effective_rank": "effective rank", "alignment": "alignment", "uniformity": "uniformity"}
SCORE_FORMATS = {
    **{name: f"{label} {{:.2f}} %" for name, label in SCORES.items()},
    **{name: f"{label} {{:.3g}}" for name, label in QUALITY.items()},
}
STATUS_FORMATS = {"loss": "loss {:.4f}", "lr": "lr {:.3g}", "images_per_s": "{:.0f} images/s", **SCORE_FORMATS}


def command(name: str, model: FrozenModelConfig, data: str | None, *more: str) -> str:
    """Return the command line that runs `name` ("knn", "linear", ...) on the same network and data."""
    network = ["--checkpoint", str(model.checkpoint), *(["-a", model.arch] if model.arch else [])]
    if model.encoder != FrozenModelConfig().encoder:
        network.append(f"--set=crossbatch.model.encoder={model.encoder}")
    return shlex.join([*_start(name), *network, "--data", str(data), *more])


def replay_command(out: Path, step: int) -> str:
    """Return the command line that replays a step of the run in `out`, and says what went wrong in it first."""
    return shlex.join([*_start("replay"), "--run", str(out), "--step", str(step)])


def _start(name: str) -> list[str]:
    """Return how to start a command: as a script where the working directory is a checkout, else as `crossbatch NAME`."""
    script = Path("launch") / f"{name}.py"
    return ["python", str(script)] if script.is_file() else ["crossbatch", name]


def print_summary(rows: list[tuple[str, str]], commands: list[str], out: Path, has_board: bool = True) -> None:
    """Print a table, and the commands to type next; with `has_board`, the last one starts TensorBoard on `out`."""
    printer = console()
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # paths are to be copied
    for name, value in rows:
        table.add_row(name, value)
    printer.print(table)
    commands = [*commands, *([shlex.join(["tensorboard", "--logdir", str(out)])] if has_board else [])]
    for line in ["next:", *(f"  {line}" for line in commands)] if commands else []:
        printer.print(line, soft_wrap=True)


class Log:
    """Takes the place of `RunLog` on ranks other than 0, and does nothing."""

    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def record(self, values: dict[str, Any]) -> None: ...
    def complete(self, line: dict[str, Any] | None) -> None: ...
    def has_scores(self, step: int) -> bool:
        return False

    def scalars(self, values: dict[str, float], step: int) -> None: ...
    def advance(self, step: int) -> None: ...
    def first_views(self, views: torch.Tensor) -> None: ...
    def summary(self, rows: list[tuple[str, str]], commands: list[str]) -> None: ...
    def stopped(self, signal_name: str, step: int) -> None: ...
    def failed(self) -> None: ...
    def close(self) -> None: ...


class RunLog(Log):
    """Writes the log of a run directory, on rank 0.

    Args:
        out: the run directory.
        first_step: optimizer steps already done; lines of later steps are dropped, because these steps are repeated.
        last_step: the step at which the progress bar is full.
        to: where metrics go besides metrics.jsonl: "tensorboard", and trackers of `engine.trackers`.
        config: the resolved configuration, for the trackers.
    """

    def __init__(
        self,
        out: Path,
        first_step: int,
        last_step: int,
        to: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ):
        self.console = console()
        (out / STOPPED).unlink(missing_ok=True)
        # The last line, and where it begins in the file; None where that is unknown.
        self.last, self.begin = _drop_lines_after(first_step, out / METRICS)
        self.metrics = None  # the file, from the first line on
        self.waiting = b""  # lines of metrics that could not be written yet
        self.out, self.last_step = out, last_step
        self.board, self.purge_step = None, first_step + 1 if first_step else None
        self.has_board = "tensorboard" in to
        self.failing: set[str] = set()  # of metrics.jsonl, TensorBoard
        self.trackers = Trackers(to, out, config or {}, not first_step, self.warn)
        self.outcome: Outcome = "finished"
        self.bar = Progress(
            TextColumn("{task.fields[epoch]}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task("", total=last_step, completed=first_step, status="", epoch="starting")
        if self.console.is_terminal:
            self.bar.start()

    def note(self, text: str) -> None:
        """Print a line above the progress bar."""
        with contextlib.suppress(OSError):  # a full disk; for streams that `protect_streams` has not replaced
            self.console.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.note(f"warning: {text}")

    def record(self, values: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, show every number of it in TensorBoard, and print the most important ones.

        If the last line is of the same step, the values are added to that line.
        """
        replaces = self.last.get("step") == values["step"]
        self.last = {**self.last, **values} if replaces else values
        line = json.dumps(self.last).encode() + b"\n"
        begin, self.begin = self.begin if replaces and not self.waiting else None, None
        self.waiting += line
        with self._warning_if_full(METRICS):
            self.metrics = self.metrics or (self.out / METRICS).open("ab", buffering=0)
            if begin is not None:
                self.metrics.truncate(begin)
            begin = (self.out / METRICS).stat().st_size + len(self.waiting) - len(line)
            while self.waiting:
                self.waiting = self.waiting[self.metrics.write(self.waiting) :]
            self.begin = begin
        numbers = {name: value for name, value in flatten(values, "/").items() if isinstance(value, (int, float))}
        self.trackers.record(numbers, values["step"])
        for name in ("step", "epoch", "images_seen"):
            numbers.pop(name)
        self.scalars({name if "/" in name else f"run/{name}": value for name, value in numbers.items()}, values["step"])
        status = _formatted(values, STATUS_FORMATS)
        if self.console.is_terminal:
            self.bar.update(self.task, status=status, epoch=f"epoch {values['epoch']:.2f}")
            if scores := _formatted(values, SCORE_FORMATS):
                self.note(f"step {values['step']}: {scores}")
        else:
            self.note(f"step {values['step']}/{self.last_step}  epoch {values['epoch']:.2f}  {status}")

    def complete(self, line: dict[str, Any] | None) -> None:
        """Record the line of a step, if there is one, which the rank that should have written it did not live to write."""
        if line and self.last.get("step") != line["step"]:
            self.record(line)

    def has_scores(self, step: int) -> bool:
        """Return whether the last line is that of `step`, with the scores of an evaluation."""
        return self.last.get("step") == step and bool(SCORE_FORMATS.keys() & self.last.keys())

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Show numbers in TensorBoard only, by name."""
        with self._warning_if_full(BOARD):
            for name, value in values.items() if self.has_board else ():
                self._open_board().add_scalar(name, value, step)

    def advance(self, step: int) -> None:
        """Move the progress bar to `step` steps."""
        self.bar.update(self.task, completed=step)

    def first_views(self, views: torch.Tensor) -> None:
        """Show 16 images of the uint8 views [v, n, C, H, W] of the first batch in TensorBoard, an image's views in a column.

        Of more channels than three, the first three are the colours; of two, the first is the brightness.
        """
        from torchvision.utils import make_grid

        if not self.has_board:
            return
        views = views[:, :, : 3 if views.shape[2] >= 3 else 1]
        rows = [row for some in zip(*(view[:16].split(8) for view in views), strict=True) for row in some]
        with self._warning_if_full(BOARD):
            self._open_board().add_image("views", make_grid(torch.cat(rows), nrow=8, pad_value=255), 0)
            self._open_board().flush()

    def summary(self, rows: list[tuple[str, str]], commands: list[str]) -> None:
        """Close the log, and print the last table and the commands to type next."""
        self.close()
        print_summary(rows, commands, self.out, self.has_board)

    def stopped(self, signal_name: str, step: int) -> None:
        """Write the file that marks the run as interrupted and resumable, and let the trackers know when the log closes."""
        self.outcome = "stopped"
        with self._warning_if_full(STOPPED):
            write_atomically(self.out / STOPPED, json.dumps({"signal": signal_name, "step": step}) + "\n")

    def failed(self) -> None:
        """Let the trackers know, when the log closes, that the run has failed."""
        self.outcome = "failed"

    def close(self) -> None:
        """End the progress bar and close the files; may be called twice."""
        self.bar.live.stop()
        self.trackers.close(self.outcome)
        if self.metrics is not None:
            self.metrics.close()
        if self.board is not None:
            with self._warning_if_full(BOARD):
                self.board.close()
            self.board = None

    def _open_board(self):
        """Return TensorBoard's writer; a new one if the last one failed, because it would keep failing."""
        from torch.utils.tensorboard import SummaryWriter

        if self.board is None:
            self.board = SummaryWriter(str(self.out), purge_step=self.purge_step)
            self.purge_step = None
        return self.board

    @contextlib.contextmanager
    def _warning_if_full(self, what: str) -> Iterator[None]:
        """Warn once, instead of raising, if the block cannot write `what`: training matters more than its log."""
        try:
            yield
            self.failing.discard(what)
        except OSError as error:
            if what == BOARD:
                self.board = None
            if what not in self.failing:
                self.warn(f"{what} cannot be written: {error}; training goes on")
            self.failing.add(what)


def _drop_lines_after(step: int, file: Path) -> tuple[dict[str, Any], int | None]:
    """Remove the metrics of steps after `step`, which will come again, and a line that a crash has cut off.

    Returns the last line that stays, and where it begins.
    """

    def parse(line: str) -> dict[str, Any]:
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            return {"step": math.inf}

    if not file.exists():
        return {}, None
    kept = [line for line in file.read_text(encoding="utf-8").splitlines() if parse(line)["step"] <= step]
    write_atomically(file, "".join(line + "\n" for line in kept))
    return (parse(kept[-1]), file.stat().st_size - len(kept[-1].encode()) - 1) if kept else ({}, None)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Return the lines of the metrics of a run directory, without one that a crash has cut off. Raises OSError."""
    lines = []
    for text in (out / METRICS).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def finite_or_none(value: float) -> float | None:
    """Return `value`, or None if it is infinite or NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def _formatted(values: Mapping[str, Any], formats: Mapping[str, str]) -> str:
    return "  ".join(text.format(values[name]) for name, text in formats.items() if values.get(name) is not None)


def score_rows(step: int, found: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return rows of the closing table for what an evaluation found at `step`: one for each percentage, one for the rest."""
    rows = [(f"{SCORES[name]} at step {step}", f"{found[name]:.2f} %") for name in SCORES if name in found]
    without_labels = _formatted(found, {name: SCORE_FORMATS[name] for name in QUALITY})
    return [*rows, *([(f"features at step {step}", without_labels)] if without_labels else [])]


class StepClock:
    """Measures the wall time between two log lines, and how much of it was spent waiting for data.

    Evaluation and saving do not count: the caller restarts the clock after an evaluation, and reports a save with `paused`.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start measuring anew."""
        self.steps, self.wait_s, self.paused_s = 0, 0.0, 0.0
        self.start = time.perf_counter()

    def waited(self, since: float) -> None:
        """Count one step, and the time from `since` (of time.perf_counter) until now as waiting for its batch."""
        self.last_wait_s = time.perf_counter() - since
        self.wait_s += self.last_wait_s
        self.steps += 1

    def paused(self, since: float) -> None:
        """Leave out the time from `since` until now."""
        self.paused_s += time.perf_counter() - since

    def reading(self, batch: int) -> dict[str, float]:
        """Return images/s for a global batch of `batch` images, and milliseconds a step, since the last `restart`."""
        step_s = (time.perf_counter() - self.start - self.paused_s) / max(self.steps, 1)
        return {
            "images_per_s": batch / step_s,
            "data_wait_ms": 1000 * self.wait_s / max(self.steps, 1),
            "step_ms": 1000 * step_s,
        }
