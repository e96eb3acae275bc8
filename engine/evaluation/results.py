"""Writes results.json and pictures of an evaluation; all but `log_skipped_images` and `progress_bar` is for rank 0."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from crossbatch import InputError, __version__
from crossbatch.engine.evaluation import pictures
from crossbatch.engine.runtime.atomic_files import write_atomically

RESULTS = "results.json"
NAMED = 10  # broken images that a rank names


def create_output_dir(out: Path, kind: str) -> None:
    """Create the folder. Raises InputError if it holds anything but an earlier result of `kind`, "knn" or "linear"."""
    if (out / "checkpoints").exists() or _kind(out) not in (None, kind):
        raise InputError(f"--out {out}: already holds a run of another kind; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}; choose a writable folder") from None


def _kind(out: Path) -> str | None:
    """Return the command that wrote the results in `out`, or None."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((out / RESULTS).read_text(encoding="utf-8")).get("command")
    return None


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Write results.json, with the versions of crossbatch and torch."""
    versions = {"crossbatch": __version__, "torch": torch.__version__}
    write_atomically(out / RESULTS, json.dumps({**results, "versions": versions}, indent=2) + "\n")


def save_figures(out: Path, figures: dict[str, Figure], step: int = 0) -> None:
    """Save each figure as NAME.png and in TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(out))
    for name, figure in figures.items():
        board.add_image(name, pictures.save(figure, out / f"{name}.png"), step)
    board.close()


def log_skipped_images(names: Iterable[str]) -> None:
    """Print the names of the first broken images of this rank."""
    for name in list(names)[:NAMED]:
        print(f"skipped a broken image: {name}", flush=True)


@contextlib.contextmanager
def progress_bar(what: str, total: int, visible: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar over images on a terminal; yield a function to call with the number of images just done."""
    console = Console(stderr=True)
    if not (visible and console.is_terminal):
        yield lambda images: None
        return
    with Progress(console=console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda images: bar.advance(task, images)
