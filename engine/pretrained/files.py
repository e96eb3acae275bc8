"""Reads and writes files of weights of other programs, torch's and safetensors, without running any code in them.

A torch file is a pickle, and a pickle is a program. `read_torch` lets it make tensors, numbers (numpy's, too), text, paths,
containers of these, and the argparse.Namespace that DeiT puts beside its weights; it refuses all else. Files are written
under another name first, so an existing file is replaced by a complete one or not at all.
"""

import argparse
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from crossbatch import InputError
from crossbatch.engine.runtime.atomic_files import replace_atomically

# Classes and functions that make data and run nothing; numpy's under the names of its versions 1 and 2.
_HARMLESS: list[Any] = [
    *(argparse.Namespace, pathlib.PosixPath, np.ndarray, np.dtype),
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"),
    *(
        (getattr(np._core.multiarray, name), f"numpy.{package}.multiarray.{name}")  # pyright: ignore
        for name in ("scalar", "_reconstruct")
        for package in ("core", "_core")
    ),
]


def read_torch(file: Path) -> Any:
    """Return what `torch.save` wrote, with its tensors mapped from the disk. Raises InputError if it is not such a file."""
    try:
        mapped = zipfile.is_zipfile(file)  # files from before torch 1.6 cannot be mapped
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except pickle.UnpicklingError as error:
        reason = "it is cut off or damaged"
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it asks for {asked[1]}, which could run code; nothing of it was run"
        raise InputError(f"{file}: cannot be read: {reason}; allowed: a file of tensors") from None
    except Exception as error:
        # The text of a LookupError is the byte that pickle took for an instruction.
        told = str(error) and not isinstance(error, LookupError)
        reason = str(error).splitlines()[0] if told else type(error).__name__
        raise InputError(f"{file}: cannot be read, it is cut off, damaged or of another kind: {reason}") from None


def read_safetensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file. Raises InputError if it cannot be read."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{file}: cannot be read, it is cut off, damaged or of another kind: {error}") from None


def write_file(file: Path, save: Callable[[Path], object], key: str = "--output") -> None:
    """Call `save` with a temporary path, so that `file` is written completely or not at all.

    Raises InputError, naming the flag `key`, if that fails.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(file) as temporary:
            save(temporary)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch's writer raises RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{key} {file}: cannot be written: {reason}; choose another place") from None
