"""The folder `checkpoints/`: what lies there, and in which order files are touched.

A checkpoint is written under a name that starts with a dot, synced, renamed, and only then is `latest` moved and an older one
dropped, which is renamed to a dotted name before its files are deleted. So whatever has a plain name is complete, unless
somebody else touched it, and a crash between any two operations leaves the newest complete one in place.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from crossbatch import InputError
from crossbatch.engine.runtime.atomic_files import write_atomically

MANIFEST, CONFIG = "state.json", "config.json"


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the newest `newest`, and those whose step `every_steps` divides (0: none)."""

    newest: int
    every_steps: int = 0


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def candidates(out: Path, resume: str) -> list[Path]:
    """The checkpoints that `--resume` means, in the order in which to try them; empty for a run that starts anew.

    "auto" means those of `out`, newest first, "none" none, and a path a run or a single checkpoint.

    Raises InputError when there is none in what was named, or when "none" would overwrite a run.
    """
    if resume == "none":
        if (out / "metrics.jsonl").exists():
            raise InputError(
                f"--resume none: {out} already holds a run; resume it with --resume auto or choose another --out"
            )
        return []
    if resume == "auto":
        return _newest_first(out / "checkpoints")
    given = Path(resume)
    if given.name.startswith("step-") and given.is_dir():
        return [given]
    found = _newest_first(given / "checkpoints")
    if not found:
        raise InputError(
            f"--resume {resume}: {'no checkpoint in it' if given.exists() else 'no such path'}; allowed: auto, none, a run "
            f"directory with checkpoints/, or one of its checkpoints/step-N"
        )
    return found


def find(path: Path, key: str) -> Path:
    """The newest checkpoint of a run directory, or the one that `path` is. Raises InputError, naming `key`."""
    if (path / MANIFEST).is_file():
        return path
    found = _newest_first(path / "checkpoints")
    if not found:
        raise InputError(
            f"{key} {path}: {'no checkpoint in it' if path.exists() else 'no such path'}; allowed: a run directory with "
            f"checkpoints/, or one of its checkpoints/step-N"
        )
    return found[0]


def commit(aside: Path, folder: Path, step: int, keep: Keep) -> None:
    """Gives the finished checkpoint `aside` its name in `folder`, moves `latest`, and drops what is not to be kept."""
    target = folder / name_of(step)
    _sync(aside)
    if target.exists():  # of an earlier attempt at this step, which was not resumed from
        _remove(target)
    aside.rename(target)
    _sync(folder)
    write_atomically(folder / "latest", target.name + "\n")
    for old in _dropped(folder, step, keep):
        _remove(old)


def create_run_directory(out: Path) -> None:
    """Create the run directory `out` with its checkpoints/, and delete what interrupted saves left there.

    Raises InputError if that folder cannot be written.
    """
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        clean(out / "checkpoints")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}; choose a writable folder") from None


def clean(folder: Path) -> None:
    """Deletes what interrupted saves left."""
    for leftover in folder.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _newest_first(folder: Path) -> list[Path]:
    steps = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(steps, key=step_of, reverse=True)


def _dropped(folder: Path, step: int, keep: Keep) -> list[Path]:
    """Beside what `keep` does not cover: later ones, which belong to a run that was resumed from before them."""
    everything = _newest_first(folder)
    older = [path for path in everything if step_of(path) <= step]
    marked = [path for path in older if keep.every_steps and step_of(path) % keep.every_steps == 0]
    kept = [*older[: keep.newest], *marked]
    return [path for path in everything if path not in kept]


def _remove(checkpoint: Path) -> None:
    """A half-deleted checkpoint must not look like one."""
    away = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(away, ignore_errors=True)
    checkpoint.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
