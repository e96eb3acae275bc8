"""What an evaluation looks like: confusion matrix, nearest neighbours, accuracy over epochs. Figures without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RIGHT, WRONG = "#1a9850", "#d73027"
NAMED = 40  # classes up to which axes carry names
WRITTEN = 20  # classes up to which cells carry numbers


def confusion_counts(truth_M: np.ndarray, predictions_M: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [num_classes, num_classes]: rows are true classes, columns predicted ones."""
    cells = truth_M * num_classes + predictions_M
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def confusion_matrix(counts_KK: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """`counts_KK[t, p]` images of class t were called p; shown in percent of their class."""
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
    """A query and its nearest training images in each row: (uint8 [H, W, 3], what stands above, whether it is right).

    The query's frame says whether the vote was right, those of the others whether they are of its class.
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
    """Top-1 (percent) over epochs, a line for each name."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in lines.items():
        axes.plot(epochs, values, marker="." if len(epochs) < 30 else None, label=name)
    axes.set(xlabel="epoch", ylabel="top-1 on the evaluation images (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def save(figure: Figure, file: Path) -> torch.Tensor:
    """Writes a PNG; returns its pixels, uint8 [3, H, W], for TensorBoard."""
    canvas = FigureCanvasAgg(figure)
    figure.savefig(file, dpi=110)
    figure.set_dpi(110)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).permute(2, 0, 1)
