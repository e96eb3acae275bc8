"""Checkpoints that fit any world size and backend: full tensors by name, gathered on rank 0.

    checkpoints/
      step-00001200/state.pt     parameters, buffers, optimizer, progress; read with weights_only
      step-00001200/config.json  the resolved configuration
      latest                     the name of the newest complete one

A checkpoint is written under a temporary name, synced and renamed, then `latest` is replaced; a crash between any two of these
leaves the one before. The position in the data, the schedules and all random numbers follow from the step.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from crossbatch import InputError
from crossbatch.engine.distributed import barrier
from crossbatch.engine.sharding import Backend, Held

FORMAT = 1


def save(folder: Path, backend: Backend, progress: dict[str, Any], config: dict[str, Any], keep: int) -> None:
    """Writes `folder`/step-N on rank 0 and drops all but the newest `keep`; every rank must call it.

    `progress` is what `load` returns; it holds at least `step` (N) and `updates` (of the optimizer).
    """
    state = {
        "format": FORMAT,
        "progress": progress,
        "parameters": {name: _gather(held) for name, held in backend.parameters_held().items()},
        "buffers": {name: _gather(held) for name, held in backend.buffers_held().items()},
        "optimizer": {
            name: {key: _gather(held) for key, held in state.items()}
            for name, state in backend.optimizer_held().items()
        },
    }
    if dist.get_rank() == 0:
        target = folder / f"step-{progress['step']:08d}"
        temporary = folder / f".{target.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with (temporary / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        write_atomically(temporary / "config.json", json.dumps(config, indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        write_atomically(folder / "latest", target.name + "\n")
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    barrier()


def load(checkpoint: Path, backend: Backend) -> dict[str, Any]:
    """Fills the backend from `checkpoint` (a step-N folder) and returns its progress; every rank must call it.

    Raises:
        InputError: when the file is unreadable or its tensors are not the model's.
    """
    try:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise InputError(f"--resume {checkpoint}: cannot be read as a checkpoint: {error}") from None
    held: list[tuple[str, dict[str, Held]]] = [
        ("parameters", backend.parameters_held()),
        ("buffers", backend.buffers_held()),
        *((name, tensors) for name, tensors in backend.optimizer_held().items()),
    ]
    sources = [state["parameters"], state["buffers"], *(state["optimizer"].get(name, {}) for name, _ in held[2:])]
    for (part, tensors), source in zip(held, sources, strict=True):
        _check_names(checkpoint, part, tensors, source)
        for name, target in tensors.items():
            full = source[name].view(-1)
            for piece in target.pieces:
                piece.local.copy_(full[piece.start : piece.start + piece.local.numel()])
    backend.loaded(state["progress"]["updates"])
    return state["progress"]


def find(out: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` means: "auto" the newest of `out` or None, "none" None, else a run or a checkpoint.

    Asked on rank 0 only. Raises InputError when there is none to find or when "none" would overwrite a run.
    """
    if resume == "none":
        if (out / "metrics.jsonl").exists():
            raise InputError(
                f"--resume none: {out} already holds a run; resume it with --resume auto or choose another --out"
            )
        return None
    if resume == "auto":
        return _newest(out / "checkpoints")
    given = Path(resume)
    if (given / "state.pt").exists():
        return given
    found = _newest(given / "checkpoints")
    if found is None:
        raise InputError(
            f"--resume {resume}: {'no checkpoint in it' if given.exists() else 'no such path'}; allowed: auto, none, a run "
            f"directory with checkpoints/, or one of its checkpoints/step-N"
        )
    return found


def write_atomically(path: Path, text: str) -> None:
    """Either the old or the new content is there after a crash."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _newest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    complete = [p for p in sorted(folder.glob("step-*")) if (p / "state.pt").exists() and (p / "config.json").exists()]
    return complete[-1] if complete else None


def _gather(held: Held) -> torch.Tensor | None:
    """The full tensor on rank 0, None elsewhere."""
    if held.replicated:
        return held.pieces[0].local.detach().cpu().view(held.shape).clone() if dist.get_rank() == 0 else None
    full = torch.zeros(held.shape.numel(), device=_device())
    for piece in held.pieces:
        full[piece.start : piece.start + piece.local.numel()] = piece.local
    dist.reduce(full, dst=0)  # the runs are disjoint: adding zeros is exact
    return full.cpu().view(held.shape) if dist.get_rank() == 0 else None


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _check_names(checkpoint: Path, part: str, ours: dict[str, Held], theirs: dict[str, Any]) -> None:
    missing, unexpected = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    wrong = [name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape]
    if missing or unexpected or wrong:
        raise InputError(
            f"--resume {checkpoint}: is of another model or optimizer ({part}: {len(missing)} missing {missing[:2]}, "
            f"{len(unexpected)} unexpected {unexpected[:2]}, {len(wrong)} of another shape {wrong[:2]}); "
            f"resume with the configuration in {checkpoint / 'config.json'}"
        )
