"""Writes what an evaluation leaves behind, on rank 0: results.json, and figures as PNG files and in TensorBoard."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from crossbatch import InputError, __version__
from crossbatch.engine.runtime.atomic_files import write_atomically

RESULTS = "results.json"
DPI = 110
RIGHT, WRONG = "#1a9850", "#d73027"
MAX_DRAWN_CLASSES = 1000  # rows of a confusion matrix
MAX_NAMED_CLASSES, MAX_NUMBERED_CLASSES = 40, 20  # with more, axes have no class names, and cells no numbers


def create_output_dir(out: Path, kind: str) -> None:
    """Create the folder. Raises InputError if it holds anything but an earlier result of `kind`, "knn" or "linear"."""
    held = kind
    with contextlib.suppress(OSError, ValueError):  # no results, or none that can be read
        held = json.loads((out / RESULTS).read_text(encoding="utf-8")).get("command", kind)
    if (out / "checkpoints").exists() or held != kind:
        raise InputError(f"--out {out}: already holds a run of another kind; choose another folder")
    out.mkdir(parents=True, exist_ok=True)


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Write results.json, with the versions of crossbatch and torch."""
    versions = {"crossbatch": __version__, "torch": torch.__version__}
    write_atomically(out / RESULTS, json.dumps({**results, "versions": versions}, indent=2) + "\n")


def save_figures(out: Path, figures: dict[str, Callable[[], Figure]], step: int = 0) -> None:
    """Draw each figure, and save it as NAME.png and in TensorBoard. What fails is left out with a warning."""
    from torch.utils.tensorboard import SummaryWriter

    drawn: dict[str, np.ndarray] = {}  # `savefig` and `add_figure` would each draw it anew
    for name, draw in figures.items():
        with _warning(f"{name}.png"):
            canvas = FigureCanvasAgg(draw())
            canvas.draw()
            drawn[name] = np.asarray(canvas.buffer_rgba())[..., :3]
            Image.fromarray(drawn[name]).save(out / f"{name}.png", dpi=(DPI, DPI))
    with _warning("TensorBoard"), SummaryWriter(str(out)) as board:
        for name, pixels in drawn.items():
            board.add_image(name, pixels, step, dataformats="HWC")


@contextlib.contextmanager
def _warning(what: str) -> Iterator[None]:
    """Warn, instead of raising, if `what` fails: the numbers are written, and the command has done its work."""
    try:
        yield
    except Exception as error:
        print(f"warning: {what} is left out: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def confusion_matrix(truth_M: np.ndarray, predictions_M: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Draw how many of the images of a class (row) were predicted as each class (column), in percent of the row.

    With more classes than the picture has pixels, a row and a column stand for several classes that follow each other.
    """
    together = -(-len(names) // MAX_DRAWN_CLASSES)
    classes = -(-len(names) // together)
    truth_M, predictions_M = truth_M // together, predictions_M // together
    counts_KK = np.bincount(truth_M * classes + predictions_M, minlength=classes**2).reshape(classes, classes)
    percent = 100 * counts_KK / np.maximum(counts_KK.sum(1, keepdims=True), 1)
    side = 4 + 0.35 * min(classes, MAX_NAMED_CLASSES)
    figure = Figure(figsize=(side + 1, side), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(shown, ax=axes, label="% of the true class", shrink=0.8)
    unit = f" (groups of {together} classes)" if together > 1 else ""
    axes.set(xlabel=f"predicted{unit}", ylabel=f"true{unit}", title=title)
    if classes <= MAX_NAMED_CLASSES:
        labels = [_plain(name) for name in names]
        axes.set_xticks(range(classes), labels, rotation=90)
        axes.set_yticks(range(classes), labels)
    if classes <= MAX_NUMBERED_CLASSES:
        for (row, column), value in np.ndenumerate(percent):
            if value:
                colour = "white" if value > 55 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    return figure


def _plain(text: str) -> str:
    """Return a name as matplotlib takes it: it reads $...$ as a formula, and cannot draw what is not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def neighbour_grid(rows: Sequence[Sequence[tuple[np.ndarray, str, bool]]], title: str) -> Figure:
    """Draw rows of a query and its nearest training images.

    A cell is (uint8 [H, W, C], the text above it, whether it is right): for the query, whether the vote was right; for the
    others, whether they are of its class. The frame is green or red accordingly. Of more channels than three, the first three
    are the colours; of two, the first is the brightness.
    """
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(1.25 * columns + 0.4, 1.45 * len(rows) + 0.6), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for row, axes_row in zip(rows, grid, strict=True):
        for (pixels, text, right), axes in zip(row, axes_row, strict=False):
            gray = {} if pixels.shape[2] >= 3 else {"cmap": "gray", "vmin": 0, "vmax": 255}
            axes.imshow(pixels[..., : 1 if gray else 3], interpolation="nearest", **gray)
            axes.set_title(_plain(text), fontsize=7)
            for spine in axes.spines.values():
                spine.set(color=RIGHT if right else WRONG, linewidth=3)
        for axes in axes_row[len(row) :]:
            axes.set_axis_off()
    figure.suptitle(title, fontsize=9)
    return figure


def curves(lines: Mapping[str, Sequence[float]], epochs: Sequence[int], title: str) -> Figure:
    """Draw top-1 (percent) over epochs, with a line for each name."""
    figure = Figure(figsize=(7, 4.5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for name, values in lines.items():
        axes.plot(epochs, values, marker="." if len(epochs) < 30 else None, label=name)
    axes.set(xlabel="epoch", ylabel="top-1 on the evaluation images (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
