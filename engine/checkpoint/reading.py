"""Reading any part of the tensors of a checkpoint, whichever ranks wrote them.

The index of slices is made of the headers of the files. Values are read only where they are wanted, and nothing in a file can
run code.
"""

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from crossbatch.engine.checkpoint import format2
from crossbatch.engine.checkpoint.manifest import Manifest, Unreadable, check_contents, read_manifest
from crossbatch.engine.sharding import LocalShards


class StoredSlice(NamedTuple):
    """Holds one slice in a file; `values[a:b]` reads a part of it."""

    start: int
    length: int
    values: Any


def fill(checkpoint: Path, manifest: Manifest, held: Mapping[str, LocalShards]) -> None:
    """Copy values from the checkpoint into the memory of `held`, by name. Raises Unreadable."""
    index = read_index(checkpoint, manifest)
    for name, tensor in held.items():
        for wanted in tensor.pieces:
            for stored in index[name]:
                start = max(wanted.start, stored.start)
                end = min(wanted.start + wanted.local.numel(), stored.start + stored.length)
                if start < end:
                    values = stored.values[start - stored.start : end - stored.start]
                    if values.dtype != wanted.local.dtype:
                        raise Unreadable(f"damaged: {name} is {values.dtype} instead of {wanted.local.dtype}")
                    wanted.local[start - wanted.start : end - wanted.start].copy_(values)


def read(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Return whole tensors of a checkpoint, for one process; needs no process group.

    Args:
        checkpoint: the directory of one checkpoint.
        prefix: the beginning of the names of the tensors that are wanted ("parameters.", "buffers.", "optimizer.mu.").
            It is cut off from the names that are returned.

    Raises:
        Unreadable: if anything in the checkpoint is damaged.
    """
    manifest, _ = read_manifest(checkpoint)
    check_contents(checkpoint, manifest)
    index = read_index(checkpoint, manifest)
    return {
        name.removeprefix(prefix): torch.cat([stored.values[:] for stored in index[name]]).view(shape)
        for name, shape in manifest.shapes.items()
        if name.startswith(prefix)
    }


def read_index(checkpoint: Path, manifest: Manifest) -> dict[str, list[StoredSlice]]:
    """Return the slices of every tensor, sorted. Raises Unreadable unless every element is in exactly one slice."""
    index: dict[str, list[StoredSlice]] = {name: [] for name in manifest.shapes}
    slices = format2.read_slices(checkpoint) if manifest.format == 2 else _read_slices(checkpoint, manifest)
    try:
        for name, start, length, values in slices:
            index[name].append(StoredSlice(start, length, values))
    except (OSError, ValueError, LookupError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise Unreadable(f"damaged: {type(error).__name__}: {error}") from None
    for name, stored in index.items():
        stored.sort(key=lambda one: one.start)
        end = 0
        for start, length, _ in stored:
            if start != end:
                raise Unreadable(
                    f"damaged: {name}: elements {min(start, end)} to {max(start, end)} are not in one slice"
                )
            end = start + length
        if end != torch.Size(manifest.shapes[name]).numel():
            raise Unreadable(f"damaged: {name}: elements from {end} on are not in one slice")
    return index


def _read_slices(checkpoint: Path, manifest: Manifest) -> Iterator[tuple[str, int, int, Any]]:
    """Yield name, first element, length and lazily read values of every slice in the files of the ranks."""
    for file in manifest.files:
        if file.endswith(".safetensors"):
            opened = safe_open(checkpoint / file, framework="pt")
            for key in opened.keys():  # noqa: SIM118
                name, _, start = key.rpartition("@")
                values = opened.get_slice(key)
                yield name, int(start), values.get_shape()[0], values
