"""What a run tells: metrics.jsonl for programs, TensorBoard for curves and pictures, a progress bar and a table for a person.

`Log` says nothing and stands in for the ranks other than 0; `RunLog` is rank 0's.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class Log:
    """Says nothing."""

    def note(self, text: str) -> None: ...

    def record(self, values: dict[str, Any]) -> None: ...

    def advance(self, step: int) -> None: ...

    def pictures(self, tag: str, images: torch.Tensor, step: int) -> None: ...

    def summary(self, rows: list[tuple[str, str]], commands: list[str]) -> None: ...

    def close(self) -> None: ...


class RunLog(Log):
    """Rank 0's log of one run directory.

    Args:
        out: the run directory.
        first_step: optimizer steps already done; later lines of an interrupted run are dropped, because they come again.
        last_step: the step at which the progress bar is full.
    """

    def __init__(self, out: Path, first_step: int, last_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.console = Console(highlight=False)
        self._drop_after(out / "metrics.jsonl", first_step)
        self.file = (out / "metrics.jsonl").open("a", encoding="utf-8")
        self.board = SummaryWriter(str(out), purge_step=first_step + 1 if first_step else None)
        self.last_step = last_step
        self.bar = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.fields[epoch]}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=last_step, completed=first_step, status="", epoch="starting")
            self.bar.start()

    @staticmethod
    def _drop_after(path: Path, step: int) -> None:
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def record(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and every number of it as a TensorBoard scalar."""
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        for name, value in _flat(values):
            if isinstance(value, (int, float)) and name not in ("step", "epoch", "images_seen"):
                self.board.add_scalar(name if "/" in name else f"run/{name}", value, values["step"])
        status = _status(values)
        if self.bar is not None:
            self.bar.update(self.task, status=status, epoch=f"epoch {values['epoch']:.2f}")
            if "knn_top1" in values:
                self.note(f"step {values['step']}: k-NN top-1 {values['knn_top1']:.2f} %")
        else:
            self.note(f"step {values['step']}/{self.last_step}  epoch {values['epoch']:.2f}  {status}")

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def pictures(self, tag: str, images: torch.Tensor, step: int) -> None:
        """A uint8 image [3, H, W] for TensorBoard."""
        self.board.add_image(tag, images, step)
        self.board.flush()

    def summary(self, rows: list[tuple[str, str]], commands: list[str]) -> None:
        """The closing table, and what to type next."""
        self.close()
        table = Table(show_header=False)
        for name, value in rows:
            table.add_row(name, value)
        self.console.print(table)
        self.note("next:")
        for command in commands:
            self.note(f"  {command}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        self.file.close()
        self.board.close()


class StepClock:
    """Wall time between two log lines, split into waiting for data and the rest; evaluation and saving are left out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.steps, self.wait_s, self.paused_s = 0, 0.0, 0.0
        self.start = time.perf_counter()

    def waited(self, since: float) -> None:
        self.wait_s += time.perf_counter() - since
        self.steps += 1

    def paused(self, since: float) -> None:
        self.paused_s += time.perf_counter() - since

    def reading(self, batch: int) -> dict[str, float]:
        """images/s of the global batch and milliseconds a step, since the last `restart`."""
        step_s = (time.perf_counter() - self.start - self.paused_s) / max(self.steps, 1)
        return {
            "images_per_s": batch / step_s,
            "data_wait_ms": 1000 * self.wait_s / max(self.steps, 1),
            "step_ms": 1000 * step_s,
        }


def _step_of(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return 2**62  # a line cut off by a crash is dropped


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for name, value in values.items():
        rows += _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else [(prefix + name, value)]
    return rows


def _status(values: dict[str, Any]) -> str:
    formats = {"loss": "loss {:.4f}", "lr": "lr {:.3g}", "images_per_s": "{:.0f} images/s", "knn_top1": "k-NN {:.2f} %"}
    return "  ".join(text.format(values[name]) for name, text in formats.items() if name in values)
