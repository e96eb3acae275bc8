"""Draws confusion matrices, nearest neighbours and accuracy over epochs, as figures that need no display."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RIGHT, WRONG = "#1a9850", "#d73027"
NAMED = 40  # axes have class names up to this number of classes
WRITTEN = 20  # cells have numbers up to this number of classes


def confusion_counts(truth_M: np.ndarray, predictions_M: np.ndarray, num_classes: int) -> np.ndarray:
    """Count images by true class (row) and predicted class (column): int64 [num_classes, num_classes]."""
    cells = truth_M * num_classes + predictions_M
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def confusion_matrix(counts_KK: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Draw `counts_KK`, as `confusion_counts` returns them, in percent of the true class."""
    totals = counts_KK.sum(1, keepdims=True)
    percent = 100 * counts_KK / np.maximum(totals, 1)
    classes = len(names)
    side = 4 + 0.35 * min(classes, NAMED)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(shown, ax=axes, label="% of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if classes <= NAMED:
        axes.set_xticks(range(classes), names, rotation=90)
        axes.set_yticks(range(classes), names)
    if classes <= WRITTEN:
        for (row, column), value in np.ndenumerate(percent):
            if counts_KK[row, column]:
                colour = "white" if value > 55 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    return figure


def neighbour_grid(rows: Sequence[Sequence[tuple[np.ndarray, str, bool]]], title: str) -> Figure:
    """Draw rows of a query and its nearest training images.

    A cell is (uint8 [H, W, 3], the text above it, whether it is right): for the query, whether the vote was right; for the
    others, whether they are of its class. The frame is green or red accordingly.
    """
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(1.25 * columns + 0.4, 1.45 * len(rows) + 0.6), layout="constrained")
    for row, axes_row in zip(rows, figure.subplots(len(rows), columns, squeeze=False), strict=True):
        for axes, cell in zip(axes_row, [*row, *[None] * (columns - len(row))], strict=True):
            axes.set(xticks=[], yticks=[])
            if cell is None:
                axes.set_axis_off()
                continue
            pixels, text, right = cell
            axes.imshow(pixels, interpolation="nearest")
            axes.set_title(text, fontsize=7)
            for spine in axes.spines.values():
                spine.set(color=RIGHT if right else WRONG, linewidth=3)
    figure.suptitle(title, fontsize=9)
    return figure


def curves(lines: Mapping[str, Sequence[float]], epochs: Sequence[int], title: str) -> Figure:
    """Draw top-1 (percent) over epochs, with a line for each name."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in lines.items():
        axes.plot(epochs, values, marker="." if len(epochs) < 30 else None, label=name)
    axes.set(xlabel="epoch", ylabel="top-1 on the evaluation images (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def save(figure: Figure, file: Path) -> torch.Tensor:
    """Write a PNG and return its pixels, uint8 [3, H, W], for TensorBoard."""
    canvas = FigureCanvasAgg(figure)
    figure.savefig(file, dpi=110)
    figure.set_dpi(110)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).permute(2, 0, 1)
