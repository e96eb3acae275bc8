"""Writing one checkpoint: every rank a file of slices, then rank 0 the rest.

The files are safetensors, but written here: its own writer copies all tensors in older versions, and the checksum would need
another pass over the file. The bytes go from the memory of each slice into the file.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from crossbatch.engine.checkpoint.directory import CONFIG, MANIFEST, Keep, commit, name_of
from crossbatch.engine.checkpoint.manifest import Manifest, check_sizes, describe
from crossbatch.engine.checkpoint.reading import read_index
from crossbatch.engine.checkpoint.slices import Slices
from crossbatch.engine.runtime.atomic_files import write_atomically

DTYPE_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"},
}


class WriteFailed(Exception):
    """Says on every rank which ranks could not write, and why."""


def write(
    directory: Path,
    staged: Slices,
    manifest: Manifest,
    config: dict[str, Any],
    keep: Keep,
    group: dist.ProcessGroup | None = None,
    token: str = "0",
) -> None:
    """Write `directory`/step-N; every rank of `group` calls it. If it fails on one rank, it fails on all and leaves nothing.

    Args:
        directory: `checkpoints/` of the run.
        staged: this rank's slices, in host memory.
        manifest: `files` is filled in on rank 0.
        config: the resolved configuration, with `world_size`.
        keep: which checkpoints stay in `directory`.
        group: a gloo group; None for one process.
        token: a text, the same on all ranks, that tells the files of this attempt from those of an interrupted one.

    Raises:
        WriteFailed: if a rank cannot write.
        RuntimeError: if a rank has gone.
    """
    aside = directory / f".{name_of(manifest.step)}.{token}.tmp"
    rank = 0 if group is None else dist.get_rank(group)
    name = f"rank-{rank:05d}.safetensors"

    def finish() -> None:
        if rank == 0:
            manifest.files = dict(files)
            _finish(aside, directory, manifest, config, keep)

    try:
        files = _on_all_ranks(lambda: (name, _write_slices(aside / name, staged)), group)
        _on_all_ranks(finish, group)
    finally:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)


def _write_slices(file: Path, staged: Slices) -> dict[str, int]:
    """Write a safetensors file and return its size and checksum."""
    largest_first = sorted(staged.items(), key=lambda item: -item[1].element_size())  # keeps every slice aligned
    header, offset = {}, 0
    for (name, start), values in largest_first:
        header[f"{name}@{start}"] = {
            "dtype": DTYPE_NAMES[values.dtype],
            "shape": [values.numel()],
            "data_offsets": [offset, offset + values.nbytes],
        }
        offset += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    crc, size = 0, 0
    with file.open("wb") as stream:
        for data in (len(text).to_bytes(8, "little"), text, *(_bytes(values) for _, values in largest_first)):
            stream.write(data)
            crc, size = zlib.crc32(data, crc), size + len(data)
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": size, "crc32": crc}


def _finish(aside: Path, directory: Path, manifest: Manifest, config: dict[str, Any], keep: Keep) -> None:
    """Complete the checkpoint that all ranks have written, look at it as a reader would, and give it its name."""
    write_atomically(aside / CONFIG, json.dumps(config, indent=2) + "\n")
    manifest.files[CONFIG] = describe(aside / CONFIG)
    write_atomically(aside / MANIFEST, manifest.to_json())
    check_sizes(aside, manifest)
    read_index(aside, manifest)
    commit(aside, directory, manifest.step, keep)


def _on_all_ranks(work: Callable[[], Any], group: dist.ProcessGroup | None) -> list[Any]:
    """Return what `work` returns on every rank. Raises WriteFailed on all ranks if it raises on one."""
    if group is None:
        return [work()]
    result, error = None, None
    try:
        result = work()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (result, error), group)
    errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
    if errors:
        raise WriteFailed("; ".join(errors))
    return [result for result, _ in outcomes]


def _bytes(values: torch.Tensor) -> memoryview:
    """Return the memory of a 1-D CPU tensor."""
    return memoryview(values.detach().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
