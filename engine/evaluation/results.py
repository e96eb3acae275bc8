"""What an evaluation leaves behind: results.json and pictures. For rank 0."""

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
NAMED = 10  # broken images of a rank


def create_output_dir(out: Path, kind: str) -> None:
    """Makes the folder. Raises InputError if it holds something else than an earlier result of that kind, knn or linear."""
    if (out / "checkpoints").exists() or _kind(out) not in (None, kind):
        raise InputError(f"--out {out}: already holds a run of another kind; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}; choose a writable folder") from None


def _kind(out: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((out / RESULTS).read_text(encoding="utf-8")).get("command")
    return None


def write_results(out: Path, results: dict[str, Any]) -> None:
    versions = {"crossbatch": __version__, "torch": torch.__version__}
    write_atomically(out / RESULTS, json.dumps({**results, "versions": versions}, indent=2) + "\n")


def save_figures(out: Path, figures: dict[str, Figure], step: int = 0) -> None:
    """Each figure as NAME.png and in TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(out))
    for name, figure in figures.items():
        board.add_image(name, pictures.save(figure, out / f"{name}.png"), step)
    board.close()


def log_skipped_images(names: Iterable[str]) -> None:
    """Of this rank."""
    for name in list(names)[:NAMED]:
        print(f"skipped a broken image: {name}", flush=True)


@contextlib.contextmanager
def progress_bar(what: str, total: int, visible: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over images on a terminal; yields what to call with the number of images done."""
    console = Console(stderr=True)
    if not (visible and console.is_terminal):
        yield lambda images: None
        return
    with Progress(console=console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda images: bar.advance(task, images)
