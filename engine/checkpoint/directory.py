"""Finds, keeps and drops checkpoints in `checkpoints/`, and touches files in an order that survives crashes.

A checkpoint is written under a name that starts with a dot, synced, and renamed. Only then does `latest` move, and an older
checkpoint goes: it is renamed to a dotted name before its files are deleted. So whatever has a plain name is complete, unless
somebody else touched it, and a crash between any two operations leaves the newest complete checkpoint in place.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from crossbatch import InputError
from crossbatch.engine.runtime.atomic_files import sync, write_atomically

MANIFEST, CONFIG = "state.json", "config.json"


@dataclass(frozen=True)
class Keep:
    """Says which checkpoints stay: the last `newest` ones, and every one at a multiple of `every_steps` (0: none)."""

    newest: int
    every_steps: int = 0


def name_of(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def candidates(out: Path, resume: str) -> list[Path]:
    """Return the checkpoints to resume from, in the order in which to try them; none for a run that starts anew.

    Args:
        out: the run directory.
        resume: the value of `--resume`: "auto" for the checkpoints of `out`, newest first; "none"; or the path of another run
            directory or of a single checkpoint.

    Raises:
        InputError: if there is no checkpoint at the path, or if `resume` is "none" and `out` already holds a run.
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
    return _found_in(given, "--resume", "auto, none, ")


def find(path: Path, key: str) -> Path:
    """Return the newest checkpoint of a run directory, or `path` if it is one itself. Raises InputError that names `key`."""
    return path if (path / MANIFEST).is_file() else _found_in(path, key)[0]


def _found_in(run: Path, key: str, also_allowed: str = "") -> list[Path]:
    """Return the checkpoints of a run directory, newest first; raise InputError that names `key` if there are none."""
    found = _newest_first(run / "checkpoints")
    if not found:
        raise InputError(
            f"{key} {run}: {'no checkpoint in it' if run.exists() else 'no such path'}; allowed: {also_allowed}a run directory "
            f"with checkpoints/, or one of its checkpoints/step-N"
        )
    return found


def _newest_first(directory: Path) -> list[Path]:
    if not directory.exists():
        return []
    try:
        found = list(directory.iterdir())  # glob takes a folder that cannot be read for an empty one
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be read: {error.strerror}; make it readable, or name another run directory"
        ) from None
    steps = [path for path in found if path.name.startswith("step-") and path.name[5:].isdecimal()]
    return sorted(steps, key=step_of, reverse=True)


def create_run_directory(out: Path) -> None:
    """Create the run directory `out` with its checkpoints/, and delete what interrupted saves left there.

    Raises InputError if that folder cannot be written.
    """
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        for leftover in (out / "checkpoints").glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}; choose a writable folder") from None


def commit(aside: Path, directory: Path, step: int, keep: Keep) -> None:
    """Give the finished checkpoint `aside` its name in `directory`, move `latest`, and drop checkpoints that are not kept.

    Checkpoints of later steps go, too: they belong to a history that this run was resumed from before.
    """
    target = directory / name_of(step)
    sync(aside)
    if target.exists():  # from an earlier attempt that was not resumed from
        _remove(target)
    aside.rename(target)
    sync(directory)
    write_atomically(directory / "latest", target.name + "\n")
    everything = _newest_first(directory)
    until_now = [path for path in everything if step_of(path) <= step]
    kept = until_now[: keep.newest]
    kept += [path for path in until_now if keep.every_steps and step_of(path) % keep.every_steps == 0]
    for old in everything:
        if old not in kept:
            _remove(old)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint under another name, so that a half-deleted one does not look complete."""
    away = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(away, ignore_errors=True)
    checkpoint.rename(away)
    shutil.rmtree(away, ignore_errors=True)
