"""Writes and reads the file that an interrupted linear probe goes on from, and refuses that of another probe."""

from pathlib import Path
from typing import Any

import torch

from crossbatch import InputError, RunStopped
from crossbatch.data import Source
from crossbatch.engine.checkpoint.changes import fixed_values
from crossbatch.engine.config import to_dict
from crossbatch.engine.config.evaluation import LinearConfig
from crossbatch.engine.datasets import checksum
from crossbatch.engine.pretrained.files import read_torch, write_file
from crossbatch.engine.pretrained.weights import PROBE, PROBE_FILE
from crossbatch.engine.run_log import Log
from crossbatch.engine.runtime.distributed import on_main

CHECKSUM = "checksum of names and labels"


def identity(config: LinearConfig, train: Source) -> dict[str, Any]:
    """Return, by key path, all that must stay as it is when the probe is resumed on the images `train`."""
    counts = {"images": len(train), "classes": len(train.class_names), CHECKSUM: checksum(train)}
    return {**fixed_values(to_dict(config), LinearConfig), **counts}


def save_probe(out: Path, content: dict[str, Any], log: Log, is_last: bool) -> None:
    """Save the probe on rank 0. If that fails, warn, or raise RunStopped after the last epoch, on all ranks.

    Args:
        out: the folder of the probe.
        content: "history", "identity", "backbone" (the fingerprint), "class_names", and the state of the probe.
    """
    content = {"kind": PROBE, **content}
    try:
        on_main(lambda: write_file(out / PROBE_FILE, lambda path: torch.save(content, path), "--out"))
    except InputError as error:
        if is_last:
            raise RunStopped(f"the probe could not be saved: {error}") from None
        log.warn(f"the probe was not saved after epoch {len(content['history'])}: {error}")


def read_probe(resume: str, out: Path, identity: dict[str, Any], fingerprint: str) -> dict[str, Any] | None:
    """Return the content of the probe that `resume` means; None to start anew.

    "auto" is the probe in `out`, if there is one; "none" starts anew; anything else is a file, or the folder that holds it.

    Raises:
        InputError: if that is not a probe, or the probe of another backbone (`fingerprint`), data or settings (`identity`).
    """
    file = out / PROBE_FILE if resume == "auto" else Path(resume)
    file = file / PROBE_FILE if file.is_dir() else file
    if resume == "none" or (resume == "auto" and not file.exists()):
        return None
    content = read_torch(file)
    if not isinstance(content, dict) or content.get("kind") != PROBE:
        raise InputError(
            f"--resume {file}: not a linear probe; allowed: auto, none, or the --out of an earlier launch/linear.py"
        )
    before = content["identity"]
    changed = [
        f"{name}: was {before.get(name)}, is {value}"
        for name, value in identity.items()
        if before.get(name) != value and (name in before or name != CHECKSUM)  # earlier versions did not keep it
    ]
    if content["backbone"] != fingerprint:
        changed.append("the weights of the backbone: differ")
    if changed:
        raise InputError(
            f"--resume {file}: belongs to another probe: {'; '.join(changed)}; choose another --out, or start anew "
            f"with --resume none"
        )
    return content
